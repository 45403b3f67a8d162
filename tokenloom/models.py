"""Finds models by name and checks their files before anything tries to load them.

A name is tried as a bundled model, then as a local folder, then as an id on the Hugging Face hub. A model is a diffusers
pipeline folder (`model_index.json`, one sub-folder a component) or the folder of one component (`config.json` and its
weights); both have `card.json`, the weight record.

Knows file formats and versions; knows nothing of what the models compute, and never imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenloom import __version__
from tokenloom.errors import TokenloomError, unknown_name

DEFAULT_MODEL = "tokenloom-emoji-64"
VERSION_KEY = "_tokenloom_version"
INDEX_FILE = "model_index.json"
CONFIG_FILE = "config.json"
CARD_FILE = "card.json"

_ASSETS = Path(__file__).parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.md"]
_CHUNK = 1 << 24  # bytes read at once for a sum
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself


@dataclass(frozen=True)
class ModelInfo:
    """A bundled model.

    Attributes:
        name: What `resolve` and `--model` take.
        path: Its folder.
        card: The weight record (`card.json`); empty when the folder has none.
    """

    name: str
    path: Path
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all safetensors files together."""
        return sum(file.stat().st_size for file in self.path.rglob("*.safetensors"))


def bundled() -> dict[str, ModelInfo]:
    """Returns the models inside the package, by name."""
    folders = sorted(path for path in _ASSETS.iterdir() if is_pipeline(path) or is_component(path))
    return {folder.name: ModelInfo(folder.name, folder, read_card(folder)) for folder in folders}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a saved pipeline."""
    return (folder / INDEX_FILE).is_file()


def pipeline_class(folder: Path) -> str | None:
    """Name of the class of a saved pipeline; `None` for a folder that holds none."""
    index = folder / INDEX_FILE
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None


def default_for(pipeline: str, command: str) -> str:
    """Name of the first bundled model of a class of pipelines.

    Args:
        pipeline: Name of the class.
        command: The command that trains such models, for the error.

    Raises:
        TokenloomError: If there is none.
    """
    for info in bundled().values():
        if pipeline_class(info.path) == pipeline:
            return info.name
    raise TokenloomError(
        f"No bundled model is a {pipeline}. Give --model a folder that `tokenloom {command}` wrote, or a hub id."
    )


def is_component(folder: Path) -> bool:
    """Whether a folder holds one saved component: a tokenizer or a generator."""
    return (folder / CONFIG_FILE).is_file()


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Finds the folder of a model and checks it.

    Args:
        name: A bundled name ("tokenloom-emoji-64"), a folder, or a hub id ("owner/model").
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub downloads are kept; the hub's own default otherwise.

    Returns:
        The folder of the model. Its files have passed `check`.

    Raises:
        TokenloomError: Nothing of that name, no way to fetch it, or a damaged or too new model.

    Example:
        >>> resolve("tokenloom-emoji-64").name
        'tokenloom-emoji-64'
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        raise TokenloomError(
            f"Expected the name of a model, got {name!r}. Give a bundled name, a folder, or a hub id 'owner/model'."
        )
    folder = _find(name, revision, cache_dir)
    check(folder)
    return folder


def _find(
    name: str | os.PathLike[str], revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
    text = os.fspath(name)
    if isinstance(name, str) and Path(text).name == text and text in bundled():
        return _ASSETS / text
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise TokenloomError(
            f"Expected the folder of a model, got the file {text}. Give the folder it lies in."
        )
    if isinstance(name, str) and _HUB_ID.fullmatch(text):
        return _fetch(text, revision, cache_dir)
    if path.name != text or not isinstance(name, str):  # it was written as a path
        raise TokenloomError(
            f"No model at {text}: there is no such folder. Give a bundled name ({', '.join(bundled()) or 'none'}), "
            "the folder of a saved pipeline, or a hub id 'owner/model'."
        )
    raise unknown_name(
        "model",
        text,
        bundled(),
        "A local folder or a hub id 'owner/model' is also accepted (see `tokenloom models`).",
    )


def _fetch(repo_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    cache = None if cache_dir is None else Path(cache_dir)
    try:
        folder = snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub client raises types of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise TokenloomError(
            f"{repo_id!r} is neither a bundled model nor a folder here, and it could not be fetched from the Hugging Face "
            f"hub ({type(error).__name__}: {reason}). Check the spelling and the network connection, or download the "
            f"model elsewhere and give its folder. Bundled models, which need no network: "
            f"{', '.join(bundled()) or 'none'}."
        ) from error
    return Path(folder)


def read_card(folder: Path) -> dict[str, Any]:
    """Returns `card.json` of a model folder, or an empty dict if it has none."""
    path = folder / CARD_FILE
    return _read_json(path) if path.is_file() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns `config.json` of a saved component."""
    config = _read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise TokenloomError(f"{folder / CONFIG_FILE} must hold a mapping, got {config!r}. {_repair(folder)}")
    return config


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Writes `card.json` of a saved pipeline or module, with this version and the SHA-256 sums of its weights.

    Args:
        folder: The saved pipeline or module.
        card: The weight record: anything JSON can hold. "sha256" and the version are filled in.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    sums = {path.relative_to(folder).as_posix(): digest(path) for path in sorted(files)}
    text = json.dumps({**card, VERSION_KEY: __version__, "sha256": sums}, indent=2, ensure_ascii=False)
    scratch = folder / f".{CARD_FILE}.part"
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(folder / CARD_FILE)


def check(folder: Path) -> None:
    """Checks that a model folder is complete, undamaged and not newer than this version.

    Args:
        folder: A saved pipeline, or one saved component.

    Raises:
        TokenloomError: Names the file at fault and how to repair it.
    """
    index_path = folder / INDEX_FILE
    if not is_pipeline(folder):
        if not is_component(folder):
            raise TokenloomError(
                f"{folder} is not a saved model: it has neither {INDEX_FILE} nor {CONFIG_FILE}. Give a folder that "
                "`save_pretrained` wrote."
            )
        index_path = folder / CONFIG_FILE
    index = _read_json(index_path)
    check_version(index, index_path)
    card = read_card(folder)
    check_version(card, folder / CARD_FILE)
    for name, value in index.items() if is_pipeline(folder) else ():
        if not name.startswith("_") and _is_component(value) and not (folder / name).is_dir():
            raise TokenloomError(
                f"The component folder {folder / name} is missing, but {INDEX_FILE} lists it. {_repair(folder)}"
            )
    for path in sorted(folder.glob("*/*.json")):
        check_version(_read_json(path), path)
    for path in sorted(folder.rglob("*.safetensors")):
        check_safetensors(path)
    check_digests(folder, card)


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def check_version(config: Any, path: Path) -> None:
    """Raises if a configuration was written by a newer version of tokenloom than this one."""
    written = config.get(VERSION_KEY) if isinstance(config, dict) else None
    if written is None:
        return
    if _version_tuple(str(written)) > _version_tuple(__version__):
        raise TokenloomError(
            f"{path} was written by tokenloom {written}, and this is tokenloom {__version__}. "
            f"Install a newer version: pip install --upgrade 'tokenloom>={written}'."
        )


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def check_safetensors(path: Path) -> None:
    """Checks that a safetensors file has a readable header and exactly the bytes that the header promises.

    Args:
        path: The file. Only its header is read.

    Raises:
        TokenloomError: The file is truncated or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"its {size:,} bytes hold no complete header")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise _damaged(path, "its header cannot be read") from error
    expected = 8 + length + end
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise _damaged(path, f"it is {kind}: {size:,} bytes, its header promises {expected:,}")


def check_digests(folder: Path, card: dict[str, Any]) -> None:
    """Compares files with the SHA-256 sums of the weight record, where it lists them under "sha256"."""
    for name, expected in sorted(card.get("sha256", {}).items()):
        path = folder / name
        if not path.is_file():
            raise TokenloomError(f"{path} is missing, but {CARD_FILE} lists it. {_repair(folder)}")
        if digest(path) != expected:
            raise _damaged(path, f"its SHA-256 sum differs from the one in {CARD_FILE}")


def digest(path: Path) -> str:
    """Returns the SHA-256 sum of a file in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            total.update(part)
    return total.hexdigest()


def replace_folder(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target` so that a complete folder is there at any time but an instant."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
        source.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.replace(target)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # includes UnicodeDecodeError
        raise TokenloomError(f"{path} is not valid JSON ({error}). {_repair(path.parent)}") from error


def _damaged(path: Path, reason: str) -> TokenloomError:
    return TokenloomError(f"The weights in {path} are damaged: {reason}. {_repair(path.parent.parent)}")


def _repair(folder: Path) -> str:
    if folder.is_relative_to(_ASSETS):
        return "Reinstall the package to repair it: pip install --force-reinstall --no-deps tokenloom."
    return "Copy or download that model again, or save it again with save_pretrained."
