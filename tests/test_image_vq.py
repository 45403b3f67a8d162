"""ImageVQTokenizer: shapes, ranges, batches, gradients, files, and bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom import ImageVQTokenizer, Layout, TokenloomError

FSQ = {"quantizer_type": "fsq", "quantizer_options": {"levels": [4, 4, 3]}}
VQ = {"quantizer_type": "vq", "quantizer_options": {"codebook_size": 32, "dim": 4}}
KINDS = [FSQ, VQ]


def build(merge: int = 2, **options: object) -> ImageVQTokenizer:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch": 2, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    tokenizer = ImageVQTokenizer(**shape, merge=merge, **options)  # type: ignore[arg-type]
    with torch.no_grad():  # random weights hardly tell pictures apart; this spreads their codes
        tokenizer.to_code.weight.mul_(4)
    return tokenizer.eval()


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS, ids=["fsq", "vq"])
@pytest.mark.parametrize("merge", [1, 2])
def test_shapes_and_ranges(kind, merge):
    tokenizer = build(merge, **kind)
    side = 8 // merge
    assert tokenizer.layout == Layout.grid(side, side)
    codes = tokenizer.encode(pictures(3))
    assert codes.shape == (3, side * side)
    assert codes.dtype == torch.long
    assert 0 <= int(codes.min()) <= int(codes.max()) < tokenizer.vocab_size
    assert len(codes.unique()) > 4
    output = tokenizer.decode(codes)
    assert output.shape == (3, 3, 16, 16)
    assert output.dtype == torch.float32
    assert output.abs().max() <= 1
    assert torch.equal(tokenizer.reconstruct(pictures(3)), output)


@pytest.mark.parametrize("kind", KINDS, ids=["fsq", "vq"])
def test_decode_agrees_with_the_training_pass(kind):
    tokenizer = build(**kind)
    with torch.no_grad():
        output, quantized = tokenizer(pictures(2))
    torch.testing.assert_close(output.clamp(-1, 1), tokenizer.decode(quantized.codes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["fsq", "vq"])
def test_a_picture_has_the_same_codes_and_pixels_in_any_batch(kind):
    tokenizer, batch = build(**kind), pictures(5)
    together = tokenizer.encode(batch)
    alone = torch.cat([tokenizer.encode(picture[None]) for picture in batch])
    assert torch.equal(alone, together)
    decoded = torch.cat([tokenizer.decode(row[None]) for row in together])
    torch.testing.assert_close(decoded, tokenizer.decode(together), atol=1e-5, rtol=1e-5)


def test_a_token_sees_its_own_place():
    tokenizer, batch = build(merge=2, **FSQ), pictures(1)
    grid = tokenizer.features(batch).view(4, 4, -1)
    changed = batch.clone()
    changed[:, :, 12:, 4:8] *= -1  # the patches of token row 3, column 1
    difference = (tokenizer.features(changed).view(4, 4, -1) - grid).abs().sum(-1)
    assert int(difference.argmax()) == 3 * 4 + 1


def test_a_token_paints_its_own_place():
    tokenizer, codes = build(merge=2, **FSQ), torch.zeros(1, 16, dtype=torch.long)
    changed = codes.clone()
    changed[0, 3 * 4 + 1] = tokenizer.vocab_size - 1
    vectors = tokenizer.quantizer.decode(torch.cat((codes, changed)))
    before, after = tokenizer.paint_vectors(vectors).detach()
    blocks = (after - before).abs().sum(0).unfold(0, 4, 4).unfold(1, 4, 4).sum((-1, -2))
    assert int(blocks.argmax()) == 3 * 4 + 1


@pytest.mark.parametrize("kind", KINDS, ids=["fsq", "vq"])
def test_gradient_reaches_every_weight(kind):
    tokenizer = build(**kind).train()
    output, quantized = tokenizer(pictures(2))
    sum(quantized.losses.values(), output.square().mean()).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("kind", KINDS, ids=["fsq", "vq"])
def test_saved_tokenizer_is_the_same(kind, tmp_path):
    tokenizer = build(merge=1, **kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageVQTokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(pictures(2))
    assert torch.equal(loaded.encode(pictures(2)), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert loaded.layout == tokenizer.layout
    assert dict(loaded.config)["quantizer_options"] == kind["quantizer_options"]


def test_half_precision_weights_take_float_pixels():
    tokenizer = build(**FSQ).to(torch.bfloat16)
    output = tokenizer.reconstruct(pictures(2))
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_bits_per_image():
    assert build(2, **VQ).bits_per_image == 16 * 5
    assert build(1, **FSQ).bits_per_image == pytest.approx(64 * 5.5849625)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(16, dtype=torch.long),
        torch.zeros(1, 15, dtype=torch.long),
        torch.zeros(1, 4, 4, dtype=torch.long),
        torch.zeros(1, 16),
        torch.zeros(1, 16, dtype=torch.bool),
        [[0] * 16],
    ],
)
def test_codes_of_a_wrong_kind_are_refused(codes):
    with pytest.raises(TokenloomError, match=r"integer codes of shape \(B, 16\), got"):
        build(**FSQ).decode(codes)


@pytest.mark.parametrize("value", [-1, 48, 10_000])
def test_codes_outside_the_vocabulary_are_refused(value):
    codes = torch.zeros(2, 16, dtype=torch.long)
    codes[1, 3] = value
    with pytest.raises(TokenloomError, match=r"must lie in 0\.\.47"):
        build(**FSQ).decode(codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("kind", KINDS, ids=["fsq", "vq"])
def test_small_integer_codes_are_welcome(kind, dtype):
    tokenizer = build(**kind)
    codes = tokenizer.encode(pictures(1))
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


def test_an_empty_batch_gives_an_empty_batch():
    tokenizer = build(**FSQ)
    assert tokenizer.decode(torch.zeros(0, 16, dtype=torch.long)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(3, 16, 16),
        torch.zeros(1, 1, 16, 16),
        torch.zeros(1, 3, 16, 32),
        torch.zeros(1, 3, 16, 16, dtype=torch.long),
        "a.png",
    ],
)
def test_pixels_of_a_wrong_kind_are_refused(pixels):
    with pytest.raises(TokenloomError, match=r"expects float pixels of shape \(B, 3, "):
        build(**FSQ).encode(pixels)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(TokenloomError, match=r"multiple of patch \* merge = 8"):
        ImageVQTokenizer(image_size=20, patch=4, merge=2)
    with pytest.raises(TokenloomError, match="image_size 0"):
        ImageVQTokenizer(image_size=0)
    with pytest.raises(TokenloomError, match="Missing option of the vq quantizer"):
        ImageVQTokenizer(quantizer_type="vq")
