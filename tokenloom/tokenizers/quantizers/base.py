"""What all quantizers share: the result, straight-through and rotated gradients, codebook figures.

Knows vectors and codes. Knows nothing of pictures, sound, layouts, or how a code is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError


class Quantized(NamedTuple):
    """What `encode` returns.

    Attributes:
        codes: LongTensor (B, N), 0 <= code < codebook_size; (B, N, K) of a quantizer with K codebooks.
        z_q: (B, N, d) quantized vectors; gradients pass straight through to the input.
        losses: Scalars to add to the training loss, already weighted.
        stats: Scalars to log.
    """

    codes: Tensor
    z_q: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class Quantizer(nn.Module):
    """Base class of all quantizers.

    Attributes:
        dim: Width d of the vectors.
        codebook_size: Number of codes of one codebook.
        codebooks: Codes a vector K; with K = 1 the codes have no last axis.
    """

    dim: int
    codebook_size: int
    codebooks: int = 1

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors."""
        raise TokenloomError(f"{type(self).__name__} does not define encode(); override it.")

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) of LongTensor codes."""
        raise TokenloomError(f"{type(self).__name__} does not define decode(); override it.")


def codebook_usage(counts: Tensor) -> dict[str, float]:
    """Usage, perplexity and dead codes of a histogram of codes.

    Args:
        counts: (codebook_size,) how often each code was used.

    Returns:
        "usage" (fraction of codes used at least once), "perplexity" (exponential of the entropy in nats) and "dead"
        (number of codes never used).
    """
    total = counts.sum().clamp(min=1)
    p = counts.double() / total
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    used = int((counts > 0).sum())
    return {
        "usage": used / counts.numel(),
        "perplexity": float(entropy.exp()),
        "dead": float(counts.numel() - used),
    }


def straight_through(z: Tensor, chosen: Tensor) -> Tensor:
    """The values of `chosen` with the gradient of `z`; both have the same shape."""
    return z + (chosen - z).detach()


def rotate_to(z: Tensor, chosen: Tensor) -> Tensor:
    """The values of `chosen` with the gradient of a rotation (Fifty et al. 2024, "the rotation trick").

    The rotation and scaling that take z to its code are held constant, so that the gradient of a vector is turned with
    it and the angle between gradient and vector is kept.

    Args:
        z: (..., d) vectors before quantization.
        chosen: (..., d) their codes.
    """
    start = F.normalize(z.detach(), dim=-1, eps=1e-6)
    end = F.normalize(chosen.detach(), dim=-1, eps=1e-6)
    middle = F.normalize(start + end, dim=-1, eps=1e-6)
    turned = z - 2 * (z * middle).sum(-1, keepdim=True) * middle + 2 * (z * start).sum(-1, keepdim=True) * end
    length = z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return turned * (chosen.detach().norm(dim=-1, keepdim=True) / length)


def negative_p_log_p(p: Tensor, smallest: float = 1e-5) -> Tensor:
    """-p log p in nats; the logarithm is that of at least `smallest`."""
    return -p * p.clamp(min=smallest).log()


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def sum_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place; `values` itself where there is one process."""
    if distributed():
        dist.all_reduce(values)
    return values


def from_first_process(values: Tensor) -> Tensor:
    """The `values` of the first process, in place; `values` itself where there is one process."""
    if distributed():
        dist.broadcast(values, 0)
    return values


def nearest(flat: Tensor, table: Tensor) -> Tensor:
    """LongTensor (M,): the row of `table` (K, d) nearest to each row of `flat` (M, d), lowest index first."""
    with torch.no_grad():
        return (table.square().sum(1) - 2 * flat @ table.T).argmin(1)
