"""Every saving of a decode step beside the same step without it, at the shapes of published models.

    python benchmarks/savings.py -o savings.json

The two sides run in turns in one process; the ratio is that of processor time, median of the pairs, so that other processes
disturb it little. Both sides give the same result up to rounding, except where the name says int8 or w8a8. Ends with a profile of
steps of the shapes of LlamaGen-B, NAR-B and VAR-d16, with two of their layers.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from tokenloom.evaluation.benchmark import compare_speed, environment
from tokenloom.evaluation.speed_cells import make_cell
from tokenloom.generators.kernels import MOST_ROWS, SkinnyLinear, kernels
from tokenloom.generators.sampling import Sampling, guide, sample_tokens
from tokenloom.media import write_atomically
from tokenloom.rng import gumbel

Pair = tuple[str, Callable[[], Any], Callable[[], Any]]
_WIDTH, _CODES = 768, 16384


def _heads() -> Iterator[Pair]:
    """The output matrix."""
    one, two = (torch.nn.Linear(_WIDTH, _CODES, bias=False) for _ in range(2))
    x = torch.randn(2, 1, _WIDTH)

    def after() -> Tensor:
        given, null = one(x).chunk(2)
        return guide(given, null, 2.0)

    yield "guidance before the output matrix", lambda: one(guide(*x.chunk(2), 2.0)), after
    rows = torch.randn(2, 1, 16, _WIDTH)

    def apart() -> Tensor:
        logits = [F.linear(part, head.weight) for part, head in zip(rows, (one, two), strict=True)]
        return torch.stack(logits).sum(0)

    yield "two heads added up in place of a stack, 16 rows", lambda: one(rows[0]) + two(rows[1]), apart


def _attention() -> Iterator[Pair]:
    """Twelve heads of 64, 257 rows of cache, in the middle of a generation."""
    keys, values = torch.randn(2, 2, 12, 257, 64)
    query, seen = torch.randn(2, 12, 1, 64), (torch.arange(257) < 129)[None]
    work = F.scaled_dot_product_attention

    def masked() -> Tensor:
        return work(query, keys, values, attn_mask=seen)

    yield (
        "slice of the cache in place of a mask, 129 of 257",
        lambda: work(query, keys[:, :, :129], values[:, :, :129]),
        masked,
    )
    order = torch.randperm(257)[:129]

    def gathered() -> Tensor:
        return work(query, keys[:, :, order], values[:, :, order])

    yield (
        "keys in decode order in place of a gather",
        lambda: work(query, keys[:, :, :129], values[:, :, :129]),
        gathered,
    )


def _conditioning() -> Iterator[Pair]:
    """A block of VAR-d16, two halves, the ten scales."""
    table, condition = torch.nn.Linear(1024, 6 * 1024), torch.randn(2, 1024)

    def every() -> None:
        for _ in range(10):
            table(F.silu(condition))

    yield "adaLN once in place of ten times", lambda: table(F.silu(condition)), every


def _drawing() -> Iterator[Pair]:
    """One row, and the 256 rows of VAR's last scale."""
    for rows, codes, top in ((1, _CODES, 1000), (64, 4096, 900)):
        logits, seeds, places = torch.randn(1, rows, codes), torch.tensor([3]), torch.arange(rows)

        def whole(
            logits: Tensor = logits, top: int = top, places: Tensor = places, codes: int = codes
        ) -> Tensor:
            limit = logits.topk(top, sorted=False).values.amin(-1, keepdim=True)
            kept = logits.masked_fill(logits < limit, -torch.inf)
            noise = gumbel(torch.tensor([[[3]]]), places[None, :, None], torch.arange(codes))
            return (kept + noise).argmax(-1)

        def first(
            logits: Tensor = logits, top: int = top, places: Tensor = places, seeds: Tensor = seeds
        ) -> Tensor:
            return sample_tokens(logits, seeds, places, Sampling(top_k=top))

        yield f"noise of the {top} best of {codes} alone, {rows} rows", first, whole


def _few_rows() -> Iterator[Pair]:
    """Weights that do not fit into the caches, one after the other."""
    layers = [torch.nn.Linear(_WIDTH, 4096, bias=False) for _ in range(12)]
    loaded = kernels()
    if loaded is None:
        return
    for form in MOST_ROWS:
        fast = [SkinnyLinear(layer, loaded, form) for layer in layers]
        for rows in (1, 2, 4, 8):
            x = torch.randn(rows, 1, _WIDTH)

            def ours(fast: Any = fast, x: Tensor = x) -> None:
                for layer in fast:
                    layer(x)

            def theirs(x: Tensor = x) -> None:
                for layer in layers:
                    layer(x)

            yield f"kernel for few rows{'' if form == 'float32' else f', {form}'}, {rows} rows", ours, theirs


def _buffers() -> Iterator[Pair]:
    cell = make_cell("llamagen", None, {"n_layer": 2}, detokenize=False)
    transformer = cell.generator.transformer
    kept = transformer.new_cache(2, 257)
    yield (
        "buffers of the last call in place of new ones, 2 layers",
        kept.reset,
        lambda: transformer.new_cache(2, 257),
    )


def _profile(name: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Share of processor time of the largest operations of a generation."""
    cell = make_cell(name, None, sizes, detokenize=False)
    labels = cell.labels(1)

    def work() -> Tensor:
        return cell.generator.generate(
            labels, guidance=cell.guidance, sampling=cell.sampling, seeds=0, decode="cached"
        )

    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        work()
    events = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(events.values())
    largest = sorted(events, key=lambda key: -events[key])[:8]
    return {key: events[key] / total for key in largest}


@torch.no_grad()
def main(
    rounds: Annotated[int, typer.Option(help="Pairs that count.")] = 7,
    profile: Annotated[bool, typer.Option(help="Also profile three models.")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file.")] = None,
    only: Annotated[
        str, typer.Option(help="One group: heads, attention, conditioning, drawing, few_rows, buffers.")
    ] = "",
) -> None:
    """Times every pair and prints the ratios."""
    figures: dict[str, Any] = {"environment": environment(), "pairs": {}, "profiles": {}}
    all_groups = (_heads, _attention, _conditioning, _drawing, _few_rows, _buffers)
    groups = {each.__name__.strip("_"): each for each in all_groups}
    if only and only not in groups:
        raise typer.BadParameter(f"There is no group {only!r}; choose one of {', '.join(groups)}.")
    for group in [groups[only]] if only else all_groups:
        for name, with_it, without in group():
            result = compare_speed(with_it, without, rounds=rounds, warmups=2)
            pairs = zip(result.other.cpu_seconds, result.ours.cpu_seconds, strict=True)
            ratio = statistics.median(other / max(mine, 1e-9) for other, mine in pairs)
            milliseconds = [1e3 * statistics.median(side.cpu_seconds) for side in (result.ours, result.other)]
            figures["pairs"][name] = {"ratio": ratio, "ms": milliseconds}
            typer.echo(f"{name}: {milliseconds[0]:.3f} ms beside {milliseconds[1]:.3f} ms, {ratio:.2f}x")
    shapes: dict[str, dict[str, Any]] = {
        "llamagen": {"n_layer": 2, "block_size": 16},
        "nar": {"n_layer": 1, "block_size": 64},
        "var": {"depth": 2, "patch_nums": [1, 2, 3, 4, 5, 6]},
    }
    for name, sizes in shapes.items() if profile else ():
        figures["profiles"][name] = _profile(name, sizes)
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in figures["profiles"][name].items())
        typer.echo(f"{name}: {shares}")
    if output is not None:
        write_atomically(output, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
