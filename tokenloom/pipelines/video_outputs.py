"""Frames as a video pipeline gives them: bytes while they are collected, then pictures, arrays or tensors.

Knows frames and ranges of pixels. Knows nothing of models.

Shapes: B clips, F frames, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenloom.tokenizers.pixels import rescale
from tokenloom.tokenizers.video import VideoTokenizer


def to_bytes(pixels: Tensor, tokenizer: VideoTokenizer) -> Tensor:
    """uint8 frames on the CPU of frames in the tokenizer's range."""
    unit = rescale(pixels.float(), tokenizer.pixel_range, (0.0, 255.0))
    return unit.round().clamp(0, 255).to(torch.uint8).cpu()


def as_output(output_type: str, pixels: Tensor) -> Any:
    """uint8 frames (B, F, 3, H, W) as the caller wants them."""
    if output_type == "pt":
        return pixels.float() / 255
    arrays = pixels.permute(0, 1, 3, 4, 2).numpy()
    if output_type == "np":
        return arrays.astype(np.float32) / 255
    return [[Image.fromarray(frame) for frame in clip] for clip in arrays]
