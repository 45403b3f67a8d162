"""Metrics of clips: quality frame by frame, flicker, drift, and where a thing on a plain colour is.

Everything works on float frames in [0, 1]. Knows nothing of tokenizers, generators or files.

Shapes: B clips, T frames, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.metrics import psnr, ssim

_QUIET = 0.1  # from the median over time, of pixels where nothing moves
_QUIET_SHARE = 0.8  # of the frames
_APART = 0.12  # from the colour behind a thing, in the channel that differs most


@dataclass(frozen=True)
class FrameQuality:
    """What came back of clips.

    Attributes:
        psnr: (B, T) dB, at most 100.
        ssim: (B, T), see `tokenloom.evaluation.metrics.ssim`.
    """

    psnr: Tensor
    ssim: Tensor

    @property
    def drift(self) -> float:
        """Mean PSNR of the first third of the frames minus that of the last third, in dB: what is lost along a clip."""
        third = max(1, self.psnr.shape[1] // 3)
        return float(self.psnr[:, :third].mean() - self.psnr[:, -third:].mean())


def frame_quality(output: Tensor, reference: Tensor) -> FrameQuality:
    """PSNR and SSIM of every frame of clips (B, T, 3, H, W).

    Raises:
        TokenloomError: If the shapes differ, or are others.
    """
    _check_pair(output, reference)
    flat = output.flatten(0, 1), reference.flatten(0, 1)
    shape = output.shape[:2]
    return FrameQuality(psnr(*flat).clamp(max=100).view(shape), ssim(*flat).view(shape))


def added_flicker(output: Tensor, reference: Tensor) -> float:
    """Mean absolute error of the differences between neighbouring frames of clips (B, T, 3, H, W), in levels of 255.

    It is 0 where every error stands still, and counts whatever trembles that should not, or the other way round.
    """
    _check_pair(output, reference)
    if output.shape[1] < 2:
        return 0.0
    return 255 * float((output.diff(dim=1) - reference.diff(dim=1)).abs().mean())


def flicker(clips: Tensor) -> float:
    """Standard deviation over time of pixels where nothing moves, in levels of 255, for clips without a reference.

    Args:
        clips: (B, T, 3, H, W) in [0, 1]. A pixel counts where it lies near its median in most of the frames; in the others
            something passed by.
    """
    middle = clips.median(dim=1, keepdim=True).values
    away = (clips - middle).abs().amax(dim=2, keepdim=True)  # (B, T, 1, H, W)
    near = away < _QUIET
    quiet = near & (near.float().mean(dim=1, keepdim=True) >= _QUIET_SHARE)
    count = quiet.float().sum() * clips.shape[2]
    if not count:
        return float("nan")
    return 255 * float(((clips - middle).square() * quiet).sum().div(count).sqrt())


def colour_drift(clips: Tensor) -> float:
    """Mean absolute change of the colour behind the things from the first third of clips to the last, in levels of 255."""
    third = max(1, clips.shape[1] // 3)
    change = ground_colour(clips[:, :third]) - ground_colour(clips[:, -third:])
    return 255 * float(change.abs().mean())


def ground_colour(clips: Tensor) -> Tensor:
    """Colours (B, 3) behind what moves in clips (B, T, 3, H, W): the median of their borders."""
    rim = torch.cat(
        [clips[..., 0, :], clips[..., -1, :], clips[..., :, 0], clips[..., :, -1]], dim=-1
    )  # (B, T, 3, 2 H + 2 W)
    return rim.transpose(1, 2).flatten(2).median(dim=2).values


def track(clips: Tensor) -> Tensor:
    """Where the thing is in clips on a plain colour.

    Args:
        clips: (B, T, 3, H, W) in [0, 1].

    Returns:
        (B, T, 3): centre (x, y), 0 at the upper left to 1, and share of the frame, of the pixels that differ from the colour
        behind; NaN for the centre where none does.
    """
    ground = ground_colour(clips)[:, None, :, None, None]
    mask = ((clips - ground).abs().amax(dim=2) > _APART).float()  # (B, T, H, W)
    height, width = mask.shape[2:]
    mass = mask.sum((2, 3))
    across = (torch.arange(width, device=mask.device) + 0.5) / width
    down = (torch.arange(height, device=mask.device) + 0.5) / height
    x = (mask.sum(2) * across).sum(2) / mass
    y = (mask.sum(3) * down).sum(2) / mass
    return torch.stack([x, y, mass / (height * width)], dim=2)


def track_error(found: Tensor, known: Tensor) -> tuple[float, float]:
    """How far tracks (B, T, 3) lie from the known ones: mean distance of centres, and mean ratio of sizes, at least 1.

    A frame in which nothing was found counts as half a frame away and as twice too small.

    Raises:
        TokenloomError: If the shapes differ.
    """
    if found.shape != known.shape or found.ndim != 3:
        raise TokenloomError(
            f"Expected two tracks (B, T, 3), got {tuple(found.shape)} and {tuple(known.shape)}."
        )
    lost = found[..., 2] <= 0
    distance = (found[..., :2] - known[..., :2]).square().sum(2).sqrt()
    ratio = (found[..., 2] / known[..., 2].clamp(min=1e-6)).clamp(min=1e-6).log().abs().exp()
    half = torch.tensor(0.5, dtype=distance.dtype)
    two = torch.tensor(2.0, dtype=ratio.dtype)
    return float(torch.where(lost, half, distance).mean()), float(torch.where(lost, two, ratio).mean())


def _check_pair(output: Tensor, reference: Tensor) -> None:
    if output.ndim != 5 or output.shape != reference.shape:
        raise TokenloomError(
            f"Expected two batches of clips (B, T, 3, H, W) of one shape, got {tuple(output.shape)} and "
            f"{tuple(reference.shape)}."
        )
