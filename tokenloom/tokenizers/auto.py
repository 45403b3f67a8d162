"""Opens a tokenizer by name, whatever its class.

Knows how models are found (`tokenloom.models`) and that `config.json` names the class. Knows nothing of weights.
"""

from __future__ import annotations

import os
from typing import Any

import tokenloom.tokenizers as classes
from tokenloom import models
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.tokenizers.base import Tokenizer


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """Opens a tokenizer in float32, ready to encode and decode.

    Args:
        name: A bundled model, a folder, or a hub id: a tokenizer of its own, or a pipeline, whose component "tokenizer"
            is taken.

    Returns:
        The tokenizer, of the class that its configuration names, in evaluation mode.

    Raises:
        TokenloomError: If there is no such model, or it is damaged or no tokenizer.

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
    written = str(models.read_config(folder).get("_class_name"))
    kind = getattr(classes, written) if written in classes.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, Tokenizer)):
        known = [item for item in classes.__all__ if item.endswith("Tokenizer")]
        raise unknown_name("tokenizer class", written, known, f"{folder} is not the folder of a tokenizer.")
    return kind.from_pretrained(folder).float().eval()
