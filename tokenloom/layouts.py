"""Layouts: where each of the N tokens of a sample sits, as coordinates over named axes.

A layout says only where tokens are. It does not know what a token means (pixels, audio, text), in which sequence tokens
are predicted (`generators/orders.py`), or how a model embeds positions. Tokens are always stored in layout order, which
is raster order over the axes, the last axis fastest; for a pyramid of scales, scale by scale.

Legend: N tokens, H rows, W columns, T time steps, K codebooks.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name

_AXES: dict[str, tuple[str, ...]] = {
    "line": ("position",),
    "grid": ("row", "column"),
    "scales": ("scale", "row", "column"),
    "frames": ("time", "codebook"),
    "clip": ("time", "row", "column"),
}


@dataclass(frozen=True)
class Layout:
    """The arrangement of N tokens; frozen, hashable, equal by value, and cheap to copy and pickle.

    Build one with `Layout.line`, `.grid`, `.scales`, `.frames` or `.clip`.

    Attributes:
        kind: Name of the arrangement: "line", "grid", "scales", "frames" or "clip".
        shape: One length per axis; for scales one entry per scale, an int (square) or an (H, W) pair.

    Raises:
        TokenloomError: For an unknown kind or a shape that is not made of positive integers.

    Example:
        >>> Layout.grid(2, 3).coords.tolist()
        [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    """

    kind: str
    shape: tuple[int | tuple[int, int], ...]

    def __post_init__(self) -> None:
        """Checks the fields and brings the shape to its one canonical form."""
        if self.kind not in _AXES:
            raise unknown_name("layout", self.kind, _AXES)
        if isinstance(self.shape, str) or not isinstance(self.shape, Iterable):
            raise TokenloomError(f"A layout shape is a sequence of positive integers, got {self.shape!r}.")
        if self.kind == "scales":
            shape: tuple[int | tuple[int, int], ...] = tuple(_scale(entry) for entry in self.shape)
            if not shape:
                raise TokenloomError(
                    "A scales layout needs at least one scale, got none. Write e.g. [1, 2, 4]."
                )
        else:
            shape = tuple(_length(entry) for entry in self.shape)
            if len(shape) != len(self.axes):
                raise TokenloomError(
                    f"A {self.kind} layout has one length for each of {self.axes}, got {len(shape)}: {shape}."
                )
        object.__setattr__(self, "shape", shape)

    @classmethod
    def line(cls, n: int) -> Layout:
        """N tokens in a row, with the one axis "position"."""
        return cls("line", (n,))

    @classmethod
    def grid(cls, h: int, w: int) -> Layout:
        """An image of H x W tokens, with axes "row" and "column"."""
        return cls("grid", (h, w))

    @classmethod
    def scales(cls, sizes: Iterable[int | tuple[int, int]]) -> Layout:
        """A pyramid of maps from coarse to fine, with axes "scale", "row" and "column".

        Args:
            sizes: One entry per scale, an int for a square map or an (H, W) pair.
        """
        return cls("scales", tuple(sizes) if isinstance(sizes, Iterable) else sizes)

    @classmethod
    def frames(cls, t: int, codebooks: int) -> Layout:
        """T time steps of K codebooks each (audio codecs), with axes "time" and "codebook"."""
        return cls("frames", (t, codebooks))

    @classmethod
    def clip(cls, t: int, h: int, w: int) -> Layout:
        """A video of T frames of H x W tokens, with axes "time", "row" and "column"."""
        return cls("clip", (t, h, w))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the coordinates, in the order of the columns of `coords`."""
        return _AXES[self.kind]

    @property
    def size(self) -> int:
        """Number of tokens N."""
        if self.kind == "scales":
            return sum(h * w for h, w in self.maps)
        return math.prod(self.shape)  # type: ignore[arg-type]

    @property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """The (H, W) of every scale of a scales layout.

        Raises:
            TokenloomError: For any other kind of layout.
        """
        if self.kind != "scales":
            raise TokenloomError(f"Only a scales layout has maps, this is {self}. Use `.shape` instead.")
        return tuple((entry, entry) if isinstance(entry, int) else entry for entry in self.shape)

    @property
    def coords(self) -> Tensor:
        """Coordinates of every token, LongTensor (N, len(axes)) on the CPU.

        The tensor is cached and shared by all equal layouts: do not write into it.
        """
        return _coords(self)

    def to_config(self) -> dict[str, Any]:
        """Returns the layout as JSON-able values, for `from_config`."""
        return {"kind": self.kind, "shape": [list(e) if isinstance(e, tuple) else e for e in self.shape]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Layout:
        """Builds a layout from the output of `to_config`.

        Raises:
            TokenloomError: If a key is missing, unknown, or holds a bad value.
        """
        for key in config:
            if key not in ("kind", "shape"):
                raise unknown_name("layout configuration key", key, ("kind", "shape"))
        if "kind" not in config or "shape" not in config:
            raise TokenloomError(
                f"A layout configuration needs the keys 'kind' and 'shape', got {dict(config)}."
            )
        return cls(config["kind"], config["shape"])

    def __str__(self) -> str:
        """Short form for messages, such as "grid(4, 4)"."""
        return f"{self.kind}({', '.join(str(entry) for entry in self.shape)})"


def _length(value: object) -> int:
    """Checks one length of a shape."""
    try:
        length = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TokenloomError(f"A layout length must be a positive integer, got {value!r}.") from None
    if isinstance(value, bool) or length < 1:
        raise TokenloomError(f"A layout length must be a positive integer, got {value!r}.")
    return length


def _scale(entry: object) -> int | tuple[int, int]:
    """Checks one scale; square pairs become ints so that equal pyramids compare equal."""
    if not isinstance(entry, (tuple, list)):
        return _length(entry)
    if len(entry) != 2:
        raise TokenloomError(f"A scale is an int or an (H, W) pair, got {entry!r}.")
    h, w = _length(entry[0]), _length(entry[1])
    return h if h == w else (h, w)


@functools.lru_cache(maxsize=128)
def _coords(layout: Layout) -> Tensor:
    # Cached tensors must be ordinary CPU tensors even when first asked for under inference_mode or a meta device.
    with torch.inference_mode(False):
        if layout.kind != "scales":
            return _raster(layout.shape)  # type: ignore[arg-type]
        parts = [_raster((1, h, w)) for h, w in layout.maps]
        for scale, part in enumerate(parts):
            part[:, 0] = scale
        return torch.cat(parts)


def _raster(shape: tuple[int, ...]) -> Tensor:
    """Coordinates of a box in raster order, LongTensor (prod(shape), len(shape))."""
    return torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in shape)).view(-1, len(shape))
