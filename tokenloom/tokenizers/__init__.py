"""Tokenizers: media to codes and back.

Knows layouts; knows nothing of generators, prompts or pipelines. Names are imported on first use.
"""

from __future__ import annotations

from tokenloom.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AudioCodec": "audio_base",
        "AudioTokenizer": "audio",
        "FSQ": "quantizers",
        "HubAudioTokenizer": "audio_hub",
        "ImageCNNTokenizer": "image_cnn",
        "ImageVQTokenizer": "image_vq",
        "MimoAudioTokenizer": "audio_mimo",
        "Quantized": "quantizers",
        "Tokenizer": "base",
        "VQ": "quantizers",
        "WordTokenizer": "text",
    },
)
