"""How musical a continuation is, judged without any model: key, chroma, onsets, dissonance, repetition, silence.

Works on sound, with the known notes of the piece as the truth. The figures mean something beside each other: of the real
continuation, of the prompt played again, of noise. Shapes: (S,) samples, L frames of a chromagram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError

Notes = Sequence[tuple[float, float, int]]
"""Onset and duration in seconds, and MIDI pitch, of each note."""

_FRAMES_A_SECOND = 20
_WINDOW_SECONDS = 0.25
_LOWEST, _HIGHEST = 40, 88  # MIDI pitches that the chromagram hears
_MAJOR = (
    6.35,
    2.23,
    3.48,
    2.33,
    4.38,
    4.09,
    2.52,
    5.19,
    2.39,
    3.66,
    2.29,
    2.88,
)  # Krumhansl and Kessler 1982
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
_MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)
_MINOR_SCALE = (0, 2, 3, 5, 7, 8, 9, 10, 11)  # with the raised sixth and seventh
_ONSET_TOLERANCE = 0.075
_STRONG = 0.4  # of a frame's strongest pitch class
_SAME = 0.995  # cosine from which two seconds count as the same
_SILENT_DB = -35.0  # below the prompt


@dataclass(frozen=True)
class NoteScores:
    """Figures of one continuation, all in [0, 1].

    Attributes:
        onset_f1: F1 of the onsets heard, against those of the known notes (within 75 ms).
        chroma: Cosine of the mean chroma and that of the known notes of the same time.
        in_key: Share of the chroma in the scale of the piece's key.
        dissonance: Share of the frames in which two strong pitch classes are a semitone apart.
        repetition: Share of the seconds that sound as an earlier one did.
        silence: Share of the frames more than 35 dB below the prompt.
    """

    onset_f1: float
    chroma: float
    in_key: float
    dissonance: float
    repetition: float
    silence: float

    def as_dict(self) -> dict[str, float]:
        """The figures as a JSON-able dictionary."""
        return asdict(self)


def note_scores(
    audio: Tensor, sample_rate: int, notes: Notes, start: float, prompt_level: float
) -> NoteScores:
    """Scores of a continuation.

    Args:
        audio: The continuation, float samples (S,).
        sample_rate: Samples a second.
        notes: Those of the whole piece.
        start: Second of the piece at which the continuation begins.
        prompt_level: Root mean square of the prompt.

    Raises:
        TokenloomError: If the continuation is shorter than half a second, or there are no notes.
    """
    seconds = audio.shape[0] / sample_rate
    if audio.ndim != 1 or seconds < 0.5 or not notes:
        raise TokenloomError(
            f"Expected at least half a second of sound (S,) and some notes, got {tuple(audio.shape)} and {len(notes)} notes."
        )
    frames = chromagram(audio, sample_rate)
    mean, known = frames.mean(0), note_chroma(notes, start, start + seconds)
    loud = frame_levels(audio, sample_rate)
    wanted = sorted({round(onset - start, 2) for onset, _, _ in notes if start <= onset < start + seconds})
    return NoteScores(
        onset_f1=f1(heard_onsets(audio, sample_rate), wanted, _ONSET_TOLERANCE),
        chroma=_cosine(mean, known),
        in_key=float(mean[list(key_scale(note_chroma(notes)))].sum() / mean.sum().clamp(min=1e-9)),
        dissonance=_dissonance(frames),
        repetition=_repetition(frames),
        silence=float((loud < prompt_level * 10 ** (_SILENT_DB / 20)).float().mean()),
    )


def chromagram(audio: Tensor, sample_rate: int) -> Tensor:
    """Strength of the twelve pitch classes, float32 (L, 12), 20 frames a second; silence is 0."""
    window = 1 << (round(_WINDOW_SECONDS * sample_rate) - 1).bit_length()
    hop = sample_rate // _FRAMES_A_SECOND
    padded = torch.nn.functional.pad(audio.float(), (window // 2, window // 2))
    spectrum = torch.stft(
        padded, window, hop, window=torch.hann_window(window), center=False, return_complex=True
    )
    hertz = torch.arange(1, window // 2 + 1) * sample_rate / window
    pitch = 69 + 12 * (hertz / 440).log2()
    near = (-0.5 * ((pitch - pitch.round()) / 0.2).square()).exp()  # bins between two pitches count little
    near = near * ((pitch > _LOWEST - 0.5) & (pitch < _HIGHEST + 0.5))
    table = torch.zeros(len(hertz), 12)
    table[torch.arange(len(hertz)), pitch.round().long() % 12] = near
    return spectrum[1:].abs().square().T @ table


def note_chroma(notes: Notes, start: float = 0.0, stop: float = float("inf")) -> Tensor:
    """Seconds that each pitch class sounds between two times, float32 (12,)."""
    chroma = torch.zeros(12)
    for onset, duration, pitch in notes:
        chroma[pitch % 12] += max(0.0, min(onset + duration, stop) - max(onset, start))
    return chroma


def key_scale(chroma: Tensor) -> tuple[int, ...]:
    """Pitch classes of the scale of the key that fits a chroma (12,) best."""
    best = max(
        (_cosine(chroma - chroma.mean(), _profile(weights, tonic)), tonic, scale)
        for weights, scale in ((_MAJOR, _MAJOR_SCALE), (_MINOR, _MINOR_SCALE))
        for tonic in range(12)
    )
    return tuple(sorted((best[1] + step) % 12 for step in best[2]))


def _profile(weights: Sequence[float], tonic: int) -> Tensor:
    profile = torch.tensor(weights).roll(tonic)
    return profile - profile.mean()


def frame_levels(audio: Tensor, sample_rate: int) -> Tensor:
    """Root mean squares (L,) of twentieths of a second."""
    size = sample_rate // _FRAMES_A_SECOND
    return audio[: len(audio) // size * size].view(-1, size).square().mean(1).sqrt()


def heard_onsets(audio: Tensor, sample_rate: int) -> list[float]:
    """Seconds at which the spectrum grows suddenly (spectral flux, 10 ms apart, peaks at least 80 ms apart)."""
    window, hop = 1 << (sample_rate // 25 - 1).bit_length(), sample_rate // 100
    padded = torch.nn.functional.pad(audio.float(), (window, window // 2))
    spectrum = torch.stft(
        padded, window, hop, window=torch.hann_window(window), center=False, return_complex=True
    )
    flux = (1 + 100 * spectrum.abs()).log().diff(dim=1).clamp(min=0).mean(0)
    if not float(flux.max()) > 0:
        return []
    around = torch.nn.functional.avg_pool1d(flux[None], 31, 1, 15, count_include_pad=False)[0]
    highest = torch.nn.functional.max_pool1d(flux[None], 15, 1, 7)[0]
    peaks = (flux == highest) & (flux > 1.5 * around) & (flux > 0.1 * flux.max())
    return [max(0.0, (index * hop - window / 2) / sample_rate) for index in peaks.nonzero()[:, 0].tolist()]


def f1(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> float:
    """F1 of times, each matched once in order; 1 if there is nothing to find and nothing was found."""
    if not found and not wanted:
        return 1.0
    hits, left = 0, sorted(found)
    for time in sorted(wanted):
        left = [other for other in left if other >= time - tolerance]
        if left and left[0] <= time + tolerance:
            hits += 1
            left = left[1:]
    return 2 * hits / (len(found) + len(wanted))


def _dissonance(frames: Tensor) -> float:
    strong = (frames >= _STRONG * frames.amax(1, keepdim=True)) & (frames.amax(1, keepdim=True) > 0)
    return float((strong & strong.roll(1, 1)).any(1).float().mean())


def _repetition(frames: Tensor) -> float:
    """Compares seconds, half a second apart, with those that ended before they began."""
    half = _FRAMES_A_SECOND // 2
    starts = range(0, len(frames) - 2 * half + 1, half)
    if len(starts) < 3:
        return 0.0
    seconds = torch.nn.functional.normalize(
        torch.stack([frames[start : start + 2 * half].sqrt().flatten() for start in starts]), dim=1
    )
    alike = (seconds @ seconds.T).tril(-2) > _SAME
    return float(alike.any(1)[2:].float().mean())


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-9).clamp(-1, 1))
