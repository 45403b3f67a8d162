"""Forwards that draft and verify saves in block diffusion, on a small model trained here (about ten seconds).

    python benchmarks/drafts.py

Walks on a circle of 8 codes, two blocks of 8 positions, one position a pass: 16 forwards one after the other. The codes of both
ways must be equal before anything is printed. Times are those of the processor, in turns.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer

from tokenloom.errors import TokenloomError
from tokenloom.generators import BlockDiffusionGenerator, Forwards, Sampling, orders
from tokenloom.generators.reveal import REVEALS
from tokenloom.layouts import Layout

_LENGTH, _BLOCK, _CODES = 16, 8, 8


def trained(reveal: str, steps: int, width: int) -> BlockDiffusionGenerator:
    """A model of walks."""
    torch.manual_seed(0)
    order = orders.blocks(Layout.line(_LENGTH), _BLOCK).to_config()
    settings = {"width": width, "heads": 4, "depth": 2}
    rule = {"passes": _BLOCK, "reveal": reveal}
    model = BlockDiffusionGenerator(order, _CODES, settings, {"kind": "none"}, rule_config=rule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(-1, 2, (64, _LENGTH)).cumsum(1) % _CODES).backward()
        optimizer.step()
    return model.eval()


def measure(
    model: BlockDiffusionGenerator, temperature: float, drafts: int, samples: int
) -> tuple[float, float, float]:
    """Forwards a sample alone, seconds of the processor a sample one pass a forward, and with guesses."""
    sampling, seconds, alone = Sampling(temperature=temperature), [0.0, 0.0], 0
    for seed in range(samples):
        forwards, start = Forwards(), time.process_time()
        plain = model.generate(batch_size=1, seeds=seed, sampling=sampling)
        middle = time.process_time()
        codes = model.generate(
            batch_size=1, seeds=seed, sampling=sampling, decode="parallel", drafts=drafts, forwards=forwards
        )
        seconds = [seconds[0] + middle - start, seconds[1] + time.process_time() - middle]
        alone += forwards.made
        if not torch.equal(plain, codes):
            raise TokenloomError(f"Seed {seed} gives other codes with guesses.")
    return alone / samples, seconds[0] / samples, seconds[1] / samples


def main(
    samples: Annotated[int, typer.Option(help="Samples a setting.")] = 16,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 300,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 48,
) -> None:
    """Prints a table."""
    model = trained(REVEALS[0], steps, width)
    print("reveal      temperature  drafts  forwards of 16  ms plain  ms parallel")
    for reveal in REVEALS:
        model.rule = type(model.rule)(passes=_BLOCK, reveal=reveal)
        for temperature in (0.0, 0.7, 1.0):
            for drafts in (1, 3, 7):
                made, plain, fast = measure(model, temperature, drafts, samples)
                print(
                    f"{reveal:<10}  {temperature:>11}  {drafts:>6}  {made:>14.1f}  {plain * 1e3:>8.1f}  {fast * 1e3:>11.1f}"
                )


if __name__ == "__main__":
    typer.run(main)
