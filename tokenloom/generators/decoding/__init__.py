"""Decode rungs: different ways to compute the hidden states of a step, all giving the same tokens.

A rung is a class built from (generator, prefix, visible) whose call (x, step) returns the tapped hidden states of the
rows fed at that step; `visible` (B, P) says which prefix rows may be looked at, `None` means all. Knows nothing of sampling or guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from tokenloom.errors import unknown_name
from tokenloom.generators.decoding.cached import CachedStepper
from tokenloom.generators.decoding.reference import ReferenceStepper

if TYPE_CHECKING:
    from tokenloom.generators.base import Generator


class Stepper(Protocol):
    """Hidden states of one step."""

    def __call__(self, x: Tensor, step: int) -> tuple[Tensor, ...]:
        """Takes embeddings (B, n, D) of the rows fed at `step`; returns one (B, n, D) a tap."""
        ...


RUNGS: dict[str, Callable[[Generator, Tensor, Tensor | None], Stepper]] = {
    "reference": ReferenceStepper,
    "cached": CachedStepper,
}


def make(name: str, generator: Generator, prefix: Tensor, visible: Tensor | None = None) -> Stepper:
    """Builds the rung of a name for one generation; "auto" is the fastest one."""
    chosen = "cached" if name == "auto" else name
    if chosen not in RUNGS:
        raise unknown_name("decode rung", name, ["auto", *RUNGS])
    return RUNGS[chosen](generator, prefix, visible)
