"""Scores, the piano, the recipe of the chorales on made-up packages, and folders of sounds."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tokenloom.data.captions import Caption, read_captions, write_captions
from tokenloom.data.chorales import build_chorales, key_of, read_notes, split_of
from tokenloom.data.musicxml import Note, Score, read_mxl
from tokenloom.data.piano import Piano
from tokenloom.data.sounds import SoundFolder, near, windows
from tokenloom.errors import TokenloomError

VOICES = ("Soprano", "Alto", "Tenor", "Bass")


def note(step: str, octave: int, duration: int, extra: str = "") -> str:
    pitch = f"<pitch><step>{step}</step><octave>{octave}</octave></pitch>"
    return f"<note>{extra}{pitch}<duration>{duration}</duration></note>"


def mxl(parts: list[str], names: tuple[str, ...] = VOICES) -> bytes:
    titles = "".join(
        f'<score-part id="P{i}"><part-name>{n}</part-name></score-part>' for i, n in enumerate(names)
    )
    body = "".join(f'<part id="P{index}">{part}</part>' for index, part in enumerate(parts))
    text = f'<score-partwise version="1.1"><part-list>{titles}</part-list>{body}</score-partwise>'
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("META-INF/container.xml", "<x/>")
        archive.writestr("piece.xml", text)
    return buffer.getvalue()


HEAD = "<attributes><divisions>2</divisions><key><fifths>-1</fifths></key></attributes>"


def test_score_with_ties_chords_rests_voices_and_transposition():
    first = (
        HEAD + note("C", 4, 2) + note("E", 4, 2, "<chord/>") + "<note><rest/><duration>2</duration></note>"
    )
    first += note("G", 4, 4, '<tie type="start"/>')
    second = note("G", 4, 2, '<tie type="stop"/>') + "<backup><duration>2</duration></backup>"
    second += note("B", 3, 1) + "<note><grace/><pitch><step>A</step><octave>3</octave></pitch></note>"
    horn = HEAD.replace("</attributes>", "<transpose><chromatic>-7</chromatic></transpose></attributes>")
    score = read_mxl(
        mxl(
            [
                f"<measure>{first}</measure><measure>{second}</measure>",
                f"<measure>{horn}{note('C', 5, 8)}</measure>",
            ]
        )
    )
    assert score.fifths == -1 and score.parts == VOICES
    assert score.notes == (
        Note(0, 1, 60, 0),
        Note(0, 1, 64, 0),
        Note(0, 4, 65, 1),
        Note(2, 3, 67, 0),
        Note(4, 0.5, 59, 0),
    )


@pytest.mark.parametrize("content", [b"no archive", mxl([])])
def test_what_is_no_score_is_refused(content):
    with pytest.raises(TokenloomError, match="MusicXML"):
        read_mxl(content)


def recording(hertz: float, rate: int = 24000, seconds: float = 3.0) -> bytes:
    time = np.arange(int(rate * seconds)) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.5 * np.sin(2 * np.pi * hertz * time), rate, format="OGG")
    return buffer.getvalue()


def loudest(audio: torch.Tensor, rate: int) -> float:
    return float(torch.fft.rfft(audio).abs().argmax()) * rate / audio.shape[-1]


def test_piano_plays_in_tune_in_time_and_at_one_loudness(tmp_path):
    (tmp_path / "A4v10.ogg").write_bytes(recording(440))
    piano = Piano([tmp_path / "A4v10.ogg"], 16000)
    for pitch in (69, 70, 64):
        audio = piano.play([(0.5, 1.0, pitch)], 2.0)
        assert audio.shape == (1, 32000) and audio[0, :7900].abs().max() < 1e-3
        assert loudest(audio[0, 8000:24000], 16000) == pytest.approx(
            440 * 2 ** ((pitch - 69) / 12), rel=0.005
        )
        assert float(audio.square().mean().sqrt()) == pytest.approx(0.1, rel=0.01)
        assert audio[0, 31000:].abs().max() < 0.1 * audio.abs().max()
    assert piano.play([], 0.5).abs().max() == 0
    with pytest.raises(TokenloomError, match="recorded notes"):
        Piano([tmp_path / "kick.ogg"], 16000)


def fake_fetch(registry: str, package: str, version: str, folder: Path) -> Path:
    path = folder / f"{package}-{version}-py3-none-any.whl"
    parts = [f"<measure>{HEAD}{note(step, 4, 32)}</measure>" for step in "CEGA"]
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("bwv1.6", "bwv2.6", "bwv248.9-1"):
            archive.writestr(f"music21/corpus/bach/{name}.mxl", mxl(parts))
        archive.writestr("music21/corpus/bach/bwv9.mxl", mxl(parts, ("Flute", "Alto", "Tenor", "Bass")))
        archive.writestr("music21/corpus/bach/readme.txt", "")
    return path


def fake_download(package: str, version: str, folder: Path) -> Path:
    path, content = folder / "piano.tgz", recording(261.63)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/audio/C4v10.ogg")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def chorales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "chorales"
    report = build_chorales(out, copies=2, sample_rate=8000, fetch=fake_fetch, download=fake_download)
    assert report.sounds == sum(report.splits.values()) >= 4
    return out


def test_chorales_have_sound_notes_captions_and_credits(chorales):
    captions = read_captions(chorales)
    notes = read_notes(chorales)
    assert {caption.file for caption in captions} == set(notes)
    assert not any("bwv9" in caption.file for caption in captions)  # it lacks a voice
    for caption in captions:
        info = soundfile.info(chorales / caption.file)
        assert (info.samplerate, info.channels) == (8000, 1)
        assert info.frames / 8000 == pytest.approx(caption.extra["seconds"], abs=0.01)
        assert caption.split == split_of(str(caption.concept)) and caption.licence == "CC-BY-3.0"
        line = notes[caption.file]
        assert [pitch - line["shift"] for _, _, pitch in line["notes"]] == [60, 64, 67, 69]
        assert line["notes"][0][1] == pytest.approx(16 * 60 / line["tempo"], abs=1e-3)
    assert any(line["tempo"] != 84 for line in notes.values())
    credits = (chorales / "SOURCES.md").read_text()
    assert "Alexander Holm" in credits and "CC-BY-3.0" in credits and "Greentree" in credits


@pytest.mark.parametrize(
    ("fifths", "last", "shift", "key"),
    [
        (0, 48, 0, "C major"),
        (0, 45, 0, "A minor"),
        (-2, 46, 0, "B flat major"),
        (3, 54, 1, "G minor"),
        (0, 52, 0, None),
    ],
)
def test_keys_follow_from_the_signature_and_the_last_bass_note(fifths, last, shift, key):
    notes = (Note(0, 4, last - 3, 3), Note(4, 4, last, 3), Note(4, 4, last + 19, 0))
    assert key_of(Score(VOICES, notes, fifths), shift) == key


def test_movements_of_one_work_are_of_one_split():
    assert split_of("bwv248.9-1") == split_of("bwv248.64-6") == split_of("bwv248")
    assert {split_of(f"bwv{number}") for number in range(60)} == {"train", "val"}


def test_recipe_says_what_is_wrong(tmp_path):
    with pytest.raises(TokenloomError, match="at least 1 copy"):
        build_chorales(tmp_path / "a", copies=0)
    with pytest.raises(TokenloomError, match="data chorales"):
        read_notes(tmp_path)
    assert not (tmp_path / "a").exists()


def write(path: Path, rate: int, seconds: float, level: float = 0.5, channels: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.full((int(rate * seconds), channels), level), rate)


def test_folder_of_any_sound_files(tmp_path):
    write(tmp_path / "a" / "one.wav", 44100, 1.0, 0.25, channels=2)
    write(tmp_path / "two.flac", 16000, 0.5, -0.5)
    (tmp_path / "notes.txt").write_text("no sound")
    sounds = SoundFolder(tmp_path)
    assert len(sounds) == 2 and sounds.starts.tolist() == [0, 16000, 24000]
    assert sounds.seconds == pytest.approx(1.5)
    assert sounds.sound(0)[0, 4000:12000].sub(0.25).abs().max() < 1e-3
    assert sounds.sound(-1).shape == (1, 8000)
    chosen = sounds.windows(10000)
    assert chosen.tolist() == [[0, 0], [0, 6000], [1, 0]]
    crops = sounds.crops(chosen, 10000, torch.Generator().manual_seed(0))
    assert crops.shape == (3, 1, 10000)
    assert crops[2, 0, :8000].sub(-0.5).abs().max() < 1e-3 and crops[2, 0, 8000:].abs().max() == 0


def test_cache_gives_the_same_samples_and_notices_changes(tmp_path):
    write(tmp_path / "set" / "a.wav", 16000, 0.3)
    plain = SoundFolder(tmp_path / "set")
    first = SoundFolder(tmp_path / "set", cache=tmp_path / "cache")
    again = SoundFolder(tmp_path / "set", cache=tmp_path / "cache")
    assert torch.equal(first.samples, plain.samples) and torch.equal(again.samples, plain.samples)
    assert torch.equal(again.starts, plain.starts) and len(list((tmp_path / "cache").iterdir())) == 2
    write(tmp_path / "set" / "a.wav", 16000, 0.4)
    assert len(SoundFolder(tmp_path / "set", cache=tmp_path / "cache").samples) == 6400


def test_captions_filter_sounds(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.wav", 16000, 0.1)
    lines = [Caption(file="a.wav", text="x", group="bells"), Caption(file="b.wav", text="y", split="val")]
    write_captions(tmp_path, lines)
    assert [item.file for item in SoundFolder(tmp_path, "val").captions] == ["b.wav"]
    assert [item.file for item in SoundFolder(tmp_path, groups=["bells"]).captions] == ["a.wav"]
    with pytest.raises(TokenloomError, match="split 'vall'"):
        SoundFolder(tmp_path, "vall")


def test_folders_that_hold_no_sound(tmp_path):
    with pytest.raises(TokenloomError, match="folder of sounds"):
        SoundFolder(tmp_path / "missing")
    with pytest.raises(TokenloomError, match="nor a sound"):
        SoundFolder(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF no sound at all")
    with pytest.raises(TokenloomError, match="no sound file that can be read"):
        SoundFolder(tmp_path)


def test_pieces_stay_inside_their_item():
    starts = torch.tensor([0, 10, 13, 40])
    chosen = windows(starts, 5)
    assert chosen.tolist() == [[0, 0], [0, 5], [1, 0], *([2, begin] for begin in (0, 5, 10, 15, 20, 22))]
    for seed in range(20):
        for (start, end), (item, _) in zip(
            near(starts, chosen, 5, torch.Generator().manual_seed(seed)), chosen.tolist(), strict=True
        ):
            assert starts[item] <= start and end == starts[item + 1]
            assert start + 5 <= end or start == starts[item]
