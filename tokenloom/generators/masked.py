"""Masked prediction: hidden positions are filled in over several visits, the surest first (MaskGIT, Chang et al. 2022).

Mask: everybody sees everybody. Input: one row a position, its token, or a learned vector where the token is hidden.
Head: each row predicts its own place. Steps: 8 to 12 for 256 tokens. Here the steps of the order are *visits*: every
visit feeds all rows and predicts all hidden positions, and `Order.slices` only says how many of them stay; the others
are hidden again and drawn anew at the next visit. The cosine schedule is `orders.random(layout, steps, seed)`.

Which predictions stay is `rule_config={"reveal": ...}`: "confidence" (the most probable draws, with noise that fades),
"random" (a random sequence of its own for every sample), or "order" (the sequence of the order). Nothing computed at one
visit is valid at the next, so the cached rung keeps nothing: both rungs are one full forward a visit, and equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.generators.base import Generator, Run, Step, TokenTable
from tokenloom.generators.conditions import Given
from tokenloom.generators.orders import Order
from tokenloom.generators.plans import RowPlan
from tokenloom.generators.reveal import REVEALS, confidence_score, random_score, surest
from tokenloom.generators.sampling import Sampling


@dataclass(frozen=True)
class MaskRule:
    """Settings of masked prediction.

    Attributes:
        reveal: Which predictions of a visit stay: "confidence", "random" or "order".
        choice_temperature: Strength of the Gumbel noise on the confidence at the first visit; it falls linearly to 0 at
            the last, and is off at sampling temperature 0.
        label_drop: Share of the samples whose condition is dropped by `loss` in training mode.
        mask_schedule: Law of the share of hidden positions in training: "cosine" (MaskGIT: cos(pi r / 2) of a uniform
            r) or "truncnorm" (MAR: a normal around 1 with deviation 0.25, cut to [mask_min, 1]).
        mask_min: Smallest share under "truncnorm".
    """

    reveal: str = "confidence"
    choice_temperature: float = 4.5
    label_drop: float = 0.1
    mask_schedule: str = "cosine"
    mask_min: float = 0.7

    def __post_init__(self) -> None:
        if self.reveal not in REVEALS:
            raise unknown_name("reveal rule", self.reveal, REVEALS)
        if self.mask_schedule not in _MASK_SHARES:
            raise unknown_name("mask schedule", self.mask_schedule, _MASK_SHARES)
        for name in ("label_drop", "mask_min"):
            if not 0 <= getattr(self, name) <= 1:
                raise TokenloomError(f"{name} is a share from 0 to 1, got {getattr(self, name)}.")


def _cosine_share(uniform: Tensor, low: float) -> Tensor:
    return torch.cos(uniform * math.pi / 2)


def _truncated_normal_share(uniform: Tensor, low: float) -> Tensor:
    """Quantiles of a normal (1, 0.25) cut to [low, 1]."""
    spread = 0.25 * math.sqrt(2)
    start = math.erf((low - 1) / spread)  # -> 0 at the upper end
    return 1 + spread * torch.special.erfinv(start * (1 - uniform))


_MASK_SHARES = {"cosine": _cosine_share, "truncnorm": _truncated_normal_share}


def draw_hidden(
    batch: int,
    size: int,
    rule: MaskRule,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Positions to hide in training: ceil(share N) random ones of each sample.

    Args:
        batch: Samples B.
        size: Positions N.
        rule: Names the law of the share.
        device: Where the result lives.
        generator: Source of the draws (of that device); `None` is PyTorch's own.

    Returns:
        BoolTensor (B, N), at least one true a sample.
    """
    uniform = torch.rand(batch, 1, device=device, generator=generator)
    count = (_MASK_SHARES[rule.mask_schedule](uniform, rule.mask_min) * size).ceil().clamp(1, size)
    ranks = torch.rand(batch, size, device=device, generator=generator).argsort(1).argsort(1)
    return ranks < count


@lru_cache(maxsize=64)
def visit_plan(order: Order, prefix: int, causal_prefix: bool = False) -> RowPlan:
    """Every visit feeds the prefix and one row a position, all of which see each other; nothing stays in the cache."""
    rows = prefix + order.layout.size
    mask = torch.ones(rows, rows, dtype=torch.bool)
    if causal_prefix:
        mask[:prefix] = torch.ones(prefix, rows, dtype=torch.bool).tril()
    return RowPlan(
        feeds=(torch.arange(rows),) * order.num_steps,
        committed=(0,) * order.num_steps,
        mask=mask,
        position=torch.cat((torch.full((prefix,), -1), torch.arange(order.layout.size))),
        query=torch.zeros(rows, dtype=torch.bool),
        sources=(prefix + order.permutation)[None],
        weights=torch.ones(1, order.layout.size),
        order=order,
    )


class MaskedTable(TokenTable):
    """A token table with one more vector, for hidden positions: code -1."""

    def __init__(self, vocab_size: int, width: int, levels: list[int] | None) -> None:
        super().__init__(vocab_size, width, levels)
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Embeddings (..., D) of codes (...), -1 where hidden."""
        return torch.where((codes < 0)[..., None], self.hidden, super().forward(codes.clamp(min=0)))


class MaskedGenerator(Generator):
    """Fills in hidden codes over several visits; `rule_config` holds the fields of `MaskRule`.

    `num_steps` of the order is the number of visits; `revisit(order)` changes it without touching a weight.
    """

    rule: MaskRule

    def make_rule(self, options: dict[str, Any]) -> MaskRule:
        """A `MaskRule`."""
        check_options(MaskRule, options, "rule option of MaskedGenerator")
        return MaskRule(**options)

    def make_plan(self, order: Order, prefix: int, causal_prefix: bool) -> RowPlan:
        """One bidirectional forward a visit."""
        return visit_plan(order, prefix, causal_prefix)

    def make_tokens(self, vocab_size: int, width: int, code_levels: list[int] | None) -> MaskedTable:
        """A token table that knows hidden positions."""
        if self.special:
            raise TokenloomError("MaskedGenerator has no special tokens; leave special_tokens at 0.")
        return MaskedTable(vocab_size, width, code_levels)

    def revisit(self, order: Order) -> None:
        """Takes another number of visits, or another sequence, over the same layout.

        Raises:
            TokenloomError: If the layout differs.
        """
        if order.layout != self.order.layout:
            raise TokenloomError(
                f"The layout of this generator is {self.order.layout}, but the order has {order.layout}."
            )
        self.order = order
        self.plan = visit_plan(order, self.condition.length, bool(self.config["causal_prefix"]))
        self.register_to_config(order_config=order.to_config())

    # ---- teacher forcing --------------------------------------------------------------------------------------------

    def _states(self, codes: Tensor, hidden: Tensor, prefix: Tensor, visible: Tensor | None) -> Tensor:
        """Last states (1, B, N, D) of codes of which `hidden` (B, N) are not seen."""
        plan, rows = self.plan, torch.arange(self.plan.rows)
        x = self._inputs(codes.masked_fill(hidden, -1), prefix)
        mask = plan.mask_for(visible, rows, plan.rows, plan.steps[0].mask)
        return self._in_layout(self.run_rows(x, rows, mask=mask, condition=self.pooled_condition(prefix)))

    def _in_layout(self, taps: tuple[Tensor, ...]) -> Tensor:
        """States (1, B, N, D) of all positions, whatever the sequence of the order."""
        return self._collect(taps, self.plan.sources[:, self.order.inverse], self.plan.weights)

    def _read(self, states: Tensor) -> Tensor:
        """Logits (B, m, V) of states (1, B, m, D)."""
        return self._head(states, torch.ones(1, states.shape[2]), self._table())

    def logits(self, codes: Tensor, condition: Given | None = None, masked: Tensor | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            codes: LongTensor (B, N) in layout order.
            condition: What the model's condition takes; `None` is the null condition.
            masked: BoolTensor (B, N) or (N,), the positions that are hidden: one forward, in which every position is
                predicted from those that are not (a position that is not hidden sees itself). `None` follows the order
                of the model, one forward a step: a position is predicted from the positions of earlier steps, as for
                every other generator, and the sum of the log-likelihoods is that of the whole sequence in this order.

        Returns:
            (B, N, V) in layout order.

        Raises:
            TokenloomError: If `masked` has another shape or type.
        """
        batch, device = codes.shape[0], codes.device
        condition = self.condition.null(batch, device) if condition is None else condition
        prefix, visible = self._prefix(condition, batch, device), self.condition.visible(condition)
        if masked is not None:
            return self._read(self._states(codes, self._check_masked(masked, codes), prefix, visible))
        step = self.order.step.to(device)
        parts = torch.zeros(batch, len(step), self.vocab_size, dtype=prefix.dtype, device=device)
        for index in range(self.order.num_steps):
            hidden = (step >= index).expand(batch, -1)
            at = (step == index)[:, None]
            parts = torch.where(at, self._read(self._states(codes, hidden, prefix, visible)), parts)
        return parts

    def _check_masked(self, masked: Tensor, codes: Tensor) -> Tensor:
        size = self.order.layout.size
        good = isinstance(masked, Tensor) and masked.dtype == torch.bool
        if not good or tuple(masked.shape) not in ((size,), (1, size), tuple(codes.shape)):
            got = f"{masked.dtype} {tuple(masked.shape)}" if isinstance(masked, Tensor) else repr(masked)
            raise TokenloomError(
                f"masked must be a boolean tensor {tuple(codes.shape)} or ({size},), true where codes are hidden, got {got}."
            )
        return masked.to(codes.device).expand(codes.shape)

    def loss(
        self,
        codes: Tensor,
        condition: Given | None = None,
        masked: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats a hidden token (MaskGIT, eq. 1).

        Args:
            codes: LongTensor (B, N).
            condition: What the model's condition takes. In training mode it is dropped for a share `label_drop` of the
                samples.
            masked: BoolTensor (B, N) or (N,), what is hidden; `None` draws it (`draw_hidden`).
            generator: Source of the draws; `None` is PyTorch's own.
        """
        batch, device = codes.shape[0], codes.device
        if masked is None:
            hidden = draw_hidden(batch, self.order.layout.size, self.rule, device=device, generator=generator)
        else:
            hidden = self._check_masked(masked, codes)
            if not bool(hidden.any()):
                raise TokenloomError(
                    "masked hides nothing, so there is nothing to learn; hide one position at least."
                )
        null = self.condition.null(batch, device)
        if condition is not None and null is not None:
            null = self.condition.null_like(condition, device)
        condition = null if condition is None else condition
        prefix, visible = self._prefix(condition, batch, device), self.condition.visible(condition)
        if self.training and self.rule.label_drop and null is not None:
            drop = torch.rand(batch, 1, 1, device=device, generator=generator) < self.rule.label_drop
            prefix = torch.where(drop, self._prefix(null, batch, device), prefix)
        states = self._states(codes, hidden, prefix, visible)[:, hidden]  # the head runs on hidden rows alone
        return F.cross_entropy(self._read(states[:, None])[0].float(), codes[hidden])

    def forward(
        self,
        codes: Tensor,
        condition: Given | None = None,
        masked: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`loss(...)`, the training forward."""
        return self.loss(codes, condition, masked, generator)

    # ---- generation -------------------------------------------------------------------------------------------------

    def _run(self, run: Run) -> Tensor:
        """The visits. The noise of a position is that of (seed, position + N visit), so that every draw is a new one."""
        order, size = self.order, self.order.layout.size
        codes = torch.zeros(run.batch, size, dtype=torch.long, device=self.device)
        hidden = torch.ones_like(codes, dtype=torch.bool)
        if run.kept is not None:
            codes, hidden = run.kept[0] * run.kept[1], ~run.kept[1]
        unknown, places = hidden.sum(1, keepdim=True), torch.arange(size, device=self.device)
        for index, part in enumerate(order.slices):
            progress = index / max(1, order.num_steps - 1)
            x = self._inputs(run.both(codes.masked_fill(hidden, -1)), run.prefix)
            scale = run.guidance.at(progress, step=index, made=part.start, count=part.stop - part.start)
            logits = self._read(self._guide(self._in_layout(run.stepper(x, index)), scale, run.batch))
            sampling, counter = run.sampling.at(progress), places + size * index
            ids = self._sample(logits, run.seeds, counter, sampling, index)
            score = self._score(logits, ids, run.seeds, counter, sampling, index)
            left = unknown * (size - part.stop) // size
            chosen = surest(score, hidden, left)
            codes, hidden = torch.where(chosen, ids, codes), hidden & ~chosen
            if run.on_step is not None:
                run.on_step(Step(index, order.num_steps, codes, ~hidden.any(0).cpu()))
        return codes

    def _score(
        self, logits: Tensor, ids: Tensor, seeds: Tensor, counter: Tensor, sampling: Sampling, visit: int
    ) -> Tensor:
        """How early a drawn id (B, N) shall stay, float32 (B, N)."""
        if self.rule.reveal == "order":
            return -self.order.inverse.to(ids.device).expand_as(ids).float()
        if self.rule.reveal == "random":
            return random_score(seeds, torch.arange(len(counter), device=counter.device))
        fading = 1 - (visit + 1) / self.order.num_steps
        strength = self.rule.choice_temperature * fading if sampling.temperature != 0 else 0.0
        return confidence_score(logits, ids, seeds, counter, strength)
