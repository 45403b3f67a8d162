"""Flows: levels and steps against diffusers' scheduler, orders of convergence, guidance, and noise of seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokenloom import TokenloomError
from tokenloom.rng import normal
from tokenloom.tokenizers.flow import Guide, integrate, make_levels, mix, start_noise


def field(sample: Tensor, step: int, level: float) -> Tensor:
    return torch.sin(3 * sample) + level * sample


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_levels_and_euler_steps_are_those_of_diffusers(steps, shift):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)])
    levels = make_levels(steps, shift)
    torch.testing.assert_close(torch.tensor(levels), scheduler.sigmas)
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    wanted = start
    for level, time in zip(levels[:-1], scheduler.timesteps, strict=True):
        wanted = scheduler.step(field(wanted, 0, level), time, wanted).prev_sample
    torch.testing.assert_close(integrate(field, start, levels), wanted, atol=1e-5, rtol=1e-5)


def test_orders_of_convergence():
    """dx/ds = x from s = 1 to 0 divides by e; halving the step halves Euler's error and quarters Adams-Bashforth's."""
    start = torch.ones(1, dtype=torch.float64)

    def error(steps: int, order: int) -> float:
        end = integrate(lambda sample, step, level: sample, start, make_levels(steps), order)
        return abs(float(end) - math.exp(-1))

    assert error(64, 1) / error(128, 1) == pytest.approx(2, rel=0.05)
    assert error(64, 2) / error(128, 2) == pytest.approx(4, rel=0.05)
    assert error(1, 1) == error(1, 2)


def test_second_order_by_hand():
    seen = []

    def velocity(sample: Tensor, step: int, level: float) -> Tensor:
        seen.append((step, level))
        return torch.full_like(sample, float(step + 1))

    end = integrate(velocity, torch.zeros(1), [1.0, 0.5, 0.25, 0.0], 2)
    assert seen == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert float(end) == pytest.approx(-(0.5 * 1 + 0.25 * (3 - 0.5) + 0.25 * (4.5 - 1)))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4"])
def test_bad_steps(steps):
    with pytest.raises(TokenloomError, match="steps must be a whole number from 1"):
        make_levels(steps)


def test_mix_has_data_at_one_end_and_noise_at_the_other():
    data, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    mixed = mix(data, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], data[0])
    assert torch.equal(mixed[1], noise[1])
    torch.testing.assert_close(mixed[2], 0.75 * data[2] + 0.25 * noise[2])


def test_plain_guidance():
    one, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert not Guide(1.0, True).enabled
    torch.testing.assert_close(Guide(3.0, False)(one, other), 3 * one - 2 * other)


def test_projected_guidance_by_hand():
    """Momentum -0.5, norm at most 2.5, and only what is orthogonal to the conditioned velocity, sample by sample."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 2, 3, 4, 4, generator=generator) * 0.3 for _ in range(3)]
    guide, average = Guide(7.5, True), torch.zeros(2, 48)
    for one, other in pairs:
        got = guide(one, other)
        flat = one.flatten(1)
        average = (one - other).flatten(1) - 0.5 * average
        short = average * (2.5 / average.norm(dim=1, keepdim=True)).clamp(max=1)
        unit = flat / flat.norm(dim=1, keepdim=True)
        orthogonal = short - (short * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(got.flatten(1), flat + 6.5 * orthogonal, atol=1e-5, rtol=1e-5)


def test_bad_guidance():
    with pytest.raises(TokenloomError, match="guidance must be a finite number, got nan"):
        Guide(float("nan"), False)


def test_noise_of_seeds():
    like = torch.zeros(1)
    default = start_noise((3, 2, 4, 4), like)
    assert torch.equal(default[0], default[2])
    torch.testing.assert_close(default[0].flatten(), normal(0, 0, torch.arange(32)))
    chosen = start_noise((2, 2, 4, 4), like, [7, 9])
    assert torch.equal(chosen[1:], start_noise((1, 2, 4, 4), like, 9))
    assert torch.equal(start_noise((2, 2, 4, 4), like, 8)[1:], chosen[1:])
    assert not torch.equal(chosen[0], chosen[1])
    large = start_noise((1, 3, 64, 64), like, 5)
    assert abs(float(large.mean())) < 0.04
    assert float(large.std()) == pytest.approx(1, abs=0.03)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(TokenloomError, match=r"noise must have the shape \(1, 3, 4, 4\), got \(1, 3, 8, 4\)"):
        start_noise((1, 3, 4, 4), torch.zeros(1), None, torch.zeros(1, 3, 8, 4))
    with pytest.raises(TokenloomError, match="one seed per sample"):
        start_noise((2, 3, 4, 4), torch.zeros(1), [1, 2, 3])
