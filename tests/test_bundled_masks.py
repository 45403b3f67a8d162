"""The bundled model of masks, as a user gets it: by name, by default, and finding what a phrase means."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from tokenloom import SegmentationPipeline
from tokenloom.cli import app
from tokenloom.data.balls import draw_ball

NAME = "tokenloom-masks-128"
BALLS = {"red": (10, 20, 70), "blue": (110, 50, 60), "yellow": (40, 100, 48)}  # left, top, side


@pytest.fixture(scope="module")
def pipe() -> SegmentationPipeline:
    pipe = SegmentationPipeline.from_pretrained(NAME)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scene() -> tuple[Image.Image, dict[str, Tensor]]:
    """Three balls on a photograph of 192 x 160 pixels, and the mask of each."""
    with Image.open(str(files("tokenloom") / "assets" / "photos" / "cat.jpg")) as opened:
        picture = opened.convert("RGB").resize((192, 160))
    masks = {}
    for colour, (left, top, side) in BALLS.items():
        ball = draw_ball(colour, "matt", side)
        picture.paste(ball, (left, top), ball)
        mask = np.zeros((160, 192), dtype=bool)
        mask[top : top + side, left : left + side] = np.asarray(ball.getchannel("A")) > 127
        masks[colour] = torch.from_numpy(mask)
    return picture, masks


def overlap(first: Tensor, second: Tensor) -> float:
    return float((first & second).sum() / (first | second).sum().clamp(min=1))


def test_a_phrase_means_a_ball(
    pipe: SegmentationPipeline, scene: tuple[Image.Image, dict[str, Tensor]]
) -> None:
    picture, masks = scene
    output = pipe(picture, [f"the {colour} ball" for colour in masks])
    for colour, mask, other in zip(masks, output.masks, output.boxes, strict=True):
        assert overlap(mask, masks[colour]) > 0.75, (colour, other)
    left, top, side = BALLS["red"]
    assert torch.allclose(output.boxes[0], torch.tensor([left, top, left + side, top + side]).float(), atol=6)
    assert float(output.present.min()) > 0.5


def test_fewer_codes_are_coarser_masks(
    pipe: SegmentationPipeline, scene: tuple[Image.Image, dict[str, Tensor]]
) -> None:
    picture, masks = scene
    found = [
        overlap(pipe(picture, "the red ball", mask_tokens=count).masks[0], masks["red"])
        for count in (1, 4, 32)
    ]
    assert 0.5 < found[0] < found[1] < found[2]


def test_rungs_agree(pipe: SegmentationPipeline, scene: tuple[Image.Image, dict[str, Tensor]]) -> None:
    picture, _ = scene
    encoded, phrases = pipe.encode_picture(picture), ["the blue ball", "all balls", "the lemon"]
    wanted = pipe(encoded, phrases)
    for decode in ("reference", "compiled", "parallel"):
        assert torch.equal(pipe(encoded, phrases, decode=decode).codes, wanted.codes), decode


def test_the_command_needs_no_model(scene: tuple[Image.Image, dict[str, Tensor]], tmp_path: Path) -> None:
    picture, masks = scene
    picture.save(tmp_path / "photo.png")
    mask, over = tmp_path / "mask.png", tmp_path / "overlay.png"
    arguments = [
        "segment",
        str(tmp_path / "photo.png"),
        "the red ball",
        "-o",
        str(mask),
        "--overlay",
        str(over),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with Image.open(mask) as opened:
        assert overlap(torch.from_numpy(np.asarray(opened.convert("L")) > 127), masks["red"]) > 0.75
    with Image.open(over) as opened:
        assert opened.size == picture.size


def test_what_it_does_not_know_is_said(pipe: SegmentationPipeline) -> None:
    assert "lemon" in pipe.text_tokenizer.vocabulary and "locomotive" not in pipe.text_tokenizer.vocabulary
    assert (
        sum(path.stat().st_size for path in Path(str(files("tokenloom") / "assets" / NAME)).rglob("*")) < 12e6
    )
    assert pipe.card["recipes"] and pipe.card["figures"]
