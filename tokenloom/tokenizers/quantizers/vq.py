"""Vector quantization with a table of codes: by gradient or moving averages, Euclidean or by angle.

Knows vectors and a codebook. Knows nothing of pictures, sound or layouts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    from_first_process,
    nearest,
    rotate_to,
    straight_through,
    sum_processes,
)


class VQ(Quantizer):
    """Vector quantization with l2-normalised or Euclidean lookup (VQ-VAE; ViT-VQGAN for the normalised form).

    The codebook is trained by gradient (`ema_decay` None) or by exponential moving averages. Codes that were not used
    in `revive_after` training batches are replaced by random vectors of the next batch. Processes of a distributed run
    count and revive together, so that their codebooks stay equal.

    Args:
        codebook_size: Number of codes.
        dim: Width d of a code.
        normalize: `True`: unit-length inputs and codes (cosine lookup). `False`: Euclidean lookup. "inputs": unit-length
            inputs, codes as they are stored, chosen by the largest dot product; moving averages are written at unit
            length (the cosine codebook of vector-quantize-pytorch). "lookup": the code of the most similar direction,
            with inputs and codes as they are (VAR's cosine variant, DAC).
        commitment: Weight of the commitment loss.
        ema_decay: Decay of the moving averages, or `None` for a gradient-trained codebook.
        revive_after: Batches without use before a code is revived; 0 = never.
        kmeans_init: Rounds of k-means on the first training batch, which places the codebook; 0 = random codes. In a
            distributed run the batch of the first process counts.
        rotation: Gradients by the rotation trick instead of straight through.
        entropy_weight: Weight of "entropy of a vector's soft choice minus entropy of the batch's"; 0 = no such loss.
        entropy_temperature: Temperature of that soft choice.
    """

    idle: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    initialized: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        normalize: bool | str = True,
        commitment: float = 0.25,
        ema_decay: float | None = None,
        revive_after: int = 0,
        kmeans_init: int = 0,
        rotation: bool = False,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or dim < 1:
            raise TokenloomError(
                f"VQ needs codebook_size >= 2 and dim >= 1, got codebook_size={codebook_size}, dim={dim}."
            )
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise TokenloomError(f"ema_decay must lie in [0, 1) or be None, got {ema_decay}.")
        if normalize not in (True, False, "inputs", "lookup"):
            raise TokenloomError(f"normalize must be True, False, 'inputs' or 'lookup', got {normalize!r}.")
        if entropy_temperature <= 0:
            raise TokenloomError(f"entropy_temperature must be above 0, got {entropy_temperature}.")
        self.codebook_size, self.dim = codebook_size, dim
        self.normalize, self.commitment, self.rotation = normalize, commitment, rotation
        self.ema_decay, self.revive_after, self.kmeans_init = ema_decay, revive_after, kmeans_init
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        table = torch.empty(codebook_size, dim).normal_()
        self.codebook = nn.Parameter(F.normalize(table, dim=-1), requires_grad=ema_decay is None)
        if revive_after:
            self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.long))
        if kmeans_init:
            self.register_buffer("initialized", torch.tensor(False))
        if ema_decay is not None:
            self.register_buffer("ema_count", torch.ones(codebook_size))
            self.register_buffer("ema_sum", self.codebook.detach().clone())

    @property
    def unit_inputs(self) -> bool:
        """Whether vectors are brought to unit length before they are compared and coded."""
        return self.normalize in (True, "inputs")

    def table(self) -> Tensor:
        """The (codebook_size, d) vectors used for lookup."""
        return F.normalize(self.codebook, dim=-1) if self.normalize is True else self.codebook

    def encode(self, z: Tensor, *, defer: bool = False, learn: bool = True) -> Quantized:
        """Quantizes (B, N, d) float vectors; computed in float32, also under autocast.

        Args:
            z: (B, N, d) vectors.
            defer: Gather the moving averages but leave the codebook until `write_averages` (shared codebooks).
            learn: Whether this is a training batch for averages, counts and revival, if the module trains at all.
        """
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().flatten(0, -2)
            flat = F.normalize(flat, dim=-1) if self.unit_inputs else flat
            learn = learn and self.training
            if learn:  # before the lookup: the backward pass needs the codebook unchanged
                self.place(flat.detach())
            table = self.table().float()
            codes = self._nearest(flat, table)
            chosen = table[codes]
            losses = self._losses(flat, chosen, table)
            if learn:
                self.update(flat.detach(), codes)
                if not defer:
                    self.write_averages()
            z_q = (rotate_to if self.rotation else straight_through)(flat, chosen)
            stats = {"quantization_error": F.mse_loss(flat, chosen).detach()}
        return Quantized(codes.view(z.shape[:-1]), z_q.view(z.shape).to(z.dtype), losses, stats)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) of LongTensor codes (B, N)."""
        return F.embedding(codes, self.table())

    def _nearest(self, flat: Tensor, table: Tensor) -> Tensor:
        if self.normalize == "inputs":
            return (flat.detach() @ table.detach().T).argmax(1)
        if self.normalize == "lookup":
            return (F.normalize(flat.detach(), dim=-1) @ F.normalize(table.detach(), dim=-1).T).argmax(1)
        return nearest(flat, table)

    def _losses(self, flat: Tensor, chosen: Tensor, table: Tensor) -> dict[str, Tensor]:
        losses = {"commitment": self.commitment * F.mse_loss(flat, chosen.detach())}
        if self.ema_decay is None:
            losses["codebook"] = F.mse_loss(chosen, flat.detach())
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * self._entropy(flat, table)
        return losses

    def _entropy(self, flat: Tensor, table: Tensor) -> Tensor:
        """Mean entropy of the soft choices minus the entropy of their mean, in nats."""
        nearness = 2 * flat @ table.T - table.square().sum(1)  # less |z|^2, which the softmax does not see
        log_p = (nearness / self.entropy_temperature).log_softmax(-1)
        mean = log_p.exp().mean(0)
        return -(log_p.exp() * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()

    @torch.no_grad()
    def place(self, flat: Tensor) -> None:
        """Moves codes onto vectors of the batch (M, d): all of them at the first batch, dead ones later."""
        if self.kmeans_init and not bool(self.initialized):
            centres = from_first_process(kmeans(flat, self.codebook_size, self.kmeans_init, self.unit_inputs))
            self._move(torch.arange(self.codebook_size, device=flat.device), centres)
            self.initialized.fill_(True)
        if self.revive_after:
            dead = (self.idle >= self.revive_after).nonzero().squeeze(1)
            if dead.numel():
                fresh = flat[torch.randint(flat.shape[0], (dead.numel(),), device=flat.device)]
                self._move(dead, from_first_process(fresh))
                self.idle[dead] = 0

    def _move(self, codes: Tensor, vectors: Tensor) -> None:
        self.codebook[codes] = vectors.to(self.codebook.dtype)
        if self.ema_decay is not None:
            self.ema_sum[codes], self.ema_count[codes] = vectors.to(self.ema_sum.dtype), 1.0

    @torch.no_grad()
    def update(self, flat: Tensor, codes: Tensor) -> None:
        """Counts the codes (M,) of vectors (M, d) and gathers their moving averages, as one training batch."""
        if self.ema_decay is None and not self.revive_after:
            return
        counts = sum_processes(torch.bincount(codes, minlength=self.codebook_size))
        if self.revive_after:
            self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        if self.ema_decay is not None:
            sums = torch.zeros_like(self.ema_sum).index_add_(0, codes, flat.to(self.ema_sum.dtype))
            self.ema_count.lerp_(counts.to(self.ema_count.dtype), 1 - self.ema_decay)
            self.ema_sum.lerp_(sum_processes(sums), 1 - self.ema_decay)

    @torch.no_grad()
    def write_averages(self) -> None:
        """Writes the moving averages into the codebook; does nothing for a codebook trained by gradient."""
        if self.ema_decay is not None:
            known = self.ema_count[:, None] > 1e-5  # an unused code stays where it was
            means = self.ema_sum / self.ema_count[:, None]
            means = F.normalize(means, dim=-1) if self.normalize == "inputs" else means
            self.codebook.copy_(torch.where(known, means, self.codebook))


def kmeans(flat: Tensor, clusters: int, rounds: int, normalize: bool) -> Tensor:
    """Centres (clusters, d) of vectors (M, d), from a random choice of the vectors and `rounds` of Lloyd's method.

    Args:
        flat: (M, d) vectors, M >= 1; with fewer vectors than clusters some are taken twice.
        clusters: Number of centres.
        rounds: Rounds of assignment and averaging.
        normalize: Unit-length centres (spherical k-means).
    """
    count = flat.shape[0]
    chosen = torch.randperm(count, device=flat.device)[:clusters]
    if count < clusters:
        chosen = torch.cat([chosen, torch.randint(count, (clusters - count,), device=flat.device)])
    centres = flat[chosen]
    for _ in range(rounds):
        codes = nearest(flat, centres)
        members = torch.bincount(codes, minlength=clusters)[:, None]
        means = torch.zeros_like(centres).index_add_(0, codes, flat) / members.clamp(min=1)
        centres = torch.where(members > 0, means, centres)
        centres = F.normalize(centres, dim=-1) if normalize else centres
    return centres
