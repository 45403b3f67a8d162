"""Binary quantization without a codebook: the signs of a vector (LFQ), or of a vector on the unit sphere (BSQ).

Knows vectors and bits. Knows nothing of pictures or layouts. The first dimension is the most significant bit of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.tokenizers.quantizers.base import Quantized, Quantizer, negative_p_log_p, straight_through

_ENTROPIES = ("joint", "factorised")
_MOST_JOINT_BITS = 16
_MOST_BITS = 64


class LFQ(Quantizer):
    """Lookup-free quantization (Yu et al. 2023, MAGVIT-v2): a code is the sign of every dimension.

    Args:
        dim: Bits of a code d; the codebook has 2^d entries. The codes of 64 bits do not all fit the positive numbers of
            int64: those with the first bit set are negative (two's complement).
        commitment: Weight of the commitment loss.
        entropy_weight: Weight of "entropy of a vector's soft choice minus `diversity` times that of the batch".
        diversity: See `entropy_weight`.
        entropy: "joint" sums over all 2^d codes (at most 16 bits); "factorised" treats bits as independent, which is
            exact for one vector and an upper limit for the batch, at a cost that grows with d instead of 2^d.
        inverse_temperature: Sharpness of the soft choice.
        soft_clamp: Largest magnitude of the input, approached by tanh; `None` = not limited.
    """

    spherical = False
    powers: Tensor

    def __init__(
        self,
        dim: int,
        *,
        commitment: float = 0.25,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        entropy: str = "joint",
        inverse_temperature: float = 100.0,
        soft_clamp: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= dim <= _MOST_BITS:
            raise TokenloomError(f"A binary quantizer takes 1 to {_MOST_BITS} bits, got dim={dim}.")
        if entropy not in _ENTROPIES:
            raise unknown_name("entropy", entropy, _ENTROPIES)
        if entropy == "joint" and entropy_weight and dim > _MOST_JOINT_BITS:
            raise TokenloomError(
                f"The joint entropy of {dim} bits sums over 2^{dim} codes; pass entropy='factorised' "
                f"(or entropy_weight=0) for more than {_MOST_JOINT_BITS} bits."
            )
        self.dim, self.codebook_size = dim, 2**dim
        self.commitment, self.entropy_weight, self.diversity = commitment, entropy_weight, diversity
        self.entropy, self.inverse_temperature, self.soft_clamp = entropy, inverse_temperature, soft_clamp
        self.scale = dim**-0.5 if self.spherical else 1.0
        places = torch.arange(dim - 1, -1, -1)
        self.register_buffer("powers", torch.ones_like(places) << places, persistent=False)

    def prepare(self, z: Tensor) -> Tensor:
        """The float32 vectors (..., d) whose signs are taken."""
        z = z.float()
        if self.soft_clamp is not None:
            z = (z / self.soft_clamp).tanh() * self.soft_clamp
        return F.normalize(z, dim=-1) if self.spherical else z

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors; computed in float32, also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            x = self.prepare(z)
            bits = x.detach() > 0
            chosen = torch.where(bits, self.scale, -self.scale)
            losses = {}
            if self.commitment:
                losses["commitment"] = self.commitment * F.mse_loss(x, chosen)
            stats = {"quantization_error": F.mse_loss(x.detach(), chosen)}
            if self.entropy_weight and self.training:
                each, batch = self.entropies(x)
                losses["entropy"] = self.entropy_weight * (each - self.diversity * batch)
                stats |= {"sample_entropy": each.detach(), "batch_entropy": batch.detach()}
            z_q = straight_through(x, chosen).to(z.dtype)
        return Quantized((bits * self.powers).sum(-1), z_q, losses, stats)

    def bits(self, codes: Tensor) -> Tensor:
        """BoolTensor (..., d) of LongTensor codes (...), most significant bit first."""
        return (codes[..., None] & self.powers) != 0

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 vectors (B, N, d) of LongTensor codes (B, N)."""
        return torch.where(self.bits(codes), self.scale, -self.scale)

    def entropies(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of the soft choices of x (..., d), and the entropy of the mean choice, in nats."""
        x = x.flatten(0, -2)
        if self.entropy == "joint":
            table = self.decode(torch.arange(self.codebook_size, device=x.device))
            p = (2 * self.inverse_temperature * x @ table.T).softmax(-1)
            return negative_p_log_p(p).sum(-1).mean(), negative_p_log_p(p.mean(0)).sum()
        p = (4 * self.inverse_temperature * self.scale * x).sigmoid()
        return _binary_entropy(p).sum(-1).mean(), _binary_entropy(p.mean(0)).sum()


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al. 2024): LFQ on the unit sphere, with values of +-1/sqrt(d).

    Its entropies are factorised by default, as the paper proposes.
    """

    spherical = True

    def __init__(
        self,
        dim: int,
        *,
        commitment: float = 0.25,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        entropy: str = "factorised",
        inverse_temperature: float = 100.0,
        soft_clamp: float | None = None,
    ) -> None:
        super().__init__(
            dim,
            commitment=commitment,
            entropy_weight=entropy_weight,
            diversity=diversity,
            entropy=entropy,
            inverse_temperature=inverse_temperature,
            soft_clamp=soft_clamp,
        )


def _binary_entropy(p: Tensor) -> Tensor:
    return negative_p_log_p(p) + negative_p_log_p(1 - p)
