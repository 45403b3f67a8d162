"""Training clips of one length and size, from a pool of moving cut-outs or from a folder of clips.

Knows pools, folders and random generators. Knows nothing of tokenizers or losses.

Shapes: B clips, T frames, S side of a frame in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenloom.data.clips import ClipFolder
from tokenloom.data.moving import MotionConfig, MotionMaker
from tokenloom.data.referring_pool import POOL_FILE, Pool
from tokenloom.data.splits import TRAIN
from tokenloom.data.video import clip_seed
from tokenloom.errors import TokenloomError, check_options
from tokenloom.training.video_config import ClipsConfig

_OWN = ("size", "frames")  # options of clips that the tokenizer decides


class ClipSource(ABC):
    """Clips of T frames.

    Attributes:
        size: How many clips there are.
    """

    size: int

    @abstractmethod
    def drawn(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, T, 3, S, S): other clips at every call where there are others, see the subclass."""

    @abstractmethod
    def fixed(self, indices: Tensor) -> tuple[Tensor, list[str]]:
        """uint8 (B, T, 3, S, S) and captions, always the same for an index."""

    @abstractmethod
    def words(self) -> list[str]:
        """Texts that hold every word of the captions."""

    @abstractmethod
    def name(self) -> str:
        """A text that is another for other clips."""


class MovingSource(ClipSource):
    """Clips made of the cut-outs of a pool; `drawn` makes new ones at every call.

    Args:
        config: Which clips.
        size: Side S.
        frames: Frames T.
    """

    def __init__(self, config: ClipsConfig, size: int, frames: int) -> None:
        allowed = {key: value for key, value in config.options.items() if key not in _OWN}
        check_options(MotionConfig, config.options, "option of data.options")
        if len(allowed) < len(config.options):
            raise TokenloomError("data.options cannot set size or frames; the tokenizer and `frames` do.")
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in allowed.items()
        }
        self.settings = MotionConfig(size=size, frames=frames, **options)
        self.maker = MotionMaker(Pool.open(config.root), config.split or TRAIN, self.settings)
        self.size = config.length

    def drawn(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, T, 3, S, S) of clips that nobody has seen."""
        seeds = torch.randint(2**62, (len(indices),), generator=generator).tolist()
        return _stack([self.maker.clip(seed).frames for seed in seeds])

    def fixed(self, indices: Tensor) -> tuple[Tensor, list[str]]:
        """Clips and captions of the seeds of the indices."""
        clips = [self.maker.clip(clip_seed(0, index)) for index in indices.tolist()]
        return _stack([clip.frames for clip in clips]), [clip.text for clip in clips]

    def words(self) -> list[str]:
        """Captions of every thing with every motion."""
        return self.maker.texts()

    def name(self) -> str:
        """Pool, split and settings."""
        return f"{self.maker.pool.folder.resolve()} {self.maker.split} {self.settings} {self.size}"


class FolderSource(ClipSource):
    """Windows of the clips of a folder; `drawn` moves them at random.

    Args:
        config: Which clips.
        size: Side S.
        frames: Frames T.
    """

    def __init__(self, config: ClipsConfig, size: int, frames: int) -> None:
        if config.options:
            raise TokenloomError(
                f"{config.root!r} is a folder of clips, so data.options has nothing to say; take it away."
            )
        self.folder = ClipFolder(config.root, config.split, size, config.licences)
        self.frames, self.size = frames, len(self.folder)

    def drawn(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, T, 3, S, S), random windows of the clips."""
        return torch.stack([self.folder.window(index, self.frames, generator) for index in indices.tolist()])

    def fixed(self, indices: Tensor) -> tuple[Tensor, list[str]]:
        """The beginnings of the clips and their captions."""
        chosen = indices.tolist()
        clips = torch.stack([self.folder.window(index, self.frames) for index in chosen])
        return clips, [self.folder.captions[index].text for index in chosen]

    def words(self) -> list[str]:
        """All captions."""
        return [caption.text for caption in self.folder.captions]

    def name(self) -> str:
        """Files, their sizes and times."""
        found = [str(self.folder.root.resolve()), str(self.folder.size), str(self.frames)]
        for caption in self.folder.captions:
            status = (self.folder.root / caption.file).stat()
            found.append(f"{caption.file} {status.st_size} {status.st_mtime_ns}")
        return "\n".join(found)


def open_clips(config: ClipsConfig, size: int, frames: int) -> ClipSource:
    """The clips of a config: made of a pool where `root` holds one, else those of the folder.

    Args:
        config: Which clips.
        size: Side S of the frames.
        frames: Frames T of a clip.

    Raises:
        TokenloomError: If the folder is wrong, or nothing is left of it.
    """
    kind = MovingSource if (Path(config.root) / POOL_FILE).is_file() else FolderSource
    return kind(config, size, frames)


def _stack(clips: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).contiguous()
