"""ImageScaleTokenizer: scales, prefixes, sizes, training, files, and bad input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import ImageScaleTokenizer, Layout, TokenloomError
from tokenloom.tokenizers.quantizers import VQ, MultiScale
from tokenloom.training.config import TokenizerConfig, load_config

KINDS: dict[str, dict[str, Any]] = {
    "vq": {"quantizer_options": {"codebook_size": 64, "dim": 8, "normalize": False}},
    "bsq": {
        "quantizer_type": "bsq",
        "quantizer_options": {"dim": 8},
        "pyramid_options": {"phis": 0, "up": "bilinear"},
    },
    "fsq": {"quantizer_type": "fsq", "quantizer_options": {"levels": [4, 4, 4]}, "project": 1},
    "simvq": {"quantizer_type": "simvq", "quantizer_options": {"codebook_size": 32, "dim": 8}},
}


def build(kind: str = "vq", **options: Any) -> ImageScaleTokenizer:
    torch.manual_seed(0)
    shape = {"scales": (1, 2, 4), "channels": 8, "multipliers": (1, 1, 2), "blocks": 1, "latent_channels": 8}
    return ImageScaleTokenizer(**{**shape, "norm_groups": 4, **KINDS[kind], **options}).eval()


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_prefixes_and_ranges(kind):
    tokenizer = build(kind)
    assert tokenizer.layout == Layout.scales([1, 2, 4])
    assert (tokenizer.image_size, tokenizer.lengths) == (16, (1, 5, 21))
    codes = tokenizer.encode(pictures(3))
    assert codes.shape == (3, 21) and codes.dtype == torch.long
    output = tokenizer.decode(codes)
    assert output.shape == (3, 3, 16, 16) and output.abs().max() <= 1
    assert torch.equal(tokenizer.reconstruct(pictures(3)), output)
    shown = tokenizer.previews(codes)
    assert len(shown) == 3 and torch.equal(shown[-1], output)
    for length, preview in zip(tokenizer.lengths, shown, strict=True):
        assert torch.equal(tokenizer.encode(pictures(3), num_tokens=length), codes[:, :length])
        assert torch.equal(tokenizer.reconstruct(pictures(3), num_tokens=length), preview)
    assert not torch.equal(shown[0], shown[1]) and not torch.equal(shown[1], shown[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_with_every_scale_of_a_fitting_codebook(kind):
    tokenizer = build(kind)
    z = torch.randn(2, 16, tokenizer.quantizer.dim, generator=torch.Generator().manual_seed(2))
    if kind == "bsq":
        z = z * 0.7
    stats = tokenizer.quantizer.encode(z).stats
    errors = [float(stats[f"quantization_error.{scale}"]) for scale in range(3)]
    assert errors[2] == float(stats["quantization_error"])
    assert errors[2] < float(z.square().mean())


@pytest.mark.parametrize("size", [(8, 24), (13, 7), (1, 1), (17, 16), (40, 16)])
def test_pictures_of_any_size(size):
    tokenizer, batch = build(), pictures(2, *size)
    maps = tokenizer.maps_of(size)
    assert maps[-1] == tokenizer.grid_of(size)
    codes = tokenizer.encode(batch)
    assert codes.shape == (2, sum(h * w for h, w in maps))
    output = tokenizer.decode(codes, size)
    assert output.shape == batch.shape
    assert torch.equal(tokenizer.reconstruct(batch), output)
    assert tokenizer(batch)[0].shape == batch.shape
    assert tokenizer.decode(codes[:, : tokenizer.lengths_of(size)[0]], size).shape == batch.shape


def test_the_recipe_fits_four_megabytes_and_64_pixels():
    recipe = Path(__file__).parent.parent / "recipes" / "emoji64-scales.yaml"
    with torch.device("meta"):
        tokenizer = ImageScaleTokenizer(**load_config(TokenizerConfig, recipe).model)
    assert (tokenizer.image_size, tokenizer.layout.size) == (64, 130)
    assert 1e6 < sum(value.numel() for value in tokenizer.parameters()) * 2 < 4e6  # bytes in bfloat16


@pytest.mark.parametrize("kind", ["vq", "bsq", "simvq"])
def test_gradients_reach_every_trained_weight(kind):
    tokenizer = build(kind).train()
    output, quantized = tokenizer(pictures(2))
    (output.square().mean() + sum(quantized.losses.values())).backward()
    for name, value in tokenizer.named_parameters():
        if not value.requires_grad or name.endswith(
            ".k.bias"
        ):  # a softmax over keys does not see a shift of all
            continue
        if name.startswith("quantizer.pyramid.phis.1."):  # three scales use three of the four convolutions
            assert value.grad is None
            continue
        assert value.grad is not None and value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.5, "revive_after": 2, "kmeans_init": 3}, {"entropy_weight": 0.1}]
)
def test_training_lowers_the_loss(options):
    quantizer = {"codebook_size": 32, "dim": 8, "normalize": False, **options}
    tokenizer = build(quantizer_options=quantizer, pyramid_options={"prefix_dropout": 0.2}).train()
    optimizer = torch.optim.AdamW((value for value in tokenizer.parameters() if value.requires_grad), lr=3e-3)
    batch, errors = pictures(4).mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.2 + 0.3, []
    for _ in range(40):
        output, quantized = tokenizer(batch)
        error = (output - batch).square().mean()
        optimizer.zero_grad()
        (error + sum(quantized.losses.values())).backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert sum(errors[-5:]) < sum(errors[:5]) / 2
    assert ("entropy" in quantized.losses) == ("entropy_weight" in options)


def test_averages_see_every_scale_once_a_batch():
    torch.manual_seed(0)
    quantizer = MultiScale(VQ(8, 4, normalize=False, ema_decay=0.5), [(1, 1), (2, 2)], phis=0).train()
    codes = quantizer.encode(torch.randn(3, 4, 4)).codes
    counts = torch.bincount(codes.flatten(), minlength=8)
    torch.testing.assert_close(quantizer.inner.ema_count, 0.5 + 0.5 * counts.float())


def test_prefix_dropout_hands_on_prefixes_of_some_samples():
    torch.manual_seed(0)
    quantizer = MultiScale(VQ(16, 4, normalize=False), [(1, 1), (2, 2), (4, 4)], prefix_dropout=0.5)
    z = torch.randn(64, 16, 4)
    full = quantizer.eval().encode(z)
    torch.manual_seed(1)
    short = quantizer.train().encode(z)
    assert torch.equal(short.codes, full.codes)
    prefixes = torch.stack([quantizer.decode(full.codes[:, :k]) for k in (1, 5, 21)])
    nearest = (prefixes - short.z_q).abs().amax((2, 3)).argmin(0)
    counts = torch.bincount(nearest, minlength=3).tolist()
    assert 20 <= counts[2] <= 44 and counts[0] >= 5 and counts[1] >= 5
    assert (prefixes - short.z_q).abs().amax((2, 3)).amin(0).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_files_restore_everything(kind, tmp_path):
    tokenizer = build(kind, scales=(1, (2, 3), (4, 6)))
    tokenizer.save_pretrained(tmp_path)
    again = ImageScaleTokenizer.from_pretrained(tmp_path).eval()
    batch = pictures(2, 16, 24)
    assert again.layout == tokenizer.layout == Layout.scales([1, (2, 3), (4, 6)])
    assert torch.equal(again.encode(batch), tokenizer.encode(batch))
    torch.testing.assert_close(again.reconstruct(batch), tokenizer.reconstruct(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vq", "bsq", "fsq"])
@torch.no_grad()
def test_the_pyramid_of_a_generator_adds_up_the_same(kind):
    tokenizer = build(kind)
    codes = tokenizer.encode(pictures(2))
    pyramid = tokenizer.residual_pyramid()
    wanted = tokenizer.quantizer.decode(codes).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(pyramid.decode(codes), wanted)
    torch.testing.assert_close(pyramid.views(codes), tokenizer.quantizer.views(codes))
    with pytest.raises(TokenloomError, match="too large"):
        build("bsq", quantizer_options={"dim": 20}, latent_channels=20).residual_pyramid()


@pytest.mark.parametrize("width", [8, 63, 64])
def test_bits(width):
    tokenizer = build("bsq", quantizer_options={"dim": width}, latent_channels=width)
    bits = tokenizer.encode_bits(pictures(2))
    assert bits.shape == (2, 21, width) and bits.dtype == torch.uint8 and bits.unique().tolist() == [0, 1]
    assert torch.equal(tokenizer.decode_bits(bits), tokenizer.reconstruct(pictures(2)))
    assert torch.equal(tokenizer.decode_bits(bits[:, :5]), tokenizer.reconstruct(pictures(2), num_tokens=5))
    with pytest.raises(TokenloomError, match="0 or 1"):
        tokenizer.decode_bits(bits * 2)
    with pytest.raises(TokenloomError, match="has bits"):
        build().encode_bits(pictures(1))


def test_half_precision_and_empty_batches():
    tokenizer = build().to(torch.bfloat16)
    output = tokenizer.decode(tokenizer.encode(pictures(2)))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert build().encode(pictures(2)[:0]).shape == (0, 21)


def test_wrong_codes_and_numbers_are_named():
    tokenizer, codes = build(), torch.zeros(1, 21, dtype=torch.long)
    with pytest.raises(TokenloomError, match=r"k = 1, 5 or 21, got torch.int64 \(1, 4\)"):
        tokenizer.decode(codes[:, :4])
    with pytest.raises(TokenloomError, match=r"1, 5 or 21 codes, not num_tokens=22"):
        tokenizer.encode(pictures(1), num_tokens=22)
    with pytest.raises(TokenloomError, match="num_tokens=0"):
        tokenizer.reconstruct(pictures(1), num_tokens=0)
    with pytest.raises(TokenloomError, match=r"0\.\.63, got 0\.\.64"):
        tokenizer.decode(codes.index_fill(1, torch.tensor([3]), 64))
    with pytest.raises(TokenloomError, match="1, 5, 21 in number; got 6"):
        tokenizer.quantizer.decode(codes[:, :6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(pictures(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (1, 4, 2)}, "last scale of a pyramid must be the largest"),
        ({"scales": ()}, "at least one scale"),
        ({"project": 2}, "odd side"),
        ({"project": 0, "latent_channels": 4}, "quantizer's width 8"),
        ({"pyramid_options": {"phi": 3}}, "'phis'"),
        ({"pyramid_options": {"up": "nearest"}}, "Did you mean 'bilinear'"),
        ({"pyramid_options": {"prefix_dropout": 2.0}}, r"\[0, 1\]"),
        (
            {"quantizer_type": "residual_fsq", "quantizer_options": {"levels": [4] * 8, "quantizers": 2}},
            "one code a place",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(TokenloomError, match=message):
        build(**options)


def test_squares_of_pixels_as_channels_keep_sizes_and_places():
    torch.manual_seed(0)
    tokenizer = ImageScaleTokenizer(
        (1, 2, 4), channels=8, multipliers=(1, 2), blocks=1, norm_groups=4, patch=2
    ).eval()
    assert (tokenizer.stride, tokenizer.image_size) == (4, 16)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert tokenizer.reconstruct(pixels).shape == pixels.shape
    vectors = tokenizer.features(pixels).detach()
    before = tokenizer.paint_vectors(vectors)
    vectors[:, 0] += 5  # the upper left place
    change = (tokenizer.paint_vectors(vectors) - before).abs().mean((0, 1))
    assert change[:4, :4].mean() > change[-4:, -4:].mean()
    with pytest.raises(TokenloomError, match="patch"):
        ImageScaleTokenizer((1, 2), patch=0)
