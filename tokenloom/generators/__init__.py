"""Generators: code models that predict codes from codes, and the orders and sampling they share.

Knows layouts; knows nothing of pixels, waveforms or how codes are made. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "CaptionFeatures": "conditions",
    "Generator": "base",
    "NextBlockGenerator": "next_block",
    "NextNeighborGenerator": "next_neighbor",
    "NextScaleGenerator": "next_scale",
    "NextTokenGenerator": "next_token",
    "Step": "base",
    "Transformer": "transformer",
    "TransformerConfig": "transformer",
    "Order": "orders",
    "Guidance": "sampling",
    "Sampling": "sampling",
    "guide": "sampling",
    "sample_tokens": "sampling",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
