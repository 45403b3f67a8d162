"""Reconstruction losses: zero for equal pictures, larger for larger differences, gradients into the output alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tokenloom import TokenloomError
from tokenloom.training.augment import augment
from tokenloom.training.config import AugmentConfig
from tokenloom.training.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    hinge_loss,
    structural_loss,
)


def pictures(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise_like(values: Tensor) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64])
def test_structural_loss_is_zero_for_equal_pictures_and_grows_with_noise(size):
    target = pictures(size=size)
    assert structural_loss(target, target).abs() < 1e-5
    losses = [float(structural_loss(target + noise_like(target) * s, target)) for s in (0.05, 0.2, 0.8)]
    assert 0 < losses[0] < losses[1] < losses[2] <= 2


def test_structural_loss_of_the_negative_is_above_one():
    target = pictures()
    assert structural_loss(-target, target) > 1


def test_structural_loss_sees_lost_detail_where_the_mean_is_right():
    target = pictures()
    flat = target.mean((2, 3), keepdim=True).expand_as(target)
    assert structural_loss(flat, target) > 0.5
    assert structural_loss(target * 0.5 + flat * 0.5, target) < structural_loss(flat, target)


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    torch.manual_seed(0)
    return PerceptualLoss("resnet10t", pretrained=False)


def test_perceptual_loss_is_zero_for_equal_pictures_and_grows(perceptual):
    target = pictures(size=64)
    assert perceptual(target, target) == 0
    near, far = (perceptual(target + noise_like(target) * s, target) for s in (0.1, 1.0))
    assert 0 < near < far


def test_perceptual_gradients_reach_the_output_and_nothing_else(perceptual):
    output = (pictures(size=64) * 0.5).requires_grad_()
    perceptual(output, pictures(size=64)).backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())
    assert not perceptual.net.training


def test_perceptual_loss_uses_the_statistics_of_the_backbone(perceptual):
    mean = (torch.tensor(perceptual.net.pretrained_cfg["mean"]).view(1, 3, 1, 1) * 2 - 1).expand(1, 3, 8, 8)
    assert ((mean - perceptual.mean) / perceptual.std).abs().max() < 1e-6
    white = (torch.ones(1, 3, 1, 1) - perceptual.mean) / perceptual.std
    wanted = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white.flatten(), wanted)


def test_unknown_backbone_is_explained():
    with pytest.raises(TokenloomError, match=r"backbone 'vgg17'.*loss\.perceptual to 0"):
        PerceptualLoss("vgg17", pretrained=False)


def test_hinge_loss_by_hand():
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])) == pytest.approx(0.25 + 0.5)
    assert hinge_loss(torch.tensor([1.0]), torch.tensor([-1.0])) == 0


def test_discriminator_learns_to_tell_pictures_apart():
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=8, layers=2)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    real, fake = pictures(4), pictures(4).mean((2, 3), keepdim=True).expand(4, 3, 32, 32)
    assert critic(real).shape == (4, 1, 8, 8)
    first = float(hinge_loss(critic(real), critic(fake)).detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss = hinge_loss(critic(real), critic(fake))
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 2


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = nn.Linear(2, 2, bias=False)
    output = layer(torch.ones(1, 2))
    weight = adaptive_weight(3 * output.sum(), 0.5 * output.sum(), layer.weight)
    assert float(weight) == pytest.approx(6, rel=1e-3)
    assert not weight.requires_grad
    assert layer.weight.grad is None
    assert adaptive_weight(output.sum() * 1e9, output.sum() * 1e-9, layer.weight) == 1e4


# Augmentation


def test_augmentation_off_changes_nothing():
    batch = pictures()
    assert torch.equal(augment(batch, AugmentConfig(), torch.Generator()), batch)


def test_flip_mirrors_every_picture():
    batch = pictures()
    flipped = augment(batch, AugmentConfig(flip=1.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(flipped, batch.flip(3), atol=1e-4, rtol=0)


def test_augmentation_keeps_white_white_and_the_range():
    config = AugmentConfig(flip=0.5, shift=0.3, scale=0.3, rotate=30, colour=0.5, permute=0.5)
    generator = torch.Generator().manual_seed(0)
    white = augment(torch.ones(8, 3, 16, 16), config, generator)
    torch.testing.assert_close(white, torch.ones(8, 3, 16, 16))
    assert augment(pictures(8), config, generator).abs().max() <= 1


def test_augmentation_repeats_with_the_generator_and_differs_between_pictures():
    config = AugmentConfig(shift=0.3, colour=0.3)
    batch = pictures(1).expand(4, -1, -1, -1)
    first = augment(batch, config, torch.Generator().manual_seed(3))
    assert torch.equal(first, augment(batch, config, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, augment(batch, config, torch.Generator().manual_seed(4)))
    assert len({tuple(picture.flatten()[:50].tolist()) for picture in first}) == 4


def test_permuted_channels_hold_the_same_values():
    batch = pictures(16)
    mixed = augment(batch, AugmentConfig(permute=1.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.sort(1).values, batch.sort(1).values)
    assert not torch.equal(mixed, batch)
