"""Solvers of flow matching: from noise at time 1 to data at time 0 along x(t) = (1 - t) data + t noise.

The network gives velocities v = noise - data. "euler" and "heun" follow dx = v dt and are diffusers' flow-matching
schedulers. "sde" is the sampler published for xAR, Euler-Maruyama steps of the reverse SDE with diffusion 2t (SiT, Ma
et al. 2024), whose drift, v - t * score with score = -(x + (1 - t) v) / t, is (2 - t) v + x. No scheduler of diffusers
takes that step: the stochastic mode of its Euler scheduler jumps to the predicted data and adds new noise, which is
another process, and draws that noise from a stream. Knows nothing of networks, tokens or guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from tokenloom.errors import unknown_name

LAST_TIME = 0.04  # where the SDE ends; the rest is one step along the mean (xAR, SiT)


class Solver(Protocol):
    """One integration.

    Attributes:
        times: Time of every evaluation of the network, in (0, 1], descending.
        draws: Draws of noise that a position needs, the one it starts from included.
    """

    times: list[float]
    draws: int

    def step(self, x: Tensor, velocity: Tensor, index: int, noise: Callable[[int], Tensor]) -> Tensor:
        """The state after evaluation `index` gave `velocity` at state `x`; `noise(k)` is draw k, shaped like `x`."""
        ...


class ReverseSDE:
    """Euler-Maruyama: `steps` - 1 noisy steps from 1 to 0.04, then the mean at 0.

    Args:
        steps: Evaluations of the network.
        temperature: Factor of the noise of the steps.
    """

    def __init__(self, steps: int, temperature: float = 1.0) -> None:
        self.times = torch.linspace(1, LAST_TIME, steps, dtype=torch.float64).tolist()
        self.draws, self.temperature = steps, temperature

    def step(self, x: Tensor, velocity: Tensor, index: int, noise: Callable[[int], Tensor]) -> Tensor:
        """See `Solver`."""
        time, last = self.times[index], index + 1 == len(self.times)
        stride = (0.0 if last else self.times[index + 1]) - time
        mean = x + ((2 - time) * velocity + x) * stride
        if last or self.temperature == 0:
            return mean
        return mean + self.temperature * math.sqrt(-2 * time * stride) * noise(index + 1)


class FlowODE:
    """A flow-matching scheduler of diffusers: deterministic once the first noise is drawn.

    Args:
        steps: Solver steps; "heun" evaluates the network twice a step, but once in the last.
        kind: "euler" (equal steps from 1 to 0) or "heun".
    """

    def __init__(self, steps: int, kind: str) -> None:
        self.scheduler: Any
        if kind == "euler":
            self.scheduler = FlowMatchEulerDiscreteScheduler()
            self.scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)])
        else:
            self.scheduler = FlowMatchHeunDiscreteScheduler()
            self.scheduler.set_timesteps(steps)
        length = self.scheduler.config.num_train_timesteps
        self.times = [time / length for time in self.scheduler.timesteps.tolist()]
        self.draws = 1

    def step(self, x: Tensor, velocity: Tensor, index: int, noise: Callable[[int], Tensor]) -> Tensor:
        """See `Solver`."""
        return self.scheduler.step(velocity, self.scheduler.timesteps[index], x, return_dict=False)[0]


def clip_data(x: Tensor, velocity: Tensor, time: float, clip: float | None) -> Tensor:
    """The velocity whose predicted data, x - time * velocity, lies within -clip .. clip; `None` leaves it as it is.

    Args:
        x: State at `time`, any shape.
        velocity: Predicted velocity, shaped like `x`.
        time: In (0, 1].
        clip: The bound, above 0.
    """
    return velocity if clip is None else (x - (x - time * velocity).clamp(-clip, clip)) / time


SOLVERS = ("sde", "euler", "heun")


def make_solver(kind: str, steps: int, temperature: float = 1.0) -> Solver:
    """A fresh solver for one integration.

    Args:
        kind: "sde", "euler" or "heun".
        steps: Solver steps.
        temperature: Factor of the noise that "sde" adds.

    Raises:
        TokenloomError: For an unknown kind.

    Example:
        >>> make_solver("sde", 3).times
        [1.0, 0.52, 0.04]
    """
    if kind not in SOLVERS:
        raise unknown_name("solver", kind, SOLVERS)
    return ReverseSDE(steps, temperature) if kind == "sde" else FlowODE(steps, kind)
