"""Speed and memory, measured so that the figures survive a busy machine.

Two configurations run in turns (A, B, A, B, ...) and are compared round by round: the ratio of a pair is
little disturbed by other processes, which slow both. Median, minimum and interquartile range are given, never
a single run, and every record carries the machine, the number of threads and the load.

Knows nothing of models: what is timed is a function without arguments. `startup` measures whole commands.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.tables import markdown_table

Clock = Callable[[], float]
Work = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, minimum and interquartile range of some measurements."""

    median: float
    minimum: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarises at least one value; quartiles are interpolated (inclusive method)."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), min(values), low, high)


@dataclass(frozen=True)
class Timing:
    """One configuration: seconds of every round, by the wall and by the processor."""

    name: str
    batch_size: int
    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def spread(self) -> Spread:
        """Of the wall-clock seconds a call."""
        return Spread.of(self.seconds)

    @property
    def seconds_per_image(self) -> float:
        """Median seconds a call, divided by the batch."""
        return self.spread.median / self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary."""
        return {
            **asdict(self),
            "spread": asdict(self.spread),
            "seconds_per_image": self.seconds_per_image,
            "images_per_second": 1 / self.seconds_per_image,
        }


@dataclass(frozen=True)
class Comparison:
    """Two configurations timed in turns.

    Attributes:
        ours: The first.
        other: The second.
        ratio: Spread of `other / ours` over paired rounds: how many times faster the first is.
        environment: The machine, see `environment`.
    """

    ours: Timing
    other: Timing
    ratio: Spread
    environment: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-able dictionary."""
        return {
            "ours": self.ours.as_dict(),
            "other": self.other.as_dict(),
            "ratio": asdict(self.ratio),
            "environment": self.environment,
        }


def compare_speed(
    ours: Work,
    other: Work,
    batch_size: int = 1,
    *,
    rounds: int = 7,
    warmups: int = 3,
    names: tuple[str, str] = ("ours", "other"),
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> Comparison:
    """Times two functions in turns.

    Args:
        ours: Makes `batch_size` pictures.
        other: Makes as many.
        batch_size: Pictures a call.
        rounds: Pairs that count, at least 1.
        warmups: Pairs that do not.
        names: For the table.
        clock: Wall clock, in seconds.
        cpu_clock: Processor time of this process, in seconds.

    Returns:
        Seconds of each and the spread of the paired ratios.
    """
    if rounds < 1 or warmups < 0 or batch_size < 1:
        raise TokenloomError(
            f"Expected at least 1 round, 0 warm-ups and 1 picture, got {rounds}, {warmups} and {batch_size}."
        )
    works = (ours, other)
    wall: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    for _ in range(warmups):
        for work in works:
            work()
    for _ in range(rounds):
        for which, work in enumerate(works):
            started, cpu_started = clock(), cpu_clock()
            work()
            wall[which].append(clock() - started)
            processor[which].append(cpu_clock() - cpu_started)
    ratios = [slow / fast for fast, slow in zip(*wall, strict=True)]
    timings = [Timing(names[i], batch_size, wall[i], processor[i]) for i in (0, 1)]
    return Comparison(timings[0], timings[1], Spread.of(ratios), environment())


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes (POSIX systems)."""
    import resource

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    )


def environment() -> dict[str, Any]:
    """The machine and its state: processor, cores, threads, versions, load average."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def speed_table(comparisons: Sequence[Comparison]) -> str:
    """One markdown table: a row for each configuration and batch size."""
    header = (
        "configuration",
        "batch",
        "s an image",
        "images/s",
        "min s a call",
        "IQR s a call",
        "CPU s an image",
        "times as fast (IQR)",
    )
    rows = []
    for comparison in comparisons:
        for timing, ratio in ((comparison.ours, comparison.ratio), (comparison.other, None)):
            spread = timing.spread
            cpu = statistics.median(timing.cpu_seconds) / timing.batch_size
            rows.append(
                (
                    timing.name,
                    timing.batch_size,
                    f"{timing.seconds_per_image:.3f}",
                    f"{1 / timing.seconds_per_image:.2f}",
                    f"{spread.minimum:.3f}",
                    f"{spread.low:.3f} to {spread.high:.3f}",
                    f"{cpu:.3f}",
                    f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "1",
                )
            )
    return markdown_table(header, rows)


def _cpu_name() -> str:
    """The processor's model where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
