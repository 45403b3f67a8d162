"""The bundled models of sound and clips by decode rung: processor seconds, and guessed steps inside the patches of sound.

    python benchmarks/bundled_rungs.py --rounds 3

Codes must equal those of `decode="cached"` before a figure is printed. Rungs run in turns; medians; the first call is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tokenloom import AudioContinuationPipeline, Sampling, TokenloomError, VideoPipeline
from tokenloom.generators import Parallel, ParallelStats


def seconds(make: Callable[[Any], torch.Tensor], rungs: tuple[Any, ...], rounds: int) -> list[float]:
    """Median processor seconds of each rung.

    Args:
        make: Makes codes with a rung.
        rungs: The first is what others are held against.
        rounds: Calls of each that count.

    Raises:
        TokenloomError: If a rung gave other codes than the first.
    """
    wanted, taken = make(rungs[0]), [list[float]() for _ in rungs]
    for number in range(rounds + 1):
        for rung, times in zip(rungs, taken, strict=True):
            started = time.process_time()
            codes = make(rung)
            if number:
                times.append(time.process_time() - started)
            if not torch.equal(codes, wanted):
                raise TokenloomError(
                    f"{rung!r} gave other codes than {rungs[0]!r}; run the tests of kernels."
                )
    return [statistics.median(times) for times in taken]


def main() -> None:
    """Prints a line a model and a line a temperature."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    clips = VideoPipeline.from_pretrained("tokenloom-video-64")
    clips.set_progress_bar_config(disable=True)
    found = seconds(
        lambda rung: clips("a red ball bouncing", seed=3, decode=rung, output_type="pt").codes,
        ("cached", "compiled"),
        rounds,
    )
    print("tokenloom-video-64, frames a second:", *(f"{17 / each:.1f}" for each in found))
    sound = AudioContinuationPipeline.from_pretrained("tokenloom-chorales").generator
    for temperature in (0.0, 0.5, 0.9):
        stats = ParallelStats()
        how = Sampling(temperature, 200)
        found = seconds(
            lambda rung, how=how: sound.generate(batch_size=1, seeds=1, sampling=how, decode=rung),  # type: ignore[misc]
            ("cached", "compiled", Parallel(7, "repeat", stats=stats)),
            rounds,
        )
        speeds = ", ".join(f"{8 / each:.1f}" for each in found)
        print(
            f"tokenloom-chorales without its codec, temperature {temperature}: {speeds} s a second; {stats}"
        )


if __name__ == "__main__":
    main()
