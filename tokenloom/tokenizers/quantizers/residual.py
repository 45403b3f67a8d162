"""Residual quantization: each quantizer codes what the ones before it left over.

Knows vectors and other quantizers. Knows nothing of sound, pictures or layouts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.tokenizers.quantizers.base import Quantized, Quantizer, from_first_process, straight_through
from tokenloom.tokenizers.quantizers.binary import LFQ
from tokenloom.tokenizers.quantizers.scalar import FSQ
from tokenloom.tokenizers.quantizers.vq import VQ

_GRADIENTS = ("sum", "each")


class Residual(Quantizer):
    """Codes (B, N, K): K quantizers in turn, whose vectors add up. The first k codes alone decode to a coarser vector.

    Args:
        layers: The K quantizers, with one codebook each and the same width, or one that serves K times.
        quantizers: K; `None` = as many as there are layers.
        scales: (K, d) or (K, 1) unit of each quantizer; what is left over is divided by it. `None` = 1 everywhere.
        keep_at_least: Quantizer dropout: in training a random number of quantizers, this many to all K, codes a batch;
            `None` = always all. Codes of dropped quantizers are -1, which decodes to nothing.
        gradient: "sum" passes the gradient straight through the sum once; "each" through every quantizer, which
            multiplies it by their number (the published form of residual vector quantization).
    """

    scales: Tensor

    def __init__(
        self,
        layers: list[Quantizer],
        quantizers: int | None = None,
        scales: Tensor | None = None,
        *,
        keep_at_least: int | None = None,
        gradient: str = "sum",
    ) -> None:
        super().__init__()
        if not layers or any(layer.codebooks > 1 or layer.dim != layers[0].dim for layer in layers):
            raise TokenloomError("Residual needs one or more quantizers of one width with one codebook each.")
        count = len(layers) if quantizers is None else quantizers
        if count < 1 or len(layers) not in (1, count):
            raise TokenloomError(f"{count} quantizers need as many layers, or one; got {len(layers)}.")
        if keep_at_least is not None and not 1 <= keep_at_least <= count:
            raise TokenloomError(f"keep_at_least must lie in 1..{count}, got {keep_at_least}.")
        if gradient not in _GRADIENTS:
            raise unknown_name("gradient of a residual quantizer", gradient, _GRADIENTS)
        self.dim, self.codebook_size, self.codebooks = layers[0].dim, layers[0].codebook_size, count
        self.keep_at_least, self.gradient = keep_at_least, gradient
        self.layers = nn.ModuleList(layers)
        scales = torch.ones(count, 1) if scales is None else scales
        self.register_buffer("scales", scales, persistent=False)

    def prepare(self, z: Tensor) -> Tensor:
        """The vectors (B, N, d) that are quantized."""
        return z

    def _kept(self, device: torch.device) -> int:
        if self.keep_at_least is None or not self.training:
            return self.codebooks
        count = torch.randint(self.keep_at_least, self.codebooks + 1, (1,), device=device)
        return int(
            from_first_process(count)
        )  # processes that keep different numbers would wait for each other

    def layer(self, index: int) -> Any:
        """The quantizer that codes at place `index`."""
        return self.layers[index if len(self.layers) > 1 else 0]

    def _encode_layer(self, index: int, z: Tensor) -> Quantized:
        return self.layer(index).encode(z)

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors in float32. Losses are sums over quantizers; statistics are named "name.k"."""
        x = self.prepare(z.float())
        rest, kept = x, self._kept(z.device)
        codes = torch.full((*z.shape[:-1], self.codebooks), -1, dtype=torch.long, device=z.device)
        parts: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        stats = {"quantizers": torch.tensor(float(kept))}
        for index in range(kept):
            scale = self.scales[index]
            result = self._encode_layer(index, rest / scale)
            parts.append(result.z_q * scale)
            rest = rest - parts[-1].detach()
            codes[..., index] = result.codes
            for name, value in result.losses.items():
                losses[name] = losses[name] + value if name in losses else value
            stats |= {f"{name}.{index}": value for name, value in result.stats.items()}
        total = torch.stack(parts).sum(0)
        z_q = total if self.gradient == "each" else straight_through(x, total)
        return Quantized(codes, z_q.to(z.dtype), losses, stats)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, N, d) of LongTensor codes (B, N, k), k <= K; codes of -1 add nothing."""
        if codes.shape[-1] > self.codebooks or codes.shape[-1] < 1:
            raise TokenloomError(
                f"Expected codes of 1 to {self.codebooks} quantizers in the last axis, got {tuple(codes.shape)}."
            )
        total: Tensor | None = None
        for index, column in enumerate(codes.unbind(-1)):
            vectors = self.layer(index).decode(column.clamp(min=0)) * self.scales[index]
            vectors = torch.where((column < 0)[..., None], torch.zeros_like(vectors), vectors)
            total = vectors if total is None else total + vectors
        return total if total is not None else self.scales.new_zeros(*codes.shape[:-1], self.dim)


class ResidualVQ(Residual):
    """Residual vector quantization (Zeghidour et al. 2021, SoundStream).

    Args:
        codebook_size: Codes of one codebook.
        dim: Width d.
        quantizers: Number of quantizers K.
        shared: One codebook for all quantizers; its moving averages are written once a batch.
        keep_at_least: Quantizer dropout, see `Residual`.
        gradient: See `Residual`.
        options: Further options of every `VQ`, for instance {"ema_decay": 0.99}; lookup is Euclidean unless
            they say otherwise.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        quantizers: int,
        *,
        shared: bool = False,
        keep_at_least: int | None = None,
        gradient: str = "sum",
        options: dict[str, object] | None = None,
    ) -> None:
        settings = {"codebook_size": codebook_size, "dim": dim, "normalize": False, **(options or {})}
        check_options(VQ, settings, "option of the codebooks")
        count = 1 if shared else quantizers
        layers: list[Quantizer] = [VQ(**settings) for _ in range(count)]  # type: ignore[arg-type]
        super().__init__(layers, quantizers, keep_at_least=keep_at_least, gradient=gradient)
        self.shared = shared

    def _encode_layer(self, index: int, z: Tensor) -> Quantized:
        return self.layer(index).encode(z, defer=self.shared)

    def encode(self, z: Tensor) -> Quantized:
        """Quantizes (B, N, d) float vectors, see `Residual.encode`."""
        result = super().encode(z)
        if self.shared and self.training:
            self.layer(0).write_averages()
        return result


class ResidualFSQ(Residual):
    """Residual scalar quantization: each quantizer is finer than the last by its number of levels less one.

    Args:
        levels: Levels per dimension.
        quantizers: Number of quantizers K.
        keep_at_least: Quantizer dropout, see `Residual`.
    """

    def __init__(self, levels: list[int], quantizers: int, *, keep_at_least: int | None = None) -> None:
        layers: list[Quantizer] = [FSQ(levels, "clamp") for _ in range(quantizers)]
        count = torch.tensor(levels, dtype=torch.float32)
        scales = count ** -torch.arange(quantizers)[:, None]
        super().__init__(layers, quantizers, scales, keep_at_least=keep_at_least)
        self.register_buffer("limit", 1 + 1 / (count - 1), persistent=False)

    limit: Tensor

    def prepare(self, z: Tensor) -> Tensor:
        """The vectors squashed by tanh to a little more than [-1, 1], so that the outer levels are reached."""
        return (z / self.limit).tanh() * self.limit


class ResidualLFQ(Residual):
    """Residual binary quantization: each quantizer takes signs at half the size of the last.

    Args:
        dim: Bits of one quantizer d.
        quantizers: Number of quantizers K.
        keep_at_least: Quantizer dropout, see `Residual`.
        options: Further options of every `LFQ`.
    """

    def __init__(
        self,
        dim: int,
        quantizers: int,
        *,
        keep_at_least: int | None = None,
        options: dict[str, object] | None = None,
    ) -> None:
        settings = {"dim": dim, **(options or {})}
        check_options(LFQ, settings, "option of the quantizers")
        layers: list[Quantizer] = [LFQ(**settings) for _ in range(quantizers)]  # type: ignore[arg-type]
        super().__init__(
            layers, quantizers, 0.5 ** torch.arange(quantizers)[:, None], keep_at_least=keep_at_least
        )
