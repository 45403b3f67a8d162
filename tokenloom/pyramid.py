"""The residual pyramid: codes of many scales that add up to one map of features (VAR, Tian et al. 2024).

Every scale is a small map of codes. A scale is looked up in one codebook, enlarged to the finest size, smoothed by a
convolution ("phi") and added to the running reconstruction; the next scale refines what is still missing. A tokenizer
encodes features with it, a next-scale generator feeds the running reconstruction back. Knows nothing of pixels,
transformers or sampling.

Legend: B samples, N codes of all scales in layout order, n codes of one scale, V vocabulary, C channels, S scales,
H x W the finest map.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name

P = TypeVar("P", bound="Pyramid")
_ENLARGEMENTS = ("bicubic", "bilinear")


def phi_index(scale: int, scales: int, phis: int) -> int:
    """Which of `phis` convolutions smooths a scale: the one whose tick lies nearest to scale / (scales - 1).

    Ticks are spread evenly over [1/12, 11/12] for four convolutions and over [1/2K, 1 - 1/2K] for any other number K.
    A scale half way between two ticks goes where rounding in float64 puts it, as in the published models: their ten
    scales have two such ties, at 2/9 (the second of four ticks) and 7/9 (the fourth).
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(margin, 1 - margin, phis)
    return int(np.argmin(np.abs(ticks - scale / max(1, scales - 1))))


class Pyramid(nn.Module):
    """The maps of S scales, and the convolutions that turn a vector a place into one sum of features.

    Args:
        maps: (height, width) of every scale, coarse to fine; the last one is the finest.
        channels: Length of a vector C.
        phis: Number of convolutions shared by the scales; 0 for none.
        ratio: How much of phi(x) = (1 - ratio) x + ratio conv(x) is the convolution.
        kernel: Side of the convolutions, odd.
        up: How a scale is enlarged to the finest size, "bicubic" (VAR) or "bilinear" (Infinity).

    Raises:
        TokenloomError: If there is no scale, a scale is larger than the last one, or an option is out of range.
    """

    def __init__(
        self,
        maps: Sequence[tuple[int, int]],
        channels: int,
        phis: int = 4,
        ratio: float = 0.5,
        kernel: int = 3,
        up: str = "bicubic",
    ) -> None:
        super().__init__()
        self.channels, self.ratio, self.kernel, self.up = channels, ratio, kernel, up
        if phis < 0 or kernel < 1 or kernel % 2 == 0:
            raise TokenloomError(
                f"A pyramid needs phis >= 0 and an odd kernel, got phis={phis}, kernel={kernel}."
            )
        if up not in _ENLARGEMENTS:
            raise unknown_name("way to enlarge a scale", up, _ENLARGEMENTS)
        self._set_maps(maps)
        self.phis = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(phis)
        )

    def _set_maps(self, maps: Sequence[tuple[int, int]]) -> None:
        self.maps = tuple(maps)
        if not self.maps or any(h > self.maps[-1][0] or w > self.maps[-1][1] for h, w in self.maps):
            raise TokenloomError(f"The last scale of a pyramid must be the largest, got {self.maps}.")
        ends = list(itertools.accumulate(h * w for h, w in self.maps))
        self.slices = tuple(slice(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True))

    def with_maps(self: P, maps: Sequence[tuple[int, int]]) -> P:
        """The same weights, not copied, on maps of other sizes."""
        other = copy.copy(self)
        other._set_maps(maps)
        return other

    @property
    def scales(self) -> int:
        """Number of scales S."""
        return len(self.maps)

    def enlarge(self, vectors: Tensor, scale: int) -> Tensor:
        """What the vectors (B, n, C) of one scale add to the sum: (B, C, H, W)."""
        x = vectors.transpose(1, 2).unflatten(2, self.maps[scale])
        if self.maps[scale] != self.maps[-1]:
            x = F.interpolate(x, size=self.maps[-1], mode=self.up)
        if not self.phis:
            return x
        phi = self.phis[phi_index(scale, self.scales, len(self.phis))]
        return (1 - self.ratio) * x + self.ratio * phi(x)

    def shrink(self, features: Tensor, scale: int, down: str = "area") -> Tensor:
        """Features (B, C, H, W) at the positions of a scale: (B, n, C); "area" averages, "bilinear" interpolates."""
        if self.maps[scale] != self.maps[-1]:
            features = F.interpolate(features, size=self.maps[scale], mode=down)
        return features.flatten(2).transpose(1, 2)

    def sums(self, vectors: Tensor) -> Iterator[Tensor]:
        """The running sum (B, C, H, W) after each scale of which vectors (B, N, C) hold all places."""
        total = vectors.new_zeros(vectors.shape[0], self.channels, *self.maps[-1])
        for scale, place in enumerate(self.slices):
            if place.stop > vectors.shape[1]:
                return
            total = total + self.enlarge(vectors[:, place], scale)
            yield total

    def views_of(self, vectors: Tensor, down: str = "area") -> Tensor:
        """What vectors (B, N, C) make known before each scale but the first, at its size: (B, N - n0, C)."""
        parts = [vectors.new_zeros(vectors.shape[0], 0, self.channels)]
        for scale, total in enumerate(self.sums(vectors[:, : self.slices[-1].start]), start=1):
            parts.append(self.shrink(total, scale, down))
        return torch.cat(parts, dim=1)


class ResidualPyramid(Pyramid):
    """A codebook and the convolutions that turn codes of S scales into one map of features.

    Args:
        maps: (height, width) of every scale, coarse to fine; the last one is the finest.
        vocab_size: Number of codes V.
        channels: Length of a code vector C.
        phis: Number of convolutions shared by the scales; 0 for none.
        ratio: How much of phi(x) = (1 - ratio) x + ratio conv(x) is the convolution.
        kernel: Side of the convolutions, odd.
        cosine: Whether `encode` compares directions instead of distances.
        up: How a scale is enlarged to the finest size, "bicubic" (VAR) or "bilinear" (Infinity).

    Raises:
        TokenloomError: If there is no scale, or a scale is larger than the last one.
    """

    def __init__(
        self,
        maps: Sequence[tuple[int, int]],
        vocab_size: int,
        channels: int,
        phis: int = 4,
        ratio: float = 0.5,
        kernel: int = 3,
        cosine: bool = False,
        up: str = "bicubic",
    ) -> None:
        super().__init__(maps, channels, phis, ratio, kernel, up)
        self.cosine = cosine
        self.codes = nn.Embedding(vocab_size, channels)

    def detail(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes (B, n) of one scale add to the reconstruction: (B, C, H, W)."""
        return self.enlarge(self.codes(codes), scale)

    def decode(self, codes: Tensor, scales: int | None = None) -> Tensor:
        """Reconstruction (B, C, H, W) of the first `scales` scales (all by default) of codes (B, N)."""
        total = self.codes.weight.new_zeros(codes.shape[0], self.channels, *self.maps[-1])
        for scale, place in enumerate(self.slices[:scales]):
            total = total + self.detail(codes[:, place], scale)
        return total

    def views(self, codes: Tensor) -> Tensor:
        """What codes (B, N) make known before each scale but the first, at the size of that scale: (B, N - n0, C)."""
        return self.views_of(self.codes(codes))

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """Codes (B, N) of features (B, C, H, W): every scale takes the codes nearest to what is still missing.

        Raises:
            TokenloomError: If the features do not have the channels and size of the pyramid.
        """
        if features.shape[1:] != (self.channels, *self.maps[-1]):
            raise TokenloomError(
                f"Expected features (B, {self.channels}, {self.maps[-1][0]}, {self.maps[-1][1]}), "
                f"got {tuple(features.shape)}."
            )
        rest, codes = features, []
        for scale in range(self.scales):
            codes.append(self.nearest(self.shrink(rest, scale)))
            rest = rest - self.detail(codes[-1], scale)
        return torch.cat(codes, dim=1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Code (B, n) nearest to each vector (B, n, C)."""
        table = self.codes.weight
        if self.cosine:
            return (F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
        return (table.square().sum(1) - 2 * vectors @ table.T).argmin(-1)
