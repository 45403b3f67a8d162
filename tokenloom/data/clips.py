"""A folder of clips as training data: GIF, WebP, video files, folders of frames, with or without a captions.jsonl.

Clips are read when they are asked for. Knows files of clips, the captions format and tensors. Knows nothing of tokens.

Shapes: T frames, S side of a frame in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenloom.data.captions import CAPTIONS_FILE, Caption, read_captions
from tokenloom.data.dataset import PICTURE_SUFFIXES, fit_square, keep_captions, read_folder
from tokenloom.errors import TokenloomError
from tokenloom.media_video import read_clip

CLIP_SUFFIXES = frozenset({".gif", ".webp", ".apng", ".mp4", ".webm", ".mkv", ".mov", ".avi"})


class ClipFolder:
    """Clips of a folder, all brought to one square size.

    The folder holds clips and may hold a `captions.jsonl` (see `tokenloom.data.captions`), whose "file" may also name a
    folder of frames. Without that file every clip in it is used with the caption ""; if it has none but sub-folders of
    pictures, each of them is a clip. A line without "split" counts as "train". Further keys of a line, such as a "track",
    are kept in `captions[i].extra`.

    Args:
        root: The folder.
        split: Keep clips of this split, or of any of several; `None` keeps all.
        size: Side S of the square frames; the central square of other frames is taken.
        licences: Keep only these licences.

    Raises:
        TokenloomError: If the folder or a line of captions.jsonl is wrong, or nothing is left.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | Sequence[str] | None = None,
        size: int = 64,
        licences: Sequence[str] | None = None,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise TokenloomError(f"Expected a positive whole number of pixels as size, got {size!r}.")
        self.root, self.size = Path(root), size
        captions = _captions(self.root)
        captions = keep_captions(captions, "split", [split] if isinstance(split, str) else split, self.root)
        captions = keep_captions(captions, "licence", licences, self.root)
        self.captions: tuple[Caption, ...] = tuple(captions)

    def __len__(self) -> int:
        return len(self.captions)

    def clip(self, index: int) -> Tensor:
        """One whole clip, uint8 (T, 3, S, S).

        Raises:
            TokenloomError: If it cannot be read; the message names the file.
        """
        index = range(len(self))[index]
        clip = read_clip(self.root / self.captions[index].file)
        frames = [np.asarray(fit_square(frame, self.size, "crop")) for frame in clip.frames]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    def window(self, index: int, frames: int, generator: torch.Generator | None = None) -> Tensor:
        """`frames` frames of a clip in a row, uint8 (frames, 3, S, S).

        A shorter clip is filled up with its last frame.

        Args:
            index: Which clip.
            frames: How many frames.
            generator: Draws where they begin; `None` takes the beginning of the clip.
        """
        clip = self.clip(index)
        spare = len(clip) - frames
        if spare < 0:
            return torch.cat([clip, clip[-1:].expand(-spare, -1, -1, -1)])
        start = int(torch.randint(spare + 1, (), generator=generator)) if generator is not None else 0
        return clip[start : start + frames]


def _captions(root: Path) -> list[Caption]:
    """The captions of a folder; every clip without one if it has no captions.jsonl."""
    if (root / CAPTIONS_FILE).is_file():
        captions = read_captions(root, check_files=False)
        for caption in captions:
            if not (root / caption.file).exists():
                raise TokenloomError(
                    f"{str(root / CAPTIONS_FILE)!r} names the clip {caption.file!r}, which is not there; add it, or remove "
                    "the line."
                )
        return captions
    if root.is_dir() and not any(path.suffix.lower() in CLIP_SUFFIXES for path in root.iterdir()):
        folders = sorted(path for path in root.iterdir() if _holds_frames(path))
        if folders:
            return [Caption(file=path.name, text="") for path in folders]
    return read_folder(root, CLIP_SUFFIXES, "clip")


def _holds_frames(path: Path) -> bool:
    if not path.is_dir() or path.name.startswith("."):
        return False
    stills = PICTURE_SUFFIXES - {".gif", ".webp"}
    return any(file.suffix.lower() in stills for file in path.iterdir())
