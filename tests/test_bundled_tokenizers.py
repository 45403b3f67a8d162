"""The bundled tokenizers: the contract, their size and cards, and what the first tokens of a picture say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tokenloom import media, models
from tokenloom.cli import app
from tokenloom.demo import PHOTO
from tokenloom.evaluation.metrics import psnr
from tokenloom.pipelines import reconstruct_image
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers import load_tokenizer

NAMES = ["tokenloom-emoji-64-flex", "tokenloom-emoji-64-scales", "tokenloom-photos"]
PREFIXES = NAMES[:2]
CARD = {"description", "license", "training_data", "recipes", "limits", "training", "figures", "sha256"}


def heart(size: int = 64) -> Image.Image:
    """A red heart on white that is not in any set of drawings."""
    axis = torch.linspace(-1.3, 1.3, size)
    y, x = -axis[:, None] * 1.1 + 0.1, axis[None, :]
    inside = (x**2 + y**2 - 0.7) ** 3 - x**2 * y**3 < 0
    colour = torch.tensor([230, 40, 60])[:, None, None]
    return media.to_pil(torch.where(inside, colour, 255)[None].float() / 127.5 - 1)[0]


def quality(output: torch.Tensor, pixels: torch.Tensor) -> float:
    return float(psnr((output + 1) / 2, (pixels + 1) / 2).mean())


def test_they_are_listed_with_their_sources() -> None:
    assert set(NAMES) <= set(models.bundled())
    text = CliRunner().invoke(app, ["models"]).output
    assert all(name in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_and_their_cards_say_where_they_come_from(name: str) -> None:
    info = models.bundled()[name]
    assert 1e6 < info.num_bytes <= 4e6
    assert set(info.card) >= CARD
    root = Path(__file__).parent.parent
    assert all((root / recipe).is_file() for recipe in info.card["recipes"])
    assert info.card["figures"]["points"][-1]["psnr"] > 17


@pytest.mark.parametrize("name", NAMES)
def test_they_keep_the_contract(name: str) -> None:
    assert "prefixes" in check_tokenizer(load_tokenizer(name))


@pytest.mark.parametrize("name", PREFIXES)
def test_more_tokens_come_closer(name: str) -> None:
    tokenizer, pixels = load_tokenizer(name), media.to_pixels(heart())
    few = len(tokenizer.lengths) < 16  # else powers of two, which training kept
    lengths = [length for length in tokenizer.lengths if few or length & (length - 1) == 0]
    values = [quality(tokenizer.reconstruct(pixels, num_tokens=length), pixels) for length in lengths]
    assert len(values) > 5
    assert values == sorted(values)
    assert values[-1] > values[0] + 3


def test_photographs_of_any_size() -> None:
    tokenizer = load_tokenizer("tokenloom-photos")
    picture = Image.open(PHOTO).crop((100, 40, 300, 173))  # no training saw it
    whole = reconstruct_image(tokenizer, picture)
    assert (whole.tiles, whole.image.size) == (1, (200, 133))
    assert whole.psnr > 20
    assert whole.bits_per_pixel == pytest.approx(0.217, rel=0.05)


def test_the_command_keeps_the_first_tokens_of_each_tile(tmp_path: Path) -> None:
    heart(80).save(tmp_path / "heart.png")
    figures = []
    for options in (["--tokens", "1"], ["--tokens", "16"], []):
        words = ["reconstruct", str(tmp_path / "heart.png"), "-o", str(tmp_path / "out.png")]
        result = CliRunner().invoke(app, [*words, "--tokenizer", "tokenloom-emoji-64-flex", *options])
        assert result.exit_code == 0, result.output
        line = " ".join(result.output.split())
        assert "4 tiles" in line
        figures.append(float(line.split("PSNR ")[1].split(" dB")[0]))
    assert figures == sorted(figures)
    words += ["--tokenizer", "tokenloom-emoji-64-flex", "--tokens", "65"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "1..64 codes, not num_tokens=65" in " ".join(result.output.split())
