"""The captioned folder: `captions.jsonl`, one JSON object a line, beside the pictures it names.

    {"file": "flat/1f9c5.webp", "text": "a flat picture of onion"}

"file" (relative to the folder) and "text" are required. The optional keys "label", "tags", "style", "group",
"concept", "licence", "source" and "split" let a data set be filtered; any other key is kept and ignored. This
module reads, checks and writes the file. It never opens a picture.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tokenloom.errors import TokenloomError

CAPTIONS_FILE = "captions.jsonl"
_OPTIONAL_TEXTS = ("label", "style", "group", "concept", "licence", "source", "split")
_KNOWN = ("file", "text", "tags", *_OPTIONAL_TEXTS)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One line of `captions.jsonl`.

    Attributes:
        file: Path of the picture relative to the folder, with forward slashes.
        text: The caption; "" for a picture without one.
        label: What the picture shows, without style words.
        tags: More words for it.
        style: How it is drawn or photographed.
        group: A coarse subject ("animals & nature").
        concept: A key shared by all pictures of the same thing (for emoji the code point).
        licence: SPDX name of the picture's licence.
        source: Where the picture came from ("package@version").
        split: "train", "val", ...; None counts as "train".
        extra: Every other key of the line, untouched.
    """

    file: str
    text: str
    label: str | None = None
    tags: tuple[str, ...] = ()
    style: str | None = None
    group: str | None = None
    concept: str | None = None
    licence: str | None = None
    source: str | None = None
    split: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        """Returns the line for `captions.jsonl`, without keys that are not set."""
        values: dict[str, Any] = {"file": self.file, "text": self.text}
        for key in ("label", "tags", "style", "group", "concept", "licence", "source", "split"):
            value = getattr(self, key)
            if value is not None and value != ():
                values[key] = list(value) if key == "tags" else value
        return json.dumps({**values, **self.extra}, ensure_ascii=False)


def read_captions(folder: str | os.PathLike[str], *, check_files: bool = True) -> list[Caption]:
    """Reads and checks `captions.jsonl` of a folder.

    Args:
        folder: The folder that holds `captions.jsonl`, or the path of that file itself.
        check_files: Whether every named picture must exist.

    Returns:
        One `Caption` a line, in file order; blank lines are skipped.

    Raises:
        TokenloomError: If the file is missing, empty or not UTF-8, or a line is wrong; the message names the
            line.
    """
    path = Path(folder)
    path = path if path.name == CAPTIONS_FILE and not path.is_dir() else path / CAPTIONS_FILE
    captions = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{str(path)!r}, line {number}"
            caption = _parse(line, place)
            if check_files and not (path.parent / caption.file).is_file():
                raise TokenloomError(
                    f"{place}: there is no picture {caption.file!r} in {str(path.parent)!r}. "
                    '"file" is relative to the folder of captions.jsonl; add the picture or remove the line.'
                )
            captions.append(caption)
    if not captions:
        raise TokenloomError(
            f'{str(path)!r} is empty. Expected one JSON object a line: {{"file": "a.png", "text": "..."}}.'
        )
    return captions


def write_captions(folder: str | os.PathLike[str], captions: Iterable[Caption]) -> Path:
    """Writes `captions.jsonl` of a folder; readers see the old file or the whole new one, never a part.

    Args:
        folder: An existing folder.
        captions: The lines, written in this order.

    Returns:
        The path of the file.

    Raises:
        TokenloomError: If the folder does not exist or cannot be written.
    """
    path = Path(folder) / CAPTIONS_FILE
    text = "".join(caption.to_json() + "\n" for caption in captions)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{CAPTIONS_FILE}.", dir=path.parent)
    except OSError as error:
        raise TokenloomError(
            f"Cannot write {str(path)!r} ({error.strerror}). "
            "Create the folder first and check its permissions."
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise TokenloomError(
            f"Cannot write {str(path)!r} ({error.strerror}). Check the free space."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 file; a byte order mark is dropped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenloomError(
            f"Cannot read {str(path)!r} ({error.strerror}). "
            f"Expected a folder with a {CAPTIONS_FILE}, one JSON object a line: "
            ' {"file": "a.png", "text": "a red ball"}.'
        ) from error
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TokenloomError(
                f"{str(path)!r}, line {number}: not UTF-8 text ({error.reason} at byte {error.start}). "
                "Save the file as UTF-8."
            ) from error
    return lines


def _parse(line: str, place: str) -> Caption:
    """Turns one line into a `Caption`, or says what is wrong with it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        )
        raise TokenloomError(
            f"{place}: not JSON ({detail}). "
            'Expected one object a line: {"file": "a.png", "text": "a red ball"}.'
        ) from error
    if not isinstance(values, dict):
        raise TokenloomError(
            f'{place}: expected a JSON object with "file" and "text", got {type(values).__name__}. '
            "Put it in braces."
        )
    for key in ("file", "text"):
        if key not in values:
            raise TokenloomError(f'{place}: the key "{key}" is missing. Every line needs "file" and "text".')
        _check_text(values, key, place)
    for key in _OPTIONAL_TEXTS:
        if values.get(key) is not None:
            _check_text(values, key, place)
    tags = values.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise TokenloomError(
            f'{place}: "tags" must be a list of texts, got {tags!r:.80}. Write ["red", "round"].'
        )
    _check_relative(values["file"], place)
    return Caption(
        file=values["file"],
        text=values["text"],
        tags=tuple(tags or ()),
        extra={key: value for key, value in values.items() if key not in _KNOWN},
        **{key: values.get(key) for key in _OPTIONAL_TEXTS},
    )


def _check_text(values: Mapping[str, Any], key: str, place: str) -> None:
    if not isinstance(values[key], str):
        got = f"{values[key]!r:.80} ({type(values[key]).__name__})"
        raise TokenloomError(f'{place}: "{key}" must be a text, got {got}. Put it in double quotes.')


def _check_relative(file: str, place: str) -> None:
    """Raises for a path that is empty or leaves the folder, in the spelling of any operating system."""
    windows = PureWindowsPath(file)
    outside = PurePosixPath(file).is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if not file or "\0" in file or outside:
        raise TokenloomError(
            f'{place}: "file" must be a path inside the folder, got {file!r}. '
            'Write it relative to captions.jsonl, without "..".'
        )
