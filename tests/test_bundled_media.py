"""The bundled models of sound and clips, as a user gets them: by name, by default, and doing what their words say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tokenloom import AudioContinuationPipeline, VideoPipeline, media_audio
from tokenloom.cli import app
from tokenloom.media_video import read_clip
from tokenloom.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def clips() -> VideoPipeline:
    pipe = VideoPipeline.from_pretrained("tokenloom-video-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sounds() -> AudioContinuationPipeline:
    pipe = AudioContinuationPipeline.from_pretrained("tokenloom-chorales")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def height(frames: Tensor) -> Tensor:
    """Mean row, from 0 (top) to 1, of what differs from the border, for each of (T, 3, H, W) frames."""
    behind = frames[:, :, :2].mean((2, 3), keepdim=True)
    apart = (frames - behind).abs().sum(1).clamp(min=0.2) - 0.2
    rows = torch.linspace(0, 1, frames.shape[2])
    return (apart.sum(2) * rows).sum(1) / apart.sum((1, 2)).clamp(min=1e-3)


def test_a_ball_moves_where_the_words_say(clips: VideoPipeline) -> None:
    shifts = {}
    for word in ("up", "down"):
        frames = clips([f"a blue ball moving {word}"] * 6, seed=list(range(6)), output_type="pt").frames
        assert frames.shape == (6, 17, 3, 64, 64)
        shifts[word] = sum(float(height(clip)[-1] - height(clip)[0]) for clip in frames) / 6
    assert shifts["up"] < -0.1 and shifts["down"] > 0.1


def test_a_clip_goes_on_from_its_last_frames(clips: VideoPipeline) -> None:
    first = clips("a red ball growing", seed=2, output_type="pt").frames
    longer = clips("a red ball growing", video=first[0], num_frames=25, seed=3, output_type="pt").frames
    assert longer.shape[1] == 25
    assert torch.allclose(longer[:, :17], first, atol=0.01)


def test_the_video_command_needs_no_model(tmp_path: Path) -> None:
    target = tmp_path / "out.gif"
    result = CliRunner().invoke(app, ["video", "a red ball bouncing", "-o", str(target), "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert len(read_clip(target).frames) == 17


def chord(seconds: float = 3.0) -> Tensor:
    """Samples (1, S) at 16 kHz of decaying C major chords, two a second."""
    time = torch.arange(round(seconds * 16000)) / 16000
    since = time % 0.5
    tones = [torch.sin(2 * torch.pi * pitch * time) for pitch in (130.8, 196.0, 261.6, 329.6)]
    return (0.1 * torch.exp(-3 * since) * torch.stack(tones).sum(0))[None]


def test_the_codec_keeps_the_spectrum_of_a_piano_like_sound() -> None:
    from tokenloom.evaluation.audio_metrics import mel_distance

    codec, sound = load_tokenizer("tokenloom-chorales"), chord()
    again = codec.reconstruct(sound[None])
    noise = torch.randn(sound.shape, generator=torch.Generator().manual_seed(0)) * sound.std()
    assert mel_distance(again[0, 0], sound[0], 16000) < 0.7 * mel_distance(noise[0], sound[0], 16000)
    assert codec.bits_per_second() == 2000


def test_a_continuation_keeps_the_prompt_and_streams_the_whole(sounds: AudioContinuationPipeline) -> None:
    prompt = chord()
    whole = sounds(prompt, 16000, seconds=1.0, seed=5)
    audio = torch.as_tensor(whole.audios)
    assert audio.shape == (1, 1, 64000) and torch.equal(audio[0, :, :48000], prompt)
    assert float(audio[..., 48000:].abs().mean()) > 1e-3  # not silent
    pieces = list(sounds(prompt, 16000, seconds=1.0, seed=5, stream=True))
    assert torch.allclose(
        torch.cat([torch.as_tensor(piece) for piece in pieces], dim=-1), audio[..., 48000:], atol=1e-4
    )


@pytest.mark.parametrize("decode", ["compiled", "parallel"])
def test_every_way_to_decode_gives_the_same(
    decode: str, sounds: AudioContinuationPipeline, clips: VideoPipeline
) -> None:
    """On trained models, whose logits lie apart, rounding has not changed a code."""
    for temperature in (0.0, 0.9):
        options = {"seconds": 0.8, "seed": 4, "temperature": temperature}
        want, got = (sounds(chord(), 16000, decode=rung, **options) for rung in ("cached", decode))
        assert torch.equal(want.codes, got.codes)
    if decode == "compiled":
        pair = [
            clips("a red ball bouncing", seed=3, decode=rung, output_type="pt") for rung in ("cached", decode)
        ]
        assert torch.equal(pair[0].codes, pair[1].codes)


def test_the_continue_command_needs_no_model(tmp_path: Path) -> None:
    prompt, target = tmp_path / "prompt.wav", tmp_path / "out.wav"
    media_audio.save_audio(chord()[None][0], prompt, 16000)
    result = CliRunner().invoke(
        app,
        ["continue", str(prompt), "-o", str(target), "--seconds", "1", "--seed", "3", "--decode", "compiled"],
    )
    assert result.exit_code == 0, result.output
    import soundfile

    assert soundfile.info(str(target)).frames == 64000
