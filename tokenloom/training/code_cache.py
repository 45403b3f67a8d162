"""Codes of the training pictures, worked out once and kept in a file if a folder for it is given.

Knows tokenizers and how pictures are changed. Knows nothing of generators. A file is named after everything the codes depend
on (pixels, weights, changes, seed), so a changed setting makes a new file and an old one is never mistaken for it.

Shapes: M pictures, N codes a picture, S the side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenloom.tokenizers.base import Tokenizer
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import rescale
from tokenloom.training.augment import augment
from tokenloom.training.config import GeneratorConfig
from tokenloom.training.data import to_float


def cached_codes(tokenizer: ImageTokenizer, pixels: Tensor, config: GeneratorConfig) -> Tensor:
    """Codes of all pictures as `encode_views` gives them, from the folder `config.code_cache` if they are there.

    Args:
        tokenizer: The trained tokenizer.
        pixels: uint8 (M, 3, S, S).
        config: The views and their changes, and the folder, which is made if missing.

    Returns:
        int32 (M, views, N).
    """
    if config.code_cache is None:
        return encode_views(tokenizer, pixels, config)
    folder = Path(config.code_cache)
    path = folder / f"{_fingerprint(tokenizer, pixels, config)}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        codes = encode_views(tokenizer, pixels, config)
        scratch = folder / f".{path.stem}-{os.getpid()}"
        save_file({"codes": codes.contiguous()}, scratch)
        scratch.replace(path)
    return load_file(path)["codes"]


def _fingerprint(tokenizer: ImageTokenizer, pixels: Tensor, config: GeneratorConfig) -> str:
    """32 hexadecimal digits of everything the codes depend on."""
    settings = [asdict(config.augment), config.views, config.loop.seed, weights_digest(tokenizer)]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    found.update(f"{tuple(pixels.shape)}".encode())
    found.update(pixels.contiguous().numpy().data)
    return found.hexdigest()[:32]


def weights_digest(tokenizer: Tokenizer) -> str:
    """A text that is another for tokenizers of another class, configuration or weights."""
    settings = [type(tokenizer).__name__, dict(tokenizer.config)]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().float().cpu().contiguous().numpy().data)
    return found.hexdigest()


@torch.no_grad()
def encode_pixels(tokenizer: ImageTokenizer, pixels: Tensor) -> Tensor:
    """Codes int32 (B, N) on the CPU of pixels (B, 3, S, S) in [-1, 1]."""
    values = rescale(pixels.to(tokenizer.device), (-1.0, 1.0), tokenizer.pixel_range)
    return tokenizer.encode(values).int().cpu()


@torch.no_grad()
def encode_views(
    tokenizer: ImageTokenizer, pixels: Tensor, config: GeneratorConfig, batch_size: int = 256
) -> Tensor:
    """Codes of all pictures, `config.views` copies each.

    Args:
        tokenizer: The trained tokenizer.
        pixels: uint8 (M, 3, S, S).
        config: How many views and how they are changed; view 0 is the unchanged picture.
        batch_size: Pictures encoded at once.

    Returns:
        int32 (M, views, N).
    """
    generator = torch.Generator().manual_seed(config.loop.seed)
    views = []
    for view in range(max(1, config.views)):
        parts = []
        for batch in pixels.split(batch_size):
            values = to_float(batch)
            values = augment(values, config.augment, generator) if view else values
            parts.append(encode_pixels(tokenizer, values))
        views.append(torch.cat(parts))
    return torch.stack(views, dim=1)
