"""Random changes to a batch of pictures: mirror, shift, scale, rotation, colour. White borders.

Works on whole batches of float pixels in [-1, 1]. Knows nothing of data sets or models.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.training.config import AugmentConfig


def augment(pixels: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Changes each picture on its own.

    Args:
        pixels: (B, 3, H, W) float in [-1, 1] on a white background.
        config: How much.
        generator: Source of randomness (CPU).

    Returns:
        (B, 3, H, W) float in [-1, 1].
    """

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1).to(pixels.device)

    batch = pixels.shape[0]
    if config.flip or config.shift or config.scale or config.rotate:
        angle = uniform(batch) * math.radians(config.rotate)
        size = 1 + uniform(batch) * config.scale
        mirror = torch.where((uniform(batch) + 1) / 2 < config.flip, -1.0, 1.0)
        shift = uniform(batch, 2) * 2 * config.shift
        theta = torch.zeros(batch, 2, 3, device=pixels.device)
        theta[:, 0, 0], theta[:, 0, 1] = mirror * angle.cos() / size, -angle.sin() / size
        theta[:, 1, 0], theta[:, 1, 1] = mirror * angle.sin() / size, angle.cos() / size
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels - 1, grid, mode="bicubic", align_corners=False) + 1
    if config.permute:
        order = torch.rand(batch, 3, generator=generator).argsort(1)
        keep = torch.rand(batch, 1, generator=generator) >= config.permute
        order = torch.where(keep, torch.arange(3), order).to(pixels.device)
        pixels = pixels.gather(1, order[:, :, None, None].expand_as(pixels))
    if config.colour:
        gain = 1 + uniform(batch, 3, 1, 1) * config.colour
        contrast = 1 + uniform(batch, 1, 1, 1) * config.colour
        pixels = 1 + (pixels - 1) * contrast * gain  # white stays white
    return pixels.clamp(-1, 1)
