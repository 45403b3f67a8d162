"""Linear layers and draws of codes that run few rows with the kernels.

A step of a generation multiplies one to eight rows by large weight matrices, so its time is that of reading weights. Matrix
libraries are made for many rows; `docs/lab-notes.md` has the figures. Knows matrices and logits; knows nothing of models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.generators.kernels.build import Kernels, Linear
from tokenloom.generators.sampling import Sampling, checking_later, sample_tokens

MOST_ROWS = {"float32": 4, "int8": 8, "w8a8": 16}
"""The forms of few-row products, and the rows up to which the kernel is used for one.

"int8" rounds weights, one scale an output; "w8a8" rounds rows as well, one scale a row, and multiplies whole numbers.
"""


class SkinnyLinear(nn.Module):
    """A linear layer that shares the parameters of another one and runs few rows with the kernel.

    Args:
        linear: The layer.
        loaded: The kernels.
        form: A key of `MOST_ROWS`. Rows beyond its number always use the weights as they are.
    """

    def __init__(self, linear: nn.Linear, loaded: Kernels, form: str = "float32") -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.loaded, self.form, self.most = loaded, form, MOST_ROWS[form]
        self._made: tuple[object, Linear, tuple[Tensor, Tensor] | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., K) to (..., O)."""
        weight = self.weight
        few = 0 < x.numel() <= self.most * x.shape[-1]
        plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and weight.is_contiguous()
        return self.loaded.product(x, self.structure()) if few and plain else F.linear(x, weight, self.bias)

    @property
    def int8(self) -> bool:
        """Whether few rows read weights rounded to int8."""
        return self.form != "float32"

    def structure(self) -> Linear:
        """What the kernel reads: the weights, or codes that are worked out again when the weights change."""
        weight, bias = self.weight, self.bias
        state = (
            weight.data_ptr(),
            weight._version if self.int8 else 0,
            None if bias is None else bias.data_ptr(),
        )
        if self._made is None or self._made[0] != state:
            codes = self.rounded() if self.int8 else None
            by = (
                Linear.of(weight, None, bias)
                if codes is None
                else Linear.of(*codes, bias, self.form == "w8a8")
            )
            self._made = (state, by, codes)
        return self._made[1]

    def rounded(self) -> tuple[Tensor, Tensor]:
        """int8 codes (O, K) and scales (O,) of the weights."""
        weight = self.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous(), scale


class QuickDraw:
    """`sample_tokens`, with the kernel where it can: the same codes up to rounding of the logarithm.

    Args:
        loaded: The kernels.
    """

    def __init__(self, loaded: Kernels) -> None:
        self.loaded = loaded

    def __call__(
        self, logits: Tensor, seeds: Tensor, positions: Tensor, sampling: Sampling | None = None
    ) -> Tensor:
        """Draws codes (B, n) of logits (B, n, V)."""
        how = sampling or Sampling()
        plain = how.resolved and how.top_p == 1 and how.temperature != 0 and not checking_later()
        fits = logits.ndim == 3 and seeds.shape == logits.shape[:1]
        if plain and fits and logits.dtype == torch.float32 and logits.device.type == "cpu":
            temperature = max(float(how.temperature), torch.finfo(torch.float32).tiny)  # type: ignore[arg-type]
            drawn = self.loaded.draw(logits, seeds, positions, temperature, int(how.top_k))  # type: ignore[arg-type]
            if drawn is not None:
                return drawn
        return sample_tokens(logits, seeds, positions, sampling)
