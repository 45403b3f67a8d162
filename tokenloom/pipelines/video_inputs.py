"""Checks what users pass to the video pipeline and brings clips and pictures to one form.

Every mistake becomes a `TokenloomError` that says what was expected, what came, and how to fix it. Knows nothing of models.

Shapes: F frames, S side of a frame in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenloom import media, media_video
from tokenloom.errors import TokenloomError
from tokenloom.pipelines.inputs import load_picture

Picture = Image.Image | str | Path
Clips = str | os.PathLike[str] | Sequence[Image.Image] | Tensor


def check_form(video: object, image: object, last_image: object, loop: bool, stream: bool) -> None:
    """Raises unless what is given belongs together."""
    if video is not None and (image is not None or last_image is not None or loop):
        raise TokenloomError(
            "A clip is continued with video=, or begun with image=; last_image and loop belong to image. Pass one of the two."
        )
    if last_image is not None and image is None:
        raise TokenloomError("last_image needs image, the picture that the clip begins with. Pass both.")
    if last_image is not None and loop:
        raise TokenloomError(
            "A loop ends with its first frame, so it has no last_image. Leave one of them out."
        )
    if stream and (last_image is not None or loop):
        raise TokenloomError("A clip with a known end is made as a whole; leave out stream.")


def load_clip(video: Clips, size: int) -> Tensor:
    """Float frames (1, F, 3, S, S) in [-1, 1] of a clip.

    Args:
        video: A file or a folder of frames; PIL pictures of one size; or frames (F, 3, H, W), uint8 or float in [0, 1].
        size: Side S; other frames are cut to the largest centred square and resized.

    Raises:
        TokenloomError: For anything else, no frames, frames of several sizes, or a damaged file.
    """
    if isinstance(video, Tensor):
        return _fit(_unit(video), size)
    if isinstance(video, (str, os.PathLike)):
        frames = media_video.read_clip(video).frames
    elif isinstance(video, Sequence) and all(isinstance(frame, Image.Image) for frame in video):
        frames = [media.to_rgb(frame) for frame in video if isinstance(frame, Image.Image)]
    else:
        raise TokenloomError(
            f"Expected video to be a file, a folder, a list of PIL pictures or a tensor (F, 3, H, W), got "
            f"{type(video).__name__}."
        )
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise TokenloomError(
            f"A clip needs at least one frame, and one size for all, got {len(frames)} frames of {len(sizes)} sizes. Resize "
            "them first."
        )
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    return _fit(pixels.float() / 255, size)


def load_frame(name: str, picture: Picture, size: int) -> Tensor:
    """Float frame (1, 1, 3, S, S) in [-1, 1] of a picture or its file."""
    return load_clip([media.to_rgb(load_picture(name, picture))], size)


def _unit(video: Tensor) -> Tensor:
    """Frames (F, 3, H, W) in [0, 1] of a tensor."""
    if video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise TokenloomError(
            f"Expected video to be frames (F, 3, H, W), at least one, got {tuple(video.shape)}. One clip is continued at a "
            "time."
        )
    unit = video.float() / 255 if video.dtype == torch.uint8 else video.float()
    if not (unit >= 0).logical_and(unit <= 1).all():
        raise TokenloomError(
            f"Float frames lie in [0, 1], got {float(unit.min()):.3g} to {float(unit.max()):.3g}. Bring them there first."
        )
    return unit


def _fit(unit: Tensor, size: int) -> Tensor:
    """(1, F, 3, S, S) in [-1, 1] of frames (F, 3, H, W) in [0, 1]."""
    height, width = unit.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = unit[:, :, top : top + side, left : left + side]
    if side != size:
        square = F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return square[None] * 2 - 1
