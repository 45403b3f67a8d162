"""Figures of segmentation: overlap, boundaries, precision, absent objects.

Works on bool arrays (H, W). Knows nothing of models, files or phrases beyond their kinds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

THRESHOLDS = (0.5, 0.7, 0.9)
_TOLERANCE = 0.008  # of the diagonal: how far a boundary may be off


def iou(got: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union; 1 if both are empty."""
    union = int((got | wanted).sum())
    return int((got & wanted).sum()) / union if union else 1.0


def boundary_f(got: np.ndarray, wanted: np.ndarray) -> float:
    """F measure of boundary pixels that lie within 0.8 % of the diagonal, at least one pixel, of the other's boundary.

    1 if both are empty, 0 if one is (Csurka et al. 2013).
    """
    if not got.any() or not wanted.any():
        return float(got.any() == wanted.any())
    reach = max(1, round(_TOLERANCE * float(np.hypot(*got.shape))))
    ours, theirs = _boundary(got), _boundary(wanted)
    precision = float((ours & _grow(theirs, reach)).sum() / ours.sum())
    recall = float((theirs & _grow(ours, reach)).sum() / theirs.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask with a neighbour outside it; the picture's border counts as outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _grow(mask: np.ndarray, reach: int) -> np.ndarray:
    for _ in range(reach):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


@dataclass(frozen=True)
class Outcome:
    """One phrase after evaluation.

    Attributes:
        split: Of the example.
        kind: Of the phrase.
        absent: Whether the phrase means nothing.
        iou: Overlap; for absent ones 1 if the answer is empty, else 0.
        intersection: Pixels.
        union: Pixels.
        boundary: Boundary F.
    """

    split: str
    kind: str
    absent: bool
    iou: float
    intersection: int
    union: int
    boundary: float

    @classmethod
    def of(cls, got: np.ndarray, wanted: np.ndarray, kind: str, split: str) -> Outcome:
        """Compares two masks of one size."""
        both, either = int((got & wanted).sum()), int((got | wanted).sum())
        return cls(split, kind, not wanted.any(), iou(got, wanted), both, either, boundary_f(got, wanted))


def figures(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Figures of outcomes: counts, gIoU, cIoU, boundary F and precision of present objects, accuracy of absent ones.

    gIoU is the mean overlap, cIoU all intersections by all unions, precision the share of overlaps that reach a threshold.
    Figures without outcomes are NaN.
    """
    every = list(outcomes)
    present = [one for one in every if not one.absent]
    absent = [one.iou for one in every if one.absent]
    union = sum(one.union for one in present)
    overlaps = np.array([one.iou for one in present])
    result = {
        "phrases": float(len(present)),
        "gIoU": _mean(overlaps),
        "cIoU": sum(one.intersection for one in present) / union if union else float("nan"),
        "boundary F": _mean(np.array([one.boundary for one in present])),
    }
    for threshold in THRESHOLDS:
        result[f"precision {threshold}"] = _mean(overlaps >= threshold)
    result["absent phrases"] = float(len(absent))
    result["absent accuracy"] = _mean(np.array(absent))
    return result


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
