"""Data sets: the captioned picture folder, and the recipes that build one from public packages.

Importing this package loads nothing; every name below is imported from its module on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenloom.lazy import lazy_exports

if TYPE_CHECKING:
    from tokenloom.data.captions import Caption as Caption
    from tokenloom.data.captions import read_captions as read_captions
    from tokenloom.data.captions import write_captions as write_captions
    from tokenloom.data.dataset import ImageCaptionFolder as ImageCaptionFolder
    from tokenloom.data.emoji import build_emoji as build_emoji
    from tokenloom.data.prompts import caption as caption
    from tokenloom.data.prompts import plain_caption as plain_caption
    from tokenloom.data.splits import assign_splits as assign_splits

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Caption": "captions",
        "ImageCaptionFolder": "dataset",
        "assign_splits": "splits",
        "build_emoji": "emoji",
        "caption": "prompts",
        "plain_caption": "prompts",
        "read_captions": "captions",
        "write_captions": "captions",
    },
)
