"""Pictures of any size through the image tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_tokenizer

import tokenloom
from tokenloom import media
from tokenloom.pipelines import reconstruction

PHOTO = Path(tokenloom.__file__).parent / "assets" / "photos" / "cat.jpg"


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (16, 16), (17, 15), (40, 33)])
def test_any_size_comes_back_in_its_size(size: tuple[int, int]) -> None:
    tokenizer = tiny_tokenizer()
    result = reconstruction.reconstruct_image(tokenizer, Image.new("RGB", size, (10, 200, 90)))
    assert result.image.size == size
    assert result.tiles == math.ceil(size[0] / 16) * math.ceil(size[1] / 16)
    assert result.bits == result.tiles * 16 * 6  # 16 tokens of 64 codes
    assert result.bits_per_pixel == pytest.approx(result.bits / (size[0] * size[1]))


def test_a_tokenizer_for_any_size_gets_the_whole_picture() -> None:
    torch.manual_seed(0)
    tokenizer = tokenloom.ImageScaleTokenizer(
        (1, 2), channels=8, multipliers=(1, 2), blocks=1, norm_groups=4
    ).eval()
    result = reconstruction.reconstruct_image(tokenizer, Image.open(PHOTO).crop((0, 0, 30, 22)))
    maps = [(rows, columns) for rows, columns in tokenizer.maps_of((22, 30))]
    assert (result.tiles, result.image.size) == (1, (30, 22))
    assert result.bits == sum(rows * columns for rows, columns in maps) * 12  # 4,096 codes


def test_a_line_of_codes_describes_a_tile_not_a_large_picture() -> None:
    tokenizer = tokenloom.ImageFlexTokenizer(
        16,
        registers=4,
        encoder_config={"width": 8, "depth": 1, "heads": 1},
        decoder_config={"width": 8, "depth": 1, "heads": 1, "kind": "direct"},
    ).eval()
    result = reconstruction.reconstruct_image(tokenizer, Image.open(PHOTO).crop((0, 0, 40, 20)))
    assert (result.tiles, result.image.size) == (6, (40, 20))
    assert result.bits == pytest.approx(6 * 4 * math.log2(64000))


def test_fewer_tokens_are_fewer_bits() -> None:
    torch.manual_seed(0)
    tokenizer = tokenloom.ImageScaleTokenizer(
        (1, 2), channels=8, multipliers=(1, 2), blocks=1, norm_groups=4
    ).eval()
    result = reconstruction.reconstruct_image(tokenizer, Image.open(PHOTO).crop((0, 0, 8, 4)), num_tokens=1)
    assert (result.tiles, result.bits) == (2, 24)
    with pytest.raises(tokenloom.TokenloomError, match="num_tokens=2"):
        reconstruction.reconstruct_image(tokenizer, Image.new("RGB", (4, 4)), num_tokens=2)


def test_each_tile_is_what_the_tokenizer_gives() -> None:
    tokenizer = tiny_tokenizer()
    image = Image.open(PHOTO).crop((100, 50, 148, 82))
    result = reconstruction.reconstruct_image(tokenizer, image)
    tile = tokenizer.reconstruct(media.to_pixels(image.crop((16, 16, 32, 32))))
    got = np.array(result.image)[16:32, 16:32].astype(int)
    assert np.abs(got - np.array(media.to_pil(tile)[0]).astype(int)).max() <= 1


def test_psnr_is_that_of_the_two_pictures() -> None:
    result = reconstruction.reconstruct_image(tiny_tokenizer(), Image.open(PHOTO).crop((0, 0, 50, 50)))
    error = np.array(result.image).astype(float) - np.array(result.original).astype(float)
    assert result.psnr == pytest.approx(10 * math.log10(255**2 / (error**2).mean()), abs=1e-3)
    assert f"PSNR {result.psnr:.2f} dB at {result.bits_per_pixel:.3f} bits per pixel" in str(result)


def test_fit_takes_the_centred_square_as_one_tile() -> None:
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    result = reconstruction.reconstruct_image(tiny_tokenizer(), image, fit=True)
    assert result.tiles == 1
    assert result.original.size == result.image.size == (16, 16)
    assert np.array(result.original)[..., 2].min() == 255


def test_transparency_is_put_on_white() -> None:
    result = reconstruction.reconstruct_image(tiny_tokenizer(), Image.new("RGBA", (16, 16), (0, 0, 0, 0)))
    assert result.original.getpixel((3, 3)) == (255, 255, 255)
