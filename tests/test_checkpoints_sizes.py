"""Official checkpoints of other widths, depths, head sizes, grids and vocabularies than those of the fixtures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden import GREEDY, read, state_of
from torch import Tensor

from tokenloom.checkpoints import from_official, official_guidance, to_official
from tokenloom.generators import CaptionFeatures

LLAMA = {64: 60, 192: 180, 96: 37, 11: 4}  # old length -> new length of an axis
SMALL = {"dim": 60, "n_head": 3, "vocab_size": 37, "num_classes": 3, "n_layer": 3}
CASES: list[tuple[str, str, dict[int, int], dict[str, Any]]] = [
    ("llamagen", "llamagen_c2i", LLAMA, SMALL | {"block_size": 9}),
    ("llamagen", "llamagen_c2i", LLAMA, SMALL | {"block_size": 1, "n_head": 5}),
    ("llamagen", "llamagen_t2i", LLAMA | {6: 4, 24: 10}, SMALL | {"block_size": 25, "cls_token_num": 4}),
    ("nar", "nar_c2i", LLAMA, SMALL | {"block_size": 25}),
    ("nar", "nar_c2i", LLAMA, SMALL | {"block_size": 9, "n_layer": 2, "medusa_attention_num": 2}),
    ("nar", "nar_t2i", LLAMA | {6: 4, 24: 10}, SMALL | {"block_size": 9, "cls_token_num": 4}),
    ("nar_video", "nar_video", LLAMA | {80: 37, 8: 4, 25: 19}, SMALL | {"latent_shape": [3, 2, 3]}),
    ("dar", "dar_gpt", LLAMA, SMALL | {"block_size": 7, "n_head": 2}),
    ("par", "par_4x", LLAMA, SMALL | {"block_size": 36}),
    ("par", "par_4x", LLAMA | {3: 8}, SMALL | {"block_size": 36, "ar_token_num": 9, "spe_token_num": 8}),
    (
        "nbp",
        "nbp_hybrid",
        {64: 60, 256: 100, 69: 29, 40: 31},
        {
            "n_embd": 60,
            "n_head": 3,
            "n_layer": 3,
            "first_stage_vocab_size": 20,
            "class_cond_dim": 7,
            "token_number_per_step": 2,
            "num_tokens": 14,
        },
    ),
    (
        "nbp",
        "nbp_fp",
        {64: 60, 256: 100, 60: 20, 40: 31},
        {
            "n_embd": 60,
            "n_head": 5,
            "first_stage_vocab_size": 20,
            "token_number_per_step": 3,
            "num_tokens": 15,
        },
    ),
]


def resized(name: str, lengths: dict[int, int], layers: int) -> dict[str, Tensor]:
    """Random weights under the names of a fixture, with other lengths of axes and another number of layers."""
    old, generator = state_of(name), torch.Generator().manual_seed(0)
    state = {}
    for key, value in old.items():
        copies = (
            range(layers) if ".0." in key and re.match(r"(transformer\.blocks|layers)\.0\.", key) else [0]
        )
        if re.match(r"(transformer\.blocks|layers)\.[1-9]", key):
            continue
        for index in copies:
            shape = [lengths.get(length, length) for length in value.shape]
            weight = torch.randn(shape, generator=generator) * 0.3
            state[re.sub(r"(blocks|layers)\.0\.", rf"\g<1>.{index}.", key)] = weight
    return state


def some_condition(model: Any, batch: int) -> Any:
    """Labels, or captions with different numbers of words."""
    if model.condition.length == 0:
        return None
    if hasattr(model.condition, "features"):
        features = torch.randn(
            batch, *model.condition.absent.shape, generator=torch.Generator().manual_seed(1)
        )
        words = torch.arange(batch)[:, None] % features.shape[1] + 1
        return CaptionFeatures(features, torch.arange(features.shape[1]).flip(0) < words)
    return torch.arange(batch) % 3


@pytest.mark.parametrize(("family", "name", "lengths", "changes"), CASES)
def test_other_sizes(family: str, name: str, lengths: dict[int, int], changes: dict[str, Any]) -> None:
    """They load, return, and decode alike on both rungs; teacher-forced logits repeat the greedy choices."""
    config = read(name)[1]["config"] | changes
    extra = {"nar": config.get("medusa_attention_num", 1), "nar_video": 2}.get(family, 0)
    state = resized(name, lengths, config["n_layer"] + extra)
    model = from_official(family, state, config)
    back = to_official(model)
    assert back.keys() == state.keys() and all(torch.equal(value, back[key]) for key, value in state.items())
    batch, size = 3, model.order.layout.size
    condition, options = some_condition(model, batch), {}
    if condition is None:
        known = torch.randint(model.vocab_size, (batch, size), generator=torch.Generator().manual_seed(2))
        options = {"batch_size": batch, "known": known, "keep": ~model.plan.predicted}
    for settings in ({}, {} if condition is None else {"cfg_scale": 2.5}):
        guidance = official_guidance(family, **settings)
        codes = [
            model.generate(condition, guidance=guidance, sampling=GREEDY, decode=decode, **options)
            for decode in ("reference", "cached")
        ]
        assert torch.equal(*codes) and codes[0].shape == (batch, size)
        if not guidance.enabled:
            with torch.no_grad():
                best = model.logits(codes[0], condition).argmax(-1) - model.special
            assert torch.equal(best[:, model.plan.predicted], codes[0][:, model.plan.predicted])
    assert torch.isfinite(model.loss(codes[0], condition))
