"""Patches of codec frames: G frames of K codes as one vector, and one vector as G frames of K codes.

`PatchEncoder` reads a patch with a small transformer. `PatchDecoder` writes one with another, step by step in any order over
`Layout.frames(G, K)`: delayed codebooks as in MiMo-Audio (2025), one code after the other as in RQ-Transformer, whole frames.
`PatchNetworks` is the pair of MiMo-Audio; `tokenloom.generators.two_level` puts a transformer over patches between them.
Knows codes and vectors. Knows nothing of sound.

Legend: B samples, P patches, G frames a patch, K codebooks, D width of a patch vector, S steps, V largest vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators import orders
from tokenloom.generators.sampling import Sampling, sample_tokens
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.layouts import Layout

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def code_tables(codebook_sizes: Sequence[int], width: int) -> nn.ModuleList:
    """One embedding table a codebook; its last row stands for "no code", which embeds as zero."""
    if not codebook_sizes or min(codebook_sizes) < 1:
        raise TokenloomError(
            f"A patch needs one or more codebooks of at least one code, got {codebook_sizes}."
        )
    tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in codebook_sizes)
    for table in tables:
        nn.init.normal_(table.get_parameter("weight"), std=0.02)
    return tables


def embed_codes(tables: nn.ModuleList, codes: Tensor) -> Tensor:
    """Sum over codebooks (..., D) of codes (..., K); a code of -1, or the last row of its table, adds nothing."""
    total: Tensor | None = None
    for table, column in zip(tables, codes.unbind(-1), strict=True):
        last = table.num_embeddings - 1  # type: ignore[operator]
        none = (column < 0) | (column == last)
        part = table(column.masked_fill(none, last)).masked_fill(none[..., None], 0.0)
        total = part if total is None else total + part
    if total is None:
        raise TokenloomError("There are no codes to embed; a patch needs at least one codebook.")
    return total


def check_patches(codes: Tensor, sizes: Sequence[int], frames: int) -> None:
    """Raises unless `codes` are integers (B, K, T), T a multiple of `frames`, each a code or -1 (or its size) for none."""
    given = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(type(codes))
    whole = isinstance(codes, Tensor) and codes.dtype in _INTEGERS and codes.ndim == 3
    if not whole or codes.shape[1] != len(sizes) or codes.shape[2] % frames:
        raise TokenloomError(
            f"Expected integer codes (B, {len(sizes)}, T) with T a multiple of {frames} frames, got {given}."
        )
    most = torch.tensor(list(sizes), device=codes.device)[:, None]
    if bool(((codes < -1) | (codes > most)).any()):
        raise TokenloomError(
            f"Codes must lie below {tuple(sizes)}, or be -1 for none; got up to {int(codes.max())}."
        )


class PatchEncoder(nn.Module):
    """G frames of K codes to one vector; patches do not see each other.

    Args:
        config: The transformer over the G frames of a patch.
        frames: G.
        width: D.
        causal: Whether a frame sees earlier frames of its patch only.
    """

    def __init__(self, config: TransformerConfig, frames: int, width: int, causal: bool = False) -> None:
        super().__init__()
        self.frames, self.causal = frames, causal
        self.layers = Transformer(config)
        self.out = nn.Linear(config.width * frames, width, bias=False)

    def forward(self, x: Tensor, used: Tensor | None = None) -> Tensor:
        """Vectors (B, P, D) of embedded frames (B, P G, d); patches that are not `used` (B, P) give zero."""
        x = x.unflatten(1, (-1, self.frames))
        keep = None if used is None else used[:, :, None, None]
        x = x if keep is None else x * keep
        places = torch.arange(self.frames, device=x.device)
        mask = places[:, None] >= places if self.causal else None
        rope = self.layers.rope(places[:, None])
        y = self.layers(x.flatten(0, 1), rope=rope, mask=mask)[0].view(x.shape)
        return self.out((y if keep is None else y * keep).flatten(2))


class PatchDecoder(nn.Module):
    """One vector to G frames of K codes: a depth decoder with one output matrix a codebook.

    Step 0 is fed the vector, step s the sum of the codes drawn in step s - 1.

    Args:
        config: The transformer over the steps of a patch.
        order: Steps of the positions of `Layout.frames(G, K)`.
        codebook_sizes: Codes of each codebook.
        width: D.
        code_width: Width of the embeddings of codes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        order: orders.Order,
        codebook_sizes: Sequence[int],
        width: int,
        code_width: int,
    ) -> None:
        super().__init__()
        self.order, self.sizes = order, tuple(codebook_sizes)
        self.start = nn.Linear(width, config.width, bias=False)
        self.widen = (
            nn.Linear(code_width, config.width, bias=False) if code_width != config.width else nn.Identity()
        )
        self.layers = Transformer(config)
        self.heads = nn.ModuleList(nn.Linear(config.width, size + 1, bias=False) for size in self.sizes)
        steps = [order.permutation[part] for part in order.slices]
        self.steps = [(positions, order.layout.coords[positions].unbind(1)) for positions in steps]

    def _feed(self, tables: nn.ModuleList, codes: Tensor, step: int) -> Tensor:
        """Row (B, 1, d) of the codes (B, G, K) of one step."""
        time, book = (index.tolist() for index in self.steps[step][1])
        rows = [tables[k](codes[:, t, k]) for t, k in zip(time, book, strict=True)]
        return self.widen(torch.stack(rows).sum(0))[:, None]

    def step_logits(self, hidden: Tensor, step: int) -> Tensor:
        """Logits (B, n, V) of the positions of a step of hidden states (B, d); -inf beyond their codebook."""
        books = self.steps[step][1][1].tolist()
        rows, most = [self.heads[k](hidden)[:, : self.sizes[k]].float() for k in books], max(self.sizes)
        if min(self.sizes) < most:
            rows = [F.pad(row, (0, most - row.shape[1]), value=-torch.inf) for row in rows]
        return torch.stack(rows, 1)

    def hidden(
        self, tables: nn.ModuleList, vectors: Tensor, codes: Tensor, steps: int | None = None
    ) -> Tensor:
        """Teacher-forced hidden states (B, S, d) of vectors (B, D) and codes (B, G, K); of the first `steps` alone if given."""
        rows = [self.start(vectors)[:, None]]
        rows += [self._feed(tables, codes, step) for step in range((steps or len(self.steps)) - 1)]
        places = torch.arange(len(rows), device=vectors.device)
        mask = places[:, None] >= places
        return self.layers(torch.cat(rows, 1), rope=self.layers.rope(places[:, None]), mask=mask)[0]

    def logits(self, tables: nn.ModuleList, vectors: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits (B, G K, V) in layout order of vectors (B, D) and codes (B, G, K)."""
        hidden = self.hidden(tables, vectors, codes)
        parts = [self.step_logits(hidden[:, step], step) for step in range(len(self.steps))]
        return torch.cat(parts, dim=1)[:, self.order.inverse.to(hidden.device)]

    @torch.no_grad()
    def generate(
        self,
        tables: nn.ModuleList,
        vectors: Tensor,
        draw: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Codes (b, G, K) of vectors (B, D).

        Args:
            tables: The tables of the codes.
            vectors: (B, D); with guidance B = 2 b.
            draw: Codes (b, n) of logits (B, n, V) and positions (n,) in layout order of the patch.
        """
        frames, books = (int(side) for side in self.order.layout.shape)  # type: ignore[arg-type]
        codes: Tensor | None = None
        cache = self.layers.new_cache(len(vectors), len(self.steps))
        x = self.start(vectors)[:, None]
        every = self.layers.rope(torch.arange(len(self.steps), device=vectors.device)[:, None])
        for step, (positions, (time, book)) in enumerate(self.steps):
            rope = None if every is None else (every[0][step : step + 1], every[1][step : step + 1])
            hidden = self.layers(x, rope=rope, cache=cache)[0][:, 0]
            cache.commit(1)
            drawn = draw(self.step_logits(hidden, step), positions.to(vectors.device))
            codes = drawn.new_zeros(len(drawn), frames, books) if codes is None else codes
            codes[:, time, book] = drawn
            if step + 1 < len(self.steps):
                x = self._feed(tables, codes, step).repeat(len(vectors) // len(codes), 1, 1)
        return codes if codes is not None else vectors.new_zeros(0, frames, books, dtype=torch.long)


def make_decoder_order(frames: int, codebooks: int, order: Mapping[str, Any] | None) -> orders.Order:
    """The order of a patch of {"name": ..., "options": {...}}; by default delayed codebooks."""
    values = dict(order or {"name": "delay"})
    return orders.build(values["name"], Layout.frames(frames, codebooks), **(values.get("options") or {}))


class PatchNetworks(ModelMixin, ConfigMixin):
    """Patch encoder and decoder around a language model over patches and words, as in MiMo-Audio.

    Args:
        frames: Frames a patch G; the language model makes one step a patch.
        codebook_sizes: Codes of each codebook.
        width: Width D of the language model.
        encoder_config: Fields of `TransformerConfig` of the patch encoder.
        decoder_config: The same of the patch decoder.
        order: {"name": ..., "options": {...}} of the order inside a patch; `None` = "delay".
        causal_encoder: Whether a frame sees earlier frames of its patch only.
        text_vocab: Words of the language model; 0 = none.
        no_text: The word that says "here is a patch of sound".
    """

    config_name = "config.json"  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        frames: int,
        codebook_sizes: Sequence[int],
        width: int,
        encoder_config: dict[str, Any],
        decoder_config: dict[str, Any],
        order: dict[str, Any] | None = None,
        causal_encoder: bool = False,
        text_vocab: int = 0,
        no_text: int = 0,
    ) -> None:
        super().__init__()
        self.frames, self.sizes, self.no_text = frames, tuple(codebook_sizes), no_text
        reader, writer = (TransformerConfig.from_dict(part) for part in (encoder_config, decoder_config))
        steps = make_decoder_order(frames, len(self.sizes), order)
        self.text = nn.Embedding(text_vocab, width) if text_vocab else None
        self.tables = code_tables(self.sizes, reader.width)
        self.encoder = PatchEncoder(reader, frames, width, causal_encoder)
        self.decoder = PatchDecoder(writer, steps, self.sizes, width, reader.width)

    def embed(self, codes: Tensor, text: Tensor | None = None) -> Tensor:
        """Rows (B, P, D) for the language model.

        Args:
            codes: LongTensor (B, K, P G); -1, or the size of its codebook, stands for no code.
            text: LongTensor (B, P), `no_text` where there is sound; `None` = sound everywhere.
        """
        check_patches(codes, self.sizes, self.frames)
        x = embed_codes(self.tables, codes.transpose(1, 2).long())
        if text is None:
            return self.encoder(x)
        if self.text is None or tuple(text.shape) != (codes.shape[0], codes.shape[2] // self.frames):
            raise TokenloomError(
                f"Text is one word a patch, ({codes.shape[0]}, {codes.shape[2] // self.frames}), for networks with a text "
                f"table; got {tuple(text.shape)}."
            )
        sound = text == self.no_text
        return self.encoder(x, sound) + self.text(text).masked_fill(sound[:, :, None], 0.0)

    def logits(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits (B, K, G, V) of hidden states (B, D) of the language model and codes (B, K, G)."""
        check_patches(codes, self.sizes, self.frames)
        logits = self.decoder.logits(self.tables, vectors, codes.transpose(1, 2).long())
        return logits.unflatten(1, (self.frames, len(self.sizes))).transpose(1, 2)

    @torch.no_grad()
    def generate(self, vectors: Tensor, seeds: Tensor, sampling: Sampling | None = None) -> Tensor:
        """Codes (B, K, G) of the next patch of hidden states (B, D) of the language model; one seed (B,) a sample."""

        def draw(logits: Tensor, positions: Tensor) -> Tensor:
            return sample_tokens(logits, seeds, positions, sampling)

        return self.decoder.generate(self.tables, vectors, draw).transpose(1, 2).contiguous()
