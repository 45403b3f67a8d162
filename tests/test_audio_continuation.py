"""The continuation pipeline: the prompt stays, seeds, batches, windows, streams, loudness, saving, and bad input."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from tests.tiny_audio import FRAMES, HOP, RATE, SHAPE, tiny_codec, tiny_pipeline, tone
from tokenloom import (
    AudioContinuationPipeline,
    NextBlockGenerator,
    TokenloomError,
    TwoLevelGenerator,
    media_audio,
    orders,
)
from tokenloom.cli import app
from tokenloom.layouts import Layout
from tokenloom.pipelines.audio_prompt import continue_file
from tokenloom.pipelines.joining import Joint, level, limit
from tokenloom.pipelines.windows import sliding_frames
from tokenloom.tokenizers.text import WordTokenizer


@pytest.fixture(scope="module")
def pipe() -> AudioContinuationPipeline:
    return tiny_pipeline()


@pytest.mark.parametrize("samples", [HOP, 410, 2000])
def test_prompt_is_kept_and_lengths_are_exact(pipe, samples):
    prompt = torch.from_numpy(tone(1.0))[:samples]
    result = pipe(prompt, RATE, seconds=0.1237, seed=3)
    new = round(0.1237 * RATE)
    assert result.audios.shape == (1, 1, samples + new) and result.prompt_samples == samples
    assert torch.equal(result.audios[0, 0, :samples], prompt)
    assert result.audios.abs().max() <= 1 and result.seeds == [3] and result.sampling_rate == RATE
    seen = min(samples // HOP, FRAMES // 2)
    assert result.prompt_frames == seen
    assert result.codes.shape == (1, 2, seen + -(-(samples % HOP + new) // HOP))
    codes = pipe.tokenizer.encode(prompt[None, None, : samples // HOP * HOP], num_codebooks=2)
    if samples // HOP <= 50:
        assert torch.equal(result.codes[:, :, :seen], codes[:, :, -seen:])


def test_seeds_and_batches(pipe):
    prompt = torch.stack([torch.from_numpy(tone(0.1, hertz)) for hertz in (200, 500)])[:, None]
    both = pipe(prompt, RATE, seconds=0.15, seed=[5, 9])
    again = pipe(prompt[1:], RATE, seconds=0.15, seed=9)
    assert torch.equal(both.codes[1:], again.codes)
    assert torch.allclose(both.audios[1:], again.audios, atol=1e-5)
    assert not torch.equal(pipe(prompt[1:], RATE, seconds=0.15, seed=10).codes, again.codes)
    more = pipe(prompt[1:], RATE, seconds=0.15, seed=8, num_continuations=2)
    assert more.seeds == [8, 9] and torch.equal(more.codes[1:], again.codes)
    drawn = pipe(prompt[1:], RATE, seconds=0.15, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe(prompt[1:], RATE, seconds=0.15, seed=drawn.seeds).codes, drawn.codes)


@pytest.mark.parametrize("seconds", [0.02, 0.2])
def test_stream_is_the_whole_in_pieces(pipe, seconds):
    prompt = tone(0.103)
    whole = pipe(prompt, RATE, seconds=seconds, seed=4)
    pieces = list(pipe(prompt, RATE, seconds=seconds, seed=4, stream=True, output_type="np"))
    assert all(isinstance(piece, np.ndarray) for piece in pieces) and len(pieces) >= 2 + 10 * (seconds > 0.1)
    joined = np.concatenate(pieces, axis=2)
    assert np.allclose(joined, whole.audios[:, :, whole.prompt_samples :].numpy(), atol=1e-5)


def test_a_stream_may_be_left_and_other_calls_may_come_between(pipe):
    stream = pipe(tone(0.1), RATE, seconds=100.0, seed=4, stream=True)
    first = next(stream)
    other = pipe(tone(0.1), RATE, seconds=0.05, seed=4)
    assert torch.allclose(first, other.audios[:, :, 800 : 800 + first.shape[2]], atol=1e-5)
    stream.close()


def test_long_continuations_slide_on_with_windows_of_their_own(pipe):
    frames = 4 * FRAMES
    result = pipe(tone(0.1), RATE, seconds=frames * HOP / RATE, seed=1)
    new = result.codes[0, :, result.prompt_frames :]
    assert new.shape[1] == frames
    half = FRAMES // 2
    parts = [new[:, start : start + half] for start in range(0, frames, half)]
    assert len({tuple(part.flatten().tolist()) for part in parts}) == len(parts)
    wide = pipe(tone(0.1), RATE, seconds=0.3, seed=1, overlap=(FRAMES - 1) * HOP / RATE)
    assert wide.prompt_frames == FRAMES - 1


def test_windows_look_back_to_what_was_made():
    calls = []

    def generate(known, keep, number, on_step):
        calls.append((known.view(6, 2)[:, 0].tolist(), keep.view(6, 2).all(1).tolist()))
        codes = torch.where(keep, known, torch.arange(12) // 2 + 10 * (number + 1))
        for frame in range(6):
            committed = torch.arange(12) < 2 * (frame + 1)
            on_step(type("Step", (), {"codes": codes, "committed": committed}))
        raise AssertionError("the window was not stopped")

    context = torch.tensor([[[1, 2, 3, 4]] * 2])
    for live in (False, True):
        calls.clear()
        made = list(sliding_frames(generate, context, 6, 3, 5, live=live))
        assert torch.cat(made, 2)[0, 0].tolist() == [13, 14, 15, 23, 24]
        assert calls[0] == ([2, 3, 4, 0, 0, 0], [True] * 3 + [False] * 3)
        assert calls[1] == ([13, 14, 15, 0, 0, 0], [True] * 3 + [False] * 3)
        assert len(made) == (5 if live else 2)


def test_errors_of_the_thread_are_raised():
    def generate(known, keep, number, on_step):
        raise TokenloomError("logits are not finite")

    with pytest.raises(TokenloomError, match="not finite"):
        list(sliding_frames(generate, torch.zeros(1, 2, 1, dtype=torch.long), 4, 2, 3, live=True))


def test_generators_with_a_plan_work_as_well():
    order = orders.delay(Layout.frames(8, 2))
    torch.manual_seed(0)
    generator = NextBlockGenerator(order.to_config(), 16, {"width": 16, "heads": 2, "depth": 1}).eval()
    pipe = AudioContinuationPipeline(tiny_codec(), generator)
    pipe.set_progress_bar_config(disable=True)
    whole = pipe(tone(0.05), RATE, seconds=0.1, seed=2)
    pieces = torch.cat(list(pipe(tone(0.05), RATE, seconds=0.1, seed=2, stream=True)), dim=2)
    assert torch.allclose(pieces, whole.audios[:, :, 400:], atol=1e-5)


def spoken_pipeline(kind: str) -> AudioContinuationPipeline:
    """A pipeline that reads words, or a class."""
    words = WordTokenizer(["high", "low"], max_length=2) if kind == "words" else None
    condition = (
        {"kind": "words", "vocabulary": 4, "length": 2} if words else {"kind": "class", "num_classes": 3}
    )
    torch.manual_seed(1)
    generator = TwoLevelGenerator(FRAMES, 2, [16, 16], SHAPE, SHAPE, SHAPE, condition).eval()
    pipe = AudioContinuationPipeline(tiny_codec(), generator, {"guidance_scale": 3.0}, words)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("kind", "name", "two", "ids"),
    [
        ("words", "prompt", ["a high", "low low"], [[2, 0], [3, 3]]),
        ("class", "label", [2, 0], [2, 0]),
    ],
)
def test_words_and_classes_stand_before_every_window(kind, name, two, ids, tmp_path, monkeypatch):
    spoken_pipeline(kind).save_pretrained(tmp_path / "model")
    pipe = AudioContinuationPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    calls, generate = [], pipe.generator.generate

    def record(condition=None, *, guidance, **options):
        calls.append((None if condition is None else condition.tolist(), guidance.scale))
        return generate(condition, guidance=guidance, **options)

    monkeypatch.setattr(pipe.generator, "generate", record)
    prompt = torch.from_numpy(tone(0.1))[None, None].expand(2, 1, -1)
    pipe(prompt, RATE, seconds=0.1, seed=4, **{name: two})
    assert len(calls) > 2 and set(map(str, calls)) == {str((ids, 3.0))}
    calls.clear()
    pipe(prompt, RATE, seconds=0.01, seed=4, num_continuations=2, guidance_scale=1.5, **{name: two})
    pipe(prompt, RATE, seconds=0.01, seed=4, **{name: two[0]})
    pipe(prompt, RATE, seconds=0.01, seed=4)
    assert calls == [
        ([ids[0], ids[0], ids[1], ids[1]], 1.5),
        ([ids[0], ids[0]], 3.0),
        (None, 1.0),
    ]
    with pytest.raises(TokenloomError, match="one prompt for all 2 sounds or one each, got 3"):
        pipe(prompt, RATE, **{name: [*two, two[0]]})


def test_words_and_classes_that_do_not_fit(pipe, tmp_path):
    with pytest.raises(TokenloomError, match="without words"):
        pipe(tone(0.1), RATE, prompt="high")
    with pytest.raises(TokenloomError, match="without classes"):
        pipe(tone(0.1), RATE, label=1)
    with pytest.raises(TokenloomError, match=r"0\.\.2"):
        spoken_pipeline("class")(tone(0.1), RATE, label=7)
    with pytest.raises(TokenloomError, match="got no text_tokenizer"):
        AudioContinuationPipeline(tiny_codec(), spoken_pipeline("words").generator)
    soundfile.write(tmp_path / "a.wav", tone(0.1), RATE)
    spoken_pipeline("words").save_pretrained(tmp_path / "model")
    words = [
        "continue",
        str(tmp_path / "a.wav"),
        "-m",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "b.wav"),
    ]
    done = CliRunner().invoke(app, [*words, "--seconds", "0.1", "--prompt", "high", "--guidance", "2"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*words, "--label", "1"])
    assert done.exit_code == 2 and "without classes" in done.output


def test_loudness_is_brought_to_the_codec_and_back(pipe):
    usual = torch.from_numpy(tone(0.1))[None, None]
    loud, quiet = 4 * usual, usual / 1000
    assert float(level(usual)) == 1
    assert float(level(loud)) == pytest.approx(
        10 ** (-14 / 20) / float(loud.square().mean().sqrt()), rel=1e-3
    )
    assert float(level(quiet)) > 100 and float(level(torch.zeros(1, 1, 10))) == 1
    result = pipe(quiet[0], RATE, seconds=0.1, seed=0)
    assert result.audios[:, :, 800:].abs().max() < 0.02


def test_limit_touches_only_what_is_too_loud():
    audio = torch.tensor([0.5, -0.9, 0.95, -3.0, 40.0])
    bent = limit(audio)
    assert torch.equal(bent[:2], audio[:2]) and bent.abs().max() <= 1
    assert 0.9 < bent[2] < 0.95 and bent[3] < -0.99


def test_there_is_no_step_at_the_joint():
    prompt, decoded = torch.full((1, 1, 100), 0.5), torch.full((1, 1, 80), -0.3)
    joint = Joint(prompt, decoded, 20, 1000, 8000)
    made = torch.cat([joint.add(part) for part in torch.full((1, 1, 1100), -0.3).split(7, dim=2)], dim=2)
    assert made.shape == (1, 1, 1000)
    assert (made.diff() <= 1e-6).all() and made.diff().abs().max() < 0.02 and abs(made[0, 0, 0] - 0.5) < 0.02
    assert torch.allclose(made[0, 0, 100:], torch.tensor(-0.3))


def test_saved_and_loaded_gives_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["tokenizer"] == ["tokenloom", "AudioTokenizer"]
    other = AudioContinuationPipeline.from_pretrained(tmp_path / "model")
    other.set_progress_bar_config(disable=True)
    one, two = (p(tone(0.1), RATE, seconds=0.1, seed=1) for p in (pipe, other))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.audios, two.audios)


def test_sound_of_many_forms(pipe, tmp_path):
    stereo = np.stack([tone(0.2, rate=96000), tone(0.2, 500, rate=96000)])
    result = pipe(stereo, 96000, seconds=0.05, seed=0)
    assert result.prompt_samples == 1600
    bytes_of_8_bits = torch.from_numpy((tone(0.1) * 127 + 128).astype("uint8"))
    assert pipe(bytes_of_8_bits, RATE, seconds=0.05, seed=0).audios.shape == (1, 1, 1200)
    soundfile.write(tmp_path / "really.mp3", tone(0.5, rate=16000), 16000, format="MP3")
    (tmp_path / "really.mp3").rename(tmp_path / "named.wav")
    assert pipe(tmp_path / "named.wav", seconds=0.05, seed=0).prompt_samples >= 3900
    with_peak = pipe(3 * torch.from_numpy(tone(0.1)) / 0.2, RATE, seconds=0.05, seed=0)
    assert with_peak.audios.abs().max() <= 1


def test_silence_is_continued_with_a_warning(pipe, caplog):
    assert pipe(np.zeros(400, "float32"), RATE, seconds=0.05, seed=0).audios.isfinite().all()
    assert "silent" in caplog.text


BAD = [
    ({"audio": tone(0.1)}, "sampling rate of the sound is missing"),
    ({"audio": tone(0.1), "sampling_rate": 44.1}, "whole number of Hz"),
    ({"audio": tone(0.1)[:39], "sampling_rate": RATE}, "4.9 ms; this codec needs at least one frame, 5.0 ms"),
    ({"audio": tone(0.1) * np.nan, "sampling_rate": RATE}, "NaN"),
    ({"audio": np.zeros(0), "sampling_rate": RATE}, "at least one"),
    ({"audio": [0.1, 0.2], "sampling_rate": RATE}, "got list"),
    ({"audio": "nowhere.wav"}, "no sound file"),
    ({"audio": tone(0.1), "sampling_rate": RATE, "seconds": 0}, "positive number of seconds"),
    ({"audio": tone(0.1), "sampling_rate": RATE, "seconds": float("nan")}, "positive number of seconds"),
    ({"audio": tone(0.1), "sampling_rate": RATE, "overlap": 0.06}, "overlap must lie between"),
    (
        {"audio": tone(0.1), "sampling_rate": RATE, "overlap": float("nan")},
        "less than the 0.060 s of a window, got nan",
    ),
    ({"audio": tone(0.1), "sampling_rate": RATE, "seed": [1, 2]}, "one seed per sample"),
    ({"audio": tone(0.1), "sampling_rate": RATE, "num_continuations": 0}, "num_continuations"),
    ({"audio": tone(0.1), "sampling_rate": RATE, "output_type": "wav"}, "output_type"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(TokenloomError, match=message):
        pipe(**arguments)


def test_a_wrong_rate_of_a_file_is_named(pipe, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.1), RATE)
    with pytest.raises(TokenloomError, match="8000 samples a second, not sampling_rate=16000"):
        pipe(tmp_path / "a.wav", 16000)


def test_components_that_do_not_fit():
    with pytest.raises(TokenloomError, match="sampling setting 'temprature'"):
        tiny_pipeline(temprature=1.0)
    generator = NextBlockGenerator(
        orders.raster(Layout.line(8)).to_config(), 16, {"width": 16, "heads": 2, "depth": 1}
    )
    with pytest.raises(TokenloomError, match="trained together"):
        AudioContinuationPipeline(tiny_codec(), generator)


def test_two_hours_of_prompt_need_no_more_than_their_end(pipe, monkeypatch):
    sizes = []
    encode = pipe.tokenizer.encode
    monkeypatch.setattr(
        pipe.tokenizer,
        "encode",
        lambda audio, **options: sizes.append(audio.shape[2]) or encode(audio, **options),
    )
    pipe(np.tile(tone(1.0), 120), RATE, seconds=0.05, seed=0)
    assert sizes == [(FRAMES // 2 + 50) * HOP]


def hours_of_silence(path: Path, hours: float) -> np.ndarray:
    """A sparse WAV file at 1 kHz, silent but for its last minute, which is returned."""
    end = tone(60.0, 100.0, 1000)
    soundfile.write(path, end, 1000)
    samples = round(hours * 3_600_000)
    header, body = path.read_bytes()[:44], path.read_bytes()[44:]
    header = header[:4] + struct.pack("<I", 36 + 2 * samples) + header[8:40] + struct.pack("<I", 2 * samples)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(44 + 2 * samples)
        file.seek(44 + 2 * samples - len(body))
        file.write(body)
    return soundfile.read(path, start=samples - 60_000, dtype="float32")[0]


def test_of_two_hours_in_a_file_only_the_end_is_resampled(pipe, tmp_path, monkeypatch):
    end = hours_of_silence(tmp_path / "long.wav", 2)
    sizes = []
    real = media_audio.resample
    monkeypatch.setattr(
        media_audio, "resample", lambda audio, *rates: sizes.append(audio.shape[-1]) or real(audio, *rates)
    )
    made = torch.cat(list(pipe(tmp_path / "long.wav", seconds=0.2, seed=3, stream=True)), dim=2)
    assert len(sizes) == 1 and sizes[0] < 60_000
    short = pipe(end, 1000, seconds=0.2, seed=3)
    assert torch.allclose(made, short.audios[:, :, 480_000:], atol=1e-4)


def test_files_go_on_in_files_piece_by_piece(pipe, tmp_path, monkeypatch):
    hours_of_silence(tmp_path / "long.wav", 0.1)
    sizes = []
    write = media_audio.AudioWriter.write
    monkeypatch.setattr(
        media_audio.AudioWriter, "write", lambda self, audio: sizes.append(len(audio)) or write(self, audio)
    )
    made = continue_file(pipe, tmp_path / "long.wav", tmp_path / "out.flac", seconds=0.5, seed=3)
    assert made.samples == 360 * RATE + 4000 == sum(sizes) and made.prompt_samples == 360 * RATE
    assert max(sizes) <= 31 * RATE and made.seed == 3 and made.shown.shape == (30 * RATE + 4000,)
    whole = pipe(tmp_path / "long.wav", seconds=0.5, seed=3)
    written, _ = media_audio.load_audio(tmp_path / "out.flac")
    assert (written - whole.audios[0]).abs().max() < 1e-4
    drawn = continue_file(pipe, tmp_path / "long.wav", tmp_path / "a.wav", seconds=0.1)
    again = continue_file(pipe, tmp_path / "long.wav", tmp_path / "b.wav", seconds=0.1, seed=drawn.seed)
    assert torch.equal(drawn.shown, again.shown)


def test_windows_of_a_stream_are_the_whole(pipe):
    whole = pipe(tone(0.103), RATE, seconds=0.2, seed=4)
    pieces = list(pipe(tone(0.103), RATE, seconds=0.2, seed=4, stream="windows"))
    assert 2 <= len(pieces) < 10
    assert torch.allclose(torch.cat(pieces, 2), whole.audios[:, :, whole.prompt_samples :], atol=1e-5)
    with pytest.raises(TokenloomError, match="stream 'window'"):
        pipe(tone(0.1), RATE, stream="window")


@pytest.fixture
def saved(pipe, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "prompt.wav", tone(0.2, rate=16000), 16000)
    return tmp_path


def test_command_continues_and_plots(saved):
    words = [
        "continue",
        str(saved / "prompt.wav"),
        "-o",
        str(saved / "out.flac"),
        "--model",
        str(saved / "model"),
    ]
    done = CliRunner().invoke(
        app, [*words, "--seconds", "0.3", "--seed", "3", "--plot", str(saved / "p.png")]
    )
    assert done.exit_code == 0, done.output
    assert "seed 3" in done.output and (saved / "p.png").stat().st_size > 1000
    assert soundfile.info(saved / "out.flac").frames == 1600 + 2400


@pytest.mark.parametrize("kind", ["stereo", "8 bits", "96 kHz", "silence", "MP3", "loud floats", "24 bits"])
def test_command_takes_sound_of_every_form(saved, kind):
    path, wave = saved / "in.wav", tone(0.2, rate=48000)
    if kind == "stereo":
        soundfile.write(path, np.stack([wave, -wave / 2], 1), 48000)
    elif kind == "MP3":
        soundfile.write(saved / "in.mp3", tone(0.5, rate=48000), 48000)
        (saved / "in.mp3").rename(path)
    else:
        form = {"8 bits": "PCM_U8", "loud floats": "FLOAT", "24 bits": "PCM_24"}.get(kind, "PCM_16")
        rate = 96000 if kind == "96 kHz" else 48000
        gain = {"loud floats": 20, "silence": 0}.get(kind, 1)
        soundfile.write(path, gain * wave, rate, subtype=form)
    words = [
        "continue",
        str(path),
        "-o",
        str(saved / "o.wav"),
        "-m",
        str(saved / "model"),
        "--seconds",
        "0.1",
    ]
    done = CliRunner().invoke(app, [*words, "--seed", "1"])
    assert done.exit_code == 0, done.output
    made, _ = soundfile.read(saved / "o.wav")
    seconds = {"96 kHz": 0.1, "MP3": 0.5}.get(kind, 0.2)
    assert len(made) == pytest.approx((seconds + 0.1) * RATE, abs=500 if kind == "MP3" else 0.1)
    assert np.abs(made).max() <= 1


@pytest.mark.parametrize(
    ("prompt", "output", "message"),
    [
        ("cut.wav", "o.wav", "cut off"),
        ("text.wav", "o.wav", "no sound file that can be read"),
        ("missing.wav", "o.wav", "no sound file"),
        ("prompt.wav", "o.doc", "sound format"),
        ("prompt.wav", "text.wav/o.wav", "cannot be written"),
        ("empty.wav", "o.wav", "empty"),
        ("nan.wav", "o.wav", "NaN or infinity at 0.000 s"),
        ("short.wav", "o.wav", "1.0 ms; this codec needs at least one frame, 5.0 ms"),
        ("rate.wav", "o.wav", "says that it has 2000000000 samples a second"),
        ("no-rate.wav", "o.wav", "no sound file that can be read"),
        (".", "o.wav", "got the folder"),
        ("prompt.wav", ".", "got the folder"),
    ],
)
def test_command_answers_mistakes_in_one_line(saved, prompt, output, message):
    (saved / "text.wav").write_text("this is no sound")
    (saved / "empty.wav").write_bytes(b"")
    soundfile.write(saved / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    soundfile.write(saved / "short.wav", tone(0.001), RATE)
    for name, rate in (("rate.wav", 2_000_000_000), ("no-rate.wav", 0)):
        content = (saved / "prompt.wav").read_bytes()
        (saved / name).write_bytes(content[:24] + struct.pack("<I", rate) + content[28:])
    (saved / "cut.wav").write_bytes((saved / "prompt.wav").read_bytes()[:2000])
    words = ["continue", str(saved / prompt), "-o", str(saved / output), "-m", str(saved / "model")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1
    assert not any("part" in path.name for path in saved.iterdir()) and not (saved / "o.wav").exists()
