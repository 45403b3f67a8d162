"""What a generation is asked for (`Run`, and the checks before it) and what it reports (`Step`).

Errors say what was expected, what came and how to fix it. Knows nothing of embeddings, plans or sampling.

Legend: B samples, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.conditions import Condition, Given
from tokenloom.generators.order import Order
from tokenloom.generators.sampling import Guidance, Sampling

if TYPE_CHECKING:
    from tokenloom.generators.decoding import Stepper


@dataclass(frozen=True)
class Step:
    """What `on_step` receives after each step.

    Attributes:
        index: Step just finished, 0 to num_steps - 1.
        num_steps: Steps in all.
        codes: LongTensor (B, N) in layout order; positions not yet made hold 0. Do not write into it.
        committed: BoolTensor (N,), true where `codes` is final.
    """

    index: int
    num_steps: int
    codes: Tensor
    committed: Tensor


@dataclass(frozen=True)
class Run:
    """One call of `generate`, checked and ready to run.

    Attributes:
        batch: Samples B.
        seeds: LongTensor (B,).
        guidance: The guidance; where it is enabled, the null half runs behind the conditional half.
        sampling: How tokens are drawn.
        prefix: Prefix rows (B or 2B, P, D).
        stepper: The decode rung.
        kept: Codes (B, N) and where to keep them, or `None`.
        on_step: Called after each step.
        limit: Steps to run; `None` runs all.
    """

    batch: int
    seeds: Tensor
    guidance: Guidance
    sampling: Sampling
    prefix: Tensor
    stepper: Stepper
    kept: tuple[Tensor, Tensor] | None
    on_step: Callable[[Step], None] | None
    limit: int | None = None

    def scales(self, order: Order) -> list[float]:
        """The guidance scale of every step of an order."""
        last = max(1, order.num_steps - 1)
        return [
            self.guidance.at(step / last, step=step, made=place.start, count=place.stop - place.start)
            for step, place in enumerate(order.slices)
        ]

    def rows(self, scales: list[float], committed: Sequence[int]) -> list[int]:
        """How many samples each step runs: without the null half where neither it nor a later step needs it."""
        if not self.guidance.enabled:
            return [self.batch] * len(scales)
        last = max((step for step, scale in enumerate(scales) if scale != 1), default=-1)
        return [
            self.batch * (2 if scale != 1 or (step < last and kept) else 1)
            for step, (scale, kept) in enumerate(zip(scales, committed, strict=True))
        ]

    def both(self, codes: Tensor) -> Tensor:
        """Codes (B, N) for all halves that run, (B or 2B, N)."""
        return codes.repeat(2, 1) if self.guidance.enabled else codes


def check_codes(codes: Tensor, size: int, limits: tuple[int, int], name: str = "codes") -> None:
    """Raises unless `codes` are integers (B, size) from the lower limit up to, but without, the upper one."""
    if (
        not isinstance(codes, Tensor)
        or codes.is_floating_point()
        or codes.ndim != 2
        or codes.shape[1] != size
    ):
        got = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(codes)
        raise TokenloomError(f"{name} must be an integer tensor of shape (B, {size}), got {got}.")
    low, high = limits
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) < high:
        raise TokenloomError(
            f"{name} must lie in {low}..{high - 1}, got {int(codes.min())}..{int(codes.max())}."
        )


def check_batch(
    condition: Condition, given: Given | None, batch_size: int | None, device: torch.device
) -> tuple[Given | None, int]:
    """The condition on the device, null where nothing is given, and the number of samples."""
    if given is None:
        batch = 1 if batch_size is None else batch_size
        if not isinstance(batch, int) or batch < 1:
            raise TokenloomError(f"batch_size must be a positive integer, got {batch!r}.")
        return condition.null(batch, device), batch
    condition.check(given)
    if batch_size is not None and batch_size != given.shape[0]:
        raise TokenloomError(
            f"batch_size is {batch_size}, but the condition holds {given.shape[0]} samples; give one of them."
        )
    return given.to(device), given.shape[0]


def check_steps(steps: int | None, most: int) -> None:
    """Raises unless `steps` is `None` or from 1 to `most`; 0 says that the generator visits positions in a way of its own."""
    if steps is None:
        return
    if not most:
        raise TokenloomError("This generator visits positions in a way of its own; leave steps out.")
    if not isinstance(steps, int) or not 1 <= steps <= most:
        raise TokenloomError(f"steps must lie in 1..{most}, got {steps!r}.")


def check_known(
    known: Tensor | None,
    keep: Tensor | None,
    batch: int,
    predicted: Tensor,
    limits: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:
    """Known codes (B, N) and where to keep them (B, N), or `None` where nothing is kept.

    Args:
        known: Codes (B, N) or (1, N).
        keep: BoolTensor (B, N), (1, N) or (N,).
        batch: Number of samples B.
        predicted: BoolTensor (N,), false where the generator predicts nothing, so that codes have to be known.
        limits: As in `check_codes`.
        device: Where the results are wanted.
    """
    size, given = len(predicted), ~predicted
    if known is None and keep is None:
        if bool(given.any()):
            raise TokenloomError(
                f"This generator predicts {int(predicted.sum())} of {size} positions from the others; pass "
                "known codes, and keep them at plan.predicted == False at least."
            )
        return None
    if not isinstance(known, Tensor) or not isinstance(keep, Tensor):
        raise TokenloomError("known and keep belong together: codes (B, N), and which of them to keep.")
    known = known.expand(batch, -1) if known.ndim == 2 and known.shape[0] == 1 else known
    check_codes(known, size, limits, "known")
    keep = keep.expand(batch, -1) if keep.ndim == 1 or keep.shape[0] == 1 else keep
    if known.shape[0] != batch or tuple(keep.shape) != (batch, size) or keep.dtype != torch.bool:
        raise TokenloomError(
            f"known must be ({batch}, {size}) codes and keep a boolean ({batch}, {size}) or ({size},) mask, "
            f"got {tuple(known.shape)} and {keep.dtype} {tuple(keep.shape)}."
        )
    if not bool(keep[:, given.to(keep.device)].all()):
        raise TokenloomError(
            "keep must hold where this generator predicts nothing (plan.predicted == False)."
        )
    return known.to(device), keep.to(device)


def diagnose(module: nn.Module) -> str:
    """Why a module gave values that are not finite: the first damaged parameter, or overflowing activations."""
    dtype = torch.float32
    for name, parameter in module.named_parameters():
        dtype = parameter.dtype
        if not torch.isfinite(parameter).all():
            return f"The weights of {name} are not finite; the checkpoint is damaged."
    return f"All weights are finite, so activations overflowed in {dtype}; run the model in float32."
