"""What video tokenizers take: float frames, bytes, or PIL pictures, checked and brought to one form.

Knows clips, pictures and ranges of pixels. Knows nothing of tokenizers or codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.pixels import Range, as_pixels, pad_to


def as_clips(media: Any, bounds: Range, who: str, device: torch.device | None = None) -> Tensor:
    """Float frames (B, T, 3, H, W) of whatever a video tokenizer may be given.

    The axes are those that the video pipelines of diffusers take and give.

    Args:
        media: Float frames (B, T, 3, H, W) in `bounds`; uint8 frames of that shape; a PIL picture (a clip of one frame), a
            list of them (one clip), or a list of such lists (a batch of clips of one length).
        bounds: Lowest and highest value of a pixel.
        who: Name of the tokenizer, for messages.
        device: Where frames of PIL pictures are put; tensors stay where they are.

    Raises:
        TokenloomError: For another kind of object, another shape, no frames, or clips of several lengths or sizes.
    """
    if isinstance(media, Tensor):
        if media.ndim != 5 or media.shape[2] != 3 or media.shape[1] == 0:
            raise _unexpected(media, who)
        return as_pixels(media.flatten(0, 1), bounds, who).unflatten(0, media.shape[:2])
    clips = _lists(media)
    if not clips or not all(clips):
        raise _unexpected(media, who)
    lengths = sorted({len(clip) for clip in clips})
    if len(lengths) > 1:
        raise TokenloomError(
            f"{who} takes clips of one length a batch, got {', '.join(map(str, lengths[:4]))} frames; encode them one by one."
        )
    pictures = [picture for clip in clips for picture in clip]
    return as_pixels(pictures, bounds, who, device).unflatten(0, (len(clips), lengths[0]))


def pad_frames(clips: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Frames (B, T, 3, H, W) with the last frame and the lower and right edge repeated up to the sizes given."""
    missing = frames - clips.shape[1]
    if missing:
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    return pad_to(clips.flatten(0, 1), height, width).unflatten(0, clips.shape[:2])


def _lists(media: Any) -> list[list[Image.Image]]:
    """Pictures clip by clip; empty for anything that is not made of pictures."""
    if isinstance(media, Image.Image):
        return [[media]]
    if not isinstance(media, Sequence) or isinstance(media, (str, bytes)):
        return []
    if all(isinstance(item, Image.Image) for item in media):
        return [list(media)] if media else []
    clips = [list(item) if isinstance(item, (list, tuple)) else [] for item in media]
    return clips if all(isinstance(item, Image.Image) for clip in clips for item in clip) else []


def _advice(media: Any) -> str:
    if not isinstance(media, Tensor):
        return "open a file with tokenloom.media_video.read_clip(path)"
    if media.ndim == 4 and media.shape[1] == 3:
        return "pictures are clips of one frame, pixels[:, None]; one clip is a batch of one, pixels[None]"
    if media.ndim == 5 and media.shape[1] == 3:
        return "move the frames forward with clips.transpose(1, 2)"
    if media.ndim == 5 and media.shape[4] == 3:
        return "move the channels forward with clips.permute(0, 1, 4, 2, 3)"
    return "stack frames of three channels to clips, at least one frame each"


def _unexpected(media: Any, who: str) -> TokenloomError:
    given = f"{media.dtype} {tuple(media.shape)}" if isinstance(media, Tensor) else repr(type(media))
    return TokenloomError(
        f"{who} expects frames (B, T, 3, H, W), float or uint8, or lists of PIL pictures; got {given}; {_advice(media)}."
    )
