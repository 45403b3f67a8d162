"""Frames of masks: boxes as codes, coarse to fine, and what lies inside cut out and put back."""

from __future__ import annotations

import pytest
import tiny_masks
import torch
from tiny_masks import make_mask_tokenizer
from torch import Tensor

from tokenloom import MaskTokenizer, TokenloomError
from tokenloom.testing import check_tokenizer
from tokenloom.tokenizers.mask_frames import MaskFrame


def boxes(count: int, size: int, seed: int = 0) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * size
    return corners.sort(1).values.flatten(1)


def build(frame_codes: int = 2) -> MaskTokenizer:
    return make_mask_tokenizer(image_size=32, frame_codes=frame_codes, frame_side=16)


def ellipses(count: int, height: int = 32, width: int = 32) -> Tensor:
    return tiny_masks.ellipses(count, height, width, 0.2)


@pytest.mark.parametrize(
    ("vocabulary", "coarse", "finer"), [(16, 2, 2), (64, 3, 2), (512, 6, 4), (4096, 10, 8)]
)
def test_scales(vocabulary: int, coarse: int, finer: int) -> None:
    frame = MaskFrame(3, 8, vocabulary)
    assert (frame.coarse, frame.finer, frame.steps) == (coarse, finer, coarse * finer**2)
    given = boxes(2000, 96)
    codes = frame.encode(given, 96)
    assert codes.shape == (2000, 3) and int(codes.min()) >= 0 and int(codes.max()) < vocabulary
    back, step = frame.decode(codes, 96), 96 / frame.steps
    assert torch.equal(frame.encode(back, 96), codes)
    wide = ((given[:, 2:] - given[:, :2]) > step).all(1)  # others grow to a step
    assert float((back - given)[wide].abs().max()) <= step / 2 + 1e-4
    assert bool((back[:, 2:] - back[:, :2] > step - 1e-3).all())


def test_prefixes_come_nearer() -> None:
    frame, given = MaskFrame(3, 8, 512), boxes(2000, 128)
    codes = frame.encode(given, 128)
    far = [float((frame.decode(codes[:, :count], 128) - given).abs().mean()) for count in (1, 2, 3)]
    assert far[0] < 8 and far[1] < 2 and far[2] < 0.5
    kept = torch.tensor([1, 2, 3]).repeat(700)[:2000]
    mixed = frame.decode(codes, 128, kept)
    for count in (1, 2, 3):
        rows = kept == count
        assert torch.equal(mixed[rows], frame.decode(codes[rows, :count], 128))


def test_codes_without_a_box_count_as_the_nearest() -> None:
    frame = MaskFrame(2, 8, 512)
    assert torch.equal(
        frame.decode(torch.tensor([[511, 300]]), 10), frame.decode(torch.tensor([[440, 255]]), 10)
    )


def test_what_is_cut_out_comes_back_in_its_place() -> None:
    frame = MaskFrame(3, 64, 512)
    masks = ellipses(8, 128, 128).float()
    place = frame.decode(frame.encode(frame.boxes(masks), 128), 128)
    inside = frame.cut(masks, place)
    assert inside.shape == (8, 64, 64) and float(inside.mean()) == pytest.approx(3.1416 / 4, abs=0.03)
    back = frame.paste(inside - 0.5, place, 128, -0.5) > 0
    overlap = (back & (masks > 0)).sum((1, 2)) / (back | (masks > 0)).sum((1, 2))
    assert float(overlap.min()) > 0.97


def test_a_framed_tokenizer_keeps_the_contract() -> None:
    assert "batch order" in check_tokenizer(build(), ellipses(6).float())


def test_shapes_do_not_know_where_they_are() -> None:
    """Only the codes of the frame change when a mask moves by whole steps."""
    tokenizer = build()
    assert tokenizer.frame is not None and tokenizer.frame.steps == 6
    mask = ellipses(1, 48, 48)
    masks = torch.zeros(2, 192, 192, dtype=torch.bool)  # a step is 32 pixels, 6 for one of the tokenizer
    masks[0, 10:58, 10:58], masks[1, 10:58, 74:122] = mask, mask
    codes = tokenizer.encode(masks)
    assert not torch.equal(codes[0, :2], codes[1, :2])
    assert tokenizer.shapes == 4 and torch.equal(codes[0, 2:], codes[1, 2:])


def test_prefixes_inside_the_frame_are_boxes() -> None:
    tokenizer, masks = build(), ellipses(4)
    codes = tokenizer.encode(masks)
    for count in range(1, 7):
        logits = tokenizer.decode(codes, count)
        torch.testing.assert_close(logits, tokenizer.decode(codes[:, :count]))
        torch.testing.assert_close(logits, tokenizer(masks, torch.full((4,), count))[0])
    boxes_ = tokenizer.frame.decode(codes[:, :2], 32)  # type: ignore[union-attr]
    for logits, (x0, y0, x1, y1) in zip(tokenizer.decode(codes), boxes_.tolist(), strict=True):
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = False
        assert float(logits[outside].max()) < 0
    cut = codes.clone()
    cut[0, 1] = tokenizer.empty_code  # type: ignore[call-overload]
    torch.testing.assert_close(tokenizer.decode(cut)[0], tokenizer.decode(codes, 1)[0])
    torch.testing.assert_close(tokenizer.decode(cut)[1:], tokenizer.decode(codes)[1:])


def test_blank_masks_and_thin_ones() -> None:
    tokenizer = build()
    masks = torch.stack([torch.zeros(200, 90), torch.ones(200, 90), torch.zeros(200, 90)]).bool()
    masks[2, 77] = True  # vanishes at 32 pixels but for its frame
    codes = tokenizer.encode(masks)
    assert codes[:2].tolist() == [[64] * 6, [65] * 6] and int(codes[2].max()) < 64
    for count in (1, 2, 6):
        back = tokenizer.decode(codes[:2], count, (200, 90), output="mask")
        assert back.flatten(1).float().mean(1).tolist() == [0, 1]
    box = tokenizer.frame.decode(codes[2:, :2], 200)[0].tolist()  # type: ignore[union-attr]
    assert box[1] <= 78 and box[3] >= 76


def test_soft_codes_paint_what_codes_paint() -> None:
    tokenizer, masks = build(), ellipses(3)
    codes = tokenizer.encode(masks)
    sure = torch.nn.functional.one_hot(codes, tokenizer.vocab_size).float()
    soft = tokenizer.decode_probabilities(sure.requires_grad_())
    torch.testing.assert_close(soft, tokenizer.decode(codes, output="probabilities"), atol=1e-5, rtol=1e-4)
    soft.sum().backward()
    assert float(sure.grad[:, 2:].abs().sum()) > 0  # type: ignore[index]


def test_bad_frames() -> None:
    with pytest.raises(TokenloomError, match=r"frame_codes must lie in 0\.\.5"):
        build(frame_codes=6)
    with pytest.raises(TokenloomError, match="16 codes"):
        MaskFrame(2, 8, 15)
