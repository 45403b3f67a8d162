"""Training of mask tokenizers on scenes: batches, learning, saved models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from referring_pools import write_pool

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers import load_tokenizer
from tokenloom.training.mask_tokenizer_task import draw_mask, morph
from tokenloom.training.run import train_mask_tokenizer
from tokenloom.training.scenes import SceneSource
from tokenloom.training.segmentation_config import ScenesConfig


def test_draw_mask_takes_objects_and_groups() -> None:
    instances = np.zeros((8, 8), np.uint8)
    instances[:2], instances[4:6], instances[7:] = 1, 2, 3
    generator = torch.Generator().manual_seed(0)
    areas = {int(draw_mask(instances, generator).sum()) for _ in range(100)}
    assert areas == {8, 16, 24, 32, 40}


def test_morph_changes_some_masks_and_never_blanks_one() -> None:
    masks = torch.zeros(40, 16, 16)
    masks[:20, 4:12, 4:12], masks[20:, 8, 8] = 1, 1
    changed = morph(masks, 1.0, torch.Generator().manual_seed(0))
    sums = set(changed[:20].flatten(1).sum(1).tolist())
    assert sums <= {16.0, 36.0, 100.0, 144.0} and len(sums) > 1
    assert bool((changed.flatten(1).sum(1) > 0).all())
    assert torch.equal(morph(masks, 0.0, torch.Generator()), masks)


def test_a_mask_tokenizer_trains_and_loads(tmp_path: Path) -> None:
    shape = {"width": 24, "depth": 1, "heads": 2, "patch": 8}
    config = {
        "output": str(tmp_path / "run"),
        "whole": 1.0,
        "soft_until": 0.2,
        "scenes": {"pool": str(write_pool(tmp_path / "pool")), "length": 20},
        "model": {"image_size": 32, "levels": 4, "encoder_config": shape, "decoder_config": shape},
        "loop": {
            "steps": 40,
            "batch_size": 8,
            "warmup": 2,
            "learning_rate": 3e-3,
            "log_every": 1,
            "ema": 0.5,
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    folder = train_mask_tokenizer(tmp_path / "c.yaml")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["bce"] + row["l2"] for row in part]) for part in (rows[:4], rows[-8:]))
    assert last < 0.9 * first
    assert {"l2", "edge", "bce", "dice"} <= rows[0].keys()
    tokenizer = load_tokenizer(folder)
    codes = tokenizer.encode(torch.ones(1, 20, 32, dtype=torch.bool))
    assert codes.tolist() == [[tokenizer.full_code] * 4]
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    config["scenes"]["options"] = {"smalest": 0.1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(TokenloomError, match="smallest"):
        train_mask_tokenizer(tmp_path / "c.yaml")


@pytest.mark.slow
def test_workers_make_the_same_scenes(tmp_path: Path) -> None:
    pool = str(write_pool(tmp_path / "pool"))
    here = SceneSource(ScenesConfig(pool=pool), 32)
    there = SceneSource(ScenesConfig(pool=pool, workers=1), 32)
    for near, far in zip(here.samples([1, 2, 3], 2), there.samples([1, 2, 3], 2), strict=True):
        assert near[1] == far[1]
        assert np.array_equal(near[0], far[0]) and np.array_equal(near[2], far[2])
    assert all(map(np.array_equal, here.instances([4, 5]), there.instances([4, 5])))
