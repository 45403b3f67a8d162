"""Generators: code models that predict codes from codes, and the orders and sampling they share.

Knows layouts; knows nothing of pixels, waveforms or how codes are made. Names are imported on first use.
"""

from __future__ import annotations

from tokenloom.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BlockDiffusionGenerator": "block_diffusion",
        "CaptionFeatures": "conditions",
        "ContinuousGenerator": "continuous",
        "Denoising": "continuous",
        "Forwards": "drafts",
        "Generator": "base",
        "Guidance": "sampling",
        "MaskedGenerator": "masked",
        "MaskedLatentGenerator": "masked_continuous",
        "NextBlockGenerator": "next_block",
        "LatentStep": "continuous",
        "NextCellGenerator": "next_cell",
        "NextNeighborGenerator": "next_neighbor",
        "NextScaleGenerator": "next_scale",
        "NextTokenGenerator": "next_token",
        "Order": "orders",
        "Parallel": "parallel",
        "ParallelStats": "parallel",
        "PatchNetworks": "patches",
        "PictureWords": "conditions",
        "RangedTokenGenerator": "ranged",
        "Sampling": "sampling",
        "resized": "resize",
        "Step": "base",
        "Transformer": "transformer",
        "TransformerConfig": "transformer",
        "TwoLevelGenerator": "two_level",
        "estimate_memory": "memory",
        "guide": "sampling",
        "sample_tokens": "sampling",
        "slide": "sliding",
    },
)
