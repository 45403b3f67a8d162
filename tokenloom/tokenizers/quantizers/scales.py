"""Multi-scale residual quantization: a map of vectors as codes of many sizes, coarse to fine (VAR, Infinity).

Knows maps of vectors, a pyramid, and the quantizer that all scales share. Knows nothing of pictures or networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.pyramid import Pyramid
from tokenloom.tokenizers.quantizers.base import Quantized, Quantizer, straight_through
from tokenloom.tokenizers.quantizers.vq import VQ

Maps = Sequence[tuple[int, int]]


class MultiScale(Quantizer):
    """Codes (B, N) of all scales of a map (Tian et al. 2024, VAR; Han et al. 2024, Infinity).

    Scale by scale, what is still missing is averaged to the size of the scale, quantized, enlarged to the finest size,
    smoothed by a convolution and added up. The losses compare the sum after every scale with the map, so that every
    prefix of scales is a map of its own (VAR, eq. 5 with the sum in place of the last term).

    Args:
        inner: The quantizer of all scales, with one codebook.
        maps: (height, width) of every scale, coarse to fine; the last one is that of the map.
        phis: Convolutions shared by the scales; 0 for none.
        ratio: Share of the convolution in phi(x) = (1 - ratio) x + ratio conv(x).
        kernel: Side of the convolutions.
        up: "bicubic" or "bilinear", see `tokenloom.pyramid.Pyramid`.
        commitment: Weight of the loss that draws the map to its codes.
        prefix_dropout: Share of the training samples of which only a random prefix of the scales is handed on.
    """

    def __init__(
        self,
        inner: Quantizer,
        maps: Maps,
        *,
        phis: int = 4,
        ratio: float = 0.5,
        kernel: int = 3,
        up: str = "bicubic",
        commitment: float = 0.25,
        prefix_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if inner.codebooks > 1:
            raise TokenloomError(
                f"A multi-scale quantizer needs one code a place, but {type(inner).__name__} gives {inner.codebooks}."
            )
        if not 0 <= prefix_dropout <= 1:
            raise TokenloomError(f"prefix_dropout must lie in [0, 1], got {prefix_dropout}.")
        self.dim, self.codebook_size = inner.dim, inner.codebook_size
        self.commitment, self.prefix_dropout = commitment, prefix_dropout
        self.inner = inner
        self.pyramid = Pyramid(maps, inner.dim, phis, ratio, kernel, up)

    def _on(self, maps: Maps | None) -> Pyramid:
        return self.pyramid if maps is None else self.pyramid.with_maps(maps)

    def _vectors(self, codes: Tensor) -> Tensor:
        """Vectors (B, n, d) of codes (B, n), in the dtype of the convolutions."""
        vectors = self.inner.decode(codes)
        weight = next(self.pyramid.parameters(), vectors)
        return vectors.to(weight.dtype)

    def _choose(self, z: Tensor) -> Quantized:
        return self.inner.encode(z, learn=False) if isinstance(self.inner, VQ) else self.inner.encode(z)

    def _learn(self, vectors: list[Tensor], codes: list[Tensor]) -> None:
        """Shows all scales of a batch to a codebook of averages at once."""
        if self.training and isinstance(self.inner, VQ):
            flat = torch.cat([value.detach().float().flatten(0, 1) for value in vectors])
            flat = F.normalize(flat, dim=-1) if self.inner.unit_inputs else flat
            self.inner.update(flat, torch.cat([value.flatten() for value in codes]))
            self.inner.write_averages()

    def encode(self, z: Tensor, maps: Maps | None = None) -> Quantized:
        """Quantizes a map (B, H W, d) of float vectors in raster order, in float32.

        Args:
            z: (B, H W, d) vectors of the finest map.
            maps: Other sizes of the scales than those of the constructor.

        Returns:
            Codes (B, N) of all scales, vectors (B, H W, d), losses, and the error after each scale.
        """
        pyramid = self._on(maps)
        with torch.autocast(z.device.type, enabled=False):
            features = z.float().transpose(1, 2).unflatten(2, pyramid.maps[-1])
            if self.training and isinstance(self.inner, VQ):
                flat = z.detach().float().flatten(0, 1)
                self.inner.place(F.normalize(flat, dim=-1) if self.inner.unit_inputs else flat)
            rest, total = features, torch.zeros_like(features)
            vectors, results, sums = [], [], []
            for scale in range(pyramid.scales):
                vectors.append(pyramid.shrink(rest, scale))
                results.append(self._choose(vectors[-1]))
                detail = pyramid.enlarge(self._vectors(results[-1].codes), scale).float()
                rest, total = rest - detail.detach(), total + detail
                sums.append(total)
            codes = [result.codes for result in results]
            losses, stats = self._losses(features, sums, results)
            self._learn(vectors, codes)
            z_q = straight_through(features, self._kept(sums)).flatten(2).transpose(1, 2)
        return Quantized(torch.cat(codes, dim=1), z_q.to(z.dtype), losses, stats)

    def _losses(
        self, features: Tensor, sums: list[Tensor], results: list[Quantized]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means over the scales; the scales' own losses of distance are replaced by those of the sums."""
        fixed = features.detach()
        losses = {}
        if self.commitment:
            errors = [F.mse_loss(features, value.detach()) for value in sums]
            losses["commitment"] = self.commitment * torch.stack(errors).mean()
        if any(value.requires_grad for value in self.parameters()):
            losses["codebook"] = torch.stack([F.mse_loss(value, fixed) for value in sums]).mean()
        if "entropy" in results[0].losses:
            losses["entropy"] = torch.stack([result.losses["entropy"] for result in results]).mean()
        stats = {
            f"quantization_error.{scale}": F.mse_loss(value.detach(), fixed)
            for scale, value in enumerate(sums)
        }
        stats["quantization_error"] = stats[f"quantization_error.{len(sums) - 1}"]
        return losses, stats

    def _kept(self, sums: list[Tensor]) -> Tensor:
        """The last sum, or of some training samples that of a random prefix of the scales."""
        if not (self.training and self.prefix_dropout) or len(sums) == 1:
            return sums[-1]
        batch, device = sums[-1].shape[0], sums[-1].device
        short = torch.rand(batch, device=device) < self.prefix_dropout
        which = torch.where(short, torch.randint(len(sums) - 1, (batch,), device=device), len(sums) - 1)
        return torch.stack(sums)[which, torch.arange(batch, device=device)]

    def decode(self, codes: Tensor, maps: Maps | None = None) -> Tensor:
        """Vectors (B, H W, d) of LongTensor codes (B, N) of all scales, or of the first of them.

        Raises:
            TokenloomError: If the codes do not end with a scale.
        """
        pyramid = self._on(maps)
        ends = [place.stop for place in pyramid.slices]
        if codes.shape[1] not in ends:
            raise TokenloomError(
                f"Codes must end with a scale, that is, be {', '.join(map(str, ends))} in number; got {codes.shape[1]}."
            )
        *_, total = pyramid.sums(self._vectors(codes))
        return total.flatten(2).transpose(1, 2)

    def views(self, codes: Tensor, down: str = "area") -> Tensor:
        """What codes (B, N) make known before each scale but the first, at its size: (B, N - n0, d).

        The input of next-scale generators; VAR averages ("area"), Infinity interpolates ("bilinear").
        """
        return self.pyramid.views_of(self._vectors(codes), down)
