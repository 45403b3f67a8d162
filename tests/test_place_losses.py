"""What places of a picture tell by themselves: words, outlines and boxes, and a training that begins with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from referring_pools import write_pool
from safetensors.torch import load_file

from tokenloom import MaskTokenizer
from tokenloom.errors import TokenloomError
from tokenloom.tokenizers import AnswerCodes
from tokenloom.training.place_losses import PlaceHeads, box_loss, name_loss, outline_loss, shown_objects
from tokenloom.training.run import train_segmentation
from tokenloom.training.segmentation_task import side_loss


def test_places_name_what_they_show() -> None:
    instances = torch.zeros(1, 4, 4, dtype=torch.uint8)
    instances[0, :2, :2], instances[0, 2:, 3] = 1, 2
    things = torch.tensor([[[2, 3], [4, 0]]])
    chances = torch.full((1, 4, 5), 1e-9)
    chances[0, 0, [2, 3]] = 0.5  # object 1 everywhere: both of its words
    chances[0, [1, 2], 0] = 1.0  # background
    chances[0, 3, [0, 4]] = 0.5  # half of it object 2
    best = name_loss(chances.log(), shown_objects(instances, 2), things)
    assert float(best) == pytest.approx(2 * np.log(2) / 4, rel=1e-4)
    assert float(name_loss(chances[:, [3, 1, 2, 0]].log(), shown_objects(instances, 2), things)) > 2


def test_outlines_are_told_square_by_square() -> None:
    torch.manual_seed(0)
    instances = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    sure = (instances > 0).float() * 40 - 20
    outline = (
        sure.view(2, 2, 4, 2, 4).transpose(2, 3).reshape(2, 4, 4, 4)
    )  # places in rows, squares of one pixel
    assert float(outline_loss(outline, shown_objects(instances, 2))) < 1e-6
    assert float(outline_loss(outline.transpose(2, 3), shown_objects(instances, 2))) > 1


def test_boxes_are_those_of_the_object_that_a_place_shows() -> None:
    instances = torch.zeros(1, 8, 8, dtype=torch.uint8)
    instances[0, 1:4, 1:7], instances[0, 5:8, 4:8] = 1, 2
    boxes = torch.full((1, 4, 4), 9.0)
    boxes[0, 0] = boxes[0, 1] = torch.tensor([1, 1, 7, 4]) / 8
    boxes[0, 3] = torch.tensor([4, 5, 8, 8]) / 8
    assert float(box_loss(boxes, shown_objects(instances, 3))) == 0  # place 2 shows nothing, whatever its box
    boxes[0, 3, 0] += 0.4
    assert float(box_loss(boxes, shown_objects(instances, 3))) == pytest.approx(0.1 / 3)
    assert float(box_loss(boxes, shown_objects(torch.zeros_like(instances), 1))) == 0


def test_sides_are_numbers() -> None:
    """Without blur a side is one step; with it the next step is nearly right, and the codes of masks do not count."""
    answers = AnswerCodes(levels=3, masks=5, bins=9)
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 4, answers.vocabulary), torch.randint(5, 14, (2, 4))
    scale = logits[..., 5:14]
    plain = torch.nn.functional.cross_entropy(scale.flatten(0, 1), codes.flatten() - 5, reduction="none")
    assert torch.allclose(side_loss(logits, codes, answers, 0.0).flatten(), plain, atol=1e-5)
    sure = torch.full((1, 1, answers.vocabulary), -20.0)
    sure[..., 9] = 0.0
    near, far = (float(side_loss(sure, torch.tensor([[code]]), answers, 1.5)) for code in (10, 13))
    assert float(side_loss(sure, torch.tensor([[9]]), answers, 1.5)) < near < far


def test_heads_fit_their_places() -> None:
    outline, boxes = PlaceHeads(6, 16)(torch.randn(2, 9, 6))
    assert outline.shape == (2, 9, 8, 8) and boxes.shape == (2, 9, 4)
    assert PlaceHeads(6, 4)(torch.randn(2, 9, 6))[0].shape == (2, 9, 4, 4)


def test_a_training_begins_with_places(tmp_path: Path) -> None:
    """Answers rest until their turn: no loss, and no step of the generator."""
    shape = {"width": 24, "depth": 1, "heads": 2, "patch": 8}
    MaskTokenizer(32, 4, shape, shape).save_pretrained(tmp_path / "tokenizer")
    config = {
        "output": str(tmp_path / "run"),
        "scenes": {"pool": str(write_pool(tmp_path / "pool")), "length": 20},
        "tokenizer": str(tmp_path / "tokenizer"),
        "encoder": {"stride": 8, "width": 24, "depth": 1, "heads": 2},
        "transformer": {"width": 24, "heads": 2, "depth": 1},
        "phrases": 2,
        "place_loss": 0.5,
        "places_until": 0.5,
        "loop": {"steps": 4, "batch_size": 2, "warmup": 1, "log_every": 1, "checkpoint_every": 1, "keep": 9},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    train_segmentation(tmp_path / "c.yaml")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["box" in row for row in rows] == [False, False, True, True]
    assert all({"names", "outlines", "sides"} <= row.keys() for row in rows)
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    first, second, third = (load_file(folder / "model.safetensors") for folder in folders[:3])
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any(name.startswith("encoder.") for name in moved)
    assert not any(
        ".transformer." in name or ".blocks." in name for name in moved if name.startswith("generator.")
    )
    assert any(not torch.equal(second[name], third[name]) for name in first if name.startswith("generator."))
    config["place_loss"] = 0
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(TokenloomError, match="places_until"):
        train_segmentation(tmp_path / "c.yaml")
