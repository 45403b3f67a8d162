"""Quantizers with a learned projection: of the vectors (factorised codes) or of the codebook (SimVQ).

Knows vectors and other quantizers. Knows nothing of pictures or layouts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.quantizers.base import Quantized, Quantizer
from tokenloom.tokenizers.quantizers.vq import VQ


class Projected(Quantizer):
    """Quantizes a linear projection of the vectors, and projects back.

    A narrow space makes for a codebook that is well used (ViT-VQGAN). With several codebooks the projection is cut into
    as many parts, which the one inner quantizer codes apart from each other.

    Args:
        inner: Quantizer of the narrow space, with one codebook.
        dim: Width d of the vectors outside.
        codebooks: Number of parts K; codes are (B, N, K) where K > 1.
    """

    def __init__(self, inner: Quantizer, dim: int, codebooks: int = 1) -> None:
        super().__init__()
        if codebooks < 1 or (codebooks > 1 and inner.codebooks > 1):
            raise TokenloomError(
                f"codebooks must be at least 1, and 1 around a quantizer that has several itself; got {codebooks} "
                f"around {type(inner).__name__} with {inner.codebooks}."
            )
        self.dim, self.codebook_size = dim, inner.codebook_size
        self.parts, self.codebooks = codebooks, max(codebooks, inner.codebooks)
        self.project_in = nn.Linear(dim, inner.dim * codebooks)
        self.inner = inner
        self.project_out = nn.Linear(inner.dim * codebooks, dim)

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors; losses and statistics are means over the codebooks."""
        results = [self.inner.encode(part) for part in self.project_in(z).chunk(self.parts, dim=-1)]
        z_q = self.project_out(torch.cat([result.z_q for result in results], dim=-1))
        codes = (
            torch.stack([result.codes for result in results], dim=-1) if self.parts > 1 else results[0].codes
        )
        losses = _means([result.losses for result in results])
        return Quantized(codes, z_q, losses, _means([result.stats for result in results]))

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) of LongTensor codes (B, N), or (B, N, K) of several codebooks."""
        parts = codes.unbind(-1) if self.parts > 1 else (codes,)
        vectors = torch.cat([self.inner.decode(part) for part in parts], dim=-1)
        return self.project_out(vectors.to(self.project_out.weight.dtype))


def _means(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([value[name] for value in values]).mean() for name in values[0]}


class SimVQ(VQ):
    """A codebook seen through one learned linear layer (Zhu et al. 2024, SimVQ).

    Every code moves with the layer, also those that no vector chose, so that codes do not die.

    Args:
        codebook_size: Number of codes.
        dim: Width d of a code.
        commitment: Weight of the commitment loss.
        rotation: Gradients by the rotation trick instead of straight through.
        normalize: Unit-length inputs and codes (cosine lookup), as HiMTok, instead of Euclidean lookup.
        frozen: Whether the codes behind the layer stay as they were drawn, as in the paper.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        commitment: float = 0.25,
        rotation: bool = False,
        normalize: bool = False,
        frozen: bool = True,
    ) -> None:
        super().__init__(codebook_size, dim, normalize=normalize, commitment=commitment, rotation=rotation)
        self.codebook.requires_grad_(not frozen)
        self.transform = nn.Linear(dim, dim, bias=False)

    def projected(self) -> Tensor:
        """The (codebook_size, d) codes behind the layer, of any length."""
        with torch.autocast(self.codebook.device.type, enabled=False):
            return self.transform(self.codebook)

    def table(self) -> Tensor:
        """The (codebook_size, d) vectors used for lookup."""
        table = self.projected()
        return F.normalize(table, dim=-1) if self.normalize is True else table
