"""Training of a mask tokenizer on the outlines of scenes: single objects, groups of them, and what others leave visible.

Knows `MaskTokenizer` and its losses. Knows nothing of pictures and phrases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from tokenloom.errors import check_options
from tokenloom.media import save_image, sheet
from tokenloom.tokenizers.mask import MaskTokenizer
from tokenloom.training.loop import Task
from tokenloom.training.mask_losses import draw_lengths, tokenizer_loss
from tokenloom.training.scenes import SceneSource, draw_seeds
from tokenloom.training.segmentation_config import MaskTokenizerConfig

_GROUPS = 0.25  # share of masks that show several objects
_REACH = 2  # pixels a mask is grown or shrunk at most
_SHOWN = (1, 2, 4, 8, 16, 32)
_SAMPLE_SEEDS = range(10**6, 10**6 + 12)


class _Trained(nn.Module):
    """The tokenizer behind one forward that gives the loss, so that it may be wrapped for several devices."""

    def __init__(self, tokenizer: MaskTokenizer, weights: dict[str, float]) -> None:
        super().__init__()
        self.tokenizer, self.weights = tokenizer, weights

    def forward(self, masks: Tensor, kept: Tensor, soft: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return tokenizer_loss(self.tokenizer, masks, kept, self.weights, soft)


class MaskTokenizerTask(Task):
    """Trains a mask tokenizer."""

    def __init__(self, config: MaskTokenizerConfig) -> None:
        self.config = config
        set_seed(config.loop.seed)
        check_options(MaskTokenizer, config.model, "model option")
        self.tokenizer = MaskTokenizer(**config.model)
        self.scenes = SceneSource(config.scenes, self.tokenizer.image_size)
        self.module = _Trained(self.tokenizer, dict(config.losses)).train()
        self.size = config.scenes.length

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Masks (B, S, S), one of each of as many new scenes, and the prefix length that each is decoded from."""
        seeds = draw_seeds(len(indices), generator)
        masks = torch.stack(
            [draw_mask(instances, generator) for instances in self.scenes.instances(seeds)]
        ).float()
        masks = morph(masks, self.config.morphology, generator)
        return {
            "masks": masks,
            "kept": draw_lengths(len(masks), self.tokenizer.levels, generator, self.config.whole),
            "chance": torch.rand(len(masks), generator=generator),
        }

    def loss(self, module: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of `reconstruction_losses` and of the quantizer."""
        end = self.config.soft_until * self.config.loop.steps
        return module(batch["masks"], batch["kept"], batch["chance"] < 1 - step / max(end, 1e-9))

    def samples(self, path: Path) -> None:
        """A sheet: masks above, below them what 1, 2, 4, ... codes decode to."""
        generator = torch.Generator().manual_seed(0)
        maps = self.scenes.instances(list(_SAMPLE_SEEDS))
        masks = torch.stack([draw_mask(one, generator) for one in maps]).float()
        codes = self.tokenizer.encode(masks.to(self.tokenizer.device))
        rows = [masks]
        for count in _SHOWN:
            if count <= self.tokenizer.levels:
                rows.append(self.tokenizer.decode(codes, count, output="probabilities").float().cpu())
        pixels = (torch.cat(rows) * 255).round().byte().numpy()
        save_image(sheet([Image.fromarray(one) for one in pixels], columns=len(masks)), path)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer in diffusers' layout."""
        self.tokenizer.save_pretrained(folder)


def draw_mask(instances: np.ndarray, generator: torch.Generator) -> Tensor:
    """Bool (S, S): a random object of a map of objects, or several of them."""
    present = np.unique(instances[instances > 0])
    order = torch.randperm(len(present), generator=generator).tolist()
    several = len(present) > 1 and float(torch.rand((), generator=generator)) < _GROUPS
    count = 1
    if several:
        count = int(torch.randint(2, len(present) + 1, (), generator=generator))
    return torch.from_numpy(np.isin(instances, present[order[:count]]))


def morph(masks: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """Masks (B, S, S), some of them grown or shrunk by a few pixels; none becomes empty or full."""
    chosen = torch.rand(len(masks), generator=generator) < chance
    grow = torch.rand(len(masks), generator=generator) < 0.5
    reach = torch.randint(1, _REACH + 1, (len(masks),), generator=generator)
    result = masks.clone()
    for index in chosen.nonzero().flatten().tolist():
        width = 2 * int(reach[index]) + 1
        sign = 1 if grow[index] else -1
        changed = sign * F.max_pool2d(sign * masks[index, None], width, 1, width // 2)[0]
        if 0 < float(changed.mean()) < 1:
            result[index] = changed
    return result
