"""The recipe that compares orders on clips: a tiny budget end to end, its table, and what a second call leaves alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from referring_pools import write_pool

from tokenloom import TokenloomError, VideoTokenizer
from tokenloom.data.moving import MotionConfig
from tokenloom.data.video import build_video
from tokenloom.evaluation.video_judge import train_video_judge

RECIPES = Path(__file__).parent.parent / "recipes"


def test_a_comparison_ends_with_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("compare_video_orders")
    pool, clips = write_pool(tmp_path / "pool"), MotionConfig(16, 5, plain=1.0)
    build_video(tmp_path / "clips", pool=pool, count=4, splits=("train",), config=clips)
    torch.manual_seed(0)
    shape = {"widths": (8, 8), "strides": [(2, 1, 1)], "blocks": (1, 1), "norm_groups": 4}
    VideoTokenizer(16, 5, **shape, quantizer_options={"levels": [4, 4]}).save_pretrained(
        tmp_path / "tokenizer"
    )
    train_video_judge(pool, steps=1, batch_size=4, config=clips).save(tmp_path / "judge")
    words = [
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "clips"),
        "--pool",
        str(pool),
        "--split",
        "train",
    ]
    words += ["--tokenizer", str(tmp_path / "tokenizer"), "--judge", str(tmp_path / "judge")]
    for name, value in (
        ("steps", 2),
        ("batch-size", 2),
        ("width", 24),
        ("depth", 3),
        ("heads", 2),
        ("length", 4),
    ):
        words += [f"--{name}", str(value)]
    recipe.main(words)
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    steps = {name: found["speed"]["steps"] for name, found in figures.items()}
    assert list(steps) == list(recipe.ORDERS) and list(steps.values()) == [48, 9, 12, 15, 3]
    assert all(2 < found["likelihood"]["bits_per_token"] < 6 for found in figures.values())
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.count("\n| next") == 5 and "48 |" in text

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(recipe, "train_video", fail)
    recipe.main(words)  # everything is there
    with pytest.raises(TokenloomError, match="other settings"):
        recipe.main([*words, "--guidance", "3"])
    with pytest.raises(TokenloomError, match="no order"):
        recipe.main([*words, "--only", "next scale"])
