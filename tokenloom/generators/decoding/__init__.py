"""Decode rungs: different ways to compute the hidden states of a step, all giving the same tokens.

A rung is a class built from (generator, prefix, visible) whose call (x, step) returns the tapped hidden states of the
rows fed at that step; `visible` (B, P) says which prefix rows may be looked at, `None` means all. A step that is refined
calls it several times and commits once. Knows nothing of sampling or guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tokenloom.errors import unknown_name
from tokenloom.generators.decoding.cached import CachedStepper
from tokenloom.generators.decoding.reference import ReferenceStepper
from tokenloom.generators.decoding.rows import RowModel
from tokenloom.generators.memory import check_memory
from tokenloom.generators.parallel.options import Parallel

if TYPE_CHECKING:
    from tokenloom.generators.arguments import Run


class Stepper(Protocol):
    """Hidden states of one step."""

    def __call__(
        self, x: Tensor, step: int, *, condition: Tensor | None = None, commit: bool = True
    ) -> tuple[Tensor, ...]:
        """Hidden states of the rows fed at a step.

        Args:
            x: (B, n, D) embeddings of these rows; without `commit` also of the first samples alone.
            step: Index of the step.
            condition: (B, n or 1, C) adaLN condition of these rows; `None` means that of the prefix.
            commit: Whether later steps see these rows as they are now.

        Returns:
            One (B, n, D) a tap.
        """
        ...


def _compiled(generator: RowModel, prefix: Tensor, visible: Tensor | None, form: str = "float32") -> Stepper:
    from tokenloom.generators.compiled import CompiledStepper

    return CompiledStepper.of(generator, prefix, visible, form)


def _parallel(generator: RowModel, prefix: Tensor, visible: Tensor | None, options: Parallel | str) -> Any:
    from tokenloom.generators.parallel.stepper import ParallelStepper  # it imports the arguments of a run

    return ParallelStepper(generator, prefix, visible, options)


RUNGS: dict[str, Callable[[RowModel, Tensor, Tensor | None], Stepper]] = {
    "reference": ReferenceStepper,
    "cached": CachedStepper,
    "compiled": _compiled,
    "compiled-int8": partial(_compiled, form="int8"),
    "compiled-w8a8": partial(_compiled, form="w8a8"),
}


def make(
    name: str | Parallel,
    generator: RowModel,
    prefix: Tensor,
    visible: Tensor | None = None,
    guided: bool | None = None,
) -> Stepper:
    """Builds the rung of a name for one generation; "auto" is `cached`.

    Args:
        name: A name of `RUNGS`, "auto", "parallel", or a `Parallel` with options.
        generator: The generator.
        prefix: Prefix rows (B, P, D) of all halves.
        visible: Which of them may be looked at, (B, P), or `None`.
        guided: Whether half of them is the null half, for generators whose memory is estimated; `None`: no estimate.

    Raises:
        TokenloomError: For an unknown name, or if the generation does not fit into memory.
    """
    build: Callable[[RowModel, Tensor, Tensor | None], Stepper]
    if isinstance(name, Parallel) or name == "parallel":
        build = partial(_parallel, options=name)
    elif name in ("auto", *RUNGS):
        build = RUNGS["cached" if name == "auto" else name]
    else:
        raise unknown_name("decode rung", name, ["auto", *RUNGS, "parallel"])
    if guided is not None:
        check_memory(generator, max(1, len(prefix) // (2 if guided else 1)), guided)
    return build(generator, prefix, visible)


def run(generator: Any, run: Run) -> Tensor:
    """Codes (B, N) of a generation: by the generator's own loop, or by what the rung makes of it."""
    whole = getattr(run.stepper, "run", None)
    return generator._run(run) if whole is None else whole(generator, run)
