"""A folder of sound files as training data: resampled once, kept as 16-bit samples, cut anywhere.

Knows sound files, the captions format and tensors. Knows nothing of tokens or models.
Shapes: M files, W windows, S samples.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenloom.data.captions import Caption
from tokenloom.data.dataset import keep_captions, read_folder
from tokenloom.errors import TokenloomError
from tokenloom.media_audio import audio_blocks

SOUND_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})
_SCALE = 32767.0


class SoundFolder:
    """Mono sounds of a folder at one sample rate.

    The folder holds sound files of any rate and any number of channels, and may hold a `captions.jsonl` (see
    `tokenloom.data.captions`); without it every sound file is used, subfolders included. A line without "split" counts as
    "train".

    Attributes:
        captions: One a sound, M in all.
        starts: LongTensor (M + 1,): sound i is `samples[starts[i] : starts[i + 1]]`.
        samples: int16 samples of all sounds, one after the other.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | Sequence[str] | None = None,
        sample_rate: int = 16000,
        *,
        groups: Sequence[str] | None = None,
        licences: Sequence[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Reads all sounds, block by block.

        Args:
            root: The folder.
            split: Keep sounds of this split, or of any of several; `None` keeps all.
            sample_rate: Samples a second.
            groups: Keep only these groups.
            licences: Keep only these licences.
            cache: Folder, made if missing, in which the samples are kept in a file: the next time they are mapped into
                memory instead of read. `None` keeps them in memory alone (2 bytes a sample, 115 MB an hour at 16 kHz).

        Raises:
            TokenloomError: If the folder, a line of captions.jsonl or a sound file is wrong, or nothing is left.
        """
        self.root, self.sample_rate = Path(root), sample_rate
        captions = read_folder(self.root, SOUND_SUFFIXES, "sound")
        captions = keep_captions(captions, "split", [split] if isinstance(split, str) else split, self.root)
        captions = keep_captions(captions, "group", groups, self.root)
        captions = keep_captions(captions, "licence", licences, self.root)
        self.captions: tuple[Caption, ...] = tuple(captions)
        self.samples, self.starts = self._load(None if cache is None else Path(cache))

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def seconds(self) -> float:
        """Length of all sounds."""
        return len(self.samples) / self.sample_rate

    def sound(self, index: int) -> Tensor:
        """One sound, float32 (1, S) in [-1, 1]."""
        index = range(len(self))[index]
        return self._floats(int(self.starts[index]), int(self.starts[index + 1]))[None]

    def windows(self, size: int) -> Tensor:
        """Windows of `size` samples side by side, see `windows`."""
        return windows(self.starts, size)

    def crops(self, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Random pieces near the given windows, up to half a window away; behind the end of a short sound is silence.

        Args:
            chosen: LongTensor (B, 2), rows of `windows(size)`.
            size: Samples of a piece.
            generator: Decides the places.

        Returns:
            float32 (B, 1, size).
        """
        crops = torch.zeros(len(chosen), 1, size)
        for row, (start, last) in enumerate(near(self.starts, chosen, size, generator)):
            piece = self._floats(start, min(last, start + size))
            crops[row, 0, : len(piece)] = piece
        return crops

    def _floats(self, start: int, stop: int) -> Tensor:
        return self.samples[start:stop].float() / _SCALE

    def _blocks(self, index: int) -> Iterator[np.ndarray]:
        """int16 samples (n,) of one file."""
        for block in audio_blocks(self.root / self.captions[index].file, self.sample_rate):
            yield (block[0].clamp(-1, 1) * _SCALE).round().to(torch.int16).numpy()

    def _load(self, cache: Path | None) -> tuple[Tensor, Tensor]:
        if cache is None:
            parts = [np.concatenate(list(self._blocks(index))) for index in range(len(self))]
            starts = np.cumsum([0, *map(len, parts)])
            return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(starts)
        samples = cache / f"{self._fingerprint()}.npy"
        starts_file = samples.with_suffix(".starts.npy")
        if not (samples.is_file() and starts_file.is_file()):
            self._write(cache, samples, starts_file)
        return torch.from_numpy(np.load(samples, mmap_mode="c")), torch.from_numpy(np.load(starts_file))

    def _write(self, cache: Path, samples: Path, starts_file: Path) -> None:
        """Writes the cache under other names first, so that a kill leaves nothing half-made under the right ones."""
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".sounds-", dir=cache) as folder:
                raw, starts = Path(folder) / "raw", [0]
                with raw.open("wb") as file:
                    for index in range(len(self)):
                        starts.append(
                            starts[-1] + sum(file.write(b.tobytes()) // 2 for b in self._blocks(index))
                        )
                mapped = np.memmap(raw, dtype=np.int16, mode="r")
                np.save(Path(folder) / "samples.npy", mapped)
                np.save(Path(folder) / "starts.npy", np.array(starts))
                (Path(folder) / "samples.npy").replace(samples)
                (Path(folder) / "starts.npy").replace(starts_file)
        except OSError as error:
            raise TokenloomError(
                f"The cache {str(cache)!r} cannot be written ({error}). Choose another folder, or none."
            ) from error

    def _fingerprint(self) -> str:
        """32 hexadecimal digits of the files, their sizes and times, and the rate."""
        found = hashlib.sha256(f"{self.root.resolve()} {self.sample_rate}".encode())
        for caption in self.captions:
            status = (self.root / caption.file).stat()
            found.update(f"{caption.file} {status.st_size} {status.st_mtime_ns}\n".encode())
        return found.hexdigest()[:32]


def windows(starts: Tensor, size: int) -> Tensor:
    """Windows of `size` positions side by side in items that lie one after the other.

    The last window of an item ends with the item; an item shorter than `size` has one window.

    Args:
        starts: LongTensor (M + 1,), where the items begin, and where the last one ends.
        size: Positions of a window.

    Returns:
        LongTensor (W, 2): the item, and where in it the window begins.
    """
    return torch.tensor(
        [
            (index, max(0, min(start, length - size)))
            for index, length in enumerate(starts.diff().tolist())
            for start in range(0, max(1, length), size)
        ]
    )


def near(starts: Tensor, chosen: Tensor, size: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Where pieces near the given windows begin, moved at random by up to half a window inside their item.

    Args:
        starts: As for `windows`.
        chosen: LongTensor (B, 2), rows of `windows(starts, size)`.
        size: Positions of a window.
        generator: Decides the places.

    Returns:
        (first position, end of the item) of each piece.
    """
    moves = torch.randint(-(size // 2), size // 2 + 1, (len(chosen),), generator=generator).tolist()
    places = []
    for (index, begin), move in zip(chosen.tolist(), moves, strict=True):
        first, last = int(starts[index]), int(starts[index + 1])
        places.append((first + max(0, min(begin + move, last - first - size)), last))
    return places
