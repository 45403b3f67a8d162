"""ImageCNNTokenizer: shapes, any size, batches, gradients, files, and bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tokenloom import ImageCNNTokenizer, Layout, TokenloomError

SMALL = {"channels": 8, "multipliers": (1, 1, 2), "blocks": 1, "latent_channels": 8, "norm_groups": 4}
FORMS = ["taming", "maskgit"]


def build(form: str = "taming", **options: object) -> ImageCNNTokenizer:
    torch.manual_seed(0)
    settings = {"image_size": 16, **SMALL, "form": form, "quantizer_options": {"codebook_size": 64, "dim": 4}}
    return ImageCNNTokenizer(**{**settings, **options}).eval()  # type: ignore[arg-type]


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_ranges(form):
    tokenizer = build(form)
    assert tokenizer.layout == Layout.grid(4, 4)
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.stride) == (16, 4, 4)
    assert tokenizer.bits_per_image == 16 * 6
    codes = tokenizer.encode(pictures(3))
    assert codes.shape == (3, 16)
    assert codes.dtype == torch.long
    assert len(codes.unique()) > 4
    output = tokenizer.decode(codes)
    assert output.shape == (3, 3, 16, 16)
    assert output.abs().max() <= 1
    assert torch.equal(tokenizer.reconstruct(pictures(3)), output)


@pytest.mark.parametrize("form", FORMS)
def test_decode_agrees_with_the_training_pass(form):
    tokenizer = build(form)
    output, quantized = tokenizer(pictures(2))
    torch.testing.assert_close(
        output.detach().clamp(-1, 1), tokenizer.decode(quantized.codes), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("size", [(8, 24), (13, 7), (1, 1), (17, 16)])
def test_pictures_of_any_size(size):
    tokenizer, batch = build(), pictures(2, *size)
    rows, columns = tokenizer.grid_of(size)
    codes = tokenizer.encode(batch)
    assert codes.shape == (2, rows * columns)
    output = tokenizer.decode(codes, size)
    assert output.shape == batch.shape
    assert torch.equal(tokenizer.reconstruct(batch), output)
    assert tokenizer(batch)[0].shape == batch.shape


def test_padding_repeats_the_edge():
    tokenizer, picture = build(), pictures(1, 14, 16)
    whole = torch.cat([picture, picture[:, :, -1:].expand(-1, -1, 2, -1)], dim=2)
    assert torch.equal(tokenizer.encode(picture), tokenizer.encode(whole))
    assert torch.equal(tokenizer.reconstruct(picture), tokenizer.reconstruct(whole)[:, :, :14])


def test_squares_of_pixels_as_channels():
    tokenizer = build(patch=2)
    assert (tokenizer.stride, tokenizer.grid) == (8, 2)
    assert tokenizer.encoder.conv_in.weight.shape[1] == 12
    assert tokenizer.reconstruct(pictures(2, 13, 20)).shape == (2, 3, 13, 20)


def test_without_projections_latents_are_as_wide_as_codes():
    tokenizer = build(latent_channels=None)
    assert tokenizer.encoder.conv_out.out_channels == tokenizer.quantizer.dim == 4
    assert not any("to_code" in name for name, _ in tokenizer.named_parameters())
    assert tokenizer.features(pictures(1)).shape == (1, 16, 4)


def test_a_layout_that_is_not_square():
    tokenizer = build(image_size=(16, 24))
    assert tokenizer.layout == Layout.grid(4, 6)
    assert (tokenizer.image_size, tokenizer.grid) == ((16, 24), (4, 6))
    assert tokenizer.reconstruct(pictures(1, 16, 24)).shape == (1, 3, 16, 24)


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_has_the_same_codes_in_any_batch(form):
    tokenizer, batch = build(form), pictures(5)
    alone = torch.cat([tokenizer.encode(picture[None]) for picture in batch])
    assert torch.equal(alone, tokenizer.encode(batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_gradients_reach_every_weight(form, kind):
    options = {} if kind == "vq" else {"quantizer_options": {"levels": [5, 5, 4, 3]}}
    tokenizer = build(form, quantizer_type=kind, **options).train()
    output, quantized = tokenizer(pictures(2))
    (output.square().mean() + sum(quantized.losses.values())).backward()
    for name, value in tokenizer.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name
        if not name.endswith(".k.bias"):  # a softmax over keys does not see what is added to all of them
            assert value.grad.abs().sum() > 0, name


@pytest.mark.parametrize("form", FORMS)
def test_files_restore_everything(form, tmp_path):
    tokenizer = build(form, image_size=(16, 24), pixel_range=(0.0, 1.0), clamp=False)
    tokenizer.save_pretrained(tmp_path)
    again = ImageCNNTokenizer.from_pretrained(tmp_path).eval()
    batch = pictures(2, 16, 24) / 2 + 0.5
    assert torch.equal(again.encode(batch), tokenizer.encode(batch))
    assert torch.equal(again.reconstruct(batch), tokenizer.reconstruct(batch))
    assert (again.pixel_range, again.clamp) == ((0.0, 1.0), False)


def test_half_precision_on_a_processor():
    tokenizer = build().to(torch.bfloat16)
    codes = tokenizer.encode(pictures(2, 13, 16))
    assert codes.dtype == torch.long
    output = tokenizer.decode(codes, (13, 16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_pictures_that_are_not_contiguous_and_empty_batches():
    tokenizer, batch = build(), pictures(2)
    assert torch.equal(tokenizer.encode(batch.to(memory_format=torch.channels_last)), tokenizer.encode(batch))
    assert tokenizer.encode(batch[:0]).shape == (0, 16)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 4, 16, 16),
        torch.zeros(3, 16, 16),
        torch.zeros(1, 3, 0, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.long),
        "picture.png",
    ],
    ids=["alpha", "no batch", "empty", "whole numbers", "a name"],
)
def test_wrong_pixels_are_named(pixels):
    with pytest.raises(TokenloomError, match="expects float pixels"):
        build().encode(pixels)


def test_values_out_of_range_are_named():
    with pytest.raises(TokenloomError, match="NaN"):
        build().encode(torch.full((1, 3, 16, 16), float("nan")))
    with pytest.warns(UserWarning, match=r"lie in \[0, 255\], but this tokenizer expects \[-1, 1\]"):
        build().encode(torch.linspace(0, 255, 768).view(1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().encode(pictures(1))


def test_wrong_codes_are_named():
    tokenizer = build()
    with pytest.raises(TokenloomError, match=r"shape \(B, 16\)"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(TokenloomError, match=r"shape \(B, 8\)"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.long), (8, 16))
    with pytest.raises(TokenloomError, match=r"0\.\.63"):
        tokenizer.decode(torch.full((1, 16), 64))
    with pytest.raises(TokenloomError, match="size is one number"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.long), (0, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "tamming"}, "'taming'"),
        ({"multipliers": ()}, "at least 1"),
        ({"norm_groups": 3}, "multiple of groups=3"),
        ({"patch": 0}, "patch and every one"),
        ({"image_size": (1, 2, 3)}, "size is one number"),
        (
            {"quantizer_type": "residual_fsq", "quantizer_options": {"levels": [4], "quantizers": 2}},
            "one code",
        ),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(TokenloomError, match=message):
        build(**options)
