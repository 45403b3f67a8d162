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
        "ImageFlexTokenizer": "image_flex",
        "ImageLineTokenizer": "image_line",
        "ImageScaleTokenizer": "image_scale",
        "ImageStepTokenizer": "image_step",
        "ImageTokenizer": "image",
        "ImageVQTokenizer": "image_vq",
        "MaskTokenizer": "mask",
        "MaskWords": "mask_words",
        "MimoAudioTokenizer": "audio_mimo",
        "AnswerCodes": "answer_codes",
        "MultiScale": "quantizers",
        "PictureEncoder": "picture_encoder",
        "Quantized": "quantizers",
        "Tokenizer": "base",
        "VQ": "quantizers",
        "VideoTokenizer": "video",
        "WordTokenizer": "text",
        "boxes_to_codes": "boxes",
        "codes_to_boxes": "boxes",
        "load_tokenizer": "registry",
        "mask_to_rle": "mask_formats",
        "masks_to_boxes": "boxes",
        "rle_to_mask": "mask_formats",
    },
)
