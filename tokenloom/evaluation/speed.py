"""The speed benchmark: decode rungs beside each other, or beside the official code on the same weights.

One process, the two sides in turns. No ratio is given before both sides picked the same codes without randomness. The figures
of whole generations come from a pass without instruments, those of its segments from another pass. Knows models only as
cells (`tokenloom.evaluation.speed_cells`).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.benchmark import Comparison, Spread, compare_speed, environment
from tokenloom.evaluation.roofline import decode_costs, lower_bound, measure_machine
from tokenloom.evaluation.speed_cells import Cell, make_cell
from tokenloom.evaluation.tables import markdown_table
from tokenloom.generators import Sampling, decoding

INEXACT = ("compiled-int8", "compiled-w8a8")
"""Rungs that are another model by a little: their codes are not compared, and their records say 0 equal codes."""
SEGMENTS = ("condition", "prefill", "decode", "sample", "detokenize")
_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class SpeedConfig:
    """What the benchmark does.

    Attributes:
        families: Short names or presets.
        rungs: Decode rungs; each is compared with the official code, or else with the first of them.
        batch: Samples a call.
        rounds: Pairs that count.
        warmups: Pairs that do not; both sides have run before, for the first call and for the comparison of codes.
        device: "cpu" or "cuda".
        dtype: Number format of ours.
        official: Folder of official checkouts.
        detokenize: Whether to decode to pixels: as a segment, and in whole generations where official code does so.
        overrides: Official constructor arguments to change, of all families.
    """

    families: tuple[str, ...] = ("llamagen", "var", "nar")
    rungs: tuple[str, ...] = ("cached", "compiled")
    batch: int = 1
    rounds: int = 5
    warmups: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    official: Path | None = None
    detokenize: bool = True
    overrides: tuple[tuple[str, Any], ...] = ()


class _Stopwatch:
    """Seconds a segment; waits for the device at the ends."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict.fromkeys(SEGMENTS, 0.0)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, function: Callable[..., Any], segment: str | Callable[..., str]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = self.now()
            result = function(*arguments, **options)
            name = segment if isinstance(segment, str) else segment(*arguments)
            self.seconds[name] += self.now() - start
            return result

        return timed


@contextmanager
def _instruments(cell: Cell, watch: _Stopwatch, rung: str) -> Iterator[None]:
    """Times the parts of a generation of `cell` while the context lasts."""
    generator: Any = cell.generator
    make = decoding.RUNGS[rung]

    def stepper(*arguments: Any) -> Any:
        built = make(*arguments)
        return watch.wrap(built, lambda x, step: "decode" if step else "prefill")

    generator._prefix = watch.wrap(generator._prefix, "condition")
    generator._sample = watch.wrap(generator._sample, "sample")
    decoding.RUNGS[rung] = stepper
    try:
        yield
    finally:
        decoding.RUNGS[rung] = make
        del generator._prefix, generator._sample


def segments(cell: Cell, labels: Tensor, rung: str, device: str) -> dict[str, float]:
    """Seconds of each segment of one generation, and of what lies between them ("rest"); in a pass of its own."""
    watch = _Stopwatch(device)
    start = watch.now()
    with _instruments(cell, watch, rung):
        codes = _ours(cell, labels, "cached" if rung == "auto" else rung, cell.sampling)
    whole = watch.now() - start
    rest = whole - sum(watch.seconds.values())
    if cell.decode is not None:
        watch.wrap(cell.decode, "detokenize")(codes)
    return {**watch.seconds, "rest": rest}


def _ours(cell: Cell, labels: Tensor, rung: str, sampling: Sampling) -> Tensor:
    return cell.generator.generate(labels, guidance=cell.guidance, sampling=sampling, seeds=0, decode=rung)


def check_equal(cell: Cell, labels: Tensor, rungs: Sequence[str]) -> int:
    """Picks codes without randomness on every side.

    Returns:
        How many codes were compared on each side.

    Raises:
        TokenloomError: If a side picks another code than the first one.
    """
    sides = {rung: _ours(cell, labels, rung, _GREEDY) for rung in rungs if rung not in INEXACT}
    if cell.official is not None:
        sides = {"official": cell.official.greedy(labels).to(labels.device), **sides}
    (first, expected), *others = sides.items()
    for name, codes in others:
        if not torch.equal(codes, expected):
            wrong = int((codes != expected).sum())
            raise TokenloomError(
                f"{cell.name}: {name} picks other codes than {first} at {wrong} of {codes.numel()} places, so no time "
                "is compared. In bfloat16 near ties may do this: measure in float32, or compare logits."
            )
    return expected.numel()


@contextmanager
def _peak(device: str, into: dict[str, Any]) -> Iterator[None]:
    """Peak memory in 10^6 bytes: of the device, or what the process held at most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        try:  # resets the high-water mark (Linux)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    yield
    if device == "cuda":
        into["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
        return
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        into["peak_memory_mb"] = next(
            int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")
        )
    except (OSError, StopIteration):
        into["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure_cell(cell: Cell, config: SpeedConfig) -> list[dict[str, Any]]:
    """One record a rung: gate, first call, whole generations in turns, segments, roofline, memory."""
    device, labels = config.device, cell.labels(config.batch).to(config.device)
    if cell.official is None and len(config.rungs) < 2:
        raise TokenloomError("Without an official checkout give at least two rungs to compare.")
    records = []
    first_calls = {}
    for rung in config.rungs:
        start = time.perf_counter()
        _ours(cell, labels, rung, cell.sampling)
        first_calls[rung] = time.perf_counter() - start
    compared = check_equal(cell, labels, config.rungs) if config.dtype == "float32" else 0
    machine = measure_machine(device, getattr(torch, config.dtype))
    costs = decode_costs(cell.generator, config.batch, cell.guidance.enabled)
    bound = lower_bound(costs, machine)
    tokens = cell.generator.order.layout.size
    decodes = cell.decode is not None and (cell.whole if cell.official is None else cell.official.decodes)
    for rung in config.rungs if cell.official is not None else config.rungs[1:]:
        ours = _work(cell, labels, rung, decodes, device)
        if cell.official is not None:
            name, other = "official", _synchronised(lambda: cell.official.generate(labels), device)  # type: ignore[union-attr]
        else:
            name, other = config.rungs[0], _work(cell, labels, config.rungs[0], decodes, device)
        memory: dict[str, Any] = {}
        with _peak(device, memory):
            result = compare_speed(
                ours, other, config.batch, rounds=config.rounds, warmups=config.warmups, names=(rung, name)
            )
        parts = segments(cell, labels, rung, device)
        records.append(
            {
                "model": cell.name,
                "rung": rung,
                "against": name,
                "equal_codes": 0 if rung in INEXACT else compared,
                "first_call_seconds": first_calls[rung],
                "steps": cell.generator.order.num_steps,
                "tokens": tokens,
                "decoded": decodes,
                **_figures(result, parts if decodes else {}, tokens, bound["seconds"], device),
                "real_time_factor": _real_time(cell, result),
                "segments": parts,
                "bound": bound,
                **memory,
                "comparison": result.as_dict(),
            }
        )
    return records


def _synchronised(work: Callable[[], Any], device: str) -> Callable[[], None]:
    def run() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _work(cell: Cell, labels: Tensor, rung: str, decodes: bool, device: str) -> Callable[[], None]:
    def work() -> None:
        codes = _ours(cell, labels, rung, cell.sampling)
        if decodes and cell.decode is not None:
            cell.decode(codes)

    return _synchronised(work, device)


def _real_time(cell: Cell, result: Comparison) -> float | None:
    """Seconds of sound a second of work, over the whole batch."""
    if cell.audio_seconds is None:
        return None
    return cell.audio_seconds * result.ours.batch_size / result.ours.spread.median


def _figures(
    result: Comparison, parts: dict[str, float], tokens: int, bound: float, device: str
) -> dict[str, float]:
    """The headline figures; the roofline is of the tokens alone, so the share of decoding is taken off the time.

    On a processor the roofline is compared with processor time over the number of threads.
    """
    per_call, batch = result.ours.spread.median, result.ours.batch_size
    worked = Spread.of(result.ours.cpu_seconds).median
    spent = worked / torch.get_num_threads() if device == "cpu" else per_call
    spent *= 1 - parts.get("detokenize", 0.0) / sum(parts.values()) if parts else 1.0
    cpu = [
        other / mine
        for mine, other in zip(result.ours.cpu_seconds, result.other.cpu_seconds, strict=True)
        if mine > 0
    ]
    return {
        "ms_per_sample": 1e3 * per_call / batch,
        "samples_per_second": batch / per_call,
        "tokens_per_second": tokens * batch / per_call,
        "ratio": result.ratio.median,
        "ratio_cpu": Spread.of(cpu).median if cpu else float("nan"),
        "cpu_ms_per_sample": 1e3 * worked / batch,
        "roofline": bound / max(spent, 1e-9),
    }


def speed_benchmark(config: SpeedConfig, log: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Runs the cells.

    Args:
        config: What to do.
        log: Takes one line a cell when it is done.

    Returns:
        JSON-able: "environment" and "records".

    Raises:
        TokenloomError: For unknown families or rungs, missing checkouts, or codes that differ.
    """
    records = []
    for family in config.families:
        cell = make_cell(family, config.official, dict(config.overrides), config.detokenize)
        _place(cell, config)
        for record in measure_cell(cell, config):
            records.append(record)
            if log is not None:
                log(
                    f"{record['model']} {record['rung']}: {record['ms_per_sample']:.0f} ms a sample, "
                    f"{record['ratio']:.2f} times as fast as {record['against']}"
                )
    return {"environment": environment(), "records": records}


def _place(cell: Cell, config: SpeedConfig) -> None:
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise TokenloomError(f"dtype must be float32, bfloat16 or float16, got {config.dtype!r}.")
    generator: Any = cell.generator
    generator.to(device=config.device, dtype=dtype)
    tokenizer: Any = getattr(cell.decode, "__self__", None)
    if tokenizer is not None:
        tokenizer.to(device=config.device, dtype=dtype, memory_format=torch.channels_last)


def benchmark_table(report: dict[str, Any]) -> str:
    """One row a record."""
    header = (
        "model",
        "rung",
        "beside",
        "ms a sample",
        "CPU ms",
        "tokens/s",
        "steps",
        "of the roofline",
        "first call s",
        "peak MB",
        "x real time",
        "times as fast",
        "by CPU time",
    )
    rows = [
        (
            record["model"],
            record["rung"],
            record["against"],
            f"{record['ms_per_sample']:.0f}",
            f"{record['cpu_ms_per_sample']:.0f}",
            f"{record['tokens_per_second']:.0f}",
            record["steps"],
            f"{100 * record['roofline']:.0f} %",
            f"{record['first_call_seconds']:.1f}",
            f"{record['peak_memory_mb']:.0f}",
            "-" if record["real_time_factor"] is None else f"{record['real_time_factor']:.1f}",
            f"{record['ratio']:.2f}",
            f"{record['ratio_cpu']:.2f}",
        )
        for record in report["records"]
    ]
    return markdown_table(header, rows)


def segments_table(report: dict[str, Any]) -> str:
    """Share of every segment."""
    names = (*SEGMENTS, "rest")
    rows = []
    for record in report["records"]:
        total = sum(record["segments"].values())
        shares = (f"{100 * record['segments'][name] / total:.0f} %" for name in names)
        rows.append((record["model"], record["rung"], *shares))
    return markdown_table(("model", "rung", *names), rows)


def draw_figure(report: dict[str, Any], path: Path) -> Path | None:
    """Bars of ms a sample; `None` where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    names = [f"{record['model']}\n{record['rung']}" for record in report["records"]]
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.5 * len(names), 3.5), layout="constrained")
    ours = [record["ms_per_sample"] for record in report["records"]]
    other = [record["comparison"]["other"]["seconds_per_image"] * 1e3 for record in report["records"]]
    bound = [1e3 * record["bound"]["seconds"] for record in report["records"]]
    for shift, label, heights in (
        (-0.27, "beside", other),
        (0.0, "ours", ours),
        (0.27, "lower bound", bound),
    ):
        axes.bar([place + shift for place in range(len(names))], heights, 0.27, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("ms a sample")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
    return path
