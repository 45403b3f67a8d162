"""Transformer building blocks shared by tokenizers and generators: norms, rotary positions, attention, MLP, block.

Everything is chosen by a `BlockConfig`; nothing here knows which model it is part of, what a token means, or in which
order tokens are made. Shapes: B batch, N tokens (queries), L keys, D width, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name

NORMS = ("rms", "layer")
MLPS = ("swiglu", "geglu", "gelu", "gelu_tanh", "silu")
QK_NORMS = ("l2", "layer", "rms")
MODULATIONS = ("own", "shared")


class KeyValueStore(Protocol):
    """Where attention keeps the keys and values of one layer (see `tokenloom.generators.cache`)."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, h, N, d) keys and values and returns all visible ones, (B, h, L, d)."""
        ...


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape and flavour of one transformer block.

    Attributes:
        width: Model width D.
        heads: Number of query heads.
        head_width: Width of a head; `None` means width / heads.
        kv_heads: Number of key/value heads (grouped-query attention); `None` means `heads`.
        mlp: "swiglu", "geglu" (exact GELU gate), "gelu" (erf), "gelu_tanh" or "silu".
        mlp_width: Hidden width; `None` means 4 D for plain and 8 D / 3 (rounded up to 32) for gated MLPs.
        norm: "rms" or "layer".
        norm_affine: Whether block norms have learned weights (and biases for "layer").
        norm_eps: Epsilon of every norm.
        qkv_bias: Bias of the fused query/key/value projection.
        out_bias: Bias of the attention output projection.
        mlp_bias: Bias of the MLP projections.
        qk_norm: `None`, "l2" (unit vectors and a learned logit scale per head, as VAR), "layer" or "rms".
        qk_norm_affine: Whether "layer" and "rms" query/key norms have learned weights.
        attention_scale: Softmax scale; `None` means head_width ** -0.5, or 1 with qk_norm "l2".
        modulation: `None`, "own" (adaLN with six vectors from the condition) or "shared" (one projection for all
            blocks plus a learned offset a block).
        condition_width: Width of the adaLN condition; `None` means D.
        rope_halves: Rotary positions turn pair j of (x_j, x_{j + d/2}), as in Llama of transformers, not neighbours.
        cross_attention: Whether the block also attends to a context.
        dropout: Dropout on the two residual branches.
        layer_scale: Start of a learned factor a channel on both residual branches (CaiT); `None`: no such factor.
    """

    width: int
    heads: int
    head_width: int | None = None
    kv_heads: int | None = None
    mlp: str = "swiglu"
    mlp_width: int | None = None
    norm: str = "rms"
    norm_affine: bool = True
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    qk_norm_affine: bool = True
    attention_scale: float | None = None
    modulation: str | None = None
    condition_width: int | None = None
    rope_halves: bool = False
    cross_attention: bool = False
    dropout: float = 0.0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        for kind, value, options in (
            ("norm", self.norm, NORMS),
            ("mlp", self.mlp, MLPS),
            ("qk_norm", self.qk_norm or "l2", QK_NORMS),
            ("modulation", self.modulation or "own", MODULATIONS),
        ):
            if value not in options:
                raise unknown_name(kind, value, options)
        if self.head_width is None and self.width % self.heads:
            raise TokenloomError(
                f"width {self.width} is not a multiple of heads {self.heads}; change one or set head_width."
            )
        if self.heads % self.num_kv_heads:
            raise TokenloomError(f"heads {self.heads} must be a multiple of kv_heads {self.num_kv_heads}.")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 96) * 32 if self.mlp in ("swiglu", "geglu") else 4 * self.width


def make_norm(kind: str, width: int, eps: float, affine: bool) -> nn.Module:
    """An RMSNorm or LayerNorm over the last axis, computed in float32 by PyTorch's kernels."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps, elementwise_affine=affine)
    return nn.LayerNorm(width, eps=eps, elementwise_affine=affine)


def rope_table(
    coords: Tensor, head_width: int, base: float = 10000.0, scale: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions over any number of axes.

    The head is split evenly between the axes; inside an axis, pair j rotates by `coordinate * base ** (-2j / d_axis)`
    (RoFormer, eq. 15; axial form as in LlamaGen). Rows with a negative first coordinate get cos = sin = 0, which makes
    their queries and keys zero: the convention of LlamaGen for condition tokens.

    Args:
        coords: (N, A) coordinates, any real dtype.
        head_width: Width d of a head; must be divisible by 2 A.
        base: Base of the frequencies.
        scale: Optional factor per axis applied to the coordinates.

    Returns:
        Two float32 tensors of shape (N, d / 2).
    """
    axes = coords.shape[1]
    if head_width % (2 * axes):
        raise TokenloomError(
            f"Rotary positions over {axes} axes need a head width divisible by {2 * axes}, got {head_width}."
        )
    pairs = head_width // (2 * axes)
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64, device=coords.device) / pairs)
    positions = coords.double()
    if scale is not None:
        positions = positions * torch.tensor(list(scale), dtype=torch.float64, device=coords.device)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (N, d / 2)
    visible = (coords[:, :1] >= 0).to(angles.dtype)
    return (angles.cos() * visible).float(), (angles.sin() * visible).float()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor], halves: bool = False) -> Tensor:
    """Rotates pairs of the last axis of (B, h, N, d) by the (N, d / 2) or (B, N, d / 2) cosines and sines.

    Pairs are neighbours, or with `halves` one entry of the first half and one of the second.
    """
    cos, sin = (table.to(x.dtype).unsqueeze(-3) for table in rope)
    if halves:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with a fused projection, optional q/k normalisation, rotary positions and a cache."""

    def __init__(self, config: BlockConfig, context_width: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.heads, config.num_kv_heads, config.head_size
        inner, kv = self.heads * self.size, self.kv_heads * self.size
        self.cross, self.halves = context_width is not None, config.rope_halves
        if context_width is not None:
            self.q = nn.Linear(config.width, inner, bias=config.qkv_bias)
            self.kv = nn.Linear(context_width, 2 * kv, bias=config.qkv_bias)
        else:
            self.qkv = nn.Linear(config.width, inner + 2 * kv, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.width, bias=config.out_bias)
        self.kind = config.qk_norm
        self.scale = config.attention_scale
        if self.kind == "l2":
            self.log_scale = nn.Parameter(torch.full((self.heads, 1, 1), 4.0).log())
            self.scale = 1.0 if self.scale is None else self.scale
        elif self.kind is not None:
            self.q_norm = make_norm(self.kind, self.size, config.norm_eps, config.qk_norm_affine)
            self.k_norm = make_norm(self.kind, self.size, config.norm_eps, config.qk_norm_affine)

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.kv_heads * self.size
        if self.cross:
            parts = (self.q(x), *self.kv(context).split(kv, dim=-1))
        else:
            parts = self.qkv(x).split((self.heads * self.size, kv, kv), dim=-1)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        query, key, value = (
            part.unflatten(-1, (count, self.size)).transpose(1, 2)
            for part, count in zip(parts, heads, strict=True)
        )  # (B, h, N, d)
        if self.kind == "l2":
            query = F.normalize(query, dim=-1) * self.log_scale.clamp(max=4.605170185988092).exp()
            key = F.normalize(key, dim=-1)
        elif self.kind is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def forward(
        self,
        x: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Attends (B, N, D) to itself, to the store, or to a context of shape (B, T, context_width).

        `mask` is boolean, true where a query may look, broadcastable to (B, h, N, L). `rope` turns queries and keys; a
        context has no positions, so there it turns queries alone.
        """
        query, key, value = self._project(x, context)
        kind = value.dtype  # a store may hold another number format
        if rope is not None:
            query = apply_rope(query, rope, self.halves)
            key = key if self.cross else apply_rope(key, rope, self.halves)
        if store is not None:
            key, value = store.append(key, value)
        query, key, value = query.to(value.dtype), key.to(value.dtype), value
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(mixed.transpose(1, 2).flatten(2).to(kind))


class MLP(nn.Module):
    """Gated (SwiGLU, GEGLU) or plain (GELU, SiLU) two-layer perceptron."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.gated = config.mlp in ("swiglu", "geglu")
        self.up = nn.Linear(config.width, config.hidden * (2 if self.gated else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * hidden)
        if self.kind == "silu":
            return self.down(F.silu(hidden))
        return self.down(F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class TimeEmbedding(nn.Module):
    """Times to vectors (..., D): cosines, then sines, then a two-layer perceptron (GLIDE, DiT).

    Args:
        width: Width D.
        frequencies: Number of cosines and sines together; an odd one is filled up with a zero.
        period: Ratio of the highest frequency to (nearly) the lowest.
        scale: Highest frequency, in radians per unit of time.
    """

    def __init__(
        self, width: int, frequencies: int = 256, period: float = 10000.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.frequencies, self.period, self.scale = frequencies, period, scale
        self.up = nn.Linear(frequencies, width)
        self.down = nn.Linear(width, width)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, times: Tensor) -> Tensor:
        """Embeds times (...); the waves are computed in float32."""
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=times.device) / half
        angles = times.float()[..., None] * (self.scale * torch.exp(-math.log(self.period) * exponents))
        waves = F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, self.frequencies % 2))
        return self.down(F.silu(self.up(waves.to(self.up.weight.dtype))))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals, optionally modulated (adaLN) and with cross-attention between."""

    def __init__(self, config: BlockConfig, context_width: int | None = None) -> None:
        super().__init__()
        width = config.width
        self.norm1 = make_norm(config.norm, width, config.norm_eps, config.norm_affine)
        self.norm2 = make_norm(config.norm, width, config.norm_eps, config.norm_affine)
        self.attention = Attention(config)
        self.mlp = MLP(config)
        if config.cross_attention:
            self.norm_cross = make_norm(config.norm, width, config.norm_eps, config.norm_affine)
            self.cross_attention = Attention(config, context_width or width)
        if config.modulation == "own":
            self.modulation = nn.Linear(config.condition_width or width, 6 * width)
        elif config.modulation == "shared":
            self.modulation_offset = nn.Parameter(torch.zeros(6, width))
        if config.layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((width,), config.layer_scale))
            self.scale2 = nn.Parameter(torch.full((width,), config.layer_scale))
        self.scaled = config.layer_scale is not None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
        modulation: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Maps (B, N, D) to (B, N, D).

        `modulation` is (B, N or 1, 6, D) in the order gate1, gate2, scale1, scale2, shift1, shift2 (VAR, DiT).
        """
        if modulation is None:
            mixed = self.attention(self.norm1(x), rope=rope, mask=mask, store=store)
            x = x + self.dropout(mixed * self.scale1 if self.scaled else mixed)
        else:
            gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
            hidden = self.norm1(x) * (1 + scale1) + shift1
            x = x + self.dropout(gate1 * self.attention(hidden, rope=rope, mask=mask, store=store))
        if context is not None:
            x = x + self.cross_attention(self.norm_cross(x), mask=context_mask, context=context)
        if modulation is None:
            mapped = self.mlp(self.norm2(x))
            return x + self.dropout(mapped * self.scale2 if self.scaled else mapped)
        return x + self.dropout(gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2))
