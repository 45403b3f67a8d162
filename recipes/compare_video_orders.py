"""Compares orders on clips: same tokenizer, width, depth and training budget; writes one table.

python recipes/compare_video_orders.py runs/video-orders --data data/video64 --pool data/video64/pool \
    --tokenizer runs/video64-tokenizer/model --judge runs/video-judge

Every order is trained, then measured: steps, forwards and frames a second (batch 1), teacher-forced bits on held-out clips, the
judge's marks for the thing and the motion, Frechet distance in the judge's features, and how far a continued thing strays from
its track. Figures are kept part by part; called again with the same settings, finished parts are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from compare_orders import once, percent

from tokenloom import TokenloomError, VideoPipeline
from tokenloom.data.clips import ClipFolder
from tokenloom.evaluation.tables import markdown_table, plain
from tokenloom.evaluation.video_judge import VideoJudge
from tokenloom.evaluation.video_report import measure_motion, measure_prompts, measure_speed
from tokenloom.layouts import Layout
from tokenloom.media import write_atomically
from tokenloom.tokenizers.video import VideoTokenizer
from tokenloom.training.data import open_model
from tokenloom.training.run import train_video

# Name in the table: name of the generator, options of the model.
ORDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "next token": ("next_token", {}),
    "next neighbor (planes)": ("next_neighbor", {}),
    "next block (rows)": ("next_block", {}),
    "next block (rows, first one by one)": (
        "next_block",
        {"order_options": {"sequential_first": True}, "rule_config": {"plan": "groups"}},
    ),
    "next block (frames)": ("next_block", {"order_options": {"block": "frame"}}),
}
HEADER = (
    "order",
    "steps",
    "parameters",
    "frames a s",
    "times as fast",
    "bits a token",
    "bits a clip",
    "thing %",
    "motion %",
    "Frechet",
    "strays %",
)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The settings of a comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", required=True, help="folder of frozen clips that is measured on")
    parser.add_argument("--pool", required=True, help="pool that training clips are made of")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="ORDER", help="some of: " + ", ".join(ORDERS)
    )
    parser.add_argument("--split", default="val_pair", help="split of the data")
    parser.add_argument("--plain", type=float, default=1.0, help="share of training clips on plain colours")
    parser.add_argument("--categories", nargs="*", default=[], help="only things of these categories")
    sizes = (
        ("steps", 1000),
        ("batch-size", 16),
        ("width", 144),
        ("depth", 6),
        ("heads", 4),
        ("length", 8000),
    )
    for name, value in (*sizes, ("top-k", 256), ("count", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in (("learning-rate", 2e-3), ("guidance", 2.0), ("temperature", 0.8)):
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--optimizer", default="muon")
    return parser.parse_args(words)


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the figures of an order are kept."""
    return args.output / name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")


def model_of(name: str, layout: Layout, width: int, depth: int, heads: int) -> tuple[str, dict[str, Any]]:
    """Name of the generator of an order and its options for clips of a layout."""
    generator, given = ORDERS[name]
    model = {key: dict(value) for key, value in given.items()}
    _, rows, columns = layout.shape
    if model.get("order_options", {}).get("block") == "frame":
        model["order_options"]["block"] = [1, rows, columns]
    elif "order_options" in model:
        model["order_options"]["block"] = [1, 1, columns]
    transformer: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "rope_base": 100.0}
    if generator == "next_neighbor":  # one head for each axis
        transformer["taps"] = [max(1, depth - 2), max(1, depth - 1), depth]
    return generator, {"transformer": transformer, "tie_embeddings": True, **model}


def config_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The training config of an order."""
    layout = open_model(args.tokenizer, VideoTokenizer).layout
    generator, model = model_of(name, layout, args.width, args.depth, args.heads)
    steps = args.steps
    return {
        "output": str(folder_of(name, args) / "run"),
        "tokenizer": args.tokenizer,
        "data": {
            "root": args.pool,
            "length": args.length,
            "options": {"plain": args.plain, "categories": args.categories},
        },
        "generator": generator,
        "model": model,
        "code_cache": str(args.output / "codes"),
        "sampling": {"guidance_scale": args.guidance, "temperature": args.temperature, "top_k": args.top_k},
        "loop": {
            "steps": steps,
            "batch_size": args.batch_size,
            "optimizer": args.optimizer,
            "learning_rate": args.learning_rate,
            "warmup": min(50, steps // 10),
            "schedule": "wsd",
            "cooldown": 0.4,
            "ema": 0.995 if steps >= 500 else 0.9,
            "seed": args.seed,
            "sample_every": steps,
            "checkpoint_every": max(1, min(100, steps // 2)),
        },
    }


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains an order, or goes on where it stopped."""
    values = config_of(name, args)
    path = folder_of(name, args) / "config.yaml"
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))
    started = any((Path(values["output"]) / "checkpoints").glob("step-*"))
    train_video(path, resume="latest" if started else None)
    return {"samples": args.steps * args.batch_size}


@torch.no_grad()
def likelihood(pipe: Any, clips: torch.Tensor, texts: list[str]) -> dict[str, Any]:
    """Bits of held-out clips given their captions."""
    model, total, count = pipe.generator, 0.0, 0
    predicted = model.plan.predicted
    for start in range(0, len(clips), 8):
        codes = pipe.tokenizer.encode(clips[start : start + 8])
        logits = model.logits(codes, pipe.text_tokenizer(texts[start : start + 8]))
        losses = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")[:, predicted]
        total, count = total + float(losses.double().sum()), count + losses.numel()
    bits = total / count / math.log(2)
    return {
        "bits_per_token": bits,
        "bits_per_clip": bits * int(predicted.sum()),
        "parameters": sum(value.numel() for value in model.parameters()),
    }


def measure(name: str, args: argparse.Namespace, judge: VideoJudge) -> dict[str, Any]:
    """All figures of a trained order."""
    folder = folder_of(name, args)
    pipe = VideoPipeline.from_pretrained(folder / "run" / "model")
    pipe.set_progress_bar_config(disable=True)
    data = ClipFolder(args.data, args.split, int(pipe.tokenizer.image_size))  # type: ignore[arg-type]
    known = [index for index in range(len(data)) if data.captions[index].label in judge.things]
    known = known[: args.count]
    clips = torch.stack([data.window(index, pipe.window_frames) for index in known])
    captions = [data.captions[index] for index in known]
    texts, given = [item.text for item in captions], pipe.window_frames // 2 + 1
    return {
        "likelihood": once(folder / "likelihood.json", lambda: likelihood(pipe, clips, texts)),
        "prompts": once(
            folder / "prompts.json", lambda: measure_prompts(pipe, judge, clips, captions, args.seed)
        ),
        "motion": once(
            folder / "motion.json", lambda: measure_motion(pipe, clips, captions, given, args.seed) or {}
        ),
        "speed": once(folder / "speed.json", lambda: measure_speed(pipe, texts[0])),
    }


def row(name: str, found: dict[str, Any], slowest: float) -> tuple[object, ...]:
    """One row of the table."""
    bits, marks, speed = found["likelihood"], found["prompts"]["generated"], found["speed"]
    strays = found["motion"]["continued"]["distance"] if found["motion"] else None
    return (
        name,
        speed["steps"],
        f"{bits['parameters'] / 1e6:.2f} M",
        f"{speed['frames_per_second']:.1f}",
        f"{speed['frames_per_second'] / slowest:.1f}",
        f"{bits['bits_per_token']:.3f}",
        f"{bits['bits_per_clip']:.0f}",
        percent(marks["thing"]),
        percent(marks["motion"]),
        f"{found['prompts']['frechet']:.2f}",
        percent(strays),
    )


def report(figures: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The table and what its columns mean."""
    first = next(iter(figures.values()))
    speed, real = first["speed"]["frames_per_second"], first["prompts"]["real"]
    coded = first["prompts"]["reconstructed"]
    table = markdown_table(HEADER, [row(name, found, speed) for name, found in figures.items()])
    return (
        f"{table}\nWidth {args.width}, depth {args.depth}, {args.steps * args.batch_size} training clips each. Frames a second: "
        f"median at batch 1, decoding included, on {first['speed']['threads']} threads. Bits: held-out clips given their "
        f"captions, teacher-forced. Thing and motion: what the judge sees; it sees {percent(real['thing'])} and "
        f"{percent(real['motion'])} in real clips, {percent(coded['thing'])} and {percent(coded['motion'])} in their "
        "reconstructions. Strays: mean distance of a continued thing from its track, in percent of the frame.\n"
    )


def main(words: list[str] | None = None) -> None:
    """Trains and measures every order, then writes comparison.json and comparison.md."""
    args = arguments(words)
    for name in args.only:
        if name not in ORDERS:
            raise TokenloomError(
                f"There is no order {name!r} in this comparison; there are {', '.join(ORDERS)}."
            )
    names = args.only or list(ORDERS)
    settings = {key: str(value) for key, value in vars(args).items() if key != "only"}
    if once(args.output / "settings.json", lambda: settings) != settings:
        raise TokenloomError(f"{args.output} holds a comparison with other settings; give another folder.")
    for name in names:
        once(folder_of(name, args) / "training.json", lambda name=name: train(name, args))
    judge = VideoJudge.load(args.judge)
    figures = {name: measure(name, args, judge) for name in names}
    write_atomically(args.output / "comparison.json", json.dumps(plain(figures), indent=1))
    write_atomically(args.output / "comparison.md", report(figures, args))
    print(report(figures, args))


if __name__ == "__main__":
    main()
