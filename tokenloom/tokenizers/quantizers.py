"""Quantizers: continuous vectors to integer codes and back.

A quantizer is a pure module over (B, N, d) vectors. It knows nothing of pictures, sound or layouts. `encode` returns
codes, straight-through quantized vectors, losses and statistics; `decode` turns codes into the same vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name


class Quantized(NamedTuple):
    """What `encode` returns.

    Attributes:
        codes: LongTensor (B, N), 0 <= code < codebook_size.
        z_q: (B, N, d) quantized vectors; gradients pass straight through to the input.
        losses: Scalars to add to the training loss, already weighted.
        stats: Scalars to log.
    """

    codes: Tensor
    z_q: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


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


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023): every dimension is rounded to a few levels.

    No codebook is stored and none can collapse. The first dimension is the least significant digit of the code.

    Args:
        levels: Levels per dimension; the codebook has prod(levels) entries.
    """

    basis: Tensor
    level_count: Tensor

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        if not levels or any(level < 2 for level in levels):
            raise TokenloomError(f"FSQ needs at least one dimension of two or more levels, got {levels}.")
        self.levels = tuple(int(level) for level in levels)
        self.dim = len(self.levels)
        self.codebook_size = int(torch.tensor(self.levels).prod())
        basis = torch.tensor((1, *self.levels[:-1])).cumprod(0)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("level_count", torch.tensor(self.levels), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Squashes each dimension into its range of levels, centred so that rounding hits each level."""
        half = (self.level_count - 1) * (1 + 1e-3) / 2
        offset = (self.level_count % 2 == 0) * 0.5
        shift = torch.atanh(offset / half)
        return (z + shift).tanh() * half - offset

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors; computed in float32. NaN stays NaN in `z_q` and gives a valid code."""
        bounded = self.bound(z.float())
        rounded = bounded + (bounded.round() - bounded).detach()
        half = self.level_count // 2
        digits = bounded.detach().round().nan_to_num(0.0).long() + half
        codes = (digits * self.basis).sum(-1)
        return Quantized(codes, (rounded / half).to(z.dtype), {}, {})

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) in [-1, 1] of LongTensor codes (B, N)."""
        digits = (codes[..., None] // self.basis) % self.level_count
        half = self.level_count // 2
        return (digits - half) / half


class VQ(nn.Module):
    """Vector quantization with l2-normalised or Euclidean lookup (VQ-VAE; ViT-VQGAN for the normalised form).

    The codebook is trained by gradient (`ema_decay` None) or by exponential moving averages. Codes that were not used
    in `revive_after` training batches are replaced by random vectors of the next batch. Processes of a distributed run
    count and revive together, so that their codebooks stay equal.

    Args:
        codebook_size: Number of codes.
        dim: Width d of a code.
        normalize: Unit-length inputs and codes (cosine lookup).
        commitment: Weight of the commitment loss.
        ema_decay: Decay of the moving averages, or `None` for a gradient-trained codebook.
        revive_after: Batches without use before a code is revived; 0 = never.
    """

    idle: Tensor
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        normalize: bool = True,
        commitment: float = 0.25,
        ema_decay: float | None = None,
        revive_after: int = 0,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or dim < 1:
            raise TokenloomError(
                f"VQ needs codebook_size >= 2 and dim >= 1, got codebook_size={codebook_size}, dim={dim}."
            )
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise TokenloomError(f"ema_decay must lie in [0, 1) or be None, got {ema_decay}.")
        self.codebook_size, self.dim = codebook_size, dim
        self.normalize, self.commitment = normalize, commitment
        self.ema_decay, self.revive_after = ema_decay, revive_after
        table = torch.empty(codebook_size, dim).normal_()
        self.codebook = nn.Parameter(F.normalize(table, dim=-1), requires_grad=ema_decay is None)
        if revive_after:
            self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.long))
        if ema_decay is not None:
            self.register_buffer("ema_count", torch.ones(codebook_size))
            self.register_buffer("ema_sum", self.codebook.detach().clone())

    def table(self) -> Tensor:
        """The (codebook_size, d) vectors used for lookup."""
        return F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors; computed in float32, also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().flatten(0, -2)
            flat = F.normalize(flat, dim=-1) if self.normalize else flat
            if self.training and self.revive_after:
                self._revive(
                    flat.detach()
                )  # before the lookup: the backward pass needs the codebook unchanged
            table = self.table().float()
            with torch.no_grad():
                distance = table.square().sum(1) - 2 * flat @ table.T
                codes = distance.argmin(1)
            chosen = table[codes]
            losses = {"commitment": self.commitment * F.mse_loss(flat, chosen.detach())}
            if self.ema_decay is None:
                losses["codebook"] = F.mse_loss(chosen, flat.detach())
            if self.training:
                self._update(flat.detach(), codes)
            z_q = (flat + (chosen - flat).detach()).view(z.shape).to(z.dtype)
            stats = {"quantization_error": F.mse_loss(flat, chosen).detach()}
        return Quantized(codes.view(z.shape[:-1]), z_q, losses, stats)

    @torch.no_grad()
    def _update(self, flat: Tensor, codes: Tensor) -> None:
        if self.ema_decay is None and not self.revive_after:
            return
        counts = _sum_processes(torch.bincount(codes, minlength=self.codebook_size))
        if self.revive_after:
            self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        if self.ema_decay is not None:
            sums = torch.zeros_like(self.ema_sum).index_add_(0, codes, flat.to(self.ema_sum.dtype))
            self.ema_count.lerp_(counts.to(self.ema_count.dtype), 1 - self.ema_decay)
            self.ema_sum.lerp_(_sum_processes(sums), 1 - self.ema_decay)
            known = self.ema_count[:, None] > 1e-5  # an unused code stays where it was
            self.codebook.copy_(torch.where(known, self.ema_sum / self.ema_count[:, None], self.codebook))

    @torch.no_grad()
    def _revive(self, flat: Tensor) -> None:
        dead = (self.idle >= self.revive_after).nonzero().squeeze(1)
        if not dead.numel():
            return
        fresh = flat[torch.randint(flat.shape[0], (dead.numel(),), device=flat.device)]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        self.codebook[dead] = fresh.to(self.codebook.dtype)
        self.idle[dead] = 0
        if self.ema_decay is not None:
            self.ema_sum[dead], self.ema_count[dead] = fresh.to(self.ema_sum.dtype), 1.0

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) of LongTensor codes (B, N)."""
        return F.embedding(codes, self.table())


def _sum_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def make_quantizer(kind: str, options: dict[str, object]) -> FSQ | VQ:
    """Builds a quantizer from its name ("fsq", "vq") and keyword options."""
    kinds: dict[str, Callable[..., FSQ | VQ]] = {"fsq": FSQ, "vq": VQ}
    if kind not in kinds:
        raise unknown_name("quantizer", kind, kinds)
    check_options(kinds[kind], options, f"option of the {kind} quantizer")
    return kinds[kind](**options)
