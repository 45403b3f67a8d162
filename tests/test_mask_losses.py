"""Losses of mask tokenizers: coarse targets, outlines, prefixes, morphology, and a short training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_mask_tokenizer import build, shapes

from tokenloom import TokenloomError
from tokenloom.training.augment import random_morphology
from tokenloom.training.mask_losses import (
    bce_loss,
    coarse_target,
    dice_loss,
    draw_lengths,
    draw_levels,
    edge_map,
    hierarchical_loss,
    reconstruction_losses,
    soft_mask_loss,
    tokenizer_loss,
)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_targets_get_finer_with_the_length():
    masks = shapes(1, 64, 64).float().expand(8, -1, -1).clone()
    kept = torch.arange(1, 9)
    target = coarse_target(masks, kept, 8)
    assert torch.equal(target[7], masks[7])
    far = (target - masks).abs().mean((1, 2))
    assert (far.diff() <= 1e-6).all()
    assert far[0] > 4 * far[5] > 0
    torch.testing.assert_close(target.mean((1, 2)), masks.mean((1, 2)), atol=0.02, rtol=0)
    small = F.interpolate(masks[:1, None], (4, 4), mode="bilinear", antialias=True)
    first = coarse_target(masks[:1], torch.tensor([1]), 64)
    torch.testing.assert_close(first, F.interpolate(small, (64, 64), mode="bilinear")[:, 0])


def test_outlines():
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    edges = edge_map(mask, 3)
    assert edges[0, 7, 7] == edges[0, 0, 0] == 0
    assert edges[0, 4, 4:12].tolist() == edges[0, 3, 4:12].tolist() == [1.0] * 8
    assert edge_map(torch.ones(1, 8, 8)).abs().max() == 0


def test_losses_are_zero_for_the_target_and_grow_with_the_error():
    masks = shapes(2, 32, 32).float()
    kept = torch.tensor([6, 6])
    sure = (masks * 2 - 1) * 30
    right = reconstruction_losses(sure, masks, kept, 6)
    assert sorted(right) == ["bce", "dice", "edge", "l2"]
    assert all(value < 1e-4 for value in right.values())
    shifted = reconstruction_losses(sure.roll(2, 2), masks, kept, 6)
    assert all(shifted[name] > 100 * right[name] + 1e-3 for name in right)


def test_mistakes_at_outlines_weigh_more_at_full_length():
    masks = torch.zeros(1, 32, 32)
    masks[:, 8:24, 8:24] = 1
    inner, outer = (masks * 2 - 1) * 30, (masks * 2 - 1) * 30
    inner[:, 15:17, 15:17] *= -1
    outer[:, 8:10, 15:17] *= -1
    whole = torch.tensor([6])
    at_edge = reconstruction_losses(outer, masks, whole, 6)["l2"]
    inside = reconstruction_losses(inner, masks, whole, 6)["l2"]
    torch.testing.assert_close(at_edge / inside, torch.tensor(25.0))


def test_dice_of_each_mask_or_of_all_as_one():
    target = torch.zeros(2, 4, 4)
    target[0], target[1, 0, 0] = 1, 1
    soft = target.clone()
    soft[1] = 0
    assert 0.49 < dice_loss(soft, target) < 0.51
    assert dice_loss(soft, target, together=True) < 0.04
    assert bce_loss(soft, target).isfinite()
    torch.testing.assert_close(
        soft_mask_loss(soft, target), bce_loss(soft, target) + dice_loss(soft, target) / 4
    )


def test_lengths_and_levels_are_drawn_in_range():
    lengths = draw_lengths(4000, 8, seeded())
    assert (int(lengths.min()), int(lengths.max())) == (1, 8)
    assert 0.3 < float((lengths == 8).float().mean()) < 0.4
    drawn = torch.tensor([draw_levels(32, 3, generator) for generator in [seeded()] for _ in range(2000)])
    assert (int(drawn.min()), int(drawn.max())) == (1, 32)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    assert (drawn == 1).sum() > 2 * (drawn == 32).sum()
    for count in (0, 33):
        with pytest.raises(TokenloomError, match="Between 1 and 32"):
            draw_levels(32, count, seeded())


def test_the_hierarchical_loss_is_the_mean_over_levels_and_has_gradients():
    tokenizer, masks = build(), shapes(2).float()
    logits = torch.randn(2, 6, 66, generator=seeded()).requires_grad_()
    loss = hierarchical_loss(tokenizer, logits.softmax(-1), masks, [1, 3])
    loss.backward()
    reached = logits.grad.abs().amax((0, 2))
    assert (reached[:3] > 0).all()
    assert (reached[3:] == 0).all()
    with torch.no_grad():
        each = [hierarchical_loss(tokenizer, logits.softmax(-1), masks, [level]) for level in (1, 3)]
    torch.testing.assert_close(loss.detach(), sum(each) / 2)


def test_morphology():
    masks = shapes(64, 32, 32).float()
    changed = random_morphology(masks, seeded())
    assert torch.equal(changed, random_morphology(masks, seeded()))
    assert torch.equal(changed, changed.round())
    larger, smaller = (changed - masks).amax((1, 2)) > 0, (changed - masks).amin((1, 2)) < 0
    assert not (larger & smaller).any()
    assert larger.sum() > 8
    assert smaller.sum() > 8
    assert 0.15 < float(1 - (larger | smaller).float().mean()) < 0.5
    assert torch.equal(random_morphology(masks, seeded(), 0.0), masks)
    dot = torch.zeros(40, 32, 32)
    dot[:, 16, 16] = 1
    assert random_morphology(dot, seeded(), 1.0).sum((1, 2)).min() == 1  # never eroded to nothing


def test_a_short_training_learns_shapes():
    tokenizer, masks = build().train(), shapes(16).float()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    history = []
    for step in range(60):
        kept = draw_lengths(16, 6, torch.Generator().manual_seed(step))
        loss, parts = tokenizer_loss(tokenizer, masks, kept, {"edge": 0.1})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert sorted(parts) == ["bce", "codebook", "commitment", "dice", "edge", "l2"]
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    output, wanted = tokenizer.eval().reconstruct(masks, output="mask"), masks > 0.5
    shared = (output & wanted).sum((1, 2)) / (output | wanted).sum((1, 2))
    assert shared.mean() > 0.4


def test_bad_calls():
    tokenizer = build().train()
    with pytest.raises(TokenloomError, match=r"\(B, 16, 16\)"):
        tokenizer_loss(tokenizer, torch.zeros(1, 8, 8), torch.tensor([1]))
    with pytest.raises(TokenloomError, match="no loss iou"):
        tokenizer_loss(tokenizer, shapes(1).float(), torch.tensor([1]), {"iou": 1.0})
