"""The generator: one loop that feeds rows, reads logits, samples and commits, whatever the order.

A subclass names its row plan (`tokenloom.generators.plans`); everything else is shared: teacher-forced logits, loss,
guidance, sampling, kept positions, and the decode rungs. Knows nothing of pixels, waveforms or prompts.

Legend: B samples, N positions, V vocabulary, P prefix rows, R rows, D width, J heads, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators import arguments, decoding
from tokenloom.generators.arguments import Run, Step, check_batch, check_codes, check_known, diagnose
from tokenloom.generators.conditions import Given, make_condition
from tokenloom.generators.orders import Order
from tokenloom.generators.parallel.options import Parallel
from tokenloom.generators.plans import RowPlan
from tokenloom.generators.sampling import Guidance, Sampling, guide, sample_tokens
from tokenloom.generators.token_table import TokenTable
from tokenloom.generators.transformer import Transformer, TransformerConfig
from tokenloom.rng import as_seeds

__all__ = ["Generator", "Run", "Step", "TokenTable"]

PREFIX_ROPES = ("identity", "zero", "line")


class Generator(ModelMixin, ConfigMixin):
    """Base class of all generators of discrete codes.

    Args:
        order_config: `Order.to_config()`: layout and order.
        vocab_size: Number of codes V.
        transformer_config: Fields of `TransformerConfig`.
        condition_config: {"kind": "none"}, {"kind": "class", "num_classes": C},
            {"kind": "words", "vocabulary": W, "length": P}, {"kind": "features", "features": F, "length": P},
            {"kind": "tokens", "vocabulary": W, "ids": C, "offset": O} or
            {"kind": "picture", "rows": P, "features": F, "vocabulary": W, "words": T}.
        causal_prefix: Whether prefix rows see only earlier prefix rows.
        prefix_rope: "identity" (prefix rows are not rotated), "zero" (their queries and keys become zero, the
            convention of LlamaGen) or "line" (they stand before the first token; for layouts of one axis).
        share_head: One output matrix for all directional heads.
        tie_embeddings: Use the token table as the output matrix (needs share_head).
        head_bias: Whether output matrices have a bias.
        code_levels: Radix of each digit of a code, least significant first, for codes of a scalar quantizer: the token
            table is then the sum of digit vectors and code vectors.
        special_tokens: Rows of the token table before code 0: the start token, the learned rows of the plan, the ids of
            a "tokens" condition. They are predicted as well, as codes from -special_tokens to -1.
        rule_config: Settings of the paradigm itself, for generators that have some (`NextScaleGenerator`,
            `NextBlockGenerator`).
    """

    config_name = "config.json"  # type: ignore[assignment]
    rope_cos: Tensor
    rope_sin: Tensor
    row_position: Tensor
    tokens: Any  # a TokenTable, or what `make_tokens` of a subclass returns
    draw: Callable[..., Tensor] = staticmethod(sample_tokens)  # codes of logits; a rung may have another way

    @register_to_config
    def __init__(
        self,
        order_config: dict[str, Any],
        vocab_size: int,
        transformer_config: dict[str, Any],
        condition_config: dict[str, Any] | None = None,
        causal_prefix: bool = False,
        prefix_rope: str = "identity",
        share_head: bool = True,
        tie_embeddings: bool = False,
        head_bias: bool = False,
        code_levels: list[int] | None = None,
        special_tokens: int = 0,
        rule_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.order = Order.from_config(order_config)
        self.rule = self.make_rule(rule_config or {})
        settings = TransformerConfig.from_dict(transformer_config)
        width = settings.width
        self.condition = make_condition(condition_config, width)
        self.plan = self.make_plan(self.order, self.condition.length, causal_prefix)
        heads = self.plan.sources.shape[0]
        if len(settings.taps) not in (1, heads):
            raise TokenloomError(
                f"{type(self).__name__} reads {heads} hidden states, but taps are {settings.taps}."
            )
        if tie_embeddings and not share_head:
            raise TokenloomError("tie_embeddings needs share_head.")
        self.transformer = Transformer(settings)
        self.special = special_tokens
        self.tokens = self.make_tokens(special_tokens + vocab_size, width, code_levels)
        if self.plan.query.any() and not special_tokens:
            self.query = nn.Parameter(torch.randn(int(self.plan.vectors.max()) + 1, width) * 0.02)
        self.tied, self.shared, self.head_bias = tie_embeddings, share_head, head_bias
        outputs = [
            nn.Linear(width, special_tokens + vocab_size, bias=head_bias)
            for _ in range(0 if tie_embeddings else 1 if share_head else heads)
        ]
        for head in outputs:
            nn.init.normal_(head.weight, std=0.02)
        self.heads = nn.ModuleList(outputs)
        self._register_tables(prefix_rope)

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """The row plan of this paradigm."""
        raise TokenloomError(f"{type(self).__name__} does not define make_plan(); override it.")

    def make_rule(self, options: dict[str, Any]) -> Any:
        """Settings of this paradigm from `rule_config`; most have none."""
        for name in options:
            raise unknown_name(f"rule option of {type(self).__name__}", name, ())

    def make_tokens(self, vocab_size: int, width: int, code_levels: list[int] | None) -> nn.Module:
        """What turns codes into rows; it has `codes`, an embedding of V codes, and `weight` (V, D) for tied heads."""
        return TokenTable(vocab_size, width, code_levels)

    @property
    def vocab_size(self) -> int:
        """Number of codes V, special tokens not counted."""
        return self.tokens.codes.num_embeddings - self.special

    def _register_tables(self, prefix_rope: str) -> None:
        if prefix_rope not in PREFIX_ROPES:
            raise unknown_name("prefix_rope", prefix_rope, PREFIX_ROPES)
        plan, coords, prefix = self.plan, self.order.layout.coords, self.condition.length
        ids = torch.where(plan.position < 0, torch.arange(plan.rows), prefix + plan.position)
        ids, needed = (
            (ids, prefix + len(coords)) if plan.place is None else (plan.place, int(plan.place.max()) + 1)
        )
        outside = torch.full((1, coords.shape[1]), -1 if prefix_rope == "zero" else 0)
        places = torch.cat((coords, outside))[plan.position]  # -1 picks the last row
        if prefix_rope == "line":
            if coords.shape[1] != 1:
                raise TokenloomError(
                    f"prefix_rope 'line' needs a layout of one axis, got {self.order.layout}."
                )
            places = ids[:, None]
        rope = self.transformer.rope(places)
        if rope is not None:
            self.register_buffer("rope_cos", rope[0], persistent=False)
            self.register_buffer("rope_sin", rope[1], persistent=False)
        learned = self.transformer.config.learned_positions
        if 0 < learned < needed:
            raise TokenloomError(
                f"learned_positions is {learned}, but {prefix} prefix rows and {len(coords)} tokens need "
                f"{needed}; use that, or 0 for none."
            )
        self.register_buffer("row_position", ids, persistent=False)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _embed(self, codes: Tensor, positions: Tensor, learned: Tensor, prefix: Tensor | None) -> Tensor:
        """Embeddings (B, n, D) of prefix rows, the tokens at layout indices (t,), the learned vectors of (q,) queries."""
        parts = [] if prefix is None else [prefix]
        if len(positions):
            parts.append(self.tokens(codes[:, positions.to(codes.device)] + self.special))
        if len(learned):
            learned = learned.to(codes.device)
            vectors = self.tokens(learned + 1) if self.special else self.query[learned]
            parts.append(vectors.expand(codes.shape[0], -1, -1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _prefix(self, condition: Given | None, batch: int, device: torch.device) -> Tensor:
        """Prefix rows (B, P, D)."""
        return self.condition.rows(condition, batch, device, self.tokens)

    def _inputs(self, codes: Tensor, prefix: Tensor) -> Tensor:
        """Embeddings (B, R, D) of all rows of the plan, for teacher forcing.

        A paradigm whose rows are more than tokens and queries says here and in `_feed` what it feeds.
        """
        position, query = self.plan.position, self.plan.query
        return self._embed(codes, position[(position >= 0) & ~query], self.plan.vectors, prefix)

    def _feed(self, prefix: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The same step by step: a function of (codes so far, step). It is made once a generation and may keep a state."""

        def feed(codes: Tensor, step: int) -> Tensor:
            fed = self.plan.on(codes.device)[step]
            return self._embed(codes, fed.tokens, fed.learned, None if step else prefix)

        return feed

    def run_rows(self, x: Tensor, rows: Tensor, *, mask: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        """Runs the transformer on embeddings (B, n, D) of row ids (n,) or (B, n); options as in `Transformer.forward`."""
        rows = rows.to(x.device)
        rope = (self.rope_cos[rows], self.rope_sin[rows]) if self.transformer.config.rope else None
        return self.transformer(
            x,
            position_ids=self.row_position[rows],
            rope=rope,
            mask=None if mask is None else mask.to(x.device),
            **options,
        )

    def _head(self, hidden: Tensor, weights: Tensor, table: Tensor | None) -> Tensor:
        """Logits (B, m, V) of hidden states (J, B, m, D), weighted already; heads are added.

        `weights` (J, m) or (J, B, m) mix the biases of the heads; `table` is the token table if it is the output matrix.
        """
        if table is not None:
            return F.linear(hidden.sum(0), table)
        if self.shared:
            return self.heads[0](hidden.sum(0))
        if not self.head_bias:
            logits = self.heads[0](hidden[0])
            for part, head in zip(hidden[1:], self.heads[1:], strict=True):
                logits = logits + head(part)
            return logits
        outputs = [head.get_parameter("weight") for head in self.heads]
        logits = torch.stack([F.linear(part, out) for part, out in zip(hidden, outputs, strict=True)]).sum(0)
        biases = torch.stack([head.get_parameter("bias") for head in self.heads])
        return logits + weights.to(biases).movedim(0, -1) @ biases

    def _collect(self, taps: tuple[Tensor, ...], sources: Tensor, weights: Tensor) -> Tensor:
        """Weighted hidden states (J, B, m, D) at the source rows (J, m) of each head."""
        parts = [
            taps[min(index, len(taps) - 1)][:, source.to(taps[0].device)]
            * weight.to(taps[0].device, taps[0].dtype)[:, None]
            for index, (source, weight) in enumerate(zip(sources, weights, strict=True))
        ]
        return torch.stack(parts)

    def _table(self) -> Tensor | None:
        return self.tokens.weight if self.tied else None

    def pooled_condition(self, prefix: Tensor) -> Tensor | None:
        """adaLN condition (B, 1, D): the mean of the prefix rows, or `None` for a model without modulation."""
        settings = self.transformer.config
        return prefix.mean(1, keepdim=True) if settings.modulation or settings.final_modulation else None

    # ---- teacher forcing --------------------------------------------------------------------------------------------

    def _check_codes(self, codes: Tensor, name: str = "codes") -> None:
        check_codes(codes, self.order.layout.size, (-self.special, self.vocab_size), name)

    def logits(self, codes: Tensor, condition: Given | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            codes: LongTensor (B, N) in layout order.
            condition: What the model's condition takes; `None` is the null condition.

        Returns:
            (B, N, V) in layout order: position p is predicted from the positions of earlier steps only. Special tokens,
            if there are any, come before code 0. Zero where a plan predicts nothing.
        """
        batch, device = codes.shape[0], codes.device
        condition = self.condition.null(batch, device) if condition is None else condition
        prefix = self._prefix(condition, batch, device)
        return self._forced(self._inputs(codes, prefix), prefix, condition)

    def _forced(self, x: Tensor, prefix: Tensor, condition: Given | None) -> Tensor:
        """Logits (B, N, V) in layout order of the embeddings (B, R, D) of all rows."""
        plan, device = self.plan, x.device
        rows = torch.arange(plan.rows)
        mask = plan.mask_for(self.condition.visible(condition), rows, plan.rows, plan.mask)
        taps = self.run_rows(x, rows, mask=mask, condition=self.pooled_condition(prefix))
        hidden = self._collect(taps, plan.sources, plan.weights)
        inverse = self.order.inverse
        return self._head(hidden[:, :, inverse.to(device)], plan.weights[:, inverse], self._table())

    def loss(self, codes: Tensor, condition: Given | None = None, weights: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of codes (B, N), over the positions that are predicted.

        Samples that the condition does not count (`CaptionFeatures.valid`) are left out; the loss is 0 if none is left.

        Args:
            codes: LongTensor (B, N).
            condition: What the model's condition takes.
            weights: (N,) or (B, N), by which the cross-entropy of each position is multiplied; `None` is 1.
        """
        return self._mean_loss(self.logits(codes, condition), codes, condition, weights)

    def _mean_loss(
        self, logits: Tensor, codes: Tensor, condition: Given | None, weights: Tensor | None
    ) -> Tensor:
        if weights is not None and tuple(weights.shape) not in (tuple(codes.shape), tuple(codes.shape[1:])):
            raise TokenloomError(
                f"weights must be (N,) or (B, N) for codes {tuple(codes.shape)}, got {tuple(weights.shape)}."
            )
        flat, targets = logits.float().flatten(0, 1), codes.flatten() + self.special
        losses = F.cross_entropy(flat, targets, reduction="none").view_as(codes)
        losses = losses if weights is None else losses * weights.to(losses)
        losses = losses[:, self.plan.predicted.to(losses.device)].mean(1)
        counted = self.condition.counted(condition)
        if counted is None:
            return losses.mean()
        counts = counted.to(losses)
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    def forward(self, codes: Tensor, condition: Given | None = None, *args: Any, **options: Any) -> Tensor:
        """`loss(codes, condition, ...)`, the training forward."""
        return self.loss(codes, condition, *args, **options)

    # ---- generation -------------------------------------------------------------------------------------------------

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
        steps: int | None = None,
    ) -> Tensor:
        """Generates codes.

        Args:
            condition: Batch of conditions; `None` is the null condition.
            batch_size: Number of samples where there is no condition.
            guidance: Classifier-free guidance `u + g (c - u)`: a number, a schedule or a `Guidance`. 1 runs one forward.
            sampling: Temperature and filters; default plain sampling.
            seeds: One seed a sample; an int s means s, s + 1, ...; `None` draws fresh ones. Sample i depends on seed i
                alone, up to rounding of matrix kernels with the batch size.
            known: LongTensor (B, N), codes to keep.
            keep: BoolTensor (B, N) or (N,), where to keep them; the rest is generated.
            on_step: Called after each step with a `Step`.
            decode: "auto", "reference", "cached", "compiled", "parallel", a `Parallel`: the same codes;
                or "compiled-int8", "compiled-w8a8".
            steps: How many steps of the order to run; positions of later steps stay 0. `None` runs all.

        Returns:
            LongTensor (B, N) in layout order.

        Raises:
            TokenloomError: For bad arguments, or if the model produces logits that are not finite.
        """
        limits, device = (-self.special, self.vocab_size), self.device
        arguments.check_steps(steps, self.order.num_steps if type(self)._run is Generator._run else 0)
        condition, batch = check_batch(self.condition, condition, batch_size, device)
        kept = check_known(known, keep, batch, self.plan.predicted, limits, device)
        noise_seeds, strength = as_seeds(seeds, batch, device), Guidance.of(guidance)
        prefix, visible = self._prefix(condition, batch, device), self.condition.visible(condition)
        if strength.enabled:
            told = self.condition
            null = told.null(batch, device) if condition is None else told.null_like(condition, device)
            prefix = torch.cat((prefix, self._prefix(null, batch, device)))
            visible = None if visible is None else visible.repeat(2, 1)
        stepper = decoding.make(decode, self, prefix, visible, strength.enabled)
        run = Run(batch, noise_seeds, strength, sampling or Sampling(), prefix, stepper, kept, on_step, steps)
        return decoding.run(self, run)

    def _run(self, run: Run) -> Tensor:
        """Codes (B, N): one step of the plan after the other. Paradigms that revisit positions have their own loop."""
        feed, order, table, kept = self._feed(run.prefix), self.order, self._table(), run.kept
        codes = torch.zeros(run.batch, order.layout.size, dtype=torch.long, device=self.device)
        committed = torch.zeros(order.layout.size, dtype=torch.bool)
        scales = run.scales(order)
        samples = run.rows(scales, self.plan.committed)
        for index, step in enumerate(self.plan.on(codes.device)[: run.limit]):
            sampling = run.sampling.at(index / max(1, order.num_steps - 1))
            taps = (
                run.stepper(feed(run.both(codes), index)[: samples[index]], index) if len(step.rows) else ()
            )
            positions = step.positions
            ids = torch.zeros_like(codes[:, positions])
            if step.predicts:
                hidden = self._collect(taps, step.sources, step.weights)
                logits = self._head(self._guide(hidden, scales[index], run.batch), step.weights, table)
                ids = self._sample(logits, run.seeds, positions, sampling, index)
            if kept is not None:
                ids = torch.where(kept[1][:, positions], kept[0][:, positions], ids)
            codes[:, positions] = ids
            committed[self.plan.steps[index].positions] = True
            if run.on_step is not None:
                run.on_step(Step(index, order.num_steps, codes, committed.clone()))
        return codes

    @staticmethod
    def _guide(hidden: Tensor, scale: float, batch: int) -> Tensor:
        """Mixes the two halves of (J, 2B, m, D); the heads are affine, so before them is the same and half the work."""
        if hidden.shape[1] == batch:
            return hidden
        conditional, null_half = hidden.chunk(2, dim=1)
        return guide(conditional, null_half, scale).to(hidden.dtype)

    def _sample(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling, step: int
    ) -> Tensor:
        try:
            return self.draw(logits, seeds, positions, sampling) - self.special
        except TokenloomError as error:
            if torch.isfinite(logits).all():
                raise
            raise TokenloomError(f"Step {step} of {self.order.num_steps}: {error} {diagnose(self)}") from None
