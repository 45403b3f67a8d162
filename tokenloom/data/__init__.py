"""Data sets: the captioned picture folder, and the recipes that build one from public packages.

Importing this package loads nothing; every name below is imported from its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Caption": "tokenloom.data.captions",
    "ImageCaptionFolder": "tokenloom.data.dataset",
    "assign_splits": "tokenloom.data.splits",
    "build_emoji": "tokenloom.data.emoji",
    "caption": "tokenloom.data.prompts",
    "plain_caption": "tokenloom.data.prompts",
    "read_captions": "tokenloom.data.captions",
    "write_captions": "tokenloom.data.captions",
}

if TYPE_CHECKING:
    from tokenloom.data.captions import Caption as Caption
    from tokenloom.data.captions import read_captions as read_captions
    from tokenloom.data.captions import write_captions as write_captions
    from tokenloom.data.dataset import ImageCaptionFolder as ImageCaptionFolder
    from tokenloom.data.emoji import build_emoji as build_emoji
    from tokenloom.data.prompts import caption as caption
    from tokenloom.data.prompts import plain_caption as plain_caption
    from tokenloom.data.splits import assign_splits as assign_splits

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
