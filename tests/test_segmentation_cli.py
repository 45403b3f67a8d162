"""The commands about masks, from a pool to a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from referring_pools import write_pool
from test_segmentation import make_pipeline
from typer.testing import CliRunner

from tokenloom import WordTokenizer
from tokenloom.cli import app
from tokenloom.evaluation.film_unet import FilmUNet


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_segment_writes_masks_and_an_overlay(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    out, shown = tmp_path / "mask.png", tmp_path / "overlay.png"
    text = run(
        "segment", tmp_path / "a.png", "the apple", "the dog", "-m", model, "-o", out, "--overlay", shown
    )
    for name in ("mask-1.png", "mask-2.png", "overlay.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (40, 30)
    assert "the dog: " in text and "score" in text
    failed = CliRunner().invoke(
        app, ["segment", str(tmp_path / "a.png"), "qwv", "-m", str(model), "-o", str(out)]
    )
    assert failed.exit_code == 2
    for taken in (tmp_path / "a.png", out):
        words = ["segment", tmp_path / "a.png", "the apple", "-m", model, "-o", out, "--overlay", taken]
        assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 2
    next((model / "generator").glob("*.safetensors")).unlink()
    words = ["segment", tmp_path / "a.png", "the apple", "-m", model, "-o", out]
    failed = CliRunner().invoke(app, [str(word) for word in words])
    assert failed.exit_code == 2 and "not whole" in " ".join(failed.output.split())


def test_scenes_are_frozen_and_evaluated(model: Path, tmp_path: Path) -> None:
    pool, frozen, unet = write_pool(tmp_path / "pool"), tmp_path / "frozen", tmp_path / "unet"
    text = run("data", "referring-scenes", pool, frozen, "--count", 2, "--size", 32, "--split", "train")
    assert "2 scenes" in text
    FilmUNet(32, [8, 16], phrase=16, vocabulary=6, words=5).save_pretrained(unet)
    WordTokenizer(["apple", "green", "frog", "all"], 5).save_pretrained(unet)
    (frozen / "scenes.jsonl").write_text((frozen / "scenes.jsonl").read_text() + "{}\n")
    report = tmp_path / "report"
    words = ["--unet", unet, "--mask-tokens", 2, "--code-masks", 2, "-o", report]
    run("evaluate-segmentation", model, frozen, *words)
    content = json.loads((report / "report.json").read_text())
    assert len(content["left out"]) == 1 and "line 3" in content["left out"][0]
    names = {key.rsplit("/", 1)[1] for key in content["figures"]}
    assert names == {"tokens", "2 tokens", "U-Net", "largest object"}
    assert [row["tokens"] for row in content["codes"]] == [1, 2, 4]
    assert "## Split train" in (report / "report.md").read_text()
