"""The check that code n stands where the layout says: changes one place at a time and looks where the effect is.

Knows grids of codes over pictures, and the finest scale of a pyramid. A tokenizer whose codes all act on the whole picture
has no such places, and passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.testing.failures import Bench, require

_MOST_PLACES = 24
_MOST_SAMPLES = 4
_CHUNK = 16
_LOCAL = 0.5  # how far the strongest effect must stand out, in mean effects, for places to mean something


def code_order(bench: Bench) -> None:
    """On a grid, code n belongs to cell n of the picture in raster order, in `encode` and in `decode`.

    Of scales the finest is looked at.
    """
    layout = bench.tokenizer.layout
    if layout.kind not in ("grid", "scales") or bench.media.ndim != 4 or layout.size < 4:
        return
    rows, columns = (int(side) for side in layout.coords.amax(0)[-2:] + 1)
    if rows > bench.media.shape[2] or columns > bench.media.shape[3]:
        return
    count = rows * columns
    places = torch.arange(count)
    if count > _MOST_PLACES:
        places = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_MOST_PLACES]
    for side, effects in (
        ("decode", _effects_of_codes(bench, places, rows, columns)),
        ("encode", _effects_of_pixels(bench, places, rows, columns)),
    ):
        _judge(side, effects, places, rows, columns)


def _effects_of_codes(bench: Bench, places: Tensor, rows: int, columns: int) -> Tensor:
    """(2, P, N): share of each cell in what changes when the code at a place changes, in two groups of samples."""
    groups = []
    for sample in range(2):
        codes, other = bench.codes[sample], bench.codes[sample + 1]
        changed = codes.repeat(len(places), 1)
        index = torch.arange(len(places), device=codes.device)
        place = (
            places.to(codes.device) + len(codes) - rows * columns
        )  # the last codes are those of the finest scale
        replacement = torch.where(other[place] == codes[place], other.roll(1)[place], other[place])
        equal = replacement == codes[place]
        replacement = torch.where(equal, (replacement + 1) % bench.tokenizer.vocab_size, replacement)
        changed[index, place] = replacement
        energy = torch.cat(
            [
                (bench.decode(part).float() - bench.output[sample].float()).square().mean(1)
                for part in changed.split(_CHUNK)
            ]
        )
        cells = F.adaptive_avg_pool2d(energy[:, None], (rows, columns)).flatten(1)
        groups.append(cells / cells.sum(1, keepdim=True).clamp(min=1e-20))
    return torch.stack(groups).cpu()


def _effects_of_pixels(bench: Bench, places: Tensor, rows: int, columns: int) -> Tensor:
    """(2, P, N): how often each code changes when the pixels of a cell change, in two groups of samples."""
    height, width = bench.media.shape[2:]
    groups = []
    count = min(_MOST_SAMPLES, len(bench.media))
    for samples in (range(count // 2), range(count // 2, count)):
        counts = torch.zeros(len(places), rows * columns)
        for sample in samples:
            picture, inverse = bench.media[sample], bench.low + bench.high - bench.media[sample]
            changed = picture.repeat(len(places), 1, 1, 1)
            for index, place in enumerate(places.tolist()):
                row, column = divmod(place, columns)
                down = slice(row * height // rows, (row + 1) * height // rows)
                across = slice(column * width // columns, (column + 1) * width // columns)
                changed[index, :, down, across] = inverse[:, down, across].roll(1, 0)
            codes = torch.cat([bench.encode(part) for part in changed.split(_CHUNK)])
            changes = (codes != bench.codes[sample]).float().cpu()
            counts += changes[:, -rows * columns :]
        groups.append(counts / len(samples))
    return torch.stack(groups)


def _at(effects: Tensor, where: Tensor) -> float:
    """Mean effect at one cell a place; `effects` is (P, N), `where` (P,)."""
    return float(effects.gather(1, where[:, None]).mean())


def _judge(side: str, effects: Tensor, places: Tensor, rows: int, columns: int) -> None:
    mean = float(effects.mean())
    effects = effects - effects.mean(
        1, keepdim=True
    )  # cells that change whatever place is touched say nothing
    first, second = effects
    # the strongest cell of one group of samples, weighed by the other, so that chance does not count
    strongest = (_at(second, first.argmax(1)) + _at(first, second.argmax(1))) / 2
    if strongest < _LOCAL * mean:
        return
    both = effects.mean(0)
    guess = ""
    for name, where in _other_orders(places, rows, columns).items():
        moved = where != places
        if not moved.any():
            continue
        there, here = _at(both[moved], where[moved]), _at(both[moved], places[moved])
        if there >= strongest / 2 and there > 2 * here:
            guess = f" They look like {name}."
            break
    require(
        not guess and _at(both, places) >= strongest / 4,
        f"{side}() does not keep the codes in the order of layout {rows}x{columns}: code n must stand for cell n in raster "
        f"order (rows first), but its effect is elsewhere.{guess} Check permute and flatten, and the layout's sides.",
    )


def _other_orders(places: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Cells of the places under common mistakes."""
    row, column = places // columns, places % columns
    last = rows * columns - 1
    return {
        "columns first": places % rows * columns + places // rows,
        "the inverse of columns first": column * rows + row,
        "reversed order": last - places,
        "rows from below": (rows - 1 - row) * columns + column,
        "columns from the right": row * columns + (columns - 1 - column),
    }
