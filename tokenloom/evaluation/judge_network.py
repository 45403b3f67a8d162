"""The judge's network: a narrow residual picture encoder, a bag-of-words text encoder, and a style
classifier.

A picture and a name are mapped to one unit sphere; their cosine says how well they fit. The style is
classified from the same picture features. The network has at most 1.5 million parameters. Knows nothing of
data folders, of training, or of generators.

Shapes: B pictures, L texts, C concept dimensions, S styles, W words; pictures are float (B, 3, 64, 64) in
    [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.pictures import words_of


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Everything that fixes a judge's shapes.

    Attributes:
        words: Known words; a text is the set of its known words.
        styles: Style names, the classes of the style head.
        widths: Channels at 1/2, 1/4, 1/8 and 1/16 of the picture's size.
        dim: Size of the space that pictures and names share.
        image_size: Rows and columns of a picture.
    """

    words: tuple[str, ...]
    styles: tuple[str, ...]
    widths: tuple[int, ...] = (24, 48, 96, 160)
    dim: int = 112
    image_size: int = 64

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; `JudgeConfig.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JudgeConfig:
        """Reads what `to_dict` wrote."""
        try:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain)
        except TypeError as error:
            raise TokenloomError(
                f"Expected a judge configuration, got keys {sorted(values)} ({error}). Train the judge anew."
            ) from error


@dataclass(frozen=True)
class Judgement:
    """What the judge sees in a batch of pictures.

    Attributes:
        embedding: float32 (B, C), unit length, comparable with `JudgeNetwork.texts`.
        style_logits: float32 (B, S).
        features: float32 (B, F), unit length, before the heads: what distances between pictures are measured
            in.
    """

    embedding: Tensor
    style_logits: Tensor
    features: Tensor = field(repr=False)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation and a shortcut; the first may halve the size."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class StyleNetwork(nn.Module):
    """Classifies the style from small neighbourhoods: statistics of features that see at most 17 x 17 pixels.

    It has its own few layers, because the picture encoder learns to ignore the style, and a classifier that
    sees the whole picture learns by heart which styles a concept was trained in.
    """

    def __init__(self, styles: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.Conv2d(48, 48, 3, 1, 1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(144, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, styles))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, S) of pictures (B, 3, H, W) in [-1, 1], of any size."""
        hidden = self.body(pictures.contiguous(memory_format=torch.channels_last)).flatten(2)
        return self.head(torch.cat([hidden.mean(2), hidden.std(2), hidden.amax(2)], dim=1))


class JudgeNetwork(nn.Module):
    """Picture encoder, text encoder and style classifier."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.word_index = {word: index for index, word in enumerate(config.words)}
        widths = config.widths
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 5, 2, 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        for inputs, outputs in pairwise(widths):
            layers += [ResidualBlock(inputs, outputs, 2), ResidualBlock(outputs, outputs, 1)]
        self.body = nn.Sequential(*layers)
        self.picture_head = nn.Linear(2 * widths[-1], config.dim)
        self.style = StyleNetwork(len(config.styles))
        self.word_vectors = nn.EmbeddingBag(len(config.words) + 1, config.dim, mode="mean")
        self.scale = nn.Parameter(torch.tensor(2.7))
        nn.init.normal_(self.word_vectors.weight, std=1.0)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pictures: Tensor) -> Judgement:
        """Looks at pictures: float (B, 3, H, W) in [-1, 1]."""
        hidden = self.features(pictures)
        embedding = F.normalize(self.picture_head(hidden), dim=1)
        return Judgement(embedding, self.style(pictures), F.normalize(hidden, dim=1))

    def features(self, pictures: Tensor) -> Tensor:
        """What is seen before any head: (B, 3, H, W) to means and maxima (B, F) over the last map."""
        hidden = self.body(pictures.contiguous(memory_format=torch.channels_last)).flatten(2)
        return torch.cat([hidden.mean(2), hidden.amax(2)], dim=1)

    def texts(self, names: Sequence[str]) -> Tensor:
        """Unit vectors (L, C) of L names; word order and unknown words do not count."""
        ids, offsets = self.tokenize(names)
        return F.normalize(self.word_vectors(ids, offsets), dim=1)

    def tokenize(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Flat word ids and the place where each text begins; a text without a known word is one unknown
        word.
        """
        ids: list[int] = []
        offsets: list[int] = []
        unknown = len(self.config.words)
        for name in names:
            offsets.append(len(ids))
            known = [self.word_index[word] for word in words_of(name) if word in self.word_index]
            ids += known or [unknown]
        device = self.word_vectors.weight.device
        return torch.tensor(ids, device=device), torch.tensor(offsets, device=device)
