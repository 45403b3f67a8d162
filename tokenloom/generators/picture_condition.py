"""The condition of models that look at a picture and read a phrase: rows of picture features, then rows of words.

Knows features and word ids; knows nothing of pixels, encoders or phrases.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.conditions import Condition, PictureWords, WordCondition, describe
from tokenloom.layers import make_norm

_LEAST = 0.02
"""A chance below which places do not differ: words that no place names, as "left" or "all", leave the others to choose."""


class PictureCondition(Condition):
    """`PictureWords`: features of a picture (B, P, F) and word ids (B, T); no words are the null condition beside a picture.

    Args:
        rows: Rows of picture features P.
        features: Width of a feature F.
        vocabulary: Number of word ids.
        words: Words a phrase T.
        width: Model width D.
        factor: Width of the word table.
        pointing: Whether every word also tells where the picture shows it and what is there: its row gets, projected, the
            chance of every place to name the word, and the mean of the places that name this word and those before it. What
            places name has a loss of its own (`named`), so the model need not find out by its answers what words look like.
    """

    def __init__(
        self,
        rows: int,
        features: int,
        vocabulary: int,
        words: int,
        width: int,
        factor: int = 64,
        pointing: bool = False,
    ) -> None:
        super().__init__()
        self.picture_rows, self.features, self.length = rows, features, rows + words
        self.words = WordCondition(vocabulary, words, width, factor)
        self.norm = make_norm("layer", features, 1e-5, True)
        self.project = nn.Linear(features, width)
        self.place = nn.Parameter(torch.randn(1, rows, width) * 0.02)
        self.pointing = pointing
        if pointing:
            self.name = nn.Linear(features, factor)
            self.name_bias = nn.Parameter(torch.zeros(vocabulary))
            self.point = nn.Linear(rows, width, bias=False)
            self.see = nn.Linear(width, width, bias=False)

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

    def named(self, features: Tensor) -> Tensor:
        """Logits (B, P, W) of the words that name what each place shows; id 0 is "nothing". Only with `pointing`."""
        table = self.words.table.weight
        said = self.name(features.to(table.dtype)) / table.shape[1] ** 0.5
        return F.linear(said, table, self.name_bias)

    def say(self, features: Tensor, words: Tensor) -> Tensor:
        """The rows (B n, T, D) of words (B n, T): n phrases about each of the pictures of features (B, P, F)."""
        rows = self.words(words, len(words), words.device)
        if not self.pointing:
            return rows
        chances = self.named(features).softmax(-1)
        asked = words.view(len(features), 1, -1).expand(-1, self.picture_rows, -1)
        shown = chances.gather(2, asked).transpose(1, 2).reshape(*words.shape, -1)  # (B n, T, P)
        there = (words > 0)[..., None]
        both = ((shown + _LEAST).log() * there).cumsum(1).softmax(-1)  # places that name all words so far
        seen = both.unflatten(0, (len(features), -1)) @ self.look(features)[:, None]
        seen = self.see(seen.flatten(0, 1)) * (there.cumsum(1) > 0)
        return rows + self.point(shown * there) + seen

    def forward(self, condition: PictureWords, batch: int, device: torch.device) -> Tensor:  # type: ignore[override]
        """The rows of the picture, then one row a word."""
        words = self.say(condition.features, condition.words)
        return torch.cat((self.look(condition.features), words), dim=1)
