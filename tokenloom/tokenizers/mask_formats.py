"""Run-length masks of the COCO data sets, in and out, compressed and uncompressed.

Runs alternate between outside and inside, beginning with outside, down the columns. The compressed form writes each run, or
from the fourth on its difference from the run two before, in groups of five bits, lowest first; a group is one character
from "0" on, the sixth bit says that more follow, and the fifth bit of the last is the sign.

Knows masks and the format; knows nothing of networks, and needs no other library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError

_FIRST, _BITS = 48, 5  # ord("0"), bits a character
_MORE, _SIGN = 1 << _BITS, 1 << (_BITS - 1)
_MOST_GROUPS = 13  # more bits than a run of any picture has


def mask_to_rle(mask: Tensor, compressed: bool = True) -> dict[str, Any]:
    """Run lengths of a mask, as in COCO annotations.

    Args:
        mask: Bool (H, W), H and W at least 1; other dtypes count where they are above 0.5.
        compressed: Counts as a string instead of a list.

    Returns:
        {"size": [H, W], "counts": str or list of int}.

    Raises:
        TokenloomError: For anything but one mask.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or 0 in mask.shape:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask)
        raise TokenloomError(f"A mask must be (H, W), H and W at least 1, got {given}.")
    inside = (mask if mask.dtype == torch.bool else mask > 0.5).cpu().T.flatten()
    changes = (inside[1:] != inside[:-1]).nonzero().squeeze(1) + 1
    ends = torch.cat([torch.zeros(1, dtype=torch.long), changes, torch.tensor([inside.numel()])])
    counts = ends.diff().tolist()
    if bool(inside[0]):
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": _compress(counts) if compressed else counts}


def rle_to_mask(rle: Mapping[str, Any]) -> Tensor:
    """The mask of run lengths, compressed (str or bytes) or not.

    Args:
        rle: {"size": [H, W], "counts": ...}.

    Returns:
        BoolTensor (H, W).

    Raises:
        TokenloomError: For another kind of record, damaged counts, or counts that do not fill the size.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise TokenloomError(f'A run-length mask is {{"size": [H, W], "counts": ...}}, got {_short(rle)}.')
    size, counts = rle["size"], rle["counts"]
    if not _whole(size) or len(size) != 2 or min(size) < 1:
        raise TokenloomError(
            f"The size of a run-length mask is [height, width], each at least 1, got {_short(size)}."
        )
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if not _whole(counts) or any(count < 0 for count in counts):
        raise TokenloomError(
            f"The counts of a run-length mask are whole numbers, none negative, got {_short(counts)}."
        )
    height, width = size
    if sum(counts) != height * width:
        raise TokenloomError(
            f"The counts add up to {sum(counts):,} pixels, but a mask of {height} x {width} has {height * width:,}; the record "
            "is cut off, or its size is that of another picture."
        )
    lengths = torch.tensor(counts, dtype=torch.long)
    values = torch.arange(len(counts)) % 2 == 1
    return values.repeat_interleave(lengths).view(width, height).T.contiguous()


def _whole(values: Any) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    return is_list and all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _compress(counts: Sequence[int]) -> str:
    characters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            group = value & (_MORE - 1)
            value >>= _BITS
            done = value == (-1 if group & _SIGN else 0)
            characters.append(chr(_FIRST + group + (0 if done else _MORE)))
            if done:
                break
    return "".join(characters)


def _decompress(text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for place, character in enumerate(text):
        group = ord(character) - _FIRST
        if not 0 <= group < 2 * _MORE or shift >= _MOST_GROUPS * _BITS:
            raise TokenloomError(
                f"The counts of a run-length mask are damaged at character {place}: {_short(text[place:])}."
            )
        value |= (group & (_MORE - 1)) << shift
        shift += _BITS
        if group & _MORE:
            continue
        if group & _SIGN:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise TokenloomError(f"The counts of a run-length mask end within a number: {_short(text)}.")
    return counts
