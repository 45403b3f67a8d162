"""train-codec and train-continuation, end to end on three tones: files, figures, caches, and configs that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny_audio import CODEC, FRAMES, SHAPE, tone, write_tones
from tokenloom import AudioContinuationPipeline, AudioTokenizer, TokenloomError
from tokenloom.data.captions import Caption, write_captions
from tokenloom.data.sounds import SoundFolder
from tokenloom.layouts import Layout
from tokenloom.training.audio_config import CodecConfig, ContinuationConfig
from tokenloom.training.codec_task import CodecTask
from tokenloom.training.config import from_dict, load_config
from tokenloom.training.continuation_task import ContinuationTask
from tokenloom.training.data import open_model
from tokenloom.training.frame_families import FRAME_FAMILIES, Frames, build_frames
from tokenloom.training.run import train_codec, train_continuation
from tokenloom.training.sound_codes import sound_codes

LOOP = {
    "steps": 2,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup": 1,
    "precision": "no",
    "ema": 0.5,
    "log_every": 2,
    "sample_every": 2,
    "checkpoint_every": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "two_level": {"patch": 2, "transformer": SHAPE, "encoder": SHAPE, "decoder": SHAPE},
    "next_block": {"order": "delay", "transformer": SHAPE},
    "next_token": {"order": "flat", "transformer": SHAPE},
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tones, and a codec trained on them for two steps."""
    desk = tmp_path_factory.mktemp("audio")
    write_tones(desk / "tones")
    values = {
        "output": str(desk / "codec"),
        "data": {"root": str(desk / "tones")},
        "crop_seconds": 0.1,
        "model": CODEC,
        "loss": {"stft": 0.1, "adversarial": 0.1, "adversarial_start": 0},
        "loop": LOOP,
    }
    (desk / "codec.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert train_codec(desk / "codec.yaml") == desk / "codec" / "model"
    return desk


def settings(desk: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "output": str(desk / "continuation"),
        "codec": str(desk / "codec" / "model"),
        "data": {"root": str(desk / "tones"), "cache": str(desk / "cache")},
        "frames": FRAMES,
        "codebooks": 2,
        "model": MODELS["two_level"],
        "code_cache": str(desk / "codes"),
        "loop": LOOP,
    }
    return values | changes


def test_codec_is_trained_logged_shown_and_saved(desk):
    codec = AudioTokenizer.from_pretrained(desk / "codec" / "model").eval()
    assert codec.encode(torch.from_numpy(tone(0.1))[None]).shape == (1, 3, 20)
    (row,) = [json.loads(line) for line in (desk / "codec" / "log.jsonl").read_text().splitlines()]
    assert {"mel", "stft", "wave", "adversarial", "features", "critic", "usage.codebook_0"} <= set(row)
    names = {path.name for path in (desk / "codec" / "samples").iterdir()}
    assert names == {f"step-0000000{step}.{end}" for step in (0, 2) for end in ("png", "wav")}


def test_training_changes_the_codec_towards_the_sound(desk):
    values = yaml.safe_load((desk / "codec.yaml").read_text())
    task = CodecTask(from_dict(CodecConfig, values | {"loss": {}, "quieter": 6.0}))
    batch = task.batch(torch.arange(3), torch.Generator().manual_seed(0))
    assert batch["audio"].shape == (3, 1, 800)
    peaks = batch["audio"].abs().amax((1, 2))
    assert (peaks < 0.201).all() and (peaks > 0.099).all() and len(peaks.unique()) == 3
    optimizer = torch.optim.Adam(task.module.parameters(), 3e-3)
    losses = []
    for step in range(12):
        loss, _ = task.loss(task.module, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_continuation_is_trained_and_saved_as_a_pipeline(desk):
    (desk / "continuation.yaml").write_text(yaml.safe_dump(settings(desk, sampling={"top_k": 4})))
    model = train_continuation(desk / "continuation.yaml")
    pipe = AudioContinuationPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.window == (FRAMES, 2) and pipe.config["sampling"] == {"top_k": 4}
    assert pipe(tone(0.1), 8000, seconds=0.05, seed=0).audios.shape == (1, 1, 1200)
    assert len(list((desk / "codes").iterdir())) == 1
    assert (desk / "continuation" / "samples" / "step-00000002.png").is_file()


@pytest.mark.parametrize("name", MODELS)
def test_captions_are_read_if_asked_for(desk, name):
    texts = ("a low tone", "", "a high tone")
    tones = [Caption(file=f"{index}.wav", text=text) for index, text in enumerate(texts)]
    write_captions(write_tones(desk / "told"), tones)
    told = {"root": str(desk / "told")}
    values = settings(
        desk, data=told, text={"max_length": 3, "drop": 0.5}, generator=name, model=MODELS[name]
    )
    task = ContinuationTask(from_dict(ContinuationConfig, values))
    assert task.words.vocabulary == ["tone", "high", "low"]
    seen = [task.batch(torch.tensor([0, 9, 18]), torch.Generator().manual_seed(seed)) for seed in range(12)]
    ids = {tuple(row) for batch in seen for row in batch["condition"].tolist()}
    assert ids == {(0, 0, 0), (4, 2, 0), (3, 2, 0)}
    loss, _ = task.loss(task.module, seen[0], 0)
    loss.backward()
    assert task.generator.condition.table.weight.grad.abs().sum() > 0
    task.save(desk / f"told-{name}")
    pipe = AudioContinuationPipeline.from_pretrained(desk / f"told-{name}")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(tone(0.1), 8000, prompt="a high tone", seconds=0.05, seed=0).audios.shape == (1, 1, 1200)
    task.samples(desk / "told.png")
    again = {**values, "init_from": str(desk / f"told-{name}")}
    assert ContinuationTask(from_dict(ContinuationConfig, again)).words.vocabulary == task.words.vocabulary
    with pytest.raises(TokenloomError, match="set `text` as it was trained"):
        ContinuationTask(from_dict(ContinuationConfig, {**again, "text": None}))


def test_words_need_captions(desk):
    with pytest.raises(TokenloomError, match="has no captions"):
        ContinuationTask(from_dict(ContinuationConfig, settings(desk, text={})))


def test_codes_are_those_of_whole_sounds_and_come_back_from_the_cache(desk, monkeypatch):
    codec = open_model(str(desk / "codec" / "model"), AudioTokenizer)
    sounds = SoundFolder(desk / "tones", None, 8000)
    made = sound_codes(codec, sounds, 2, str(desk / "again"))
    assert torch.equal(made.codes[:, :100].long(), codec.encode(sounds.sound(0)[None], num_codebooks=2)[0])
    monkeypatch.setattr(codec, "encode", None)
    again = sound_codes(codec, sounds, 2, str(desk / "again"))
    assert torch.equal(again.codes, made.codes) and torch.equal(again.starts, made.starts)
    chosen = made.windows(FRAMES)
    crops = made.crops(chosen, FRAMES, torch.Generator().manual_seed(0))
    assert crops.shape == (len(chosen), 2 * FRAMES)
    frames = crops[0].view(FRAMES, 2).T
    assert any(torch.equal(frames, made.codes[:, i : i + FRAMES].long()) for i in range(100 - FRAMES + 1))
    with pytest.raises(TokenloomError, match="No sound has 101 frames; the longest has 100"):
        made.windows(101)


@pytest.mark.parametrize("name", FRAME_FAMILIES)
def test_every_family_has_a_loss(name):
    frames = Frames(Layout.frames(4, 2), (16, 16))
    generator = build_frames(name, frames, MODELS[name])
    assert generator.loss(torch.arange(16).view(2, 8)) > 0
    with pytest.raises(TokenloomError, match="'transfomer'"):
        build_frames(name, frames, {"transfomer": SHAPE})


def test_configs_that_are_wrong(desk):
    with pytest.raises(TokenloomError, match="two_levels"):
        build_frames("two_levels", Frames(Layout.frames(4, 2), (16, 16)), {})
    with pytest.raises(TokenloomError, match="one vocabulary"):
        build_frames("next_block", Frames(Layout.frames(4, 2), (16, 8)), {})
    with pytest.raises(TokenloomError, match="take it away"):
        build_frames("two_level", Frames(Layout.frames(4, 2), (16, 16)), {"frames": 4})
    with pytest.raises(TokenloomError, match="crop_seconds"):
        from_dict(CodecConfig, {"output": "x", "data": {"root": "y"}, "crop_seconds": 0})
    with pytest.raises(TokenloomError, match="'code_cash'"):
        from_dict(ContinuationConfig, settings(desk, code_cash="x"))
    with pytest.raises(TokenloomError, match="'strdes'"):
        CodecTask(from_dict(CodecConfig, {"output": "x", "data": {"root": "y"}, "model": {"strdes": [4]}}))


def test_recipes_are_valid_and_small():
    recipes = Path(__file__).parent.parent / "recipes"
    codec = load_config(CodecConfig, recipes / "chorales-codec.yaml")
    config = load_config(ContinuationConfig, recipes / "chorales-continuation.yaml")
    tokenizer = AudioTokenizer(**codec.model)
    assert 1000 <= tokenizer.bits_per_second() <= 3000 and tokenizer.sample_rate == 16000
    generator = build_frames(
        config.generator,
        Frames(tokenizer.layout_for(config.frames, config.codebooks), tokenizer.codebook_sizes),
        config.model,
    )
    sizes = [sum(value.numel() for value in part.state_dict().values()) for part in (tokenizer, generator)]
    assert 2 * sizes[0] < 6e6 and 2 * sum(sizes) < 12e6, sizes  # bytes in bfloat16
    AudioContinuationPipeline(tokenizer, generator, config.sampling)
