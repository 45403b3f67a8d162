"""MaskTokenizer: kinds and sizes of masks, prefixes, blank masks, both decodes, gradients, files, and bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_masks import ellipses as shapes
from tiny_masks import make_mask_tokenizer as build

from tokenloom import Layout, MaskTokenizer, TokenloomError
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers.mask_words import IGNORED, MaskWords

PIXEL = {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1, "latent": 8, "groups": 4}


@pytest.mark.parametrize(
    "options",
    [{}, {"blank_codes": False, "pixel_config": PIXEL, "channels": 3}, {"scrambled": True}],
    ids=["own", "as published", "scrambled"],
)
def test_it_keeps_the_contract(options):
    assert "batch order" in check_tokenizer(build(**options), shapes(6).float())


def test_shapes_and_figures():
    tokenizer = build()
    assert tokenizer.layout == Layout.line(6)
    assert tokenizer.vocab_size == 66
    assert (tokenizer.empty_code, tokenizer.full_code) == (64, 65)
    assert build(blank_codes=False).vocab_size == 64
    codes = tokenizer.encode(shapes(3))
    assert codes.shape == (3, 6)
    assert codes.max() < 64
    logits = tokenizer.decode(codes)
    assert logits.shape == (3, 16, 16)
    assert torch.equal(tokenizer.decode(codes, output="mask"), logits > 0)
    torch.testing.assert_close(tokenizer.decode(codes, output="probabilities"), logits.sigmoid())


def test_kinds_of_masks():
    tokenizer, masks = build(), shapes(3)
    codes = tokenizer.encode(masks)
    for same in (masks.float(), masks.double(), masks.byte(), masks.byte() * 255, masks.half()):
        assert torch.equal(tokenizer.encode(same), codes), same.dtype
    mixed = torch.stack([masks[0].byte(), masks[1].byte() * 255, masks[2].byte()])
    assert torch.equal(tokenizer.encode(mixed), codes)
    grey = masks.byte() * 200
    assert not torch.equal(tokenizer.prepare(grey), tokenizer.prepare(masks))


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (40, 7), (5, 33), (16, 9), (64, 64)])
def test_masks_of_any_size_come_back_at_their_size(size):
    tokenizer, masks = build(), shapes(2, *size)
    codes = tokenizer.encode(masks)
    assert tokenizer.decode(codes, size=size).shape == masks.shape
    output = tokenizer.reconstruct(masks, output="mask")
    assert output.shape == masks.shape
    assert output.dtype == torch.bool
    assert tokenizer(masks.float())[0].shape == masks.shape


def test_the_way_there_and_back_keeps_places():
    """A soft mask resampled to the square and back is the mask again, in its own corner."""
    tokenizer, masks = build(image_size=64), shapes(4, 24, 40)
    square = tokenizer.prepare(masks)[:, 0]
    assert square.shape == (4, 64, 64)
    assert square[:, 40:].abs().max() == 0  # below the mask, which is wider than high
    back = tokenizer.fit(square, (24, 40)) > 0.5
    inside = (back & masks).sum((1, 2)) / (back | masks).sum((1, 2))
    assert inside.min() > 0.9


def test_large_masks_are_averaged_not_sampled():
    line = torch.zeros(1, 256, 256, dtype=torch.bool)
    line[:, :, ::16] = True
    smooth, rough = build().prepare(line), build(antialias=False).prepare(line)
    assert smooth.std() < 0.05
    assert abs(float(smooth.mean()) - 1 / 16) < 0.01
    assert abs(float(rough.mean()) - 1 / 16) > 0.02


def test_any_prefix_decodes():
    tokenizer = build()
    codes = tokenizer.encode(shapes(2))
    outputs = [tokenizer.decode(codes, count) for count in range(1, 7)]
    for count, output in enumerate(outputs, 1):
        torch.testing.assert_close(output, tokenizer.decode(codes[:, :count]))
        torch.testing.assert_close(output, tokenizer(shapes(2), torch.tensor([count, count]))[0])
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(outputs))


def test_the_first_codes_do_not_know_how_many_follow():
    tokenizer = build()
    before = tokenizer.features(shapes(2))
    with torch.no_grad():
        tokenizer.encoder.registers[2:] += torch.randn(4, 24)
    after = tokenizer.features(shapes(2))
    torch.testing.assert_close(before[:, :2], after[:, :2], atol=1e-5, rtol=1e-5)
    assert (before[:, 2:] - after[:, 2:]).abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("size", [(16, 16), (31, 9), (1, 1), (100, 120)])
def test_empty_and_full_masks_survive_at_every_length(size):
    tokenizer = build()
    masks = torch.stack([torch.zeros(size), torch.ones(size), torch.full(size, 0.4)])
    codes = tokenizer.encode(masks)
    assert codes.tolist() == [[64] * 6, [65] * 6, [64] * 6]
    for count in (1, 3, 6):
        output = tokenizer.decode(codes, count, size, output="mask")
        assert output.flatten(1).float().mean(1).tolist() == [0, 1, 0]
    logits, quantized = tokenizer(masks)
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(logits, tokenizer.decode(codes, size=size))
    one = torch.zeros(1, *size)
    one[0, 0, 0] = 1
    assert (tokenizer.encode(one) < 64).all() or size == (1, 1)


def test_a_blank_code_behind_the_first_place_ends_the_prefix():
    tokenizer = build()
    codes = tokenizer.encode(shapes(2))
    cut = codes.clone()
    cut[0, 2], cut[1, 4] = 64, 65
    output = tokenizer.decode(cut)
    torch.testing.assert_close(output[:1], tokenizer.decode(codes[:1], 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[1:], tokenizer.decode(codes[1:], 4), atol=1e-5, rtol=1e-5)


def test_sure_probabilities_decode_like_codes():
    tokenizer = build()
    codes = tokenizer.encode(
        torch.cat([shapes(2), torch.zeros(1, 16, 16).bool(), torch.ones(1, 16, 16).bool()])
    )
    sure = torch.nn.functional.one_hot(codes, 66).float()
    for count in (1, 4, 6):
        soft = tokenizer.decode_probabilities(sure, count)
        torch.testing.assert_close(
            soft, tokenizer.decode(codes, count, output="probabilities"), atol=1e-5, rtol=1e-5
        )
    assert tokenizer.decode_probabilities(sure, size=(9, 30)).shape == (4, 9, 30)
    half = 0.5 * sure[:1] + 0.5 * sure[2:3]
    mixed = tokenizer.decode_probabilities(half)
    assert mixed.max() < 0.51


def test_probabilities_pass_gradients():
    tokenizer = build()
    logits = torch.randn(2, 6, 66, requires_grad=True)
    tokenizer.decode_probabilities(logits.softmax(-1)).square().mean().backward()
    assert logits.grad is not None
    assert logits.grad.abs().amax((0, 2)).min() > 0
    assert logits.grad[:, 0, 64:].abs().min() > 0


def test_gradients_reach_every_weight():
    for options in ({}, {"pixel_config": PIXEL}):
        tokenizer = build(**options).train()
        logits, quantized = tokenizer(shapes(2))
        (logits.square().mean() + sum(quantized.losses.values())).backward()
        assert [name for name, value in tokenizer.named_parameters() if value.grad is None] == []


def test_files(tmp_path):
    tokenizer = build(pixel_config=PIXEL, levels=4)
    tokenizer.save_pretrained(tmp_path)
    again = MaskTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.reconstruct(shapes(2)), tokenizer.reconstruct(shapes(2)), atol=1e-5, rtol=1e-5
    )


def test_vectors_may_skip_the_quantizer():
    tokenizer = build()
    masks = shapes(3).float()
    hard, quantized = tokenizer(masks)
    soft, mixed = tokenizer(masks, soft=torch.tensor([True, False, True]))
    assert torch.equal(mixed.codes, quantized.codes)
    assert torch.allclose(soft[1], hard[1], atol=1e-5) and not torch.allclose(soft[0], hard[0], atol=1e-5)
    vectors = torch.nn.functional.normalize(tokenizer.features(masks), dim=-1)
    assert torch.allclose(soft[[0, 2]], tokenizer.paint_vectors(vectors)[[0, 2]], atol=1e-5)


def test_the_default_is_a_small_model():
    weights = sum(value.numel() for value in MaskTokenizer().parameters())
    assert 1e6 < weights < 2e6  # at most 4 MB in half precision


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.full((1, 8, 8), math.nan), "from nan to nan"),
        (torch.eye(8)[None] * math.inf, "nan"),
        (torch.full((1, 8, 8), 2.0), "divide bytes by 255"),
        (torch.full((1, 8, 8), -0.5), r"must lie in \[0, 1\]"),
        (torch.full((1, 8, 8), 3, dtype=torch.uint8), "masks == label"),
        (torch.ones(1, 8, 8, dtype=torch.long), "bool, uint8 or float"),
        (torch.zeros(1, 0, 8), "at least 1"),
        (torch.zeros(8, 8), r"masks\[None\]"),
        (torch.zeros(1, 1, 8, 8), r"masks\[:, 0\]"),
        ([[0, 1]], "list"),
    ],
)
def test_bad_masks(masks, message):
    with pytest.raises(TokenloomError, match=message):
        build().encode(masks)


def test_bad_codes():
    tokenizer = build()
    codes = tokenizer.encode(shapes(1))
    with pytest.raises(TokenloomError, match="6 levels"):
        tokenizer.decode(codes, 7)
    with pytest.raises(TokenloomError, match="6 levels"):
        tokenizer.decode(torch.cat([codes, codes], dim=1))
    for count in (0, -1):
        with pytest.raises(TokenloomError, match=r"1\.\.6"):
            tokenizer.decode(codes, count)
    with pytest.raises(TokenloomError, match=r"1\.\.3"):
        tokenizer.decode(codes[:, :3], 4)
    for wrong in (codes + 60, -codes - 1):
        with pytest.raises(TokenloomError, match=r"0\.\.65"):
            tokenizer.decode(wrong.clamp(-1, 66) if wrong.min() < 0 else wrong.clamp(min=66))
    for wrong in (codes.float(), codes[0], "codes"):
        with pytest.raises(TokenloomError, match="integer codes"):
            tokenizer.decode(wrong)
    with pytest.raises(TokenloomError, match="height, width"):
        tokenizer.decode(codes, size=(0, 5))
    with pytest.raises(TokenloomError, match="Did you mean 'logits'"):
        tokenizer.decode(codes, output="logit")


def test_bad_probabilities():
    tokenizer = build()
    good = torch.rand(1, 6, 66).softmax(-1)
    with pytest.raises(TokenloomError, match="66"):
        tokenizer.decode_probabilities(good[..., :64])
    with pytest.raises(TokenloomError, match="levels"):
        tokenizer.decode_probabilities(torch.cat([good, good], dim=1))
    with pytest.raises(TokenloomError, match="NaN"):
        tokenizer.decode_probabilities(good * math.nan)
    with pytest.raises(TokenloomError, match="float"):
        tokenizer.decode_probabilities(good.long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_config": {**PIXEL, "multipliers": [1, 2]}}, "change patch"),
        ({"pixel_config": {"chanels": 8}}, "pixel_config"),
        ({"image_size": 18}, "multiple of the patch"),
        ({"quantizer_options": {"size": 8}}, "quantizer_options"),
        ({"levels": 0}, "positive integer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TokenloomError, match=message):
        build(**options)


WORDS = MaskWords(start=5, end=6, first=10, levels=3, codes=4)


def test_words_in_and_out():
    ids = torch.tensor([[1, 5, 0, 0, 0, 6, 2], [5, 0, 0, 0, 6, 1, 2], [1, 2, 3, 4, 1, 2, 3]])
    labels = ids.clone()
    labels[0, 3] = IGNORED
    codes = torch.tensor([[3, 2, 1], [0, 1, 2], [1, 1, 1]])
    new_ids, new_labels = WORDS.insert(ids, labels, codes)
    assert new_ids.tolist() == [[1, 5, 13, 12, 11, 6, 2], [5, 10, 11, 12, 6, 1, 2], [1, 2, 3, 4, 1, 2, 3]]
    assert new_labels[0].tolist() == [1, 5, 13, IGNORED, 11, 6, 2]
    parsed, found = WORDS.parse(new_ids)
    assert found.tolist() == [True, True, False]
    assert torch.equal(parsed[:2], codes[:2])
    assert parsed[2].tolist() == [0, 0, 0]


def test_probabilities_of_words_are_those_before_each_code():
    ids = torch.tensor([[1, 5, 10, 11, 12, 6, 2]])
    logits = torch.zeros(1, 7, 20)
    for place, code in ((1, 3), (2, 0), (3, 1)):  # the row before the code's own place
        logits[0, place, 10 + code] = 40
        logits[0, place, 2] = 90  # another word does not count
    probabilities, found = WORDS.probabilities(logits, ids)
    assert found.tolist() == [True]
    assert probabilities.argmax(-1).tolist() == [[3, 0, 1]]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 3))


def test_bad_sequences():
    with pytest.raises(TokenloomError, match="other words"):
        WORDS.parse(torch.tensor([[5, 10, 9, 10, 6, 1]]))
    cut = torch.tensor([[1, 1, 5, 10, 11, 12]])  # no room for the end word
    assert WORDS.parse(cut)[1].tolist() == [False]
    with pytest.raises(TokenloomError, match=r"must be \(1, 3\)"):
        WORDS.insert(cut, cut, torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(TokenloomError, match="not be negative"):
        MaskWords(-1, 6, 10, 3, 4)
