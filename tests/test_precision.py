"""Which number format a pipeline is loaded in, on machines with and without bfloat16."""

from __future__ import annotations

import pytest
import torch

from tokenloom import AudioContinuationPipeline, TextToImagePipeline, VideoPipeline, precision
from tokenloom.errors import TokenloomError
from tokenloom.pipelines.base import Pipeline


def formats(pipe: Pipeline) -> dict[str, torch.dtype]:
    return {name: next(pipe.components[name].parameters()).dtype for name in ("generator", "tokenizer")}


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda: True)


def test_large_generators_are_bfloat16_where_that_pays(
    hardware: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"generator": torch.float32, "tokenizer": torch.float32}
    assert formats(TextToImagePipeline.from_pretrained()) == plain  # small: it stays in the caches
    monkeypatch.setattr(precision, "LARGE", 1_000_000)
    found = formats(TextToImagePipeline.from_pretrained())
    assert found == {"generator": torch.bfloat16, "tokenizer": torch.float32}
    assert formats(TextToImagePipeline.from_pretrained(dtype="auto")) == found
    assert formats(TextToImagePipeline.from_pretrained(dtype=torch.float32)) == plain
    own = TextToImagePipeline.from_pretrained(dtype=torch.float32).generator
    assert (
        formats(TextToImagePipeline.from_pretrained(generator=own)) == plain
    )  # the caller's own stays as it is
    monkeypatch.setattr(precision, "computes_bf16", lambda: False)
    assert formats(TextToImagePipeline.from_pretrained()) == plain


def test_a_picture_of_a_generator_in_bfloat16(hardware: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are integers, so that the tokenizer may stay in float32; both rungs run."""
    monkeypatch.setattr(precision, "LARGE", 0)
    pipe = TextToImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    for decode in ("cached", "compiled"):
        made = pipe("a red apple", seed=0, decode=decode, output_type="pt")
        assert made.images.shape == (1, 3, 64, 64) and made.images.dtype == torch.float32


def test_sound_and_clips_of_a_generator_in_bfloat16(hardware: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LARGE", 0)
    sound = AudioContinuationPipeline.from_pretrained("tokenloom-chorales")
    assert formats(sound)["generator"] == torch.bfloat16
    prompt = torch.sin(torch.arange(8000) / 8)
    made = sound(prompt, sampling_rate=16000, seconds=0.24, output_type="pt")
    assert made.audios.dtype == torch.float32 and bool(made.audios.isfinite().all())
    clips = VideoPipeline.from_pretrained("tokenloom-video-64")
    assert formats(clips)["generator"] == torch.bfloat16
    clip = clips("the lion moves right", num_frames=5, output_type="pt").frames
    assert clip.dtype == torch.float32 and bool(clip.isfinite().all())


def test_other_words_for_a_format_are_errors() -> None:
    with pytest.raises(TokenloomError, match='or "auto"'):
        TextToImagePipeline.from_pretrained(dtype="bf16")


def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert precision.computes_bf16() == (avx or amx)
        large = torch.nn.Linear(5000, 5000, device="meta")
        assert precision.pays_in_bf16(large) == (avx or amx) and not precision.pays_in_bf16(
            torch.nn.Linear(4, 4)
        )
