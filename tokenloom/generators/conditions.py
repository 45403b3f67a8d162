"""Conditions: what a generator is told before the first token, as rows of a prefix.

Each condition embeds a batch into (B, P, D) rows and knows its null value, which trains and runs the unguided half.
Knows nothing of codes, orders or prompts (words arrive as ids).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name


class Condition(nn.Module):
    """Base class.

    Attributes:
        length: Number of prefix rows P.
    """

    length: int

    def null(self, batch: int, device: torch.device) -> Tensor | None:
        """The condition that says nothing, for `batch` samples."""
        raise TokenloomError(f"{type(self).__name__} does not define null(); override it.")

    def check(self, condition: Any) -> None:
        """Raises a clear error unless `condition` is usable."""

    def forward(self, condition: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Prefix rows (B, P, D)."""
        raise TokenloomError(f"{type(self).__name__} does not define forward(); override it.")


class NoCondition(Condition):
    """One learned start row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.length = 1
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)

    def null(self, batch: int, device: torch.device) -> None:
        """Nothing is the only condition."""
        return

    def check(self, condition: Any) -> None:
        """Refuses any condition."""
        if condition is not None:
            raise TokenloomError(
                "This generator is unconditional; call generate(batch_size=...) without a condition."
            )

    def forward(self, condition: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """The start row for every sample."""
        return self.start.expand(batch, -1, -1)


class ClassCondition(Condition):
    """A class label, LongTensor (B,); the label `num_classes` is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.length, self.num_classes = 1, num_classes
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def null(self, batch: int, device: torch.device) -> Tensor:
        """The null class."""
        return torch.full((batch,), self.num_classes, device=device)

    def check(self, condition: Any) -> None:
        """Labels must be integers in 0..num_classes."""
        if not isinstance(condition, Tensor) or condition.ndim != 1 or condition.is_floating_point():
            raise TokenloomError(
                f"Class labels must be an integer tensor of shape (B,), got {_describe(condition)}."
            )
        if condition.numel() and not 0 <= int(condition.min()) <= int(condition.max()) <= self.num_classes:
            raise TokenloomError(
                f"Class labels must lie in 0..{self.num_classes - 1} ({self.num_classes} = no class), "
                f"got {int(condition.min())}..{int(condition.max())}."
            )

    def forward(self, condition: Tensor, batch: int, device: torch.device) -> Tensor:  # type: ignore[override]
        """One row a sample."""
        return self.table(condition)[:, None]


class WordCondition(Condition):
    """Word ids, LongTensor (B, P), 0 = no word; all zeros is the null condition.

    Args:
        vocabulary: Number of word ids.
        length: Words a caption P.
        width: Model width D.
        factor: Width of the word table before it is projected to D; keeps large vocabularies small.
    """

    def __init__(self, vocabulary: int, length: int, width: int, factor: int = 64) -> None:
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.table = nn.Embedding(vocabulary, factor)
        self.project = nn.Linear(factor, width)
        self.place = nn.Parameter(torch.randn(1, length, width) * 0.02)
        nn.init.normal_(self.table.weight, std=1.0)
        nn.init.normal_(self.project.weight, std=0.02 / factor**0.5 * 4)
        nn.init.zeros_(self.project.bias)

    def null(self, batch: int, device: torch.device) -> Tensor:
        """No words."""
        return torch.zeros(batch, self.length, dtype=torch.long, device=device)

    def check(self, condition: Any) -> None:
        """Ids must be integers (B, P) inside the vocabulary."""
        good = isinstance(condition, Tensor) and not condition.is_floating_point()
        if not good or condition.ndim != 2 or condition.shape[1] != self.length:
            raise TokenloomError(
                f"Word ids must be an integer tensor of shape (B, {self.length}), got {_describe(condition)}."
            )
        if condition.numel() and not 0 <= int(condition.min()) <= int(condition.max()) < self.vocabulary:
            raise TokenloomError(
                f"Word ids must lie in 0..{self.vocabulary - 1}; were they made by another vocabulary?"
            )

    def forward(self, condition: Tensor, batch: int, device: torch.device) -> Tensor:  # type: ignore[override]
        """One row a word."""
        return self.project(self.table(condition)) + self.place


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def make_condition(options: Mapping[str, Any] | None, width: int) -> Condition:
    """Builds a condition from {"kind": "none" | "class" | "words", ...options}."""
    values = dict(options or {"kind": "none"})
    kinds = {"none": NoCondition, "class": ClassCondition, "words": WordCondition}
    kind = values.pop("kind", "none")
    if kind not in kinds:
        raise unknown_name("condition kind", kind, kinds)
    check_options(kinds[kind], ["width", *values], f"option of the condition {kind!r}")
    return kinds[kind](**{**values, "width": width})
