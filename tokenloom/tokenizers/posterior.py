"""The normal distribution that a continuous tokenizer gives for every vector.

Knows means and variances; knows nothing of pictures or networks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LOG_VARIANCE = (-30.0, 20.0)  # the limits of latent diffusion's autoencoders


class Posterior(NamedTuple):
    """A normal distribution with a diagonal covariance.

    Attributes:
        mean: (..., d).
        log_variance: (..., d), between -30 and 20.
    """

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, parameters: Tensor) -> Posterior:
        """The distribution of parameters (..., 2 d): means, then logarithms of variances, in float32."""
        mean, log_variance = parameters.float().chunk(2, dim=-1)
        return cls(mean, log_variance.clamp(*_LOG_VARIANCE))

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A draw (..., d); `noise` is standard normal, `None` = torch's global random numbers."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence (...) from the standard normal distribution, in nats, summed over d."""
        return (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).sum(-1) / 2
