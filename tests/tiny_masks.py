"""A mask tokenizer with random weights that tells shapes apart, and ellipses to try it on."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom import MaskTokenizer

SMALL = {"width": 24, "depth": 2, "heads": 2, "patch": 4}


def make_mask_tokenizer(**options: object) -> MaskTokenizer:
    """Six codes of 64 for masks of 16 pixels a side, unless options say otherwise."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "image_size": 16,
        "levels": 6,
        "encoder_config": SMALL,
        "decoder_config": SMALL,
        "quantizer_options": {"codebook_size": 64, "dim": 4},
    }
    tokenizer = MaskTokenizer(**{**settings, **options}).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        tokenizer.encoder.patch_embed.weight *= 8  # so that random weights tell masks apart
    return tokenizer


def ellipses(count: int, height: int = 16, width: int = 16, spread: float = 0.3) -> Tensor:
    """Bool ellipses (B, H, W), radii from 0.1 to 0.1 + spread of the sides."""
    random = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    centre = 0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=random)
    radius = 0.1 + spread * torch.rand(count, 2, 1, 1, generator=random)
    return ((y - centre[:, 0]) / radius[:, 0]).square() + ((x - centre[:, 1]) / radius[:, 1]).square() < 1
