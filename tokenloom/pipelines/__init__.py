"""What users call: a tokenizer, a generator and the words between them, in the shape of a diffusers pipeline.

Nothing is imported until it is asked for, so that `import tokenloom.pipelines` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "TextToImageOutput": "text_to_image",
    "TextToImagePipeline": "text_to_image",
    "Reconstruction": "reconstruction",
    "reconstruct_image": "reconstruction",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports the module that defines `name` on first use."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
