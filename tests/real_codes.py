"""Real token sequences: crops of the bundled photograph through the bundled tokenizer."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenloom import models
from tokenloom.demo import PHOTO
from tokenloom.tokenizers.image_vq import ImageVQTokenizer

MODEL = "tokenloom-emoji-64"


@lru_cache
def tokenizer() -> ImageVQTokenizer:
    """The bundled tokenizer."""
    return ImageVQTokenizer.from_pretrained(models.resolve(MODEL), subfolder="tokenizer").eval()


@lru_cache
@torch.no_grad()
def real_codes(count: int = 16) -> Tensor:
    """LongTensor (count, N): codes of crops on a square raster of the photograph."""
    side = round(count**0.5)
    size = tokenizer().image_size
    photo = Image.open(PHOTO).convert("RGB").resize((side * size, side * size))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
    crops = pixels.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return tokenizer().encode(crops)
