"""Speed of every order of clips, and the memory of short and long ones, at the sizes of the bundled model with random weights.

    python benchmarks/video.py -o video.json
    python benchmarks/video.py --model FOLDER --frames 1000

Without a model the tokenizer and the generator are built from `recipes/video64-*.yaml`, whose memory and steps do not depend
on training; each order of `recipes/compare_video_orders.py` is built at the same width and depth. Times are processor time,
median of the rounds, which other processes disturb little; on an idle machine with one thread it is the time on the wall.
Memory is the largest resident memory of the process so far, read after 17 frames, after a quarter of the long clip and at its
end, so that what grows with the clip shows. Streams are also compared with the whole: codes bit for bit, decoded frames in levels of
255, because sums of other shapes are rounded otherwise.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from tokenloom import TokenloomError, VideoPipeline, VideoTokenizer, WordTokenizer
from tokenloom.data.moving import MOTIONS
from tokenloom.evaluation.benchmark import environment, peak_rss_mb
from tokenloom.evaluation.tables import markdown_table
from tokenloom.media import write_atomically
from tokenloom.training.families import build_generator

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PROMPT = "a red ball bouncing"


def pipeline(
    tokenizer: VideoTokenizer, generator: str, model: dict[str, Any], length: int, sampling: dict[str, Any]
) -> VideoPipeline:
    """A pipeline with a random generator that reads captions of `length` words."""
    said = [f"a red ball {words}" for motion in MOTIONS.values() for words in motion]
    words = WordTokenizer.from_captions(said, length)
    condition = {"kind": "words", "vocabulary": len(words), "length": length}
    torch.manual_seed(0)
    built = build_generator(generator, tokenizer, condition, model, tokenizer.layout).eval()
    pipe = VideoPipeline(tokenizer, built, words, sampling)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recipe(name: str) -> dict[str, Any]:
    """A recipe of the bundled model."""
    return dict(yaml.safe_load((RECIPES / name).read_text(encoding="utf-8")))


def bundled_size() -> VideoPipeline:
    """The model of the recipes with random weights."""
    settings = recipe("video64-generator.yaml")
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(**recipe("video64-tokenizer.yaml")["model"]).eval()
    length = settings["text"]["max_length"]
    return pipeline(tokenizer, settings["generator"], settings["model"], length, settings["sampling"])


def seconds(work: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Processor seconds and seconds on the wall of a call, medians."""
    processor, wall = [], []
    for _ in range(rounds):
        started = time.process_time(), time.perf_counter()
        work()
        processor.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    return statistics.median(processor), statistics.median(wall)


def measure_memory(pipe: VideoPipeline, frames: int) -> dict[str, Any]:
    """Megabytes after a window, after a quarter of a long clip, and at its end; frames a second along the way."""
    report: dict[str, Any] = {"loaded_mb": peak_rss_mb()}
    pipe(PROMPT, seed=0, output_type="pt")
    report |= {"window_frames": pipe.window_frames, "window_mb": peak_rss_mb()}
    started, count = time.process_time(), 0
    for piece in pipe(PROMPT, num_frames=frames, stream=True, seed=0, output_type="pt"):
        before, count = count, count + piece.shape[1]
        if before < frames // 4 <= count:
            report |= {"quarter_frames": count, "quarter_mb": peak_rss_mb()}
    spent = time.process_time() - started
    return report | {"frames": count, "long_mb": peak_rss_mb(), "frames_per_processor_second": count / spent}


def streams_equal(pipe: VideoPipeline, frames: int) -> dict[str, Any]:
    """Whether streamed generation and encoding give the bits of the whole, and how far decoded frames are apart."""
    whole = pipe(PROMPT, num_frames=frames, seed=1, output_type="pt").frames
    pieces = list(pipe(PROMPT, num_frames=frames, seed=1, stream=True, output_type="pt"))
    tokenizer, clip = pipe.tokenizer, whole * 2 - 1
    codes = tokenizer.encode(clip)
    shown = tokenizer.decode(codes, frames=frames)
    with tokenizer.streaming() as stream:
        parts = [tokenizer.encode(clip[:, start : start + 5]) for start in range(0, frames, 5)]
        parts.append(stream.finish())
        made = torch.cat([tokenizer.decode(part) for part in parts], dim=1)[:, :frames]
    return {
        "generation": torch.equal(torch.cat(pieces, dim=1), whole),
        "codes": torch.equal(torch.cat(parts, dim=1), codes),
        "largest_difference_in_levels": float((made - shown).abs().max() * 127.5),
    }


def measure_orders(pipe: VideoPipeline, rounds: int) -> dict[str, dict[str, Any]]:
    """Steps and frames a second of every order at the width and depth of the recipe, and of decoding alone."""
    sys.path.insert(0, str(RECIPES))
    compared = importlib.import_module("compare_video_orders")
    shape = recipe("video64-generator.yaml")["model"]["transformer"]
    report = {}
    for name in compared.ORDERS:
        kind, model = compared.model_of(
            name, pipe.tokenizer.layout, shape["width"], shape["depth"], shape["heads"]
        )
        other = pipeline(pipe.tokenizer, kind, model, 10, recipe("video64-generator.yaml")["sampling"])
        other(PROMPT, seed=0, output_type="pt")  # warm
        report[name] = {
            "steps": other.generator.order.num_steps,
            "parameters": other.generator.num_parameters(),
        }
        report[name] |= _rates(lambda other=other: other(PROMPT, seed=1, output_type="pt"), rounds, pipe)
    codes = torch.randint(0, pipe.tokenizer.vocab_size, (1, pipe.tokenizer.layout.size))
    report["decoding alone"] = _rates(lambda: pipe.tokenizer.decode(codes), rounds, pipe)
    return report


def _rates(work: Callable[[], Any], rounds: int, pipe: VideoPipeline) -> dict[str, float]:
    processor, wall = seconds(work, rounds)
    frames = pipe.window_frames
    return {"frames_per_processor_second": frames / processor, "frames_per_second": frames / wall}


def main(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    model: Annotated[str | None, typer.Option(help="Trained model; default random weights.")] = None,
    frames: Annotated[int, typer.Option(help="Frames of the long clip; 0 leaves memory out.")] = 1000,
    equal: Annotated[int, typer.Option(help="Frames that are compared with a stream; 0 leaves it out.")] = 40,
    rounds: Annotated[int, typer.Option(help="Clips of every order; 0 leaves the orders out.")] = 3,
) -> None:
    """Measure and print."""
    if min(frames, equal, rounds) < 0:
        raise TokenloomError(f"Expected counts of at least 0, got {frames}, {equal} and {rounds}.")
    pipe = bundled_size() if model is None else VideoPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {"environment": environment()}
    if frames:
        report["memory"] = measure_memory(pipe, frames)
        print(json.dumps(report["memory"]))
    if equal:
        report["streaming_equals_whole"] = streams_equal(pipe, equal)
        print(json.dumps(report["streaming_equals_whole"]))
    if rounds:
        report["orders"] = measure_orders(pipe, rounds)
        rows = [
            (
                name,
                found.get("steps", "-"),
                f"{found['frames_per_processor_second']:.1f}",
                f"{found['frames_per_second']:.1f}",
            )
            for name, found in report["orders"].items()
        ]
        print(markdown_table(("order", "steps", "frames a processor second", "frames a second"), rows))
    if output is not None:
        write_atomically(output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
