"""Boxes as codes, boxes of masks, and run-length masks of COCO."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom import TokenloomError
from tokenloom.tokenizers import boxes_to_codes, codes_to_boxes, mask_to_rle, masks_to_boxes, rle_to_mask
from tokenloom.tokenizers.boxes import box_error

RING = torch.zeros(50, 50, dtype=torch.bool)
RING[5:45, 5:45] = True
RING[15:35, 15:35] = False
# the COCO reference code wrote these strings
KNOWN = [
    (torch.tensor([[1, 1, 0], [0, 1, 0]]).bool(), [0, 1, 1, 2, 2], "01111"),
    (torch.zeros(4, 4).bool(), [16], "`0"),
    (torch.ones(4, 4).bool(), [0, 16], "0`0"),
    (
        RING,
        None,
        "o7X1:000000000000000000" + "RO:0F0:0F" + "0:0F" * 18 + "n0000000000000000000e7",
    ),
]


@pytest.mark.parametrize(("mask", "counts", "text"), KNOWN, ids=["small", "empty", "full", "ring"])
def test_known_run_lengths(mask, counts, text):
    assert mask_to_rle(mask) == {"size": list(mask.shape), "counts": text}
    if counts is not None:
        assert mask_to_rle(mask, compressed=False)["counts"] == counts
    for given_counts in (text, text.encode(), mask_to_rle(mask, compressed=False)["counts"]):
        assert torch.equal(rle_to_mask({"size": list(mask.shape), "counts": given_counts}), mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1))
def test_run_lengths_keep_every_mask(height, width, seed, share):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    for compressed in (True, False):
        rle = mask_to_rle(mask, compressed)
        assert torch.equal(rle_to_mask(json.loads(json.dumps(rle))), mask)


def test_long_runs():
    mask = torch.zeros(3000, 2000, dtype=torch.bool)
    mask[1, 3] = mask[2999, 1999] = True
    assert torch.equal(rle_to_mask(mask_to_rle(mask)), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": [0, 1, 1, 2]}, "add up to 4 pixels"),
        ({"size": [2, 3], "counts": "0111"}, "is cut off"),
        ({"size": [2, 3], "counts": "01`"}, "end within a number"),
        ({"size": [2, 3], "counts": "0 1"}, "damaged at character 1"),
        ({"size": [2, 3], "counts": "o" * 40}, "damaged at character 13"),
        ({"size": [2, 3], "counts": [7, -1]}, "none negative"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "whole numbers"),
        ({"size": [2, 3], "counts": None}, "whole numbers"),
        ({"size": [0, 3], "counts": []}, "at least 1"),
        ({"size": [2], "counts": [2]}, r"\[height, width\]"),
        ({"counts": [2]}, "run-length mask is"),
        ([[1, 2, 3, 4]], "run-length mask is"),
    ],
)
def test_bad_run_lengths(rle, message):
    with pytest.raises(TokenloomError, match=message):
        rle_to_mask(rle)


def test_bad_masks_for_run_lengths():
    for mask in (torch.zeros(1, 2, 2), torch.zeros(0, 2), [[0]]):
        with pytest.raises(TokenloomError, match=r"must be \(H, W\)"):
            mask_to_rle(mask)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(2, 2000),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_boxes_come_back_within_the_stated_error(height, width, bins, values):
    x0, x1 = sorted(value * width for value in values[:2])
    y0, y1 = sorted(value * height for value in values[2:])
    boxes = torch.tensor([[x0, y0, x1, y1]], dtype=torch.float64)
    codes = boxes_to_codes(boxes, (height, width), bins)
    assert 0 <= int(codes.min()) <= int(codes.max()) < bins
    again = codes_to_boxes(codes, (height, width), bins)
    error = (again.double() - boxes).abs()[0]
    vertical, horizontal = box_error((height, width), bins)
    assert error[[0, 2]].max() <= horizontal * (1 + 1e-6) + 1e-3
    assert error[[1, 3]].max() <= vertical * (1 + 1e-6) + 1e-3
    assert torch.equal(boxes_to_codes(again, (height, width), bins), codes)


def test_the_scale_of_published_models():
    boxes = torch.tensor([[0.0, 0.0, 640.0, 480.0], [320.0, 120.0, 330.0, 120.0]])
    codes = boxes_to_codes(boxes, (480, 640))
    assert codes.tolist() == [[0, 0, 999, 999], [500, 250, 515, 250]]
    assert codes.dtype == torch.long
    other = codes_to_boxes(codes[:1], (100, 50))
    assert other.tolist() == [[0.0, 0.0, 50.0, 100.0]]
    assert box_error((480, 640)) == pytest.approx((480 / 999 / 2, 640 / 999 / 2))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.tensor([[10.0, 0, 5, 5]]), "x0 <= x1"),
        (torch.tensor([[0.0, 0, 20, 5]]), "x1 <= 10"),
        (torch.tensor([[-3.0, 0, 5, 5]]), "x0, y0, x1, y1"),
        (torch.tensor([[math.nan, 0, 5, 5]]), "nan"),
        (torch.zeros(2, 3), r"\(\.\.\., 4\)"),
        ([0, 0, 1, 1], "list"),
    ],
)
def test_bad_boxes(boxes, message):
    with pytest.raises(TokenloomError, match=message):
        boxes_to_codes(boxes, (10, 10))


def test_bad_codes_of_boxes_and_scales():
    with pytest.raises(TokenloomError, match=r"0\.\.999"):
        codes_to_boxes(torch.tensor([0, 0, 1000, 5]), (10, 10))
    for codes in (torch.zeros(4), torch.zeros(3, dtype=torch.long), torch.zeros(4).bool(), [0] * 4):
        with pytest.raises(TokenloomError, match="integers"):
            codes_to_boxes(codes, (10, 10))
    for size, bins in (((0, 5), 10), ((5, 5), 1)):
        with pytest.raises(TokenloomError, match="at least"):
            boxes_to_codes(torch.zeros(4), size, bins)


def test_boxes_of_masks():
    masks = torch.zeros(4, 6, 9)
    masks[0, 2:5, 3:8] = 1
    masks[1, 5, 8] = 0.9
    masks[2, 0, 0] = 0.2  # below a half
    masks[3] = 1
    wanted = [[3, 2, 8, 5], [8, 5, 9, 6], [0, 0, 0, 0], [0, 0, 9, 6]]
    assert masks_to_boxes(masks).tolist() == wanted
    assert masks_to_boxes(masks > 0.5).tolist() == wanted
    for wrong in (masks[0], masks[:, :0], None):
        with pytest.raises(TokenloomError, match=r"\(B, H, W\)"):
            masks_to_boxes(wrong)
