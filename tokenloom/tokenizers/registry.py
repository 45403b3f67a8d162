"""Image tokenizers by name, for training configs and for folders that say which class wrote them.

Knows names and where classes live. Imports a class only when it is asked for.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.tokenizers.image import ImageTokenizer

TOKENIZERS: dict[str, str | type[ImageTokenizer]] = {
    "image_cnn": "tokenloom.tokenizers.image_cnn.ImageCNNTokenizer",
    "image_scale": "tokenloom.tokenizers.image_scale.ImageScaleTokenizer",
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


def load_tokenizer(folder: str | Path) -> ImageTokenizer:
    """The image tokenizer that `save_pretrained` wrote into a folder, of whichever class, with float32 weights.

    Raises:
        TokenloomError: If there is none, or its class is not registered.
    """
    path = Path(folder) / str(ImageTokenizer.config_name)
    if not path.is_file():
        raise TokenloomError(
            f"There is no image tokenizer in {str(folder)!r}: it has no {path.name}. Give the folder "
            '"model" that `tokenloom train-tokenizer` writes, or "tokenizer" of a saved pipeline.'
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise TokenloomError(f"{path} is not a configuration: {error}; save the tokenizer again.") from None
    classes = {_name(entry): name for name, entry in TOKENIZERS.items()}
    if saved not in classes:
        raise unknown_name(
            "class of image tokenizer", saved, classes, "Register your own with register_tokenizer."
        )
    return tokenizer_class(classes[saved]).from_pretrained(folder).float()


def _name(entry: str | type) -> str:
    return entry.rpartition(".")[2] if isinstance(entry, str) else entry.__name__
