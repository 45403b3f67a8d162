"""Clips for training, and the training of video tokenizers and generators of clips, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from referring_pools import write_pool

from tokenloom import TokenloomError, VideoPipeline, VideoTokenizer
from tokenloom.media_video import read_clip, save_clip
from tokenloom.training.clip_source import FolderSource, MovingSource, open_clips
from tokenloom.training.config import load_config
from tokenloom.training.families import build_generator
from tokenloom.training.run import train_video, train_video_tokenizer
from tokenloom.training.video_config import ClipsConfig, VideoConfig, VideoTokenizerConfig

TINY = {
    "image_size": 16,
    "num_frames": 5,
    "widths": [8, 8],
    "strides": [[2, 1, 1]],
    "blocks": [1, 1],
    "norm_groups": 4,
    "quantizer_options": {"levels": [4, 4, 4]},
}
LOOP = {
    "steps": 3,
    "batch_size": 2,
    "warmup": 1,
    "log_every": 1,
    "sample_every": 3,
    "checkpoint_every": 3,
    "ema": 0.5,
}


def test_the_recipes_are_valid_and_build_models_of_one_layout() -> None:
    folder = Path(__file__).parent.parent / "recipes"
    settings = load_config(VideoTokenizerConfig, folder / "video64-tokenizer.yaml")
    config = load_config(VideoConfig, folder / "video64-generator.yaml")
    tokenizer = VideoTokenizer(**settings.model)
    layout = tokenizer.layout_for(17, (64, 64))
    words = {"kind": "words", "vocabulary": 100, "length": config.text.max_length}
    generator = build_generator(config.generator, tokenizer, words, config.model, layout)
    assert (layout.size, generator.order.num_steps) == (5 * 8 * 8, 8 + 4 * 8 + 7)
    assert sum(p.numel() for model in (tokenizer, generator) for p in model.parameters()) < 5e6


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pool."""
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny video tokenizer with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    VideoTokenizer(**TINY).save_pretrained(folder)
    return folder


def write(path: Path, values: dict[str, Any]) -> Path:
    """Writes a config."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def gradient_clip(frames: int, side: int) -> list[Image.Image]:
    """A clip that becomes lighter."""
    return [Image.new("RGB", (side, side), (20 * index, 40, 60)) for index in range(frames)]


def test_a_pool_gives_fresh_clips_to_one_call_and_the_same_to_the_other(pool: Path) -> None:
    source = open_clips(ClipsConfig(root=str(pool), length=7), 16, 5)
    assert isinstance(source, MovingSource) and source.size == 7
    index = torch.tensor([3, 4])
    clips, texts = source.fixed(index)
    assert clips.shape == (2, 5, 3, 16, 16) and clips.dtype == torch.uint8 and len(texts) == 2
    assert torch.equal(clips, source.fixed(index)[0])
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(source.drawn(index, generator), source.drawn(index, generator))
    words = {word for text in source.words() for word in text.split()}
    assert {word for text in texts for word in text.split()} <= words


def test_a_folder_of_clips_gives_windows(tmp_path: Path) -> None:
    save_clip(gradient_clip(9, 20), tmp_path / "a.webp")
    save_clip(gradient_clip(3, 20), tmp_path / "b.gif")
    source = open_clips(ClipsConfig(root=str(tmp_path), split=None), 16, 5)
    assert isinstance(source, FolderSource) and source.size == 2
    clips, texts = source.fixed(torch.tensor([0, 1]))
    assert texts == ["", ""]
    assert torch.equal(clips[1, 3], clips[1, 2])  # filled up
    drawn = source.drawn(torch.tensor([0] * 16), torch.Generator().manual_seed(1))
    assert len({int(clip[0, 0].float().mean()) for clip in drawn}) > 2  # windows begin at several places


def test_options_of_clips_are_refused_where_they_have_nothing_to_say(pool: Path, tmp_path: Path) -> None:
    save_clip(gradient_clip(3, 20), tmp_path / "a.webp")
    with pytest.raises(TokenloomError, match="nothing to say"):
        open_clips(ClipsConfig(root=str(tmp_path), options={"plain": 1.0}), 16, 5)
    with pytest.raises(TokenloomError, match="smallest"):
        open_clips(ClipsConfig(root=str(pool), options={"smalest": 1.0}), 16, 5)
    with pytest.raises(TokenloomError, match="size or frames"):
        open_clips(ClipsConfig(root=str(pool), options={"frames": 9}), 16, 5)


def test_a_video_tokenizer_trains_and_opens(pool: Path, tmp_path: Path) -> None:
    values = {
        "output": str(tmp_path / "run"),
        "data": {"root": str(pool)},
        "model": TINY,
        "motion": 0.5,
        "loss": {"l1": 0.1, "l2": 1.0, "structure": 0.1, "adversarial": 0.1, "adversarial_start": 1},
        "loop": LOOP,
    }
    folder = train_video_tokenizer(write(tmp_path / "config.yaml", values))
    trained = VideoTokenizer.from_pretrained(folder)
    assert trained.layout.shape == (3, 4, 4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"motion", "structure", "adversarial", "critic", "psnr"} <= set(rows[-1])
    assert len(read_clip(tmp_path / "run" / "samples" / "step-00000003.webp").frames) == 5
    torch.manual_seed(0)
    fresh = VideoTokenizer(**TINY)
    assert not torch.equal(trained.encoder.conv_in.weight, fresh.encoder.conv_in.weight)


@pytest.mark.parametrize(
    ("generator", "model"),
    [
        ("next_token", {}),
        ("next_neighbor", {"transformer": {"width": 24, "depth": 1, "heads": 2, "taps": [1, 1, 1]}}),
        ("next_block", {}),
        ("next_block", {"order_options": {"block": [1, 4, 4]}}),
    ],
)
def test_every_order_trains_and_makes_clips(
    generator: str, model: dict[str, Any], pool: Path, tokenizer: Path, tmp_path: Path
) -> None:
    values = {
        "output": str(tmp_path / "run"),
        "tokenizer": str(tokenizer),
        "data": {"root": str(pool), "length": 6},
        "generator": generator,
        "model": {"transformer": {"width": 24, "depth": 1, "heads": 2}, "tie_embeddings": True, **model},
        "held_out": "val",
        "code_cache": str(tmp_path / "codes"),
        "sample_prompts": ["a red apple bouncing"],
        "sampling": {"temperature": 1.0},
        "fps": 10.0,
        "loop": LOOP,
    }
    config = write(tmp_path / "config.yaml", values)
    pipe = VideoPipeline.from_pretrained(train_video(config))
    pipe.set_progress_bar_config(disable=True)
    result = pipe("a frog moving up", seed=1)
    assert len(result.frames[0]) == 5 and result.codes.shape == (1, 48) and result.fps == 10
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("held_out" in row for row in rows)
    assert len(list((tmp_path / "codes").iterdir())) == 1
    assert train_video(config, resume="latest", overrides=["loop.steps=4"]).is_dir()  # from the kept codes


def test_clips_without_captions_train_without_words(tokenizer: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_clip(gradient_clip(7, 16), tmp_path / "clips" / f"{name}.webp")
    values = {
        "output": str(tmp_path / "run"),
        "tokenizer": str(tokenizer),
        "data": {"root": str(tmp_path / "clips"), "split": None},
        "model": {"transformer": {"width": 24, "depth": 1, "heads": 2}},
        "loop": LOOP,
    }
    pipe = VideoPipeline.from_pretrained(train_video(write(tmp_path / "config.yaml", values)))
    assert pipe.text_tokenizer is None
    with pytest.raises(TokenloomError, match="without words"):
        pipe("a frog")


def test_frames_that_the_tokenizer_cannot_hold_are_refused(
    pool: Path, tokenizer: Path, tmp_path: Path
) -> None:
    values = {
        "output": str(tmp_path / "run"),
        "tokenizer": str(tokenizer),
        "data": {"root": str(pool)},
        "frames": 4,
    }
    with pytest.raises(TokenloomError, match="use 5"):
        train_video(write(tmp_path / "config.yaml", values))
