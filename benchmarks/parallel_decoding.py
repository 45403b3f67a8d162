"""Acceptance, forwards and step compression of exact parallel decoding, for each draft, window and temperature.

    python benchmarks/parallel_decoding.py tokenloom-emoji-64 --windows 3,5,15
    python benchmarks/parallel_decoding.py runs/raster/model --temperatures 0.5,1.0 -o parallel.json

Tokens must equal those of `decode="cached"` before a figure is printed. Times are of the processor, in turns with the cached
rung; on a processor a window costs about what its rows cost, on an accelerator little more than one row.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tokenloom import TextToImagePipeline, TokenloomError
from tokenloom.evaluation.benchmark import environment
from tokenloom.evaluation.tables import markdown_table
from tokenloom.generators import Parallel, ParallelStats, Sampling
from tokenloom.media import write_atomically

PROMPTS = (
    "a red apple",
    "a cat face",
    "a blue car",
    "a house",
    "a smiling face",
    "pizza",
    "a ball",
    "a tree",
)
DRAFTS = ("random", "neighbor", "repeat", "recycle")
HEADER = (
    "temperature",
    "accept",
    "draft",
    "window",
    "forwards",
    "steps a forward",
    "accepted %",
    "times as fast",
)


def settings(drafts: Sequence[str], windows: Sequence[int], speculative: bool) -> Iterator[Parallel]:
    """Every combination; the speculative rule with the first draft alone, for comparison."""
    for window in windows:
        for draft in drafts:
            yield Parallel(window, draft)
        if speculative:
            yield Parallel(window, drafts[0], "speculative")


def measure(
    generator: Any, condition: Any, choices: Sequence[Parallel], rounds: int = 1, **options: Any
) -> list[dict[str, Any]]:
    """Figures of a generator.

    Args:
        generator: A generator of codes that is what its row plan says.
        condition: As for `generate`.
        choices: What is measured.
        rounds: Generations of each, in turns with the cached rung; seeds differ from round to round.
        **options: Passed to `generate`: sampling, guidance, known, ...

    Returns:
        A row for each of `choices`.

    Raises:
        TokenloomError: If coupled decoding gave another token than the cached rung.
    """
    rows = []
    for choice in choices:
        stats, ratios = ParallelStats(), []
        for number in range(rounds):
            seed = 1000 * number
            sequential, expected = timed(generator, condition, "cached", seed, options)
            decode = Parallel(choice.window, choice.draft, choice.accept, stats)
            seconds, found = timed(generator, condition, decode, seed, options)
            ratios.append(sequential / seconds)
            if choice.accept == "coupled" and not torch.equal(found, expected):
                raise TokenloomError(f"{choice} gave other tokens than decode='cached'.")
        rows.append(
            {
                "accept": choice.accept,
                "draft": choice.draft,
                "window": choice.window,
                "forwards": len(stats.gains) / (rounds * len(expected)),
                "compression": stats.compression,
                "acceptance": stats.acceptance,
                "speedup": statistics.median(ratios),
            }
        )
    return rows


def timed(
    generator: Any, condition: Any, decode: Any, seed: int, options: dict[str, Any]
) -> tuple[float, Any]:
    """Processor seconds of a generation, and its codes."""
    start = time.process_time()
    codes = generator.generate(condition, seeds=seed, decode=decode, **options)
    return time.process_time() - start, codes


def numbers(text: str) -> list[float]:
    """Numbers from a list with commas."""
    return [float(part) for part in text.split(",")]


def main(
    model: Annotated[str, typer.Argument(help="Name or folder of a picture model.")] = "tokenloom-emoji-64",
    windows: Annotated[str, typer.Option(help="Steps a forward, with commas.")] = "4,8,16",
    temperatures: Annotated[str, typer.Option(help="With commas; 0 is greedy.")] = "0.7,1.0",
    drafts: Annotated[str, typer.Option(help="Some of " + ", ".join(DRAFTS))] = ",".join(DRAFTS),
    top_k: Annotated[int, typer.Option(help="Best codes kept; 0 for all.")] = 256,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    rounds: Annotated[int, typer.Option(help="Generations of each setting.")] = 1,
    speculative: Annotated[bool, typer.Option(help="Also speculative acceptance.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")] = None,
) -> None:
    """Prints a table."""
    pipeline = TextToImagePipeline.from_pretrained(model)
    condition = pipeline.encode_prompts([PROMPTS[i % len(PROMPTS)] for i in range(batch)])
    choices = list(settings(drafts.split(","), [int(value) for value in numbers(windows)], speculative))
    generator, rows = pipeline.generator.eval(), []
    for temperature in numbers(temperatures):
        sampling = Sampling(temperature=temperature, top_k=top_k)
        found = measure(generator, condition, choices, rounds, sampling=sampling, guidance=guidance)
        rows += [{"temperature": temperature, **row} for row in found]
    print(f"{model}: {generator.order.num_steps} steps, {batch} prompts, {rounds} rounds")
    print(
        markdown_table(
            HEADER,
            [
                (
                    f"{row['temperature']:g}",
                    row["accept"],
                    row["draft"],
                    str(row["window"]),
                    f"{row['forwards']:.1f}",
                    f"{row['compression']:.2f}",
                    f"{100 * row['acceptance']:.0f}",
                    f"{row['speedup']:.2f}",
                )
                for row in rows
            ],
        )
    )
    if output is not None:
        write_atomically(output, json.dumps({"environment": environment(), "rows": rows}, indent=2).encode())


if __name__ == "__main__":
    typer.run(main)
