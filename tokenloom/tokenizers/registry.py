"""Image tokenizers by name, for training configs, and tokenizers opened from wherever they are saved.

Knows names, where classes live and how models are found (`tokenloom.models`). Imports a class only when it is asked for.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from tokenloom import models
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.tokenizers.base import Tokenizer
from tokenloom.tokenizers.image import ImageTokenizer

TOKENIZERS: dict[str, str | type[ImageTokenizer]] = {
    "image_cnn": "tokenloom.tokenizers.image_cnn.ImageCNNTokenizer",
    "image_flex": "tokenloom.tokenizers.image_flex.ImageFlexTokenizer",
    "image_line": "tokenloom.tokenizers.image_line.ImageLineTokenizer",
    "image_scale": "tokenloom.tokenizers.image_scale.ImageScaleTokenizer",
    "image_step": "tokenloom.tokenizers.image_step.ImageStepTokenizer",
    "image_vq": "tokenloom.tokenizers.image_vq.ImageVQTokenizer",
}
"""Name in a config -> the class, or where it is found ("module.Class")."""


def register_tokenizer(name: str, kind: type[ImageTokenizer]) -> None:
    """Makes a class of your own known to training configs (`tokenizer: NAME`) and to `load_tokenizer`.

    Raises:
        TokenloomError: If the name belongs to another class, or the class is no `ImageTokenizer`.
    """
    if not (isinstance(kind, type) and issubclass(kind, ImageTokenizer)):
        raise TokenloomError(f"Expected a subclass of ImageTokenizer under the name {name!r}, got {kind!r}.")
    if TOKENIZERS.get(name, kind) is not kind:
        raise TokenloomError(f"The name {name!r} already belongs to {TOKENIZERS[name]}; choose another one.")
    TOKENIZERS[name] = kind


def tokenizer_class(name: str) -> type[ImageTokenizer]:
    """The class of a name.

    Raises:
        TokenloomError: For an unknown name, with the closest matches.
    """
    if name not in TOKENIZERS:
        raise unknown_name("image tokenizer", name, TOKENIZERS)
    entry = TOKENIZERS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    return entry


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """Opens a tokenizer of any modality in float32, ready to encode and decode.

    Args:
        name: A bundled model, a folder, or a hub id: a tokenizer of its own, or a pipeline, whose component "tokenizer"
            is taken.

    Returns:
        The tokenizer, of the class that its configuration names, in evaluation mode.

    Raises:
        TokenloomError: If there is no such model, it is damaged or no tokenizer, or its class is not known here.

    Example:
        >>> load_tokenizer("tokenloom-emoji-64").modality
        'image'
    """
    folder = models.resolve(name)
    if models.is_pipeline(folder):
        folder = folder / "tokenizer"
        if not models.is_component(folder):
            raise TokenloomError(
                f"The pipeline {os.fspath(name)!r} has no component 'tokenizer'; give the folder of a tokenizer."
            )
    kind = _class_of(str(models.read_config(folder).get("_class_name")), folder)
    return kind.from_pretrained(folder).float().eval()


def _class_of(saved: str, folder: Path) -> type[Tokenizer]:
    registered = {_name(entry): name for name, entry in TOKENIZERS.items()}
    if saved in registered:
        return tokenizer_class(registered[saved])
    exports = importlib.import_module("tokenloom.tokenizers")
    kind = getattr(exports, saved) if saved in exports.__all__ else None
    if isinstance(kind, type) and issubclass(kind, Tokenizer):
        return kind
    known = {*registered, *(item for item in exports.__all__ if item.endswith("Tokenizer"))}
    raise unknown_name(
        "class of tokenizer", saved, known, f"{folder} names it. Register your own with register_tokenizer."
    )


def _name(entry: str | type) -> str:
    return entry.rpartition(".")[2] if isinstance(entry, str) else entry.__name__
