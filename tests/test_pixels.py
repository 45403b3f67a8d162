"""What every image tokenizer takes, what it refuses, and large pictures in tiles."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokenloom
from tokenloom import ImageCNNTokenizer, ImageScaleTokenizer, ImageVQTokenizer, TokenloomError, media
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import as_pixels, rescale
from tokenloom.tokenizers.tiling import TiledCodes, Tiling, decode_tiled, encode_tiled

ASSETS = Path(tokenloom.__file__).parent / "assets"
CNN: dict[str, Any] = {
    "channels": 8,
    "multipliers": (1, 1, 2),
    "blocks": 1,
    "latent_channels": 8,
    "norm_groups": 4,
}
CODES: dict[str, Any] = {"quantizer_options": {"codebook_size": 64, "dim": 8}}
KINDS = ["vq", "cnn", "cnn01", "scale"]


def build(kind: str) -> ImageTokenizer:
    torch.manual_seed(0)
    if kind == "vq":
        return ImageVQTokenizer(16, 2, 2, 16, 1, 1, 2, quantizer_options={"levels": [4, 4, 4]}).eval()
    if kind == "scale":
        return ImageScaleTokenizer((1, 2, 4), **CNN, **CODES).eval()
    bounds = (0.0, 1.0) if kind == "cnn01" else (-1.0, 1.0)
    return ImageCNNTokenizer(16, **CNN, **CODES, pixel_range=bounds).eval()


def levels(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def pictures(values: Tensor) -> list[Image.Image]:
    return [Image.fromarray(item.permute(1, 2, 0).numpy()) for item in values]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_floats_and_pictures_give_the_same_codes(kind):
    tokenizer, values = build(kind), levels()
    low, high = tokenizer.pixel_range
    wanted = tokenizer.encode(low + (high - low) * values.float() / 255)
    assert torch.equal(tokenizer.encode(values), wanted)
    assert torch.equal(tokenizer.encode(pictures(values)), wanted)
    assert torch.equal(tokenizer.encode(tuple(pictures(values))), wanted)
    assert torch.equal(tokenizer.encode(pictures(values)[1]), wanted[1:])
    assert torch.equal(tokenizer.reconstruct(pictures(values)), tokenizer.decode(wanted))
    assert torch.equal(tokenizer(values)[1].codes, wanted)


def test_pictures_of_every_mode():
    red = Image.new("RGB", (2, 1), (255, 0, 0))
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    deep = Image.fromarray(np.full((1, 2), 65535, dtype=np.uint16))
    white = torch.ones(1, 3, 1, 2)
    for picture in (clear, deep, Image.new("L", (2, 1), 255), Image.new("1", (2, 1), 1)):
        torch.testing.assert_close(as_pixels(picture, (-1.0, 1.0), "T"), white)
    for picture in (red, red.convert("P"), red.convert("CMYK")):
        pixels = as_pixels(picture, (0.0, 1.0), "T")
        torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (torch.zeros(1, 4, 16, 16), r"pixels\[:, :3\]"),
        (torch.zeros(1, 1, 16, 16), "repeat a grey channel"),
        (torch.zeros(1, 16, 16, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 16, 16), r"pixels\[None\]"),
        (torch.zeros(1, 3, 0, 16), "at least one pixel"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int32), r"\.to\(torch.uint8\)"),
        (np.zeros((1, 3, 16, 16)), "open_image"),
        ([], "PIL pictures"),
        (["a.png"], "PIL pictures"),
        ([Image.new("RGB", (16, 16)), Image.new("RGB", (16, 8))], "one size a batch, got 16x8, 16x16"),
        (Image.new("RGB", (0, 4)), "at least one pixel, got 0x4"),
    ],
)
def test_what_is_no_picture_is_refused_with_advice(wrong, advice):
    for kind in KINDS:
        with pytest.raises(TokenloomError, match=advice):
            build(kind).encode(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_looked_at(kind):
    tokenizer = build(kind)
    for value in (math.nan, math.inf):
        spoiled = torch.zeros(1, 3, 16, 16)
        spoiled[0, 1, 2, 3] = value
        with pytest.raises(TokenloomError, match="NaN or infinity"):
            tokenizer.encode(spoiled)
    with pytest.warns(UserWarning, match=r"Pixels lie in \[-3, 4\], but this tokenizer expects"):
        tokenizer.reconstruct(torch.linspace(-3, 4, 768).view(1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(levels())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_of_any_precision_and_memory_order(kind, dtype):
    tokenizer = build(kind)
    batch = rescale(levels().float(), (0.0, 255.0), tokenizer.pixel_range).to(dtype)
    codes = tokenizer.encode(batch)
    assert torch.equal(codes, tokenizer.encode(batch.float()))
    strided = batch.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous() and torch.equal(tokenizer.encode(strided), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_on_a_processor(kind):
    tokenizer = build(kind).to(torch.float16)
    output = tokenizer.decode(tokenizer.encode(levels()))
    assert output.dtype == torch.float16 and output.isfinite().all()


def test_a_size_that_does_not_fit_is_named():
    with pytest.raises(TokenloomError, match=r"expects float pixels of shape \(B, 3, 16, 16\).*tile=16"):
        build("vq").encode(levels(1, 16, 24))
    with pytest.raises(TokenloomError, match="decodes pictures of"):
        build("vq").decode(torch.zeros(1, 16, dtype=torch.long), (16, 24))


def test_more_codes_than_there_are_is_named():
    with pytest.raises(TokenloomError, match="16 codes, not num_tokens=17"):
        build("cnn").encode(levels(), num_tokens=17)
    assert build("cnn").encode(levels(), num_tokens=16).shape == (2, 16)
    assert build("cnn").encode(levels(2, 8, 8), num_tokens=4).shape == (2, 4)


# tiles


@pytest.mark.parametrize(
    ("size", "overlap"), [((40, 23), 4), ((16, 16), 4), ((5, 61), 0), ((17, 16), 15), ((33, 50), 7)]
)
def test_cutting_and_joining_gives_the_picture_back(size, overlap):
    tiling = Tiling(size, (16, 16), overlap)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    tiles = tiling.cut(pixels)
    assert tiles.shape == (2, tiling.count, 3, 16, 16)
    torch.testing.assert_close(tiling.join(tiles), pixels)


def test_tiles_are_cut_in_order_and_repeat_the_edge():
    pixels = torch.randn(1, 3, 33, 40)
    tiling = Tiling((33, 40), (16, 16))
    tiles = tiling.cut(pixels)[0]
    assert (tiling.grid, len(tiles)) == ((3, 3), 9)
    assert torch.equal(tiles[4], pixels[0, :, 16:32, 16:32])
    assert torch.equal(tiles[6][:, 1:], pixels[0, :, 32:33, :16].expand(-1, 15, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_every_tokenizer(kind):
    tokenizer, values = build(kind), levels(2, 30, 41)
    tiled = encode_tiled(tokenizer, values, overlap=4)
    assert tiled.codes.shape == (2, 3 * 4, tokenizer.layout.size)
    output = decode_tiled(tokenizer, tiled)
    assert output.shape == values.shape
    assert torch.equal(tokenizer.reconstruct(values, tile=16, overlap=4), output)
    alone = TiledCodes(tiled.codes[1:], tiled.tiling)
    torch.testing.assert_close(decode_tiled(tokenizer, alone), output[1:], atol=1e-5, rtol=0)
    assert torch.equal(tokenizer.reconstruct(pictures(values), tile=16, overlap=4), output)


def test_tiles_keep_prefixes_and_take_other_sides():
    tokenizer, values = build("scale"), levels(1, 30, 41)
    assert encode_tiled(tokenizer, values, num_tokens=5).codes.shape == (1, 9 * 1 + 3, 5)
    assert tokenizer.reconstruct(values, tile=(24, 32), overlap=8).shape == values.shape
    with pytest.raises(TokenloomError, match=r"tiles of \(16, 16\) pixels only"):
        encode_tiled(build("vq"), values, 24)
    with pytest.raises(TokenloomError, match="0 to 15, not by 16"):
        encode_tiled(tokenizer, values, 16, 16)
    with pytest.raises(TokenloomError, match="NaN"):
        encode_tiled(tokenizer, values.float() * math.nan)


def test_the_seam_between_tiles():
    """Where tiles begin and end, the error jumps from pixel to pixel at most 1.2 times as much as elsewhere, on average.

    Measured on a photograph with the bundled tokenizer and the default overlap of a quarter of a tile; without overlap the
    jump is more than 1.4 times as large.
    """
    tokenizer = ImageVQTokenizer.from_pretrained(ASSETS / "tokenloom-emoji-64" / "tokenizer").float().eval()
    photo = media.open_image(ASSETS / "photos" / "cat.jpg").crop((100, 60, 300, 228))
    pixels = media.to_pixels(photo)

    def jump(overlap: int | None) -> float:
        error = tokenizer.reconstruct(pixels, tile=64, overlap=overlap) - pixels
        step, ratios = 64 - (16 if overlap is None else overlap), []
        for axis in (2, 3):
            jumps = error.diff(dim=axis).abs().mean([other for other in range(4) if other != axis])
            starts = range(0, pixels.shape[axis], step)
            borders = {place - 1 for start in starts for place in (start, start + 64)}
            inside = sorted(borders & set(range(len(jumps))))
            elsewhere = [place for place in range(len(jumps)) if place not in borders]
            ratios.append(float(jumps[inside].mean() / jumps[elsewhere].mean()))
        return max(ratios)

    assert jump(None) < 1.2
    assert jump(0) > 1.4
