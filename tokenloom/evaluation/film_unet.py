"""The baseline of segmentation by phrase: a U-Net whose channels are scaled and shifted by the phrase (FiLM).

Perez et al. 2018 (FiLM), Ronneberger et al. 2015 (U-Net). It writes a logit a pixel: no codes, no boxes, no prefixes.
Knows pixels and word ids; knows nothing of tokenizers of masks or generators.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from tokenloom import media
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.text import WordTokenizer


class _FilmBlock(nn.Module):
    """Two convolutions with a residual; the phrase scales and shifts the channels between them."""

    def __init__(self, given: int, channels: int, phrase: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(given, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.film = nn.Linear(phrase, 2 * channels)
        self.skip = nn.Identity() if given == channels else nn.Conv2d(given, channels, 1)

    def forward(self, x: Tensor, phrase: Tensor) -> Tensor:
        scale, shift = self.film(phrase)[:, :, None, None].chunk(2, dim=1)
        h = F.gelu(self.norm1(self.first(x)) * (1 + scale) + shift)
        return self.skip(x) + F.gelu(self.norm2(self.second(h)))


class FilmUNet(ModelMixin, ConfigMixin):
    """Logits (B, S, S) of pictures and phrases.

    Args:
        image_size: Side S.
        channels: Channels of each level, from the finest on, multiples of 8; each level halves the side.
        phrase: Width of a phrase.
        vocabulary: Number of word ids.
        words: Words a phrase T.
        patch: Side of the squares of pixels that the finest level has in its channels: the network computes on a grid of
            S / patch places and writes patch x patch logits a place, at a fraction of the work.
    """

    config_name = "config.json"  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        channels: list[int] | None = None,
        phrase: int = 128,
        vocabulary: int = 1000,
        words: int = 8,
        patch: int = 1,
    ) -> None:
        super().__init__()
        widths = list(channels or [32, 64, 96, 128, 192])
        if patch < 1 or any(width % 8 for width in widths) or image_size % (patch * 2 ** (len(widths) - 1)):
            raise TokenloomError(
                f"channels must be multiples of 8, patch at least 1, and image_size divisible by patch times "
                f"{2 ** (len(widths) - 1)}, got {widths}, {patch} and {image_size}."
            )
        self.image_size, self.words, self.patch = image_size, words, patch
        self.table = nn.Embedding(vocabulary, phrase)
        self.place = nn.Parameter(torch.randn(words, phrase) * 0.02)
        self.reader = nn.Sequential(nn.Linear(phrase, phrase), nn.GELU(), nn.Linear(phrase, phrase))
        self.down = nn.ModuleList(
            _FilmBlock(given, width, phrase)
            for given, width in zip([3 * patch**2, *widths], widths, strict=False)
        )
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(_FilmBlock(deep + fine, fine, phrase) for deep, fine in pairs)
        self.head = nn.Conv2d(widths[0], patch**2, 1)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """Logits (B, S, S) of pixels (B, 3, S, S) in [-1, 1] and word ids (B, T), 0 = no word."""
        there = (words > 0).float()[..., None]
        read = self.reader(F.gelu(self.table(words) + self.place)) * there
        phrase = read.sum(1) / there.sum(1).clamp(min=1)
        maps, pixels = [], F.pixel_unshuffle(pixels, self.patch)
        for index, block in enumerate(self.down):
            pixels = block(F.avg_pool2d(pixels, 2) if index else pixels, phrase)
            maps.append(pixels)
        x = maps.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat((x, maps.pop()), dim=1), phrase)
        return F.pixel_shuffle(self.head(x), self.patch)[:, 0]

    @torch.no_grad()
    def segment(self, picture: Image.Image, phrases: list[str], words: WordTokenizer) -> np.ndarray:
        """Bool (n, H, W) of phrases about a picture, padded to a square below and to the right as the pipeline does."""
        side = max(picture.size)
        square = Image.new("RGB", (side, side), (128, 128, 128))
        square.paste(media.to_rgb(picture), (0, 0))
        pixels = media.to_pixels(square.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS))
        logits = self(pixels.to(self.device).expand(len(phrases), -1, -1, -1), words(phrases).to(self.device))
        logits = F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
        return (logits[:, 0, : picture.height, : picture.width] > 0).cpu().numpy()
