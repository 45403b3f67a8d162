"""Clips from generators: continuation, in-betweening, and sliding over frames without end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_generators import VOCAB, make
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    Generator,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextTokenGenerator,
    Order,
    orders,
    slide,
)
from tokenloom.layouts import Layout

CLIP = Layout.clip(3, 2, 2)
FRAME = 4
CASES = [
    pytest.param(NextTokenGenerator, orders.raster(CLIP), 12, id="token"),
    pytest.param(NextBlockGenerator, orders.blocks(CLIP, (1, 1, 2)), 6, id="row"),
    pytest.param(NextBlockGenerator, orders.blocks(CLIP, (1, 2, 2)), 3, id="frame"),
    pytest.param(NextNeighborGenerator, orders.neighbors(CLIP), 5, id="planes"),
]


def frames(*values: int) -> Tensor:
    """Codes (1, 4 n), each frame of one value."""
    return torch.tensor(values).repeat_interleave(FRAME)[None]


@pytest.mark.parametrize(("cls", "order", "steps"), CASES)
@pytest.mark.parametrize("kept", [(0,), (0, 1), (0, 2), (2,)], ids=["one", "two", "between", "before"])
def test_frames_are_kept_and_the_others_generated(
    cls: type[Generator], order: Order, steps: int, kept: tuple[int, ...]
) -> None:
    model = make(cls, order, "class", std=0.6)
    label = torch.tensor([1, 2])
    known = torch.arange(24).view(2, 12) % VOCAB
    keep = torch.isin(CLIP.coords[:, 0], torch.tensor(kept))
    seen: list[int] = []
    codes = model.generate(
        label, seeds=3, known=known, keep=keep, on_step=lambda step: seen.append(step.index)
    )
    assert seen == list(range(steps))
    assert torch.equal(codes[:, keep], known[:, keep])
    other = model.generate(label, seeds=3, known=(known + 5) % VOCAB, keep=keep)
    if 0 in kept:  # what is generated later depends on what is kept
        assert not torch.equal(other[:, ~keep], codes[:, ~keep])
    assert torch.equal(codes, model.generate(label, seeds=3, known=known, keep=keep, decode="reference"))


@pytest.mark.parametrize(("cls", "order", "steps"), CASES)
def test_a_short_clip_is_one_window(cls: type[Generator], order: Order, steps: int) -> None:
    model = make(cls, order, "class", std=0.6)
    label = torch.tensor([1, 2])
    whole = model.generate(label, seeds=7, guidance=1.5)
    made = list(slide(model, label, frames=3, seeds=7, guidance=1.5))
    assert len(made) == 3
    assert torch.equal(torch.cat(made, dim=1), whole)
    assert steps == order.num_steps


@pytest.mark.parametrize(("cls", "order", "steps"), CASES)
@pytest.mark.parametrize("overlap", [1, 2])
def test_windows_continue_what_is_there(cls: type[Generator], order: Order, steps: int, overlap: int) -> None:
    model = make(cls, order, "class", std=0.6)
    label = torch.tensor([0])
    long = torch.cat(list(slide(model, label, frames=7, overlap=overlap, seeds=5)), dim=1)
    assert long.shape == (1, 7 * FRAME)
    shorter = torch.cat(list(slide(model, label, frames=5, overlap=overlap, seeds=5)), dim=1)
    assert torch.equal(long[:, : 5 * FRAME], shorter)
    # the second window by hand, with its own noise
    known = torch.zeros(1, 12, dtype=torch.long)
    known[:, : overlap * FRAME] = long[:, (3 - overlap) * FRAME : 3 * FRAME]
    keep = torch.arange(12) < overlap * FRAME
    second = torch.tensor([5 + 0x9E3779B97F4A7C15 - (1 << 64)])
    again = model.generate(label, seeds=second, known=known, keep=keep)
    assert torch.equal(again[:, overlap * FRAME :], long[:, 3 * FRAME : (6 - overlap) * FRAME])
    assert steps == order.num_steps


def test_windows_have_noise_of_their_own() -> None:
    flat = make(NextBlockGenerator, orders.blocks(CLIP, (1, 2, 2)), "none", std=0.0)
    made = torch.cat(list(slide(flat, frames=11, overlap=1, seeds=1, batch_size=2)), dim=1)
    windows = [made[:, first * FRAME : (first + 2) * FRAME] for first in (1, 3, 5, 7, 9)]
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(windows, 2))
    assert not torch.equal(made[0], made[1])


def test_a_clip_without_end_keeps_one_window() -> None:
    model = make(NextBlockGenerator, orders.blocks(CLIP, (1, 2, 2)), "none", std=0.6)
    asked: list[int] = []
    stream = slide(model, seeds=1, on_step=lambda step: asked.append(step.codes.shape[1]))
    assert not asked  # nothing is made before it is asked for
    made = [next(stream) for _ in range(40)]
    assert all(frame.shape == (1, FRAME) for frame in made)
    assert set(asked) == {12}
    assert len(asked) == 3 * (1 + 37 // 2 + 37 % 2)


def test_a_clip_is_continued_from_a_start() -> None:
    model = make(NextNeighborGenerator, orders.neighbors(CLIP), "none", std=0.6)
    start = frames(3, 4)
    made = torch.cat(list(slide(model, frames=6, start=start, seeds=2)), dim=1)
    assert torch.equal(made[:, : 2 * FRAME], start)
    longer = frames(9, 1, 5, 3, 4)
    made = torch.cat(list(slide(model, frames=8, overlap=2, start=longer, seeds=2)), dim=1)
    assert torch.equal(made[:, : 5 * FRAME], longer)
    only_end = torch.cat(list(slide(model, frames=5, overlap=2, start=frames(3, 4), seeds=2)), dim=1)
    assert torch.equal(made[:, 3 * FRAME :], only_end)
    assert torch.equal(torch.cat(list(slide(model, frames=2, start=longer)), dim=1), longer[:, : 2 * FRAME])


def test_frames_can_be_renewed_between_windows() -> None:
    model = make(NextTokenGenerator, orders.raster(CLIP), "none", std=0.6)
    given: list[Tensor] = []

    def renew(codes: Tensor) -> Tensor:
        given.append(codes)
        return torch.zeros_like(codes)

    made = torch.cat(list(slide(model, frames=5, overlap=1, seeds=2, renew=renew)), dim=1)
    assert torch.equal(given[0], made[:, 2 * FRAME : 3 * FRAME])
    black = torch.cat(list(slide(model, frames=3, overlap=1, seeds=2, start=frames(0))), dim=1)
    assert black.shape == (1, 12)
    with pytest.raises(TokenloomError, match="renew must return"):
        list(slide(model, frames=5, seeds=2, renew=lambda codes: codes[:, :1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 0}, r"overlap must lie in 1\.\.2"),
        ({"overlap": 3}, r"less than the 3 frames"),
        ({"frames": 0}, "at least 1, or None"),
        (
            {"start": torch.zeros(1, 5, dtype=torch.long)},
            r"start must be an integer tensor of shape \(B, 4\)",
        ),
        ({"start": frames(VOCAB)}, r"start must lie in 0\.\.11"),
        ({"start": frames(1).expand(2, -1), "condition": torch.tensor([1, 1, 2])}, "of 3 samples"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    model = make(NextTokenGenerator, orders.raster(CLIP), "class")
    with pytest.raises(TokenloomError, match=message):
        slide(model, **options)


@pytest.mark.parametrize("layout", [Layout.grid(3, 4), Layout.clip(1, 2, 2)])
def test_layouts_without_frames_to_slide_over(layout: Layout) -> None:
    with pytest.raises(TokenloomError, match=r"Sliding needs|frames to slide over"):
        slide(make(NextTokenGenerator, orders.raster(layout), "none"))
