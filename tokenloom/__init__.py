"""tokenloom: turn media into tokens, model the tokens with one transformer, turn predicted tokens back into media.

Importing the package loads nothing but this file. Every public name below is imported from its module on first use, so
that `import tokenloom` and `tokenloom --help` do not pay for torch and diffusers.

`ModelMixin` is diffusers' own class. It stands here because diffusers decides how to save and load a component of a
foreign library by looking that name up beside the component's class.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AudioContinuationPipeline": "tokenloom.pipelines.audio_continuation",
    "AudioTokenizer": "tokenloom.tokenizers.audio",
    "BlockDiffusionGenerator": "tokenloom.generators.block_diffusion",
    "Denoising": "tokenloom.generators.continuous",
    "Generator": "tokenloom.generators.base",
    "Guidance": "tokenloom.generators.sampling",
    "HubAudioTokenizer": "tokenloom.tokenizers.audio_hub",
    "ImageCNNTokenizer": "tokenloom.tokenizers.image_cnn",
    "ImageFlexTokenizer": "tokenloom.tokenizers.image_flex",
    "ImageLineTokenizer": "tokenloom.tokenizers.image_line",
    "ImageScaleTokenizer": "tokenloom.tokenizers.image_scale",
    "ImageStepTokenizer": "tokenloom.tokenizers.image_step",
    "ImageVQTokenizer": "tokenloom.tokenizers.image_vq",
    "Layout": "tokenloom.layouts",
    "MaskTokenizer": "tokenloom.tokenizers.mask",
    "MaskedGenerator": "tokenloom.generators.masked",
    "MaskedLatentGenerator": "tokenloom.generators.masked_continuous",
    "MimoAudioTokenizer": "tokenloom.tokenizers.audio_mimo",
    "ModelMixin": "diffusers",
    "NextBlockGenerator": "tokenloom.generators.next_block",
    "NextCellGenerator": "tokenloom.generators.next_cell",
    "NextNeighborGenerator": "tokenloom.generators.next_neighbor",
    "NextScaleGenerator": "tokenloom.generators.next_scale",
    "NextTokenGenerator": "tokenloom.generators.next_token",
    "Order": "tokenloom.generators.orders",
    "PatchNetworks": "tokenloom.generators.patches",
    "PictureEncoder": "tokenloom.tokenizers.picture_encoder",
    "RangedTokenGenerator": "tokenloom.generators.ranged",
    "Sampling": "tokenloom.generators.sampling",
    "SegmentationPipeline": "tokenloom.pipelines.segmentation",
    "TextToImagePipeline": "tokenloom.pipelines.text_to_image",
    "Tokenizer": "tokenloom.tokenizers.base",
    "TokenloomError": "tokenloom.errors",
    "TwoLevelGenerator": "tokenloom.generators.two_level",
    "VideoPipeline": "tokenloom.pipelines.video",
    "VideoTokenizer": "tokenloom.tokenizers.video",
    "WordTokenizer": "tokenloom.tokenizers.text",
}
_MODULES = {"models": "tokenloom.models", "orders": "tokenloom.generators.orders"}

if TYPE_CHECKING:
    from diffusers import ModelMixin as ModelMixin

    from tokenloom import models as models
    from tokenloom.errors import TokenloomError as TokenloomError
    from tokenloom.generators import orders as orders
    from tokenloom.generators.base import Generator as Generator
    from tokenloom.generators.block_diffusion import BlockDiffusionGenerator as BlockDiffusionGenerator
    from tokenloom.generators.continuous import Denoising as Denoising
    from tokenloom.generators.masked import MaskedGenerator as MaskedGenerator
    from tokenloom.generators.masked_continuous import MaskedLatentGenerator as MaskedLatentGenerator
    from tokenloom.generators.next_block import NextBlockGenerator as NextBlockGenerator
    from tokenloom.generators.next_cell import NextCellGenerator as NextCellGenerator
    from tokenloom.generators.next_neighbor import NextNeighborGenerator as NextNeighborGenerator
    from tokenloom.generators.next_scale import NextScaleGenerator as NextScaleGenerator
    from tokenloom.generators.next_token import NextTokenGenerator as NextTokenGenerator
    from tokenloom.generators.orders import Order as Order
    from tokenloom.generators.patches import PatchNetworks as PatchNetworks
    from tokenloom.generators.ranged import RangedTokenGenerator as RangedTokenGenerator
    from tokenloom.generators.sampling import Guidance as Guidance
    from tokenloom.generators.sampling import Sampling as Sampling
    from tokenloom.generators.two_level import TwoLevelGenerator as TwoLevelGenerator
    from tokenloom.layouts import Layout as Layout
    from tokenloom.pipelines.audio_continuation import AudioContinuationPipeline as AudioContinuationPipeline
    from tokenloom.pipelines.segmentation import SegmentationPipeline as SegmentationPipeline
    from tokenloom.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
    from tokenloom.pipelines.video import VideoPipeline as VideoPipeline
    from tokenloom.tokenizers.audio import AudioTokenizer as AudioTokenizer
    from tokenloom.tokenizers.audio_hub import HubAudioTokenizer as HubAudioTokenizer
    from tokenloom.tokenizers.audio_mimo import MimoAudioTokenizer as MimoAudioTokenizer
    from tokenloom.tokenizers.base import Tokenizer as Tokenizer
    from tokenloom.tokenizers.image_cnn import ImageCNNTokenizer as ImageCNNTokenizer
    from tokenloom.tokenizers.image_flex import ImageFlexTokenizer as ImageFlexTokenizer
    from tokenloom.tokenizers.image_line import ImageLineTokenizer as ImageLineTokenizer
    from tokenloom.tokenizers.image_scale import ImageScaleTokenizer as ImageScaleTokenizer
    from tokenloom.tokenizers.image_step import ImageStepTokenizer as ImageStepTokenizer
    from tokenloom.tokenizers.image_vq import ImageVQTokenizer as ImageVQTokenizer
    from tokenloom.tokenizers.mask import MaskTokenizer as MaskTokenizer
    from tokenloom.tokenizers.picture_encoder import PictureEncoder as PictureEncoder
    from tokenloom.tokenizers.text import WordTokenizer as WordTokenizer
    from tokenloom.tokenizers.video import VideoTokenizer as VideoTokenizer

__all__ = [
    "AudioContinuationPipeline",
    "AudioTokenizer",
    "BlockDiffusionGenerator",
    "Denoising",
    "Generator",
    "Guidance",
    "HubAudioTokenizer",
    "ImageCNNTokenizer",
    "ImageFlexTokenizer",
    "ImageLineTokenizer",
    "ImageScaleTokenizer",
    "ImageStepTokenizer",
    "ImageVQTokenizer",
    "Layout",
    "MaskTokenizer",
    "MaskedGenerator",
    "MaskedLatentGenerator",
    "MimoAudioTokenizer",
    "ModelMixin",
    "NextBlockGenerator",
    "NextCellGenerator",
    "NextNeighborGenerator",
    "NextScaleGenerator",
    "NextTokenGenerator",
    "Order",
    "PatchNetworks",
    "PictureEncoder",
    "RangedTokenGenerator",
    "Sampling",
    "SegmentationPipeline",
    "TextToImagePipeline",
    "Tokenizer",
    "TokenloomError",
    "TwoLevelGenerator",
    "VideoPipeline",
    "VideoTokenizer",
    "WordTokenizer",
    "__version__",
    "models",
    "orders",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its module on first use (PEP 562)."""
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module 'tokenloom' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})
