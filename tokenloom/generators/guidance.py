"""Classifier-free guidance: how far a step leaves the unconditional prediction, and the mix of the two.

Knows numbers, steps and progress; knows nothing of models, tokens or noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name

Schedule = Callable[[float], float]  # progress in [0, 1] -> value

_GUIDANCE = ("constant", "linear", "steps")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `guide` mixes conditional and unconditional logits with the scale of the step.

    Attributes:
        scale: The scale g; 1 is no guidance, and models then skip the unconditional forward.
        schedule: "constant", "linear" (from `start` at progress 0 to `scale` at progress 1), "steps" (`start` at step 0,
            `scale` at step 1, and on in equal strides), or a function of progress that returns the scale itself
            (`scale` and `start` then keep their defaults).
        start: Scale at the first step of the schedules "linear" and "steps".
        interval: Progress range (both ends included) in which guidance is on; outside the scale is 1.
        tokens: Guidance is on only while at most this many tokens exist; `None` is no limit.
        steps: Guidance is on only in the first `steps` steps; `None` is no limit.
        opening: Guidance is on in the first step that makes several tokens, whatever the limits say.

    Raises:
        TokenloomError: For values that are not finite, or an interval outside [0, 1].

    Example:
        >>> Guidance(4.0, schedule="linear").at(0.5)
        2.5
    """

    scale: float = 1.0
    schedule: Literal["constant", "linear", "steps"] | Schedule = "constant"
    start: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    tokens: int | None = None
    steps: int | None = None
    opening: bool = False

    def __post_init__(self) -> None:
        """Checks the fields and makes them plain and hashable."""
        object.__setattr__(self, "scale", finite("guidance scale", self.scale))
        object.__setattr__(self, "start", finite("guidance start", self.start))
        if callable(self.schedule):
            if (self.scale, self.start) != (1.0, 1.0):
                raise TokenloomError(
                    f"A guidance function returns the scale itself, got also scale={self.scale}, start={self.start}. "
                    "Leave both out."
                )
        elif self.schedule not in _GUIDANCE:
            raise unknown_name("guidance schedule", self.schedule, _GUIDANCE)
        for name, limit in (("tokens", self.tokens), ("steps", self.steps)):
            if limit is not None and (not isinstance(limit, int) or limit < 0):
                raise TokenloomError(f"Guidance {name} must be a whole number from 0 up, got {limit!r}.")
        try:
            low, high = (float(end) for end in self.interval)
        except (TypeError, ValueError):
            raise TokenloomError(
                f"A guidance interval is a pair such as (0.0, 1.0), got {self.interval!r}."
            ) from None
        if not 0 <= low <= high <= 1:
            raise TokenloomError(
                f"A guidance interval must satisfy 0 <= low <= high <= 1, got {self.interval!r}."
            )
        object.__setattr__(self, "interval", (low, high))

    @classmethod
    def of(cls, value: float | Schedule | Guidance) -> Guidance:
        """Takes a scale, a function of progress, or a `Guidance` (returned as it is)."""
        if isinstance(value, Guidance):
            return value
        return cls(schedule=value) if callable(value) else cls(scale=value)

    @property
    def enabled(self) -> bool:
        """Whether any step may need the unconditional branch."""
        if callable(self.schedule):
            return True
        return self.scale != 1.0 or (self.schedule != "constant" and self.start != 1.0)

    def at(self, progress: float, *, step: int = 0, made: int = 0, count: int = 1) -> float:
        """The scale of a step; 1.0 means that the unconditional branch is not needed.

        Args:
            progress: In [0, 1], step / (steps - 1).
            step: Index of the step, for `steps` and the schedule "steps".
            made: How many tokens exist before the step, for `tokens`.
            count: How many tokens the step makes, for `opening`.

        Raises:
            TokenloomError: If progress is out of range, or a guidance function returns something that is not finite.
        """
        progress = check_progress(progress)
        if not self.interval[0] <= progress <= self.interval[1]:
            return 1.0
        over = (self.tokens is not None and made > self.tokens) or (
            self.steps is not None and step >= self.steps
        )
        if over and not (self.opening and count > 1 and made == step):
            return 1.0
        if callable(self.schedule):
            return finite("guidance scale", self.schedule(progress))
        if self.schedule == "linear":
            return self.start + (self.scale - self.start) * progress
        if self.schedule == "steps":
            return self.start + (self.scale - self.start) * step
        return self.scale


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Mixes two predictions: ``uncond + scale * (cond - uncond)``.

    Args:
        cond: Conditional logits or velocities, any shape, finite (forbid ids after guiding, not before).
        uncond: Unconditional ones, same shape.
        scale: The guidance scale; 1 returns `cond`.

    Returns:
        Same shape; at least float32.
    """
    if cond.dtype in (torch.bfloat16, torch.float16):
        cond = cond.float()
    if scale == 1:
        return cond
    uncond = uncond.to(cond.dtype)
    return uncond + scale * (cond - uncond)


def finite(name: str, value: object) -> float:
    """Checks a finite number."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TokenloomError(f"The {name} must be a number, got {value!r}.") from None
    if not math.isfinite(number):
        raise TokenloomError(f"The {name} must be finite, got {value!r}.")
    return number


def check_progress(value: object) -> float:
    """Checks a number in [0, 1]."""
    progress = finite("progress", value)
    if not 0 <= progress <= 1:
        raise TokenloomError(f"Progress must be in [0, 1], got {value!r}. Pass step / (steps - 1).")
    return progress
