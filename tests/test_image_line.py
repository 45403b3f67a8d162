"""ImageLineTokenizer: shapes, prefixes, posteriors, text, two stages, gradients, files, and bad input."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from tokenloom import ImageLineTokenizer, Layout, TokenloomError
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers.quantizers import VQ
from tokenloom.tokenizers.registers import RegisterConfig, causal_registers, keep_first

SMALL = {"width": 24, "depth": 2, "heads": 2, "patch": 4}
PIXEL = {"codebook_size": 16, "latent_channels": 8, "channels": 8, "multipliers": [1, 1, 2], "norm_groups": 4}


def build(**options: object) -> ImageLineTokenizer:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "image_size": 16,
        "registers": 6,
        "encoder_config": SMALL,
        "decoder_config": SMALL,
        "quantizer_options": {"codebook_size": 64, "dim": 4},
    }
    tokenizer = ImageLineTokenizer(**{**settings, **options}).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        tokenizer.encoder.patch_embed.weight *= 8
        if isinstance(
            tokenizer.quantizer, VQ
        ):  # codes near the data, so that random weights tell pictures apart
            places = tokenizer.features(tokenizer.pixel_range[1] * pictures(11).abs()).flatten(0, 1)
            tokenizer.quantizer.codebook.copy_(places[: len(tokenizer.quantizer.codebook)])
    return tokenizer


def pictures(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flexible": True},
        {"scrambled": True, "pixel_config": PIXEL, "pixel_range": (0.0, 1.0)},
        {
            "quantizer_type": "fsq",
            "quantizer_options": {"levels": [8, 5, 5]},
            "decoder_config": {**SMALL, "patch": 2},
        },
    ],
    ids=["plain", "flexible", "two stages", "fsq"],
)
def test_it_keeps_the_contract(options):
    assert "batch order" in check_tokenizer(build(**options))


def test_shapes_and_figures():
    tokenizer = build()
    assert tokenizer.layout == Layout.line(6)
    assert tokenizer.vocab_size == 64
    assert tokenizer.bits_per_image == 36
    codes = tokenizer.encode(pictures(3))
    assert codes.shape == (3, 6)
    output = tokenizer.decode(codes)
    assert output.shape == (3, 3, 16, 16)
    assert output.abs().max() <= 1
    free = build(clamp=False)
    torch.testing.assert_close(free.paint_vectors(free.quantizer.decode(codes)), free.decode(codes))


def test_the_first_codes_of_a_flexible_tokenizer_do_not_know_how_many_follow():
    tokenizer = build(flexible=True)
    before = tokenizer.features(pictures(2))
    with torch.no_grad():
        tokenizer.encoder.registers[3:] += torch.randn(3, 24)
    after = tokenizer.features(pictures(2))
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-5, rtol=1e-5)
    assert (before[:, 3:] - after[:, 3:]).abs().amax((0, 2)).min() > 1e-4


def test_any_prefix_of_a_flexible_tokenizer_decodes():
    tokenizer = build(flexible=True, clamp=False)
    codes = tokenizer.encode(pictures(2))
    z = tokenizer.quantizer.decode(codes)
    outputs = [tokenizer.decode(codes[:, :count]) for count in range(1, 7)]
    for count, output in enumerate(outputs, 1):
        torch.testing.assert_close(output, tokenizer.paint_vectors(z, kept=torch.tensor([count, count])))
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(outputs))
    with pytest.raises(TokenloomError, match=r"k = 1\.\.6"):
        tokenizer.decode(codes[:, :0])


def test_training_of_a_flexible_tokenizer_drops_codes():
    tokenizer, batch = build(flexible=True).train(), pictures(8)
    torch.manual_seed(3)
    outputs = [tokenizer(batch)[0] for _ in range(2)]
    assert not torch.allclose(*outputs)
    whole = torch.full((8,), 6)
    torch.testing.assert_close(tokenizer(batch, kept=whole)[0], tokenizer.eval()(batch)[0])


def test_every_sample_keeps_its_own_number():
    tokenizer, batch = build(flexible=True), pictures(2)
    both = tokenizer(batch, kept=torch.tensor([2, 5]))[0]
    alone = [tokenizer(batch[i : i + 1], kept=torch.tensor([n]))[0] for i, n in ((0, 2), (1, 5))]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight():
    for options in ({}, {"pixel_config": PIXEL}, {"quantizer_type": "kl", "quantizer_options": {"dim": 4}}):
        tokenizer = build(**options).train()
        output, quantized = tokenizer(pictures(2))
        (output.square().mean() + sum(quantized.losses.values())).backward()
        assert [name for name, value in tokenizer.named_parameters() if value.grad is None] == []


def test_a_continuous_tokenizer():
    tokenizer, batch = build(quantizer_type="kl", quantizer_options={"dim": 4}), pictures(3)
    vectors = tokenizer.encode(batch)
    assert vectors.shape == (3, 6, 4)
    assert (tokenizer.vocab_size, tokenizer.bits_per_image) == (0, math.inf)
    torch.testing.assert_close(tokenizer(batch)[0].clamp(-1, 1), tokenizer.decode(vectors))
    _, quantized = tokenizer(batch)
    assert quantized.codes.shape == (3, 0)
    torch.testing.assert_close(quantized.losses["kl"], tokenizer.posterior(batch).divergence().sum(1).mean())
    drawn = tokenizer.train()(batch)[1].z_q
    assert (drawn - vectors).abs().max() > 1e-3
    with pytest.raises(TokenloomError, match=r"float vectors of shape \(B, 6, 4\)"):
        tokenizer.decode(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(TokenloomError, match="no codes"):
        tokenizer.quantize(batch)
    with pytest.raises(TokenloomError, match="no posterior"):
        build().posterior(batch)


def test_the_divergence_of_a_standard_normal_is_zero():
    from tokenloom.tokenizers.posterior import Posterior

    posterior = Posterior.of(torch.zeros(2, 3, 8))
    assert posterior.divergence().abs().max() == 0
    wide = Posterior.of(torch.cat([torch.full((1, 4), 2.0), torch.full((1, 4), 99.0)], dim=1))
    assert wide.log_variance.max() == 20
    noise = torch.randn(20_000, 4)
    sample = Posterior(torch.tensor([3.0]), torch.tensor([-2.0])).sample(noise)
    assert abs(float(sample.mean()) - 3) < 0.01
    assert abs(float(sample.var().log()) + 2) < 0.05


def test_text_features():
    tokenizer = build(text_config={"features": 5, "length": 3})
    codes, text = tokenizer.encode(pictures(2)), torch.randn(2, 3, 5)
    first, second = tokenizer.decode(codes, text), tokenizer.decode(codes, text.flip(0))
    assert (first - second).abs().max() > 1e-4
    torch.testing.assert_close(tokenizer.reconstruct(pictures(2), text), first)
    with pytest.warns(UserWarning, match="text"):
        tokenizer.decode(codes)
    for wrong in (text[:1], text[:, :2], text.long(), [1, 2]):
        with pytest.raises(TokenloomError, match=r"float of shape \(2, 3, 5\)"):
            tokenizer.decode(codes, wrong)
    with pytest.raises(TokenloomError, match="takes no text"):
        build().decode(codes, text)


def test_two_stages_mix_the_codes_of_the_grid_tokenizer():
    painter = build(pixel_config=PIXEL).painter
    sure = torch.full((1, 16, 4, 4), -50.0)
    sure[:, 7] = 50
    code = painter.codebook[7].view(1, 8, 1, 1).expand(1, 8, 4, 4)
    torch.testing.assert_close(painter(sure), painter.decoder(code))


def test_files(tmp_path):
    options = {"flexible": True, "text_config": {"features": 5, "length": 3}, "pixel_config": PIXEL}
    tokenizer, text = build(**options), torch.randn(2, 3, 5)
    tokenizer.save_pretrained(tmp_path)
    again = ImageLineTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.reconstruct(pictures(2), text), tokenizer.reconstruct(pictures(2), text), atol=1e-5, rtol=1e-5
    )


def test_the_mask_of_causal_registers():
    seen = causal_registers(3, 2)
    assert seen.tolist() == [[True] * 3 + [False] * 2] * 3 + [[True] * 4 + [False], [True] * 5]


def test_dropped_vectors_are_zero():
    x = torch.ones(2, 3, 1)
    assert keep_first(x, torch.tensor([1, 3])).sum((1, 2)).tolist() == [1, 3]
    assert keep_first(x, None) is x


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 24, 24), "resize the picture"),
        (torch.zeros(1, 4, 16, 16), "alpha"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "uint8"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.full((1, 3, 16, 16), math.nan), "NaN"),
        (torch.zeros(1, 3, 0, 16), "expects float pixels"),
        ("picture.png", "str"),
    ],
)
def test_bad_pixels(pixels, message):
    with pytest.raises(TokenloomError, match=message):
        build().encode(pixels)


def test_a_wrong_range_is_a_warning():
    with pytest.warns(UserWarning, match=r"\[0, 255\]"):
        build().encode(torch.tensor([0.0, 255.0]).repeat(1, 3, 16, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().encode(pictures(1))


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(1, 5, dtype=torch.long),
        torch.zeros(1, 7, dtype=torch.long),
        torch.full((1, 6), 64),
        torch.full((1, 6), -1),
        torch.zeros(1, 6),
        torch.zeros(6, dtype=torch.long),
        [0] * 6,
    ],
)
def test_bad_codes(codes):
    with pytest.raises(TokenloomError, match=r"Codes must lie|expects integer codes"):
        build().decode(codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_config": {"widht": 8}}, "Did you mean 'width'"),
        ({"encoder_config": {**SMALL, "patch": 5}}, "multiple of the patch"),
        ({"decoder_config": {**SMALL, "depth": 0}}, "at least 1"),
        ({"registers": 0}, "positive integer"),
        ({"flexible": True, "scrambled": True}, "not both"),
        ({"pixel_config": {**PIXEL, "multipliers": [1, 2]}}, "change patch"),
        ({"pixel_config": {"code": 3}}, "pixel_config"),
        ({"text_config": {"features": 4}}, "text_config"),
        ({"quantizer_type": "kl", "quantizer_options": {"dims": 4}}, "dim"),
        ({"quantizer_type": "vqq"}, "Did you mean 'vq'"),
        (
            {
                "quantizer_type": "residual_vq",
                "quantizer_options": {"codebook_size": 8, "dim": 4, "quantizers": 2},
            },
            "one code a register",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TokenloomError, match=message):
        build(**options)


def test_an_unknown_option_of_a_transformer_says_where():
    with pytest.raises(TokenloomError, match="option of somewhere"):
        RegisterConfig.of({"depht": 1}, "option of somewhere")
