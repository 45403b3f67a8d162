"""Every family of generators of codes: 16 real sequences learned by heart, likelihoods that add up, rungs that agree.

The sequences are crops of the bundled photograph through the bundled tokenizer, its codes renumbered from 0. A class label
names the sequence. Clips, frames and scales are cut from the same codes, so that their statistics are those of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from real_codes import real_codes, tokenizer
from torch import Tensor

from tokenloom.generators import (
    BlockDiffusionGenerator,
    Generator,
    Guidance,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextScaleGenerator,
    NextTokenGenerator,
    Sampling,
    orders,
)
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout
from tokenloom.pyramid import ResidualPyramid

COUNT = 16
GREEDY = Sampling(temperature=0)
MAPS = [(1, 1), (2, 2), (4, 4)]
LINE16, CROP, CLIP, FRAMES = Layout.line(16), Layout.grid(4, 4), Layout.clip(2, 3, 4), Layout.frames(8, 4)


def renumber(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0, 1, ... in place of those that occur, and which those were."""
    used, ids = codes.unique(return_inverse=True)
    return ids, used


@lru_cache
def sequences(layout: Layout) -> Tensor:
    """LongTensor (16, N) of real codes in a layout: the middle of each picture, its rows as frames or channels."""
    grid = real_codes(COUNT).view(COUNT, 8, 8)
    if layout == CLIP:
        return renumber(torch.stack((grid[:, :3, 2:6], grid[:, 3:6, 2:6]), dim=1).flatten(1))[0]
    if layout == FRAMES:
        return renumber(grid[:, :, 2:6].flatten(1))[0]
    if layout in (CROP, LINE16):
        return renumber(grid[:, 2:6, 2:6].flatten(1))[0]
    return pyramid()[1]


@lru_cache
@torch.no_grad()
def pyramid() -> tuple[ResidualPyramid, Tensor]:
    """A pyramid over the tokenizer's vectors of 4x4 places, 64 of which are its codebook, and the codes (16, 21)."""
    vectors = tokenizer().quantizer.decode(real_codes(COUNT)).view(COUNT, 8, 8, -1)[:, 2:6, 2:6]
    torch.manual_seed(0)
    made = ResidualPyramid(MAPS, 64, vectors.shape[-1], phis=1, ratio=0.0)
    flat = vectors.flatten(0, 2)
    made.codes.weight.copy_(flat[torch.randperm(len(flat))[:64]] * torch.linspace(0.1, 1, 64)[:, None])
    return made, made.encode(vectors.permute(0, 3, 1, 2))


@dataclass(frozen=True)
class Family:
    """What is trained: a generator, its order and its options."""

    cls: type[Generator]
    order: Order
    options: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    steps: int = 120


FAMILIES = {
    "token": Family(NextTokenGenerator, orders.raster(CROP)),
    "token-delay": Family(NextBlockGenerator, orders.delay(FRAMES)),
    "neighbor-2d": Family(
        NextNeighborGenerator, orders.neighbors(CROP), {"share_head": False}, {"taps": [1, 2]}
    ),
    "neighbor-3d": Family(
        NextNeighborGenerator, orders.neighbors(CLIP), {"share_head": False}, {"taps": [1, 1, 2], "width": 72}
    ),
    "block-queries": Family(NextBlockGenerator, orders.blocks(CROP, (1, 4))),
    "block-random": Family(NextBlockGenerator, orders.random(CROP, 5, 0)),
    "block-groups": Family(NextBlockGenerator, orders.regions(CROP, 4), {"rule_config": {"plan": "groups"}}),
    "block-shift": Family(NextBlockGenerator, orders.blocks(CROP, 4), {"rule_config": {"plan": "shift"}}),
    "scale": Family(
        NextScaleGenerator,
        orders.scales(Layout.scales(MAPS)),
        {"rule_config": {"channels": 4, "phis": 1, "ratio": 0.0}},
        {"modulation": "own", "rope": False},
    ),
    "block-diffusion": Family(
        BlockDiffusionGenerator, orders.blocks(LINE16, 4), {"rule_config": {"passes": 2}}, steps=200
    ),
}


def build(family: Family, codes: Tensor) -> Generator:
    torch.manual_seed(0)
    transformer = {"width": 64, "heads": 4, "depth": 2, "mlp_width": 128, **family.transformer}
    condition = {"kind": "class", "num_classes": COUNT}
    vocabulary = int(codes.max()) + 1
    if family.cls is NextScaleGenerator:
        vocabulary = pyramid()[0].codes.num_embeddings
    model = family.cls(family.order.to_config(), vocabulary, transformer, condition, **family.options)
    if isinstance(model, NextScaleGenerator):
        model.take_pyramid(pyramid()[0], pyramid()[0].codes.weight)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_sixteen_real_sequences_are_learned_by_heart(name: str) -> None:
    """Below 0.05 nats a token, then greedy decoding gives every code back, on both rungs."""
    family = FAMILIES[name]
    codes, labels = sequences(family.order.layout), torch.arange(COUNT)
    assert len(codes.unique(dim=0)) == COUNT and len(codes.unique()) > 20
    model = build(family, codes).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, family.steps, pct_start=0.1)
    for _ in range(family.steps):
        optimizer.zero_grad()
        model(codes, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        assert model.loss(codes, labels).item() < 0.05
    options: dict[str, Any] = {"sampling": GREEDY}
    if not bool(model.plan.predicted.all()):
        options |= {"known": codes, "keep": ~model.plan.predicted}
    assert torch.equal(model.generate(labels, **options), codes)
    assert torch.equal(
        model.generate(
            labels[3:5],
            decode="reference",
            **{key: value[3:5] if key == "known" else value for key, value in options.items()},
        ),
        codes[3:5],
    )
    if isinstance(model, BlockDiffusionGenerator):
        for passes in (1, 4):
            assert torch.equal(model.generate(labels, passes=passes, sampling=GREEDY), codes)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forced_loss_is_the_sum_of_the_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative log-likelihoods collected step by step add up to the loss, for sampled sequences."""
    family = FAMILIES[name]
    codes, labels = sequences(family.order.layout), torch.arange(COUNT)
    model = build(family, codes).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            parameter.normal_(std=0.2)
    total = torch.zeros(())
    drawn = model._sample

    def record(logits: Tensor, *rest: Any) -> Tensor:
        nonlocal total
        ids = drawn(logits, *rest)
        total = total - logits.log_softmax(-1).gather(-1, ids[..., None]).double().sum()
        return ids

    monkeypatch.setattr(model, "_sample", record)
    options: dict[str, Any] = {"seeds": 5}
    if not bool(model.plan.predicted.all()):
        options |= {"known": codes, "keep": ~model.plan.predicted}
    if isinstance(model, BlockDiffusionGenerator):
        model.rule = type(model.rule)(passes=1)
        model.plan = model.make_plan(model.order, 1, False)
    made = model.generate(labels, **options)
    count = COUNT * int(model.plan.predicted.sum())
    torch.testing.assert_close(model.loss(made, labels).double(), total / count, rtol=1e-5, atol=1e-5)
    assert total / count > 1


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_rungs_agree(name: str) -> None:
    """Token for token with sampling, guidance and kept positions; a sample depends on its own seed alone."""
    family = FAMILIES[name]
    codes, labels = sequences(family.order.layout), torch.arange(COUNT)
    model = build(family, codes).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            parameter.normal_(std=0.3)
    keep = torch.arange(codes.shape[1]) % 3 == 0
    given = ~model.plan.predicted
    for batch, guidance, sampling, kept in (
        (1, 1.0, Sampling(), True),
        (5, Guidance(3.0, "linear"), Sampling(temperature=0.8, top_k=9), True),
        (5, 2.5, Sampling(top_p=0.9), False),
    ):
        options: dict[str, Any] = {"guidance": guidance, "sampling": sampling}
        seeds = [900 + 7 * index for index in range(batch)]
        if kept or bool(given.any()):
            options |= {"keep": given | keep if kept else given}
        known = {"known": codes[:batch]} if "keep" in options else {}
        cached = model.generate(labels[:batch], seeds=seeds, decode="cached", **options, **known)
        reference = model.generate(labels[:batch], seeds=seeds, decode="reference", **options, **known)
        assert torch.equal(cached, reference)
        if known:
            assert torch.equal(cached[:, options["keep"]], codes[:batch][:, options["keep"]])
        last = {"known": codes[batch - 1 : batch]} if known else {}
        alone = model.generate(labels[batch - 1 : batch], seeds=seeds[-1:], **options, **last)
        assert torch.equal(alone, cached[-1:])
