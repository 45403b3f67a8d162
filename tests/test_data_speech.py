"""The recipe of the telephone prompts, with packages of a few made-up sounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_data_photos import _deb
from typer.testing import CliRunner

from tokenloom import TokenloomError
from tokenloom.cli import app
from tokenloom.data.captions import read_captions
from tokenloom.data.sounds import SoundFolder
from tokenloom.data.speech import VOICES, build_speech, clean, phrase_of, split_of

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2003-2010, Allison Smith
License: {licence}

Files: ru-* it-*
Copyright: 2010, Somebody
License: CC-BY-3.0
"""
NAMES = ("digits/7", "hello", "vm-minutes", "queue-minute", "beep", "silence/3", "mumble")


def packages(folder: Path, licence: str = "CC-BY-SA-3.0") -> Path:
    """The five packages; every sound is the noise of a byte, "mumble" is empty."""
    folder.mkdir(exist_ok=True)
    for language in VOICES:
        package = f"asterisk-core-sounds-{language}-g722"
        files = {f"usr/share/doc/{package}/copyright": COPYRIGHT.format(licence=licence).encode()}
        files |= {
            f"usr/share/asterisk/sounds/{language}_voice/{name}.g722": b""
            if name == "mumble"
            else name.encode()
            for name in NAMES
        }
        (folder / f"{package}_1.6.1-1_all.deb").write_bytes(_deb(files))
    return folder


def decode(content: bytes) -> np.ndarray:
    """Half a second of silence, a second of a tone that follows from the content, and silence."""
    pitch = 200 + 100 * len(content)
    tone = 3000 * np.sin(2 * np.pi * pitch * np.arange(16000 if content else 100) / 16000)
    return np.concatenate([np.zeros(8000), tone, np.zeros(4000)]).astype(np.int16)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    desk = tmp_path_factory.mktemp("speech")

    def fetch(registry: str, name: str, version: str, folder: Path) -> Path:
        assert (registry, version) == ("debian", "1.6.1-1")
        return next(packages(desk / "made").glob(f"{name}_*"))

    report = build_speech(desk / "set", sample_rate=8000, fetch=fetch, decode=decode)
    assert report.sounds == 20 and report.splits["val_voice"] == 4
    assert report.minutes == pytest.approx(20 * 1.12 / 60, rel=0.05)
    return desk


def test_prompts_have_sound_captions_and_credits(prompts: Path) -> None:
    captions = read_captions(prompts / "set")
    assert {item.label for item in captions} == {"digits 7", "hello", "vm minutes", "queue minute"}
    seven = next(item for item in captions if item.file == "it/digits-7.flac")
    assert seven.text == "a man speaking Italian, digits 7" and seven.style == "Carlo Flora"
    assert seven.licence == "CC-BY-3.0" and seven.extra["prompt"] == "digits/7"
    assert {item.licence for item in captions if item.group == "English"} == {"CC-BY-SA-3.0"}
    for item in captions:
        assert item.split == split_of(item.file[:2], item.extra["prompt"], "fr")
        info = soundfile.info(prompts / "set" / item.file)
        assert (info.samplerate, info.channels) == (8000, 1)
        assert info.frames / 8000 == pytest.approx(item.extra["seconds"], abs=0.01)
    credits = (prompts / "set" / "SOURCES.md").read_text()
    for words in ("Allison Smith", "June Wallack", "Carlo Flora", "same licence", "CC-BY-SA-3.0"):
        assert words in credits
    sounds = SoundFolder(prompts / "set", "val_voice", 8000)
    assert {item.group for item in sounds.captions} == {"French"}


def test_the_recipe_gives_the_same_files_again(prompts: Path) -> None:
    build_speech(prompts / "again", sample_rate=8000, cache_dir=prompts / "made", decode=decode)
    files = [path for path in sorted((prompts / "set").rglob("*")) if path.is_file()]
    assert len(files) == 22
    for path in files:
        other = prompts / "again" / path.relative_to(prompts / "set")
        assert other.read_bytes() == path.read_bytes()


def test_no_phrase_and_no_voice_is_on_both_sides() -> None:
    assert phrase_of("vm-minutes") == phrase_of("queue-minute") == phrase_of("minutes") == "minute"
    assert phrase_of("conf-adminmenu-162") == phrase_of("conf-adminmenu-menu8") == "adminmenu"
    assert phrase_of("digits/7") == "digits/7" != phrase_of("digits/17")
    names = [f"digits/{number}" for number in range(200)]
    assert {split_of("en", name, "fr") for name in names} == {"train", "val"}
    for name in names:
        assert split_of("en", name, "fr") == split_of("ru", name, None)
        assert split_of("fr", name, "fr") == "val_voice"


def test_silence_is_cut_away_and_peaks_are_equal() -> None:
    sound = clean(decode(b"abc"))
    assert 16000 <= len(sound) <= 16000 + 8 * 320 and float(sound.abs().max()) == pytest.approx(0.7)
    assert torch.equal(sound, clean(decode(b"abc")))
    assert len(clean(np.zeros(9000, np.int16))) == 0 and len(clean(np.zeros(3, np.int16))) == 0


def test_the_decoder_reads_g722() -> None:
    from G722 import G722

    from tokenloom.data.speech import _decoder

    tone = decode(b"abc")
    coded = bytes(G722(16000, 64000).encode(tone.tolist()))
    read = _decoder()(coded)
    assert len(read) == len(tone) and read.dtype == np.int16
    delayed = read[22:]  # the filters of the codec
    assert np.corrcoef(delayed[9000:20000], tone[9000:20000])[0, 1] > 0.99


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenloomError, match="language 'de'"):
        build_speech(tmp_path / "set", held_out="de")
    with pytest.raises(TokenloomError, match="8000 samples a second"):
        build_speech(tmp_path / "set", sample_rate=80)
    packages(tmp_path / "other", "GPL-2+")
    with pytest.raises(TokenloomError, match="English prompts were expected under CC-BY-SA-3"):
        build_speech(tmp_path / "set", cache_dir=tmp_path / "other", decode=decode)
    assert not (tmp_path / "set").exists()
    done = CliRunner().invoke(app, ["data", "speech", str(tmp_path / "set"), "--held-out", "de"])
    assert done.exit_code == 2 and done.output.count("\n") == 1
