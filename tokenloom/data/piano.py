"""A piano made of recordings of single notes: notes in, sound out.

Each pitch is played by the nearest recorded one, at another speed. Knows nothing of scores or files of music.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.media_audio import load_audio, resample

_NAME = re.compile(r"([A-G])(#?)(-?\d)v")
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_LONGEST = 8.0  # seconds of a note; a piano has died away by then
_RELEASE = 0.12  # seconds in which a note falls to 1/e behind its end
_LOUDNESS = 0.1  # root mean square of what is played, -20 dB
_PEAK = 0.95

Sounding = tuple[float, float, int]
"""Onset and duration in seconds, and MIDI pitch."""


class Piano:
    """Plays notes.

    Args:
        recordings: Sound files named after their pitch, as "D#4v10.ogg".
        sample_rate: Samples a second of what is played.

    Raises:
        TokenloomError: If no file is named after a pitch, or one cannot be read.
    """

    def __init__(self, recordings: Iterable[Path], sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.recordings = {pitch: path for path in recordings if (pitch := _pitch(path.name)) is not None}
        if not self.recordings:
            raise TokenloomError("Expected recorded notes with names such as D#4v10.ogg, got none.")
        self._played: dict[int, np.ndarray] = {}

    def note(self, pitch: int) -> np.ndarray:
        """Float32 samples (n,) of a pitch that is held to its end."""
        if pitch not in self._played:
            nearest = min(self.recordings, key=lambda other: (abs(other - pitch), other))
            speed = 2 ** ((pitch - nearest) / 12)
            audio, rate = load_audio(self.recordings[nearest], seconds=(_LONGEST + 1) * max(1.0, speed))
            wave = audio[0].numpy()
            wave = wave[int(np.argmax(np.abs(wave) > 0.02 * np.abs(wave).max())) :]  # it starts at once
            places = np.arange(0, len(wave) - 1, speed)[: int(_LONGEST * rate)]
            bent = torch.from_numpy(np.interp(places, np.arange(len(wave)), wave).astype(np.float32))
            self._played[pitch] = resample(bent, rate, self.sample_rate).numpy()
        return self._played[pitch]

    def play(self, notes: Iterable[Sounding], seconds: float) -> Tensor:
        """Sound of notes.

        Args:
            notes: Onset, duration (seconds) and pitch of each.
            seconds: Length of the sound; what goes on behind it is cut off.

        Returns:
            Float32 samples (1, S), of one loudness whatever is played, within [-0.95, 0.95].
        """
        rate = self.sample_rate
        out = np.zeros(round(seconds * rate), dtype=np.float32)
        for onset, duration, pitch in notes:
            start, held = round(onset * rate), round(duration * rate)
            wave = self.note(pitch)[: min(held + round(5 * _RELEASE * rate), max(0, len(out) - start))]
            after = np.arange(len(wave)) - held
            out[start : start + len(wave)] += wave * np.exp(-np.maximum(after, 0) / (_RELEASE * rate))
        loud, peak = float(np.sqrt(np.mean(out**2))), float(np.abs(out).max(initial=0))
        gain = min(_LOUDNESS / loud, _PEAK / peak) if loud > 0 else 1.0
        return torch.from_numpy(out * np.float32(gain))[None]


def _pitch(name: str) -> int | None:
    found = _NAME.match(name)
    if found is None:
        return None
    step, sharp, octave = found.groups()
    return 12 * (int(octave) + 1) + _STEPS[step] + bool(sharp)
