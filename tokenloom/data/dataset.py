"""A folder of captioned pictures as a torch data set.

Knows picture files, the captions format and tensors. Knows nothing of tokens or models.
Shapes: N pictures, S the side in pixels.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenloom.data import prompts
from tokenloom.data.captions import CAPTIONS_FILE, Caption, read_captions
from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media import open_image

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
FITS = ("pad", "crop")
DEFAULT_SPLIT = "train"
_DECODING_THREADS = 4


class ImageCaptionFolder(Dataset[dict[str, Any]]):
    """Captioned pictures of a folder, all brought to one square size.

    The folder holds pictures and a `captions.jsonl` (see `tokenloom.data.captions`). A folder without that
    file works too: every picture in it, subfolders included, is used with the caption "", which is all that
    training an image tokenizer needs. A line without "split" counts as "train".
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | Sequence[str] | None = None,
        size: int = 64,
        *,
        styles: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        licences: Sequence[str] | None = None,
        fit: str = "pad",
        vary_captions: bool = False,
        cache: bool = False,
    ) -> None:
        """Reads the captions and, with `cache`, all the pictures.

        Args:
            root: The folder.
            split: Keep pictures of this split, or of any of several; None keeps all.
            size: Side S of the square pictures, in pixels.
            styles: Keep only these styles.
            groups: Keep only these groups.
            licences: Keep only these licences.
            fit: What becomes of pictures that are not square: "pad" puts the whole picture in the middle of a
                white square, "crop" keeps its central square.
            vary_captions: Give each time a fresh caption made of label, style and 0-2 random tags (torch's
                random state decides, so `torch.manual_seed` repeats it) instead of the caption in the file.
                Lines without a label keep their caption.
            cache: Decode every picture now and keep it in memory as uint8 (3 * S * S bytes a picture; 10,000
                pictures of 64 pixels are 123 MB), so that an epoch costs no decoding.

        Raises:
            TokenloomError: If the folder or a line of captions.jsonl is wrong, nothing is left after
                filtering, or with `cache` a picture cannot be read.
        """
        if not isinstance(size, int) or size < 1:
            raise TokenloomError(f"Expected a positive whole number of pixels as size, got {size!r}.")
        if fit not in FITS:
            raise unknown_name("fit", fit, FITS)
        self.root = Path(root)
        self.size = size
        self.fit = fit
        self.vary_captions = vary_captions
        captions = read_folder(self.root)
        captions = keep_captions(captions, "split", [split] if isinstance(split, str) else split, self.root)
        captions = keep_captions(captions, "style", styles, self.root)
        captions = keep_captions(captions, "group", groups, self.root)
        captions = keep_captions(captions, "licence", licences, self.root)
        self.captions: tuple[Caption, ...] = tuple(captions)
        self._pixels: Tensor | None = None
        if cache:
            self._pixels = self.stack()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one picture with its caption.

        Args:
            index: From 0 to len - 1, or negative to count from the end.

        Returns:
            "pixels": float32 (3, S, S) in [-1, 1]; "text": the caption; "index": the index, from 0.

        Raises:
            TokenloomError: If the picture cannot be read; the message names the file.
        """
        index = range(len(self))[index]
        pixels = self._load(index) if self._pixels is None else self._pixels[index]
        return {"pixels": pixels.to(torch.float32) / 127.5 - 1.0, "text": self.text(index), "index": index}

    def text(self, index: int) -> str:
        """Returns the caption of one picture (a fresh one each time with `vary_captions`)."""
        caption = self.captions[index]
        if not self.vary_captions or not caption.label:
            return caption.text
        rng = random.Random(int(torch.randint(2**62, ())))
        return prompts.caption(caption.label, caption.tags, caption.style, rng)

    def texts(self) -> list[str]:
        """Returns the caption of every picture, in order."""
        return [self.text(index) for index in range(len(self))]

    def stack(self) -> Tensor:
        """Returns all pictures at once; the cache itself, not a copy, if there is one.

        Returns:
            uint8 (N, 3, S, S) in 0..255, in the order of `captions`. `x.float() / 127.5 - 1` gives the range
            of items.

        Raises:
            TokenloomError: If a picture cannot be read; the message names the file.
        """
        if self._pixels is not None:
            return self._pixels
        pixels = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)

        def fill(index: int) -> None:
            pixels[index] = self._load(index)

        # Pillow's decoders release the interpreter lock.
        threads = min(_DECODING_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            try:
                for _ in pool.map(fill, range(len(self))):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return pixels

    def _load(self, index: int) -> Tensor:
        """Decodes one picture.

        Returns:
            uint8 (3, S, S).
        """
        picture = fit_square(open_image(self.root / self.captions[index].file), self.size, self.fit)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def fit_square(picture: Image.Image, size: int, fit: str = "pad") -> Image.Image:
    """Resizes an RGB picture to a square without distorting it, with antialiasing.

    Args:
        picture: Mode "RGB", any size.
        size: Side of the result, in pixels.
        fit: "pad" (whole picture, centred on white) or "crop" (central square).

    Returns:
        An RGB picture of `size` x `size`. A picture that already has that size is returned as it is.
    """
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return picture.resize(
            (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    scale = size / max(width, height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = picture.resize(inner, Image.Resampling.LANCZOS)
    if inner == (size, size):
        return resized
    square = Image.new("RGB", (size, size), (255, 255, 255))
    square.paste(resized, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square


def read_folder(
    root: Path, suffixes: Collection[str] = PICTURE_SUFFIXES, what: str = "picture"
) -> list[Caption]:
    """Returns the captions of a folder, or one empty caption for each file if it has no captions.jsonl.

    Args:
        root: The folder.
        suffixes: Endings of the files that count where there are no captions.
        what: What the files are, for messages.

    Raises:
        TokenloomError: If there is no such folder, or nothing in it.
    """
    if not root.is_dir():
        there = "a file" if root.exists() else "nothing"
        raise TokenloomError(
            f"Expected a folder of {what}s, got {str(root)!r}, where there is {there}. Check the path."
        )
    if (root / CAPTIONS_FILE).exists():
        return read_captions(root)
    found = (path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    names = (path.relative_to(root).as_posix() for path in found)
    files = sorted(name for name in names if not _is_hidden(name))
    if not files:
        raise TokenloomError(
            f"The folder {str(root)!r} has neither a {CAPTIONS_FILE} nor a {what} "
            f"({', '.join(sorted(suffixes))}). Check the path."
        )
    return [Caption(file=file, text="") for file in files]


def _is_hidden(file: str) -> bool:
    return any(part.startswith(".") for part in file.split("/"))


def _value(caption: Caption, key: str) -> str | None:
    value: str | None = getattr(caption, key)
    return DEFAULT_SPLIT if key == "split" and value is None else value


def keep_captions(
    captions: list[Caption], key: str, wanted: Iterable[str] | None, root: Path
) -> list[Caption]:
    """Keeps the captions whose value of `key` is wanted; None keeps all."""
    if wanted is None:
        return captions
    if isinstance(wanted, str):
        raise TokenloomError(f"Expected a list of {key} values, got the text {wanted!r}. Write [{wanted!r}].")
    names = list(wanted)
    present = {value for caption in captions if (value := _value(caption, key)) is not None}
    if not present and captions:
        raise TokenloomError(
            f"Cannot filter {str(root)!r} by {key}: no line of its {CAPTIONS_FILE} has the key "
            f'"{key}". Leave that filter out.'
        )
    for name in names:
        if name not in present:
            raise unknown_name(
                key,
                name,
                present,
                f"The files of {str(root)!r} left by the other filters have these values.",
            )
    kept = [caption for caption in captions if _value(caption, key) in names]
    if not kept:
        raise TokenloomError(
            f"The list of {key} values is empty, so nothing is left. Name some of {sorted(present)}."
        )
    return kept
