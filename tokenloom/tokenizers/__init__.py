"""Tokenizers: media to codes and back.

Knows layouts; knows nothing of generators, prompts or pipelines. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FSQ": "quantizers",
    "ImageCNNTokenizer": "image_cnn",
    "ImageVQTokenizer": "image_vq",
    "Quantized": "quantizers",
    "Tokenizer": "base",
    "VQ": "quantizers",
    "WordTokenizer": "text",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
