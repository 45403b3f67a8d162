"""Continuations of pieces whose notes are known, beside the real music, the prompt played again, and noise.

Knows a continuation pipeline, a folder that `tokenloom data chorales` wrote, and the note-level scores. Shapes: (S,) samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenloom.data.chorales import read_notes
from tokenloom.data.sounds import SoundFolder
from tokenloom.errors import TokenloomError
from tokenloom.evaluation.audio_report import pieces
from tokenloom.evaluation.note_scores import NoteScores, note_scores
from tokenloom.evaluation.tables import markdown_table

_TIMED_SECONDS = 4.0
_RUNGS = ("cached", "compiled")


def evaluate_continuations(
    pipe: Any,
    sounds: SoundFolder,
    *,
    prompt_seconds: float = 4.0,
    seconds: float = 6.0,
    count: int = 16,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Scores what a pipeline makes of the beginnings of known pieces.

    Args:
        pipe: An `AudioContinuationPipeline`.
        sounds: A folder with notes.jsonl, at the rate of its codec.
        prompt_seconds: Length of the prompt.
        seconds: Length of the continuation.
        count: Most pieces.
        seed: Seed of the first continuation; the next ones count up.
        log: Receives a line a piece.

    Returns:
        A JSON-able dictionary: "rows" (name -> mean `NoteScores`), "pieces", "speed".

    Raises:
        TokenloomError: If the folder has no notes, or no piece is long enough.
    """
    rate, codec = sounds.sample_rate, pipe.tokenizer
    lines = read_notes(sounds.root)
    start = round(prompt_seconds * rate)
    found: dict[str, list[NoteScores]] = {}
    chosen = pieces(sounds, prompt_seconds + seconds, count)
    for index, (name, audio) in enumerate(chosen):
        log(name)
        if name not in lines:
            raise TokenloomError(f"notes.jsonl does not name {name!r}. Build the folder again.")
        prompt, real = audio[:start], audio[start:]
        loud = float(prompt.square().mean().sqrt())
        noise = loud * torch.randn(len(real), generator=torch.Generator().manual_seed(seed + index))
        made = pipe(prompt, rate, seconds=len(real) / rate, seed=seed + index)
        versions = {
            "real continuation": real,
            "real, through the codec": _through(codec, audio, pipe.window[1])[start:],
            "continuation": torch.as_tensor(made.audios)[0, 0, start:].float(),
            "prompt again": prompt.repeat(-(-len(real) // start))[: len(real)],
            "noise, through the codec": _through(codec, noise, pipe.window[1]),
        }
        for title, sound in versions.items():
            scores = note_scores(sound, rate, lines[name]["notes"], prompt_seconds, loud)
            found.setdefault(title, []).append(scores)
    return {
        "pieces": len(chosen),
        "prompt_seconds": prompt_seconds,
        "seconds": seconds,
        "rows": {title: _mean(scores) for title, scores in found.items()},
        "speed": speed(pipe, chosen[0][1][:start]),
    }


def _through(codec: Any, audio: Tensor, codebooks: int) -> Tensor:
    given = audio[None, None].clamp(-1, 1).to(codec.device)
    return codec.reconstruct(given, num_codebooks=codebooks)[0, 0].float().cpu()


def _mean(scores: list[NoteScores]) -> dict[str, float]:
    values = [score.as_dict() for score in scores]
    return {key: statistics.fmean(value[key] for value in values) for key in values[0]}


def speed(pipe: Any, prompt: Tensor, rounds: int = 3) -> dict[str, dict[str, float]]:
    """How much faster than real time four seconds are made, and after how long a stream gives its first chunk, by rung.

    Medians of `rounds` in turns; what a first call builds is not counted. "per_processor_second" is seconds of sound a
    second of processor time, which other processes disturb little.
    """
    rate = pipe.tokenizer.sample_rate
    taken: dict[str, list[tuple[float, float, float]]] = {rung: [] for rung in _RUNGS}
    for number in range(rounds + 1):
        for rung in _RUNGS:
            wall, busy = time.perf_counter(), time.process_time()
            pipe(prompt, rate, seconds=_TIMED_SECONDS, seed=0, decode=rung)
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            started = time.perf_counter()
            stream = pipe(prompt, rate, seconds=_TIMED_SECONDS, seed=0, decode=rung, stream=True)
            next(stream)
            first = time.perf_counter() - started
            stream.close()
            if number:  # the first builds and warms up
                taken[rung].append((_TIMED_SECONDS / wall, _TIMED_SECONDS / busy, first))
    names = ("real_time_factor", "per_processor_second", "first_chunk_seconds")
    return {
        rung: dict(zip(names, map(statistics.median, zip(*times, strict=True)), strict=True))
        for rung, times in taken.items()
    }


def continuation_table(report: Mapping[str, Any]) -> str:
    """The rows of `evaluate_continuations` as markdown."""
    keys = ("onset_f1", "chroma", "in_key", "dissonance", "repetition", "silence")
    titles = ("", "onset F1", "chroma agreement", "in key", "dissonance", "repetition", "silence")
    rows = [(name, *(f"{row[key]:.3f}" for key in keys)) for name, row in report["rows"].items()]
    paces = [
        f"decode={rung!r}: {pace['real_time_factor']:.1f} times faster than real time, first sound of a stream after "
        f"{1000 * pace['first_chunk_seconds']:.0f} ms."
        for rung, pace in report["speed"].items()
    ]
    return (
        f"{report['pieces']} pieces, {report['prompt_seconds']:.1f} s of prompt, {report['seconds']:.1f} s of continuation.\n\n"
        f"{markdown_table(titles, rows)}\n" + " ".join(paces) + "\n"
    )
