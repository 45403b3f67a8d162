"""Sound files: formats, rates, blocks, and everything that can be wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample as whole_resample

from tokenloom.errors import TokenloomError
from tokenloom.media_audio import (
    AudioWriter,
    audio_blocks,
    audio_end,
    load_audio,
    resample,
    resample_end,
    save_audio,
    to_mono,
)


def tone(rate: int = 16000, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    waves = [0.5 * np.sin(2 * np.pi * 220 * (index + 1) * time) for index in range(channels)]
    return np.stack(waves, axis=1).astype("float32")


def write(path: Path, rate: int = 16000, subtype: str = "PCM_16", **options: object) -> Path:
    soundfile.write(path, tone(rate, **options), rate, subtype=subtype)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("subtype", "error"), [("PCM_U8", 1 / 100), ("PCM_16", 1e-4), ("PCM_24", 1e-6), ("FLOAT", 0)]
)
def test_widths_of_samples(tmp_path, subtype, error):
    audio, rate = load_audio(write(tmp_path / "a.wav", subtype=subtype))
    assert rate == 16000 and audio.shape == (1, 8000) and audio.dtype == torch.float32
    assert (audio - torch.from_numpy(tone()).T).abs().max() <= error


def test_stereo_becomes_the_mean_of_its_channels(tmp_path):
    audio, _ = load_audio(write(tmp_path / "a.wav", subtype="FLOAT", channels=2))
    assert torch.allclose(audio[0], torch.from_numpy(tone(channels=2)).mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 96000])
@pytest.mark.parametrize("seconds", [0.013, 0.1, 7.0])
def test_blocks_are_resampled_as_one_piece(tmp_path, rate, seconds):
    path = write(tmp_path / "a.wav", rate, "FLOAT")
    wanted = whole_resample(torch.from_numpy(tone(rate)).T, rate, 16000)
    got = torch.cat(list(audio_blocks(path, 16000, seconds=seconds)), dim=1)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < 1e-5
    assert load_audio(path, 16000)[1] == 16000


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("count", [1, 700, 10**6])
def test_the_end_is_that_of_the_whole(tmp_path, rate, count):
    path = write(tmp_path / "a.wav", rate, "FLOAT")
    whole, _ = load_audio(path, 16000)
    for end in (audio_end(path, 16000, count), resample_end(load_audio(path)[0], rate, 16000, count)):
        assert end.total == whole.shape[1] and end.samples.shape == (1, min(count, end.total))
        assert (end.samples - whole[:, -count:]).abs().max() < 1e-5
        assert float(end.peak) == pytest.approx(float(load_audio(path)[0].abs().max()))


def test_ten_milliseconds_and_silence(tmp_path):
    audio, _ = load_audio(write(tmp_path / "a.wav", seconds=0.01))
    assert audio.shape == (1, 160)
    soundfile.write(tmp_path / "b.wav", np.zeros(1600), 16000)
    assert load_audio(tmp_path / "b.wav", 24000)[0].abs().max() == 0


def test_seconds_reads_the_beginning(tmp_path):
    whole, _ = load_audio(write(tmp_path / "a.wav"))
    part, _ = load_audio(tmp_path / "a.wav", seconds=0.1)
    assert torch.equal(part, whole[:, :1600])


def test_a_long_file_is_read_in_small_pieces(tmp_path):
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 8000, 1) as file:
        for _ in range(120):
            file.write(np.zeros(8000))
    sizes = [block.shape[1] for block in audio_blocks(tmp_path / "a.wav", 4000, seconds=1)]
    assert sum(sizes) == 120 * 4000 and max(sizes) <= 4200


def test_an_mp3_named_wav_is_read_by_its_content(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(), 16000)
    (tmp_path / "a.mp3").rename(tmp_path / "a.wav")
    audio, rate = load_audio(tmp_path / "a.wav")
    assert rate == 16000 and audio.shape == (1, 8000)
    assert (audio[:, 2000:6000] - torch.from_numpy(tone()).T[:, 2000:6000]).abs().max() < 0.05


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3"])
def test_files_that_are_cut_off_are_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(seconds=4.0), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TokenloomError, match="cut off"):
        load_audio(path)
    if ending == "wav":
        assert load_audio(path, seconds=1.0)[0].shape == (1, 16000)


def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path):
    path = write(tmp_path / "a.wav")
    content = bytearray(path.read_bytes())
    place = content.index(b"data")
    content[place + 4 : place + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert load_audio(path)[0].shape == (1, 8000)


def test_files_that_are_no_sound_are_named(tmp_path):
    (tmp_path / "a.wav").write_text("hello")
    (tmp_path / "b.wav").touch()
    soundfile.write(tmp_path / "c.wav", np.zeros(0), 16000)
    for name, message in (("a", "no sound file"), ("b", "empty"), ("c", "no samples"), ("d", "There is no")):
        with pytest.raises(TokenloomError, match=message):
            load_audio(tmp_path / f"{name}.wav")
    with pytest.raises(TokenloomError, match="folder"):
        load_audio(tmp_path)


def test_nan_is_named_with_its_place(tmp_path):
    values = tone()
    values[4000] = np.nan
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype="FLOAT")
    with pytest.raises(TokenloomError, match=r"NaN or infinity at 0\.250 s"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("rate", "message"), [(None, "missing"), (0, "lies in"), (44.1, "whole"), ("16k", "whole")]
)
def test_rates_that_are_none_are_named(rate, message):
    with pytest.raises(TokenloomError, match=message):
        resample(torch.zeros(1, 100), rate, 16000)


def test_samples_of_many_forms_become_mono():
    wave = torch.from_numpy(tone())[:, 0]
    assert torch.equal(to_mono(wave), wave[None, None])
    assert torch.equal(to_mono(torch.stack([wave, -wave])), torch.zeros(1, 1, 8000))
    assert to_mono(wave.expand(3, 2, -1)).shape == (3, 1, 8000)
    assert (to_mono((wave * 32767).round().short()) - wave).abs().max() < 1e-4
    assert (to_mono((wave * 127 + 128).round().to(torch.uint8).numpy()) - wave).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.full((1, 100), torch.nan), "NaN"),
        (torch.zeros(100, 2), "Transpose"),
        (torch.zeros(0), "at least one"),
        (torch.zeros(1, 100, dtype=torch.long), "int64"),
    ],
)
def test_samples_that_are_no_sound_are_named(audio: Tensor, message: str):
    with pytest.raises(TokenloomError, match=message):
        to_mono(audio)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "opus", "mp3"])
def test_files_are_written_whole(tmp_path, ending):
    path = save_audio(torch.from_numpy(tone()).T, tmp_path / "new" / f"a.{ending}", 16000)
    audio, rate = load_audio(path)
    assert rate == 16000 and abs(audio.shape[1] - 8000) < 1200
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_loud_sound_is_turned_down_not_clipped(tmp_path):
    wave = 4 * torch.from_numpy(tone()).T
    audio, _ = load_audio(save_audio(wave, tmp_path / "a.wav", 16000))
    assert torch.allclose(audio, wave / wave.abs().max(), atol=1e-4)


def test_a_file_that_is_not_finished_leaves_nothing(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / "a.wav", 16000) as file:
        file.write(torch.zeros(100))
        raise KeyboardInterrupt
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    wave = torch.zeros(1, 100)
    with pytest.raises(TokenloomError, match=r"'\.wav'"):
        save_audio(wave, tmp_path / "a.wave", 16000)
    with pytest.raises(TokenloomError, match="folder"):
        save_audio(wave, tmp_path, 16000)
    (tmp_path / "file").touch()
    with pytest.raises(TokenloomError, match="cannot be written"):
        save_audio(wave, tmp_path / "file" / "a.wav", 16000)
    with pytest.raises(TokenloomError, match="one by one"):
        save_audio(torch.zeros(2, 1, 100), tmp_path / "a.wav", 16000)
    with pytest.raises(TokenloomError, match="cannot hold"):
        save_audio(wave, tmp_path / "a.opus", 11000)
