"""The condition of models that look at a picture and read a phrase: rows of picture features, then rows of words.

Knows features and word ids; knows nothing of pixels, encoders or phrases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.conditions import Condition, PictureWords, WordCondition, describe
from tokenloom.layers import make_norm


class PictureCondition(Condition):
    """`PictureWords`: features of a picture (B, P, F) and word ids (B, T); no words are the null condition beside a picture.

    Args:
        rows: Rows of picture features P.
        features: Width of a feature F.
        vocabulary: Number of word ids.
        words: Words a phrase T.
        width: Model width D.
        factor: Width of the word table.
    """

    def __init__(
        self, rows: int, features: int, vocabulary: int, words: int, width: int, factor: int = 64
    ) -> None:
        super().__init__()
        self.picture_rows, self.features, self.length = rows, features, rows + words
        self.words = WordCondition(vocabulary, words, width, factor)
        self.norm = make_norm("layer", features, 1e-5, True)
        self.project = nn.Linear(features, width)
        self.place = nn.Parameter(torch.randn(1, rows, width) * 0.02)

    def null(self, batch: int, device: torch.device) -> PictureWords:
        """No words about a picture of zeros."""
        empty = torch.zeros(batch, self.picture_rows, self.features, device=device)
        return PictureWords(empty, self.words.null(batch, device))

    def null_like(self, condition: PictureWords, device: torch.device) -> PictureWords:
        """No words about the same picture."""
        return PictureWords(condition.features, torch.zeros_like(condition.words))

    def check(self, condition: Any) -> None:
        """Features must be floating (B, P, F), words integers (B, T)."""
        if not isinstance(condition, PictureWords):
            raise TokenloomError(
                f"This generator takes PictureWords(features, words), got {describe(condition)}."
            )
        features, words = condition.features, condition.words
        wanted = (self.picture_rows, self.features)
        if not features.is_floating_point() or features.ndim != 3 or tuple(features.shape[1:]) != wanted:
            raise TokenloomError(
                f"Picture features must be floating, of shape (B, {wanted[0]}, {wanted[1]}), got {describe(features)}."
            )
        self.words.check(words)
        if words.shape[0] != features.shape[0]:
            raise TokenloomError(
                f"There are {features.shape[0]} pictures and {words.shape[0]} phrases; repeat the features of a picture for "
                "each of its phrases."
            )

    def look(self, features: Tensor) -> Tensor:
        """The rows (B, P, D) of a picture's features (B, P, F)."""
        return self.project(self.norm(features.to(self.project.weight.dtype))) + self.place

    def forward(self, condition: PictureWords, batch: int, device: torch.device) -> Tensor:  # type: ignore[override]
        """The rows of the picture, then one row a word."""
        words = self.words(condition.words, batch, device)
        return torch.cat((self.look(condition.features), words), dim=1)
