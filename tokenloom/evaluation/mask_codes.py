"""Classical codes of masks beside mask tokens: polygons, COCO's run lengths, PNG and WebP, at equal bits and equal overlap.

A classical code is swept over its settings: a polygon over the number of its corners, the others over the side that the mask
is shrunk to. Sizes count everything that is written: of files the headers too. Knows masks and codes; knows no networks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from tokenloom.data.annotations import fill_polygon
from tokenloom.evaluation.segmentation_metrics import iou
from tokenloom.tokenizers.mask_formats import mask_to_rle

if TYPE_CHECKING:
    from tokenloom.tokenizers.mask import MaskTokenizer

Points = list[tuple[float, float]]
"""(bits, overlap) of one mask at each setting of a code."""

LENGTHS = (1, 2, 4, 8, 16, 32)
_SIDES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_CORNERS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
_COUNT_BITS = 6  # of the number of corners
_LEAST_LOOP = 0.02  # of the mask's area, for a hole or a part to be drawn


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The closed lines (n, 2) of x and y around a mask, along pixel edges, corners alone, the longest area first."""
    padded = np.pad(mask, 1).astype(np.int8)
    across, down = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    follow: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in zip(
        *np.nonzero(across), strict=True
    ):  # horizontal edges, with the mask on the right-hand side
        ends = ((int(x), int(y)), (int(x) + 1, int(y)))
        start, end = ends if across[y, x] > 0 else ends[::-1]
        follow.setdefault(start, []).append(end)
    for y, x in zip(*np.nonzero(down), strict=True):
        ends = ((int(x), int(y) + 1), (int(x), int(y)))
        start, end = ends if down[y, x] > 0 else ends[::-1]
        follow.setdefault(start, []).append(end)
    loops = []
    while follow:
        first = at = next(iter(follow))
        loop = []
        while at in follow:
            loop.append(at)
            after = follow[at].pop()
            if not follow[at]:
                del follow[at]
            at = after
            if at == first:
                break
        points = np.array(loop, dtype=float)
        turns = np.any(np.roll(points, -1, 0) - points != points - np.roll(points, 1, 0), axis=1)
        loops.append(points[turns])
    return sorted(loops, key=lambda points: -_area(points))


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return abs(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2


def simplify(loops: Sequence[np.ndarray], corners: int) -> list[np.ndarray]:
    """At most `corners` corners of outlines: three of each of the largest, then where the line is farthest off."""
    used = list(loops[: max(1, corners // 3)])
    chosen = [_triangle(loop) for loop in used]
    while sum(map(len, chosen)) < corners:
        candidates = [_farthest(loop, picked) for loop, picked in zip(used, chosen, strict=True)]
        best = max(range(len(used)), key=lambda index: candidates[index][0])
        if candidates[best][0] <= 0:
            break
        chosen[best] = sorted([*chosen[best], candidates[best][1]])
    return [loop[picked] for loop, picked in zip(used, chosen, strict=True)]


def _triangle(loop: np.ndarray) -> list[int]:
    first = int(np.square(loop - loop.mean(0)).sum(1).argmax())
    second = int(np.square(loop - loop[first]).sum(1).argmax())
    third = int(
        (np.square(loop - loop[first]).sum(1) ** 0.5 + np.square(loop - loop[second]).sum(1) ** 0.5).argmax()
    )
    return sorted({first, second, third})


def _farthest(loop: np.ndarray, picked: list[int]) -> tuple[float, int]:
    """Distance and index of the point of a loop that lies farthest from the lines between the picked ones."""
    best = (0.0, 0)
    for start, end in zip(picked, [*picked[1:], picked[0] + len(loop)], strict=True):
        if end - start < 2:
            continue
        indices = np.arange(start + 1, end) % len(loop)
        base = loop[end % len(loop)] - loop[start]
        away = loop[indices] - loop[start]
        length = float(np.hypot(*base))
        if length:
            distance = np.abs(base[0] * away[:, 1] - base[1] * away[:, 0]) / length
        else:
            distance = np.hypot(*away.T)
        far = int(distance.argmax())
        best = max(best, (float(distance[far]), int(indices[far])))
    return best


def polygon_points(mask: np.ndarray) -> Points:
    """Polygons of more and more corners; a corner costs two coordinates."""
    coordinate = math.ceil(math.log2(max(mask.shape) + 1))
    loops = [loop for loop in outlines(mask) if _area(loop) >= _LEAST_LOOP * mask.sum()]
    points = []
    for corners in _CORNERS:
        kept = simplify(loops, corners)
        drawn = np.zeros(mask.shape, dtype=bool)
        for loop in kept:
            drawn ^= fill_polygon(loop, (mask.shape[0], mask.shape[1]))
        bits = _COUNT_BITS * len(kept) + 2 * coordinate * sum(map(len, kept))
        points.append((float(bits), iou(drawn, mask)))
    return points


def _shrunk_points(mask: np.ndarray, bits_of: Callable[[Image.Image], float]) -> Points:
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    points = []
    for side in _SIDES:
        if side > max(mask.shape):
            continue
        small = picture.resize((side, side), Image.Resampling.BOX).point(lambda value: 255 * (value > 127))
        grown = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR)) > 127
        points.append((bits_of(small), iou(grown, mask)))
    return points


def _file_bits(picture: Image.Image, **options: object) -> float:
    out = io.BytesIO()
    picture.save(out, **options)  # type: ignore[arg-type]
    return 8.0 * len(out.getvalue())


def _rle_bits(picture: Image.Image) -> float:
    return 8.0 * len(mask_to_rle(torch.from_numpy(np.array(picture) > 127))["counts"])


CLASSICAL: dict[str, Callable[[np.ndarray], Points]] = {
    "polygon": polygon_points,
    "RLE": lambda mask: _shrunk_points(mask, _rle_bits),
    "PNG": lambda mask: _shrunk_points(
        mask, lambda one: _file_bits(one.convert("1"), format="PNG", optimize=True)
    ),
    "WebP lossless": lambda mask: _shrunk_points(
        mask, lambda one: _file_bits(one.convert("RGB"), format="WEBP", lossless=True, quality=100, method=4)
    ),
}


def overlap_at(points: Points, bits: float) -> float:
    """The best overlap that a code reaches with so many bits; 0 if it needs more."""
    return max((value for cost, value in points if cost <= bits), default=0.0)


def bits_for(points: Points, overlap: float) -> float:
    """The fewest bits that a code needs for an overlap; infinity if it never reaches it."""
    return min((cost for cost, value in points if value >= overlap), default=math.inf)


def compare_codes(
    tokenizer: MaskTokenizer, masks: np.ndarray, lengths: Sequence[int] = LENGTHS
) -> list[dict[str, float]]:
    """One row a number of tokens: bits, mean overlap of the tokens, and of each classical code at these bits.

    Args:
        tokenizer: The mask tokenizer.
        masks: Bool (n, S, S), none of them empty or full.
        lengths: Numbers of tokens; those beyond the tokenizer's levels are left out.

    Returns:
        Rows {"tokens", "bits", "IoU", "polygon", ..., "polygon bits", ...}; "... bits" is the median of the bits that the
        code needs for the tokens' overlap of the same mask.
    """
    swept = {name: [code(mask) for mask in masks] for name, code in CLASSICAL.items()}
    given = torch.from_numpy(masks).to(tokenizer.device)
    codes = torch.cat([tokenizer.encode(part) for part in given.split(64)])
    rows = []
    for length in (one for one in lengths if one <= tokenizer.levels):
        size = (masks.shape[1], masks.shape[2])
        parts = [tokenizer.decode(part, length, size, "mask") for part in codes.split(64)]
        overlaps = [iou(got, mask) for got, mask in zip(torch.cat(parts).cpu().numpy(), masks, strict=True)]
        bits = length * math.log2(tokenizer.vocab_size)
        row = {"tokens": float(length), "bits": bits, "IoU": float(np.mean(overlaps))}
        for name, points in swept.items():
            row[name] = float(np.mean([overlap_at(one, bits) for one in points]))
            needed = [bits_for(one, overlap) for one, overlap in zip(points, overlaps, strict=True)]
            row[f"{name} bits"] = float(np.median(needed))
        rows.append(row)
    return rows
