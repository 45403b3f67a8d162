"""The continuation pipeline: the prompt stays, seeds, batches, windows, streams, loudness, saving, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from tests.tiny_audio import FRAMES, HOP, RATE, tiny_codec, tiny_pipeline, tone
from tokenloom import (
    AudioContinuationPipeline,
    NextBlockGenerator,
    TokenloomError,
    orders,
)
from tokenloom.cli import app
from tokenloom.layouts import Layout
from tokenloom.pipelines.joining import Joint, level, limit
from tokenloom.pipelines.windows import sliding_frames


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


@pytest.mark.parametrize(
    ("prompt", "output", "message"),
    [
        ("cut.wav", "o.wav", "cut off"),
        ("text.wav", "o.wav", "no sound file that can be read"),
        ("missing.wav", "o.wav", "no sound file"),
        ("prompt.wav", "o.doc", "sound format"),
        ("prompt.wav", "text.wav/o.wav", "cannot be written"),
        ("empty.wav", "o.wav", "empty"),
    ],
)
def test_command_answers_mistakes_in_one_line(saved, prompt, output, message):
    (saved / "text.wav").write_text("this is no sound")
    (saved / "empty.wav").write_bytes(b"")
    (saved / "cut.wav").write_bytes((saved / "prompt.wav").read_bytes()[:2000])
    words = ["continue", str(saved / prompt), "-o", str(saved / output), "-m", str(saved / "model")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1
