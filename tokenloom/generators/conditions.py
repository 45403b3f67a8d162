"""Conditions: what a generator is told before the first token, as rows of a prefix.

Each condition embeds a batch into (B, P, D) rows and knows its null value, which trains and runs the unguided half.
Knows nothing of codes, orders or prompts (words arrive as ids).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name


@dataclass(frozen=True, eq=False)
class CaptionFeatures:
    """Features of a caption from a text encoder, for generators with the condition "features".

    Attributes:
        features: (B, P, F), padded on the left.
        mask: Boolean or 0/1 (B, P), true for real words; `None` = all are real.
        valid: Boolean or 0/1 (B,), false for samples that do not count in the loss; `None` = all count.

    Example:
        >>> CaptionFeatures(torch.zeros(2, 4, 8), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).shape
        torch.Size([2, 4, 8])
    """

    features: Tensor
    mask: Tensor | None = None
    valid: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape (B, P, F) of the features."""
        return self.features.shape

    def to(self, device: torch.device) -> CaptionFeatures:
        """The same features on another device."""
        mask, valid = (
            None if value is None else value.to(device, torch.bool) for value in (self.mask, self.valid)
        )
        return CaptionFeatures(self.features.to(device), mask, valid)


@dataclass(frozen=True, eq=False)
class PictureWords:
    """Features of a picture and the words of a phrase, for generators with the condition "picture".

    Attributes:
        features: (B, P, F).
        words: LongTensor (B, T), 0 = no word.
    """

    features: Tensor
    words: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape (B, P, F) of the features."""
        return self.features.shape

    def to(self, device: torch.device) -> PictureWords:
        """The same on another device."""
        return PictureWords(self.features.to(device), self.words.to(device))


Given = Tensor | CaptionFeatures | PictureWords
"""What a condition may be given as."""


class Condition(nn.Module):
    """Base class.

    Attributes:
        length: Number of prefix rows P.
    """

    length: int

    def null(self, batch: int, device: torch.device) -> Given | None:
        """The condition that says nothing, for `batch` samples."""
        raise TokenloomError(f"{type(self).__name__} does not define null(); override it.")

    def null_like(self, condition: Any, device: torch.device) -> Any:
        """The null condition that stands beside `condition` in guidance."""
        return self.null(condition.shape[0], device)

    def check(self, condition: Any) -> None:
        """Raises a clear error unless `condition` is usable."""

    def visible(self, condition: Any) -> Tensor | None:
        """BoolTensor (B, P): which prefix rows other rows may look at; `None` where nothing is hidden."""
        return None

    def counted(self, condition: Any) -> Tensor | None:
        """BoolTensor (B,): which samples count in the loss; `None` where all do."""
        return None

    def forward(self, condition: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Prefix rows (B, P, D)."""
        raise TokenloomError(f"{type(self).__name__} does not define forward(); override it.")

    def rows(
        self, condition: Any, batch: int, device: torch.device, table: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Prefix rows (B, P, D); `table` embeds rows of the generator's token table, for conditions written in it."""
        return self(condition, batch, device)


class NoCondition(Condition):
    """One learned start row, or no row at all (length 0)."""

    def __init__(self, width: int, length: int = 1) -> None:
        super().__init__()
        if length not in (0, 1):
            raise TokenloomError(f"The condition 'none' has 0 or 1 rows, got {length!r}.")
        self.length = length
        if length:
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

    def rows(
        self, condition: Any, batch: int, device: torch.device, table: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The start row for every sample, or no row in the dtype of the token table."""
        if self.length:
            return self(condition, batch, device)
        return table(torch.zeros(batch, 0, dtype=torch.long, device=device))


class ClassCondition(Condition):
    """A class label, LongTensor (B,); the label `num_classes` is the null class, unless `null_class` is false."""

    def __init__(self, num_classes: int, width: int, null_class: bool = True) -> None:
        super().__init__()
        self.length, self.num_classes, self.null_class = 1, num_classes, null_class
        self.table = nn.Embedding(num_classes + null_class, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def null(self, batch: int, device: torch.device) -> Tensor:
        """The null class."""
        if not self.null_class:
            raise TokenloomError(
                "This generator was trained without a null class: give labels, and leave guidance at 1."
            )
        return torch.full((batch,), self.num_classes, device=device)

    def check(self, condition: Any) -> None:
        """Labels must be integers in 0..num_classes."""
        if not isinstance(condition, Tensor) or condition.ndim != 1 or condition.is_floating_point():
            raise TokenloomError(
                f"Class labels must be an integer tensor of shape (B,), got {describe(condition)}."
            )
        last = self.num_classes - (not self.null_class)
        if condition.numel() and not 0 <= int(condition.min()) <= int(condition.max()) <= last:
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
                f"Word ids must be an integer tensor of shape (B, {self.length}), got {describe(condition)}."
            )
        if condition.numel() and not 0 <= int(condition.min()) <= int(condition.max()) < self.vocabulary:
            raise TokenloomError(
                f"Word ids must lie in 0..{self.vocabulary - 1}; were they made by another vocabulary?"
            )

    def forward(self, condition: Tensor, batch: int, device: torch.device) -> Tensor:  # type: ignore[override]
        """One row a word."""
        return self.project(self.table(condition)) + self.place


class TokenCondition(Condition):
    """Ids (B, C), or (B,) if C is 1, written in the generator's own token table, then its start token (NBP).

    The table begins with special rows: the start token, the learned rows of the plan, then these ids. An id of -1 says
    nothing; its row is `absent`.

    Args:
        vocabulary: Number of ids.
        ids: Ids a condition C.
        offset: Row of the id 0 in the token table.
        width: Model width D.
    """

    absent: Tensor

    def __init__(self, vocabulary: int, ids: int, offset: int, width: int) -> None:
        super().__init__()
        self.vocabulary, self.ids, self.offset, self.length = vocabulary, ids, offset, ids + 1
        self.register_buffer("absent", torch.randn(ids, width) / width**0.5)

    def null(self, batch: int, device: torch.device) -> Tensor:
        """Nothing in every place."""
        return torch.full((batch, self.ids), -1, device=device)

    def check(self, condition: Any) -> None:
        """Ids must be integers (B, C) inside the vocabulary, or -1."""
        good = isinstance(condition, Tensor) and not condition.is_floating_point()
        if not good or condition.shape[1:] != ((self.ids,) if condition.ndim == 2 or self.ids != 1 else ()):
            shape = "(B,)" if self.ids == 1 else f"(B, {self.ids})"
            raise TokenloomError(
                f"The condition must be an integer tensor of shape {shape}, got {describe(condition)}."
            )
        if condition.numel() and not -1 <= int(condition.min()) <= int(condition.max()) < self.vocabulary:
            raise TokenloomError(
                f"Condition ids must lie in 0..{self.vocabulary - 1} (-1 = none), "
                f"got {int(condition.min())}..{int(condition.max())}."
            )

    def rows(
        self, condition: Tensor, batch: int, device: torch.device, table: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """One row an id, then the start token."""
        ids = condition.reshape(batch, self.ids)
        rows = torch.where(ids[..., None] < 0, self.absent, table(ids.clamp(min=0) + self.offset))
        return torch.cat((rows, table(ids.new_zeros(batch, 1))), dim=1)


class FeatureCondition(Condition):
    """Caption features (B, P, F) through a two-layer perceptron (LlamaGen and NAR text to image).

    Rows of padding are seen by no row but themselves. The null condition is `absent`, under the same mask.

    Args:
        features: Width F of the features.
        length: Rows P.
        width: Model width D.
    """

    absent: Tensor

    def __init__(self, features: int, length: int, width: int) -> None:
        super().__init__()
        self.features, self.length = features, length
        self.up = nn.Linear(features, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)
        self.register_buffer("absent", torch.randn(length, features) / features**0.5)

    def null(self, batch: int, device: torch.device) -> CaptionFeatures:
        """No caption, nothing hidden."""
        return CaptionFeatures(self.absent.expand(batch, -1, -1).to(device))

    def null_like(self, condition: CaptionFeatures, device: torch.device) -> CaptionFeatures:
        """No caption, under the mask of this one."""
        return CaptionFeatures(self.null(condition.shape[0], device).features, condition.mask)

    def check(self, condition: Any) -> None:
        """Features must be floating and (B, P, F), masks (B, P) with a true last column."""
        if not isinstance(condition, CaptionFeatures):
            raise TokenloomError(
                f"This generator takes CaptionFeatures(features, mask), got {describe(condition)}."
            )
        features, mask, valid = condition.features, condition.mask, condition.valid
        if not features.is_floating_point() or features.ndim != 3 or features.shape[1:] != self.absent.shape:
            raise TokenloomError(
                f"Caption features must be floating, of shape (B, {self.length}, {self.features}), "
                f"got {describe(features)}."
            )
        if mask is not None and mask.shape != features.shape[:2]:
            raise TokenloomError(f"The mask must be {tuple(features.shape[:2])}, got {tuple(mask.shape)}.")
        if valid is not None and valid.shape != features.shape[:1]:
            raise TokenloomError(f"valid must be {tuple(features.shape[:1])}, got {tuple(valid.shape)}.")
        if mask is not None and not bool(mask[:, -1].all()):
            raise TokenloomError(
                "Captions are padded on the left, but the last column of the mask has zeros."
            )

    def visible(self, condition: CaptionFeatures) -> Tensor | None:
        """The mask, unless it hides nothing."""
        if condition.mask is None or bool(condition.mask.all()):
            return None
        return condition.mask.bool()

    def counted(self, condition: CaptionFeatures | None) -> Tensor | None:
        """`valid`, as LlamaGen trains: captions whose features are missing teach nothing."""
        return None if condition is None or condition.valid is None else condition.valid.bool()

    def forward(self, condition: CaptionFeatures, batch: int, device: torch.device) -> Tensor:  # type: ignore[override]
        """One row a word."""
        hidden = self.up(condition.features.to(self.up.weight.dtype))
        return self.down(F.gelu(hidden, approximate="tanh"))


def describe(value: Any) -> str:
    """A value in an error message: dtype and shape of a tensor, else its repr."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def make_condition(options: Mapping[str, Any] | None, width: int) -> Condition:
    """Builds a condition from {"kind": "none" | "class" | "words" | "features" | "tokens" | "picture", ...}."""
    from tokenloom.generators.picture_condition import PictureCondition

    values = dict(options or {"kind": "none"})
    kinds: dict[str, type[Condition]] = {
        "none": NoCondition,
        "class": ClassCondition,
        "words": WordCondition,
        "features": FeatureCondition,
        "tokens": TokenCondition,
        "picture": PictureCondition,
    }
    kind = values.pop("kind", "none")
    if kind not in kinds:
        raise unknown_name("condition kind", kind, kinds)
    check_options(kinds[kind], ["width", *values], f"option of the condition {kind!r}")
    return kinds[kind](**{**values, "width": width})
