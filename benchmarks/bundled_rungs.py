"""The bundled models of sound, clips and masks by decode rung: processor seconds, and steps guessed in sound and masks.

    python benchmarks/bundled_rungs.py --rounds 3 --only masks

Codes must equal those of `decode="cached"` before a figure is printed. Rungs run in turns; medians; the first call is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tokenloom import (
    AudioContinuationPipeline,
    Sampling,
    SegmentationPipeline,
    TextToImagePipeline,
    TokenloomError,
    VideoPipeline,
)
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


def clips(rounds: int) -> None:
    """Prints frames a second."""
    pipe = VideoPipeline.from_pretrained("tokenloom-video-64")
    pipe.set_progress_bar_config(disable=True)
    found = seconds(
        lambda rung: pipe("a red ball bouncing", seed=3, decode=rung, output_type="pt").codes,
        ("cached", "compiled"),
        rounds,
    )
    print("tokenloom-video-64, frames a second:", *(f"{17 / each:.1f}" for each in found))


def sound(rounds: int) -> None:
    """Prints a line a temperature."""
    generator = AudioContinuationPipeline.from_pretrained("tokenloom-chorales").generator
    for temperature in (0.0, 0.5, 0.9):
        stats = ParallelStats()
        how = Sampling(temperature, 200)
        found = seconds(
            lambda rung, how=how: generator.generate(batch_size=1, seeds=1, sampling=how, decode=rung),  # type: ignore[misc]
            ("cached", "compiled", Parallel(7, "repeat", stats=stats)),
            rounds,
        )
        speeds = ", ".join(f"{8 / each:.1f}" for each in found)
        print(
            f"tokenloom-chorales without its codec, temperature {temperature}: {speeds} s a second; {stats}"
        )


def masks(rounds: int) -> None:
    """Prints a line a temperature and window, for one phrase about a picture that is encoded already."""
    paint = TextToImagePipeline.from_pretrained()
    paint.set_progress_bar_config(disable=True)
    pipe = SegmentationPipeline.from_pretrained("tokenloom-masks-128")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe.encode_picture(paint("a green apple", seed=3).images[0])
    for temperature in (0.0, 0.7):
        for window in (4, 8, 16):
            stats = ParallelStats()
            found = seconds(
                lambda rung, how=temperature: pipe(picture, "the fruit", temperature=how, decode=rung).codes,  # type: ignore[misc]
                ("cached", "compiled", Parallel(window, "repeat", stats=stats)),
                rounds,
            )
            times = ", ".join(f"{each:.3f}" for each in found)
            print(
                f"tokenloom-masks-128, temperature {temperature}, window {window}: {times} s a phrase; {stats}"
            )


def main() -> None:
    """Reads the arguments and prints the parts."""
    parts = {"clips": clips, "sound": sound, "masks": masks}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(parts), nargs="+", default=list(parts))
    options = parser.parse_args()
    for name in options.only:
        parts[name](options.rounds)


if __name__ == "__main__":
    main()
