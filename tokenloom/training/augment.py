"""Random changes to a batch of pictures: mirror, shift, scale, rotation, colour, with white borders; and to masks.

Works on whole batches of float pixels in [-1, 1], or masks in [0, 1]. Knows nothing of data sets or models.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloom.training.config import AugmentConfig

_KERNELS = (3, 5, 7)
_FEWEST_PIXELS = 10


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


def random_morphology(masks: Tensor, generator: torch.Generator, probability: float = 0.7) -> Tensor:
    """Dilates or erodes each mask with a chance, so that outlines of all kinds are seen (HiMTok).

    A mask that would lose nearly all of its pixels stays as it is.

    Args:
        masks: (B, H, W) float in [0, 1].
        generator: Source of randomness (CPU).
        probability: Chance of each mask to change.

    Returns:
        (B, H, W) float in [0, 1].
    """
    batch = masks.shape[0]
    kernels = torch.randint(len(_KERNELS), (batch,), generator=generator)
    grows = torch.rand(batch, generator=generator) < 0.5
    changes = torch.rand(batch, generator=generator) < probability
    result = masks.clone()
    for index, kernel in enumerate(_KERNELS):
        for sign, chosen in ((1.0, grows), (-1.0, ~grows)):
            rows = (changes & chosen & (kernels == index)).nonzero().squeeze(1).to(masks.device)
            if rows.numel():
                changed = sign * F.max_pool2d(sign * masks[rows], kernel, 1, kernel // 2)
                enough = changed.sum((1, 2)) > _FEWEST_PIXELS
                result[rows] = torch.where(enough[:, None, None], changed, masks[rows])
    return result
