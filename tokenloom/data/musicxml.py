"""Notes of a score in compressed MusicXML (.mxl), as numbers.

Reads what a plain polyphonic score needs: measures, voices, chords, rests, ties and transposing instruments. Repeats are
not played. Knows nothing of sound. Times are in quarter notes, pitches in MIDI numbers.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from tokenloom.errors import TokenloomError

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


@dataclass(frozen=True, order=True)
class Note:
    """One note.

    Attributes:
        onset: When it begins.
        duration: How long it lasts.
        pitch: MIDI number, 60 for middle C.
        part: Index of the part.
    """

    onset: float
    duration: float
    pitch: int
    part: int = 0


@dataclass(frozen=True)
class Score:
    """A piece of music.

    Attributes:
        parts: Names of the parts.
        notes: All notes by onset, tied ones joined.
        fifths: Sharps (or, negative, flats) of the first key signature.
    """

    parts: tuple[str, ...]
    notes: tuple[Note, ...]
    fifths: int


def read_mxl(content: bytes) -> Score:
    """The notes of a .mxl file.

    Raises:
        TokenloomError: If it is no compressed MusicXML, or not by parts.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [
                name
                for name in archive.namelist()
                if name.endswith((".xml", ".musicxml")) and not name.startswith("META-INF")
            ]
            root = ElementTree.fromstring(archive.read(names[0]))
    except (zipfile.BadZipFile, IndexError, ElementTree.ParseError) as error:
        raise TokenloomError(
            f"Expected a compressed MusicXML score, but it cannot be read ({error})."
        ) from error
    parts = root.findall("part")
    if root.tag != "score-partwise" or not parts:
        raise TokenloomError(f"Expected a MusicXML score by parts, got <{root.tag}> of {len(parts)} parts.")
    try:
        notes = [note for index, part in enumerate(parts) for note in _join_ties(_notes(part, index))]
        fifths = int(root.findtext(".//key/fifths") or 0)
    except (TypeError, ValueError, KeyError) as error:
        raise TokenloomError(f"The MusicXML score is damaged ({error}).") from error
    titles = tuple(item.findtext("part-name") or "" for item in root.iter("score-part"))
    return Score(titles, tuple(sorted(notes)), fifths)


def _notes(part: ElementTree.Element, index: int) -> Iterator[tuple[Note, bool, bool]]:
    """(note, whether a tie ends in it, whether one begins) in the order of the file."""
    start, divisions, shift = 0.0, 1.0, 0
    for measure in part.findall("measure"):
        place = end = onset = start
        for item in measure:
            length = float(item.findtext("duration") or 0) / divisions
            if item.tag == "attributes":
                divisions = float(item.findtext("divisions") or divisions)
                shift = _shift(item, shift)
            elif item.tag == "backup":
                place -= length
            elif item.tag == "forward":
                place += length
            elif item.tag == "note" and item.find("grace") is None:
                onset = onset if item.find("chord") is not None else place
                place = onset + length
                pitch = item.find("pitch")
                if pitch is not None:
                    ties = {tie.get("type") for tie in item.findall("tie")}
                    note = Note(onset, length, _midi(pitch) + shift, index)
                    yield note, "stop" in ties, "start" in ties
            end = max(end, place)
        start = end


def _shift(attributes: ElementTree.Element, before: int) -> int:
    """Semitones from the written to the sounding pitch."""
    transpose = attributes.find("transpose")
    if transpose is None:
        return before
    return int(transpose.findtext("chromatic") or 0) + 12 * int(transpose.findtext("octave-change") or 0)


def _midi(pitch: ElementTree.Element) -> int:
    octave, alter = int(pitch.findtext("octave") or 0), round(float(pitch.findtext("alter") or 0))
    return 12 * (octave + 1) + _STEPS[str(pitch.findtext("step"))] + alter


def _join_ties(notes: Iterator[tuple[Note, bool, bool]]) -> list[Note]:
    joined: list[Note] = []
    open_ties: dict[int, int] = {}  # pitch -> place in `joined`
    for note, stops, starts in notes:
        place = open_ties.pop(note.pitch, None) if stops else None
        if place is None:
            joined.append(note)
            place = len(joined) - 1
        else:
            old = joined[place]
            joined[place] = Note(old.onset, note.onset + note.duration - old.onset, old.pitch, old.part)
        if starts:
            open_ties[note.pitch] = place
    return joined
