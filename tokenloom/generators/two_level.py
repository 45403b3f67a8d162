"""Two-level generation of codec frames: a transformer over patches, and a small one inside each patch.

The temporal transformer makes one step a patch of G frames, so that its sequence is G K times shorter than one of codes; the
depth decoder writes the codes of a patch in any order over its frames and codebooks (RQ-Transformer, Lee et al. 2022; Moshi,
2024; MiMo-Audio, 2025). Knows codes and conditions. Knows nothing of sound.

Legend: B samples, T frames, K codebooks, N = T K positions, G frames a patch, P patches, D width, V largest vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import orders
from tokenloom.generators.arguments import Step, check_batch, check_codes, check_known
from tokenloom.generators.compiled import worker
from tokenloom.generators.conditions import Given, make_condition
from tokenloom.generators.parallel.options import Parallel
from tokenloom.generators.parallel.patches import GuessedPatches
from tokenloom.generators.patches import (
    PatchDecoder,
    PatchEncoder,
    code_tables,
    embed_codes,
    make_decoder_order,
)
from tokenloom.generators.sampling import Guidance, Sampling, guide, sample_tokens
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.layouts import Layout
from tokenloom.rng import as_seeds


class TwoLevelGenerator(ModelMixin, ConfigMixin):
    """Generates codes (B, N) of `Layout.frames(T, K)`, patch by patch.

    `logits`, `loss` and `generate` are those of `tokenloom.Generator`.

    Args:
        frames: Frames of a sample T, a multiple of `patch`.
        patch: Frames a patch G.
        codebook_sizes: Codes of each of the K codebooks.
        transformer_config: Fields of `TransformerConfig` of the transformer over patches.
        encoder_config: The same of the patch encoder.
        decoder_config: The same of the patch decoder.
        condition_config: As for `Generator`.
        patch_order: {"name": ..., "options": {...}} of the order inside a patch; `None` = "delay".
        causal_encoder: Whether a frame sees earlier frames of its patch only.
    """

    config_name = "config.json"  # type: ignore[assignment]
    draw: Callable[..., Tensor] = staticmethod(sample_tokens)  # codes of logits; a rung may have another way

    @register_to_config
    def __init__(
        self,
        frames: int,
        patch: int,
        codebook_sizes: Sequence[int],
        transformer_config: dict[str, Any],
        encoder_config: dict[str, Any],
        decoder_config: dict[str, Any],
        condition_config: dict[str, Any] | None = None,
        patch_order: dict[str, Any] | None = None,
        causal_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.vocab_size = tuple(codebook_sizes), max(codebook_sizes, default=0)
        inner = make_decoder_order(patch, len(self.sizes), patch_order)
        self.order = orders.patches(
            Layout.frames(frames, len(self.sizes)), patch, inner.name, **dict(inner.options)
        )
        self.patches, self.patch = frames // patch, patch
        whole, reader, writer = (
            TransformerConfig.from_dict(part) for part in (transformer_config, encoder_config, decoder_config)
        )
        self.condition = make_condition(condition_config, whole.width)
        if self.condition.length < 1 or (condition_config or {}).get("kind") == "tokens":
            raise TokenloomError(
                "TwoLevelGenerator needs a condition of one or more rows of its own: none, class, words or features."
            )
        self.tables = code_tables(self.sizes, reader.width)
        self.encoder = PatchEncoder(reader, patch, whole.width, causal_encoder)
        self.transformer = Transformer(whole)
        self.decoder = PatchDecoder(writer, inner, self.sizes, whole.width, reader.width)

    @property
    def _limits(self) -> tuple[int, int]:
        return 0, self.vocab_size

    def _check(self, codes: Tensor, name: str = "codes") -> None:
        check_codes(codes, self.order.layout.size, self._limits, name)
        most = codes.unflatten(1, (-1, len(self.sizes))).amax((0, 1)).tolist() if codes.numel() else []
        if any(code >= size for code, size in zip(most, self.sizes, strict=False)):
            raise TokenloomError(f"{name} must lie below the codebook sizes {self.sizes}, got up to {most}.")

    def _rows(self, codes: Tensor) -> Tensor:
        """Rows (B, p, D) of the patches of codes (B, p G, K)."""
        return self.encoder(embed_codes(self.tables, codes))

    def _rope(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        return self.transformer.rope(torch.arange(start, stop, device=device)[:, None])

    def _pooled(self, prefix: Tensor) -> Tensor | None:
        settings = self.transformer.config
        return prefix.mean(1, keepdim=True) if settings.modulation or settings.final_modulation else None

    def _visible(self, given: Given | None, rows: int, device: torch.device) -> Tensor:
        """Mask (1 or B, 1, R, R) of prefix rows and patches: no row sees a later one, or a hidden prefix row."""
        places = torch.arange(rows, device=device)
        mask = (places[:, None] >= places)[None, None]
        hidden = self.condition.visible(given)
        if hidden is None:
            return mask
        seen = F.pad(hidden.to(device), (0, rows - hidden.shape[1]), value=True)
        return mask & (seen[:, None, None] | (places[:, None] == places))

    def logits(self, codes: Tensor, condition: Given | None = None) -> Tensor:
        """Teacher-forced logits (B, N, V) in layout order of codes (B, N); -inf beyond a position's codebook."""
        self._check(codes)
        batch, device = codes.shape[0], codes.device
        given = self.condition.null(batch, device) if condition is None else condition
        prefix = self.condition.rows(given, batch, device, self.tables[0])
        frames = codes.unflatten(1, (-1, len(self.sizes)))
        x = torch.cat([prefix, self._rows(frames)[:, :-1]], dim=1)
        hidden = self.transformer(
            x,
            rope=self._rope(0, x.shape[1], device),
            mask=self._visible(given, x.shape[1], device),
            condition=self._pooled(prefix),
        )[0][:, prefix.shape[1] - 1 :]
        parts = frames.unflatten(1, (-1, self.patch)).flatten(0, 1)
        return self.decoder.logits(self.tables, hidden.flatten(0, 1), parts).view(batch, codes.shape[1], -1)

    def loss(self, codes: Tensor, condition: Given | None = None) -> Tensor:
        """Mean cross-entropy in nats a code of codes (B, N)."""
        return F.cross_entropy(self.logits(codes, condition).flatten(0, 1), codes.flatten().long())

    def forward(self, codes: Tensor, condition: Given | None = None) -> Tensor:
        """`loss(codes, condition)`, the training forward."""
        return self.loss(codes, condition)

    @torch.no_grad()
    def generate(
        self,
        condition: Given | None = None,
        *,
        batch_size: int | None = None,
        guidance: float | Guidance | Callable[[float], float] = 1.0,
        sampling: Sampling | None = None,
        seeds: int | list[int] | Tensor | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        on_step: Callable[[Step], None] | None = None,
        decode: str | Parallel = "auto",
    ) -> Tensor:
        """Generates codes (B, N); arguments as for `Generator.generate`, but that `on_step` is called after each patch.

        `decode` is "auto" ("cached"), "cached", "compiled", "compiled-int8", "compiled-w8a8", or "parallel" (or a
        `Parallel`): the steps inside a patch are guessed, several in a forward, and the codes are those of "cached".
        """
        ahead = Parallel() if decode == "parallel" else decode if isinstance(decode, Parallel) else None
        own = self if isinstance(decode, Parallel) or ahead is not None else worker(decode, self, "parallel")
        if own is not self:
            options: dict[str, Any] = {
                "guidance": guidance,
                "sampling": sampling,
                "seeds": seeds,
                "on_step": on_step,
            }
            return own.generate(condition, batch_size=batch_size, known=known, keep=keep, **options)
        device = self.device  # a property that walks all modules
        given, batch = check_batch(self.condition, condition, batch_size, device)
        size = self.order.layout.size
        if known is not None:
            self._check(known, "known")
        kept = check_known(known, keep, batch, torch.ones(size, dtype=torch.bool), self._limits, device)
        seeds, strength = as_seeds(seeds, batch, device), Guidance.of(guidance)
        sampling = sampling or Sampling()
        prefix, visible = self._prefixes(given, condition, batch, strength.enabled)
        cache = self.transformer.new_cache(len(prefix), prefix.shape[1] + self.patches - 1)
        codes = torch.zeros(batch, self.patches, self.patch, len(self.sizes), dtype=torch.long, device=device)
        write = self.decoder.generate if ahead is None else GuessedPatches(self.decoder, batch, ahead)
        committed, per_patch = torch.zeros(size, dtype=torch.bool), size // self.patches
        begun = 0  # patches at the beginning that are known: they are read at once
        if kept is not None:
            given_patches = kept[1].unflatten(1, (self.patches, -1)).all(2).all(0)
            begun = int(given_patches.long().cumprod(0).sum())
            codes[:, :begun] = kept[0][:, : begun * per_patch].view_as(codes[:, :begun])
        x, done = self._begin(prefix, codes[:, : min(begun, self.patches - 1)].flatten(1, 2)), 0
        for index in range(self.patches):
            part, progress = (
                slice(index * per_patch, (index + 1) * per_patch),
                index / max(1, self.patches - 1),
            )
            if index >= begun:
                rows = x.shape[1]
                hidden = self.transformer(
                    x,
                    rope=self._rope(done, done + rows, device),
                    mask=visible[:, :, done : done + rows, : done + rows],
                    cache=cache,
                    condition=self._pooled(prefix),
                )[0][:, -1]
                cache.commit(rows)
                done += rows
                scale = strength.at(progress, step=index, made=index * per_patch, count=per_patch)
                draw = self._drawing(part.start, scale, batch, seeds, sampling.at(progress), kept)
                codes[:, index] = write(self.tables, hidden, draw)
                x = self._rows(codes[:, index]).repeat(len(prefix) // batch, 1, 1)
            committed[part] = True
            if on_step is not None:
                on_step(Step(index, self.patches, codes.flatten(1), committed.clone()))
        return codes.flatten(1)

    def _begin(self, prefix: Tensor, known: Tensor) -> Tensor:
        """Rows (b, P + p, D) of the prefix and of known codes (B, p G, K)."""
        if not known.shape[1]:
            return prefix
        rows = self._rows(known).to(prefix.dtype)
        return torch.cat([prefix, rows.repeat(len(prefix) // len(rows), 1, 1)], dim=1)

    def _prefixes(
        self, given: Given | None, condition: Given | None, batch: int, guided: bool
    ) -> tuple[Tensor, Tensor]:
        """Prefix rows (b, P, D) and masks of all rows; with guidance those of the null condition are the second half."""
        halves: list[Any] = [given]
        if guided:
            null = self.condition.null(batch, self.device) if condition is None else None
            halves.append(null if condition is None else self.condition.null_like(given, self.device))
        rows = [self.condition.rows(half, batch, self.device, self.tables[0]) for half in halves]
        total = rows[0].shape[1] + self.patches - 1
        masks = [self._visible(half, total, self.device).expand(batch, -1, -1, -1) for half in halves]
        return torch.cat(rows), torch.cat(masks)

    def _drawing(
        self,
        first: int,
        scale: float,
        batch: int,
        seeds: Tensor,
        sampling: Sampling,
        kept: tuple[Tensor, Tensor] | None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that draws codes (B, n) of one step of the patch whose first layout index is `first`."""

        def draw(logits: Tensor, positions: Tensor) -> Tensor:
            positions = positions + first
            if len(logits) != batch:
                ours, null = logits.chunk(2)
                outside = ours == -torch.inf
                mixed = guide(ours.masked_fill(outside, 0), null.masked_fill(outside, 0), scale)
                logits = mixed.masked_fill(outside, -torch.inf)
            ids = self.draw(logits, seeds, positions, sampling)
            if kept is not None:
                ids = torch.where(kept[1][:, positions], kept[0][:, positions], ids)
            return ids

        return draw
