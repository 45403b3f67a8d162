"""Evaluation of segmentation: metrics, classical codes of masks, reports that go on past bad records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenloom import MaskTokenizer
from tokenloom.data.annotations import fill_polygon
from tokenloom.data.referring import Example
from tokenloom.data.referring_phrases import Phrase
from tokenloom.errors import TokenloomError
from tokenloom.evaluation import mask_codes as codes
from tokenloom.evaluation import segmentation as seg
from tokenloom.evaluation.film_unet import FilmUNet
from tokenloom.evaluation.segmentation_metrics import Outcome, boundary_f, figures, iou


def square(side: int, top: int, left: int, length: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[top : top + length, left : left + length] = True
    return mask


def example(name: str = "a") -> Example:
    big, small = square(20, 2, 2, 10), square(20, 14, 14, 4)
    phrases = (
        Phrase("the dog", "name", (0,)),
        Phrase("the cat", "name", (1,)),
        Phrase("the cow", "absent", ()),
    )
    masks = np.stack([big, small, np.zeros_like(big)])
    instances = (big + 2 * small).astype(np.uint8)
    return Example(name, Image.new("RGB", (20, 20)), phrases, masks, "val", instances)


def test_overlap_and_boundaries() -> None:
    one, other, empty = square(40, 5, 5, 20), square(40, 5, 15, 20), np.zeros((40, 40), bool)
    assert iou(one, other) == pytest.approx(200 / 600) and iou(one, one) == iou(empty, empty) == 1
    assert boundary_f(one, one) == boundary_f(empty, empty) == 1
    assert boundary_f(one, empty) == 0
    assert boundary_f(one, square(40, 6, 6, 20)) == 1  # within a pixel
    assert 0 < boundary_f(one, other) < 0.8


def test_figures() -> None:
    empty, one = np.zeros((10, 10), bool), square(10, 0, 0, 4)
    outcomes = [
        Outcome.of(one, one, "name", "val"),
        Outcome.of(empty, one, "name", "val"),
        Outcome.of(empty, empty, "absent", "val"),
        Outcome.of(one, empty, "absent", "val"),
    ]
    values = figures(outcomes)
    assert values["gIoU"] == values["cIoU"] == values["precision 0.9"] == values["absent accuracy"] == 0.5
    assert values["phrases"] == values["absent phrases"] == 2
    assert math.isnan(figures([])["gIoU"])


def test_outlines_trace_parts_and_holes() -> None:
    mask = square(24, 2, 2, 12) ^ square(24, 5, 5, 4) ^ square(24, 18, 18, 4)
    loops = codes.outlines(mask)
    assert [len(loop) for loop in loops] == [4, 4, 4]
    drawn = np.zeros_like(mask)
    for loop in loops:
        drawn ^= fill_polygon(loop, (24, 24))
    assert np.array_equal(drawn, mask)
    touching = square(12, 2, 2, 3) | square(12, 5, 5, 3)  # two squares that meet at a corner
    drawn = np.zeros_like(touching)
    for loop in codes.outlines(touching):
        drawn ^= fill_polygon(loop, (12, 12))
    assert np.array_equal(drawn, touching)


def test_polygons_get_better_with_corners() -> None:
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 30.5) ** 2 + (columns - 33.5) ** 2 < 20**2
    points = codes.polygon_points(disc)
    assert points[0][1] < 0.6 and points[-1][1] > 0.97
    assert [bits for bits, _ in points] == sorted(bits for bits, _ in points)
    assert points[0][0] == 6 + 3 * 14


def test_classical_codes_are_exact_at_full_size() -> None:
    mask = square(32, 3, 5, 17)
    for name in ("RLE", "PNG", "WebP lossless"):
        points = codes.CLASSICAL[name](mask)
        assert points[-1][1] == 1.0 and points[-1][0] > 0
    assert codes.overlap_at([(10, 0.5), (20, 0.9)], 15) == 0.5
    assert codes.overlap_at([(10, 0.5)], 5) == 0
    assert codes.bits_for([(10, 0.5), (20, 0.9)], 0.8) == 20
    assert codes.bits_for([(10, 0.5)], 0.8) == math.inf


def test_compare_codes_has_a_row_a_length() -> None:
    torch.manual_seed(0)
    shape = {"width": 16, "depth": 1, "heads": 2, "patch": 8}
    tokenizer = MaskTokenizer(32, 4, shape, shape, {"codebook_size": 14, "dim": 4}).eval()
    rows = codes.compare_codes(tokenizer, np.stack([square(32, 3, 5, 17), square(32, 9, 9, 8)]))
    assert [row["tokens"] for row in rows] == [1, 2, 4]
    assert [row["bits"] for row in rows] == [4, 8, 16]
    assert all(0 <= row["IoU"] <= 1 and row["PNG"] == 0 for row in rows)


def test_models_beside_one_another(tmp_path: Path) -> None:
    def truth(one: Example, phrases: list[str]) -> np.ndarray:
        texts = [phrase.text for phrase in one.phrases]
        return np.stack([one.masks[texts.index(text)] for text in phrases])

    def shy(one: Example, phrases: list[str]) -> np.ndarray:
        if "the cat" in phrases:
            raise TokenloomError("no cats")
        return truth(one, phrases)

    models = {"truth": truth, "shy": shy, "largest": seg.largest_object}
    lines: list[str] = []
    records = [example("a"), TokenloomError("record 7 is bad"), example("b")]
    results, bad = seg.evaluate_models(models, records, log=lines.append)
    assert bad == ["record 7 is bad"] and lines == ["left out: record 7 is bad"]
    by_name = {result.name: figures(result.outcomes) for result in results}
    assert by_name["truth"]["gIoU"] == by_name["truth"]["absent accuracy"] == 1
    assert by_name["shy"]["gIoU"] == 0.5 and len(results[1].errors) == 2
    assert by_name["largest"]["gIoU"] == 0.5 and by_name["largest"]["absent accuracy"] == 0
    path = seg.write_report(tmp_path, results, bad, [{"tokens": 1.0, "bits": 10.0, "polygon bits": math.inf}])
    text = path.read_text(encoding="utf-8")
    assert "record 7 is bad" in text and "no cats" in text and "## Split val" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["figures"]["val/name/truth"]["gIoU"] == 1
    assert seg.evaluate_models(models, records, limit=1)[0][0].outcomes != results[0].outcomes
    with pytest.raises(TokenloomError, match="all bad"):
        seg.evaluate_models(models, [TokenloomError("x")])


def test_object_masks_leave_blank_ones_out() -> None:
    found = seg.object_masks([example(), TokenloomError("x"), example()], 5)
    assert found.shape == (2, 20, 20)
    with pytest.raises(TokenloomError, match="No example"):
        seg.object_masks([TokenloomError("x")], 5)


def test_the_unet_reads_phrases() -> None:
    torch.manual_seed(0)
    network = FilmUNet(32, [8, 16], phrase=16, vocabulary=10, words=3)
    pixels = torch.rand(2, 3, 32, 32)
    words = torch.tensor([[2, 3, 0], [4, 0, 0]])
    logits = network(pixels, words)
    assert logits.shape == (2, 32, 32)
    assert not torch.allclose(logits[0], network(pixels, words.flip(0))[0])
    assert torch.allclose(
        network(pixels, torch.zeros(2, 3, dtype=torch.long))[0],
        network(pixels[:1], words[:1] * 0)[0],
        atol=1e-5,
    )
    with pytest.raises(TokenloomError, match="multiples of 8"):
        FilmUNet(32, [12, 16])
