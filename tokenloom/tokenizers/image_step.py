"""Pictures as a line of codes, each few of which condition one step of a diffusion, so that a prefix is a preview.

`ImageStepTokenizer` is the tokenizer of D-AR (Gao & Shou 2025): causal queries, a codebook, causal condition tokens, and a flow
in pixels whose s-th step sees the s-th group of them. Knows pixels and codes; knows nothing of generators, captions or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.layouts import Layout
from tokenloom.tokenizers.flow import integrate, mix, shifted, start_noise
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import Size, as_size, pad_to
from tokenloom.tokenizers.quantizers import VQ, Quantized
from tokenloom.tokenizers.step import (
    Conditioner,
    PainterConfig,
    QueryConfig,
    QueryEncoder,
    QueryEncoderConfig,
    StepPainter,
)


class ImageStepTokenizer(ImageTokenizer):
    """RGB pictures in [-1, 1] to a line of N codes; the first k of them paint the picture in as many steps as they reach.

    Args:
        image_size: Side of the pictures in pixels, or (height, width). Other sizes work as well.
        registers: Number N of codes of a picture.
        steps: Steps from noise to picture.
        groups: Groups of codes; step s takes the group that belongs to time s / steps. `None`: `steps`.
        group_size: Codes that a step takes; `None`: N / groups.
        encoder_config: Fields of `tokenloom.tokenizers.step.QueryEncoderConfig`.
        condition_config: Fields of `tokenloom.tokenizers.step.QueryConfig` for the condition tokens.
        painter_config: Fields of `tokenloom.tokenizers.step.PainterConfig`.
        quantizer_options: Keyword options of the codebook (`VQ`); by default 16,384 codes of width 8, by angle.
        rows: Rows of the tables of queries and of condition tokens, of which the first N are used; `None`: N.
        clamp: Whether `decode` clamps to [-1, 1]; official weights do not.
    """

    any_size = True
    parts = {  # noqa: RUF012
        "encoder": ("encoder",),
        "quantizer": ("quantizer",),
        "decoder": ("conditioner", "painter"),
    }

    @register_to_config
    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        registers: int = 64,
        steps: int = 8,
        groups: int | None = None,
        group_size: int | None = None,
        encoder_config: dict[str, object] | None = None,
        condition_config: dict[str, object] | None = None,
        painter_config: dict[str, object] | None = None,
        quantizer_options: dict[str, object] | None = None,
        rows: int | None = None,
        clamp: bool = True,
    ) -> None:
        super().__init__()
        height, width = as_size(image_size)
        self.image_size: int | Size = height if height == width else (height, width)
        self.layout, self.steps, self.clamp = Layout.line(registers), steps, clamp
        self.groups = groups or steps
        self.group_size = group_size or registers // max(1, self.groups)
        rows = registers if rows is None else rows
        if min(steps, self.groups) < 1 or not 1 <= self.group_size <= registers <= rows:
            raise TokenloomError(
                "There must be at least one step and one group, and 1 <= group_size <= registers <= rows; got "
                f"steps={steps}, groups={self.groups}, group_size={self.group_size}, registers={registers}, rows={rows}."
            )
        options: dict[str, Any] = {"codebook_size": 16384, "dim": 8}
        options = options if quantizer_options is None else dict(quantizer_options)
        check_options(VQ, options, "option of quantizer_options")
        self.quantizer: VQ = VQ(**options)
        self.vocab_size, dim = self.quantizer.codebook_size, self.quantizer.dim
        queries = QueryEncoderConfig.of(encoder_config, "option of encoder_config")
        tokens = QueryConfig.of(condition_config, "option of condition_config")
        self.shape = PainterConfig.of(painter_config, "option of painter_config")
        self.stride = math.lcm(queries.patch, self.shape.patch)
        self.encoder = QueryEncoder(queries, registers, rows, dim)
        self.conditioner = Conditioner(tokens, rows, dim)
        self.painter = StepPainter(self.shape, tokens.width)

    @property
    def lengths(self) -> Sequence[int]:
        """Any number of codes decodes."""
        return range(1, self.layout.size + 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that paints pixels."""
        weight: nn.Parameter = self.painter.head.weight  # type: ignore[assignment]
        return weight

    def features(self, pixels: Tensor) -> Tensor:
        """Continuous vectors (B, N, d) before quantization of pixels (B, 3, H, W), padded to whole patches."""
        return self.encoder(self._pad(pixels))

    def paint_vectors(self, z_q: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (B, 3, H, W), not clamped, of the first quantized vectors (B, k, d), from the noise of seed 0."""
        place = as_size(self.image_size if size is None else size)
        tokens = self.conditioner(z_q)
        return self._sample(tokens, start_noise(self._noise_shape(len(z_q), place), tokens), 2, place)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        size: int | Sequence[int] | None = None,
        *,
        order: int = 2,
        seeds: int | list[int] | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Pixels (B, 3, H, W) of the first k codes (B, k) of pictures, k from 1 to N.

        Steps whose codes are missing are not taken: the last step that has codes leads to the picture. The same codes and seeds give
        the same picture, in any batch.

        Args:
            codes: LongTensor (B, k).
            size: Height and width of the picture; `None`: `image_size`.
            order: 2: Adams-Bashforth. 1: Euler.
            seeds: As for `tokenloom.tokenizers.flow.start_noise`; `None`: the same noise for every picture.
            noise: The noise itself (B, 3, H, W), with sides padded to whole patches.

        Raises:
            TokenloomError: For codes of another kind or number, or settings that do not work.
        """
        self.check_codes(codes)
        place = as_size(self.image_size if size is None else size)
        tokens = self.conditioner(self.quantizer.decode(codes.long()))
        start = start_noise(self._noise_shape(len(codes), place), tokens, seeds, noise)
        pixels = self._sample(tokens, start, order, place)
        return pixels.clamp(*self.pixel_range) if self.clamp else pixels

    def forward(self, media: Any) -> tuple[Tensor, Quantized]:
        """The training pass, differentiable: a picture (B, 3, H, W), not clamped, and what the quantizer returned.

        While training every picture is seen at one random time, with the condition tokens of that time alone; the losses of
        the codebook count the codes up to these, the "flow" loss is among the quantizer's losses, and the picture is what
        the velocity points at. In evaluation mode nothing is random, and the picture is `reconstruct`'s before clamping.
        """
        pixels = self.pixels(media)
        padded, place = self._pad(pixels), (pixels.shape[2], pixels.shape[3])
        z = self.encoder(padded)
        quantized = self.quantizer.encode(z)
        if not self.training:
            return self.paint_vectors(quantized.z_q, place), quantized
        tokens = self.conditioner(quantized.z_q)
        times = torch.rand(len(pixels), device=pixels.device)
        first = self._first(times)
        places = first[:, None] + torch.arange(self.group_size, device=pixels.device)
        chosen = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        painted, loss = self.flow(padded, chosen, times, torch.randn_like(padded))
        losses = quantized.losses | self._codebook_losses(z, quantized.codes, places[:, -1])
        quantized = quantized._replace(losses=losses | {"flow": loss})
        return painted[..., : place[0], : place[1]], quantized

    def flow(self, pixels: Tensor, tokens: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One noisy look at the flow: the picture that the velocity points at, and the loss.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], whole patches.
            tokens: (B, n, D) condition tokens of the times.
            times: (B,) before the shift: 0 for noise, 1 for data.
            noise: Of the shape of `pixels`.
        """
        deviation = self.shape.deviation
        levels = shifted(1 - times, self.shape.shift)
        data = deviation * pixels
        noisy = mix(data, noise, levels)
        velocity, _ = self.painter(noisy, 1 - levels, tokens)
        loss = F.mse_loss(velocity.float(), (data - noise).float()) / deviation**2
        return (noisy + levels.view(-1, 1, 1, 1).to(velocity) * velocity) / deviation, loss

    def _codebook_losses(self, z: Tensor, codes: Tensor, last: Tensor) -> dict[str, Tensor]:
        """The losses of the codebook for vectors (B, N, d), over the codes 0..last (B,) of each picture."""
        counts = (torch.arange(codes.shape[1], device=codes.device) <= last[:, None]).float()
        vectors = F.normalize(z.float(), dim=-1) if self.quantizer.unit_inputs else z.float()
        chosen = self.quantizer.decode(codes).float()

        def mean(one: Tensor, other: Tensor) -> Tensor:
            return ((one - other).square().mean(-1) * counts).sum() / counts.sum()

        commitment = self.quantizer.commitment * mean(vectors, chosen.detach())
        return {"commitment": commitment, "codebook": mean(chosen, vectors.detach())}

    def _first(self, times: Tensor) -> Tensor:
        """LongTensor (B,): the first code of the group of times (B,)."""
        count = self.layout.size
        group = (times.double() * self.groups + 0.5).floor() / self.groups
        return (group * count).long().clamp(max=count - self.group_size)

    def _sample(self, tokens: Tensor, noise: Tensor, order: int, size: Size) -> Tensor:
        """Pixels (B, 3, *size) at the end of the flow, given the first condition tokens (B, k, D)."""
        if order not in (1, 2):
            raise TokenloomError(f"order must be 1 (Euler) or 2 (Adams-Bashforth), got {order!r}.")
        first = self._first(torch.arange(self.steps).double() / self.steps)
        starts: list[int] = first[first < tokens.shape[1]].tolist()
        levels = [shifted(1 - step / self.steps, self.shape.shift) for step in range(len(starts))]

        def velocity(sample: Tensor, step: int, level: float) -> Tensor:
            times = torch.full((len(sample),), 1 - level, device=sample.device)
            group = tokens[:, starts[step] : starts[step] + self.group_size]
            return -self.painter(sample, times, group)[0]

        pixels = integrate(velocity, noise, [*levels, 0.0], order) / self.shape.deviation
        return pixels[..., : size[0], : size[1]]

    def _noise_shape(self, batch: int, size: Size) -> tuple[int, int, int, int]:
        height, width = (side + -side % self.stride for side in size)
        return batch, 3, height, width

    def _pad(self, pixels: Tensor) -> Tensor:
        height, width = (side + -side % self.stride for side in pixels.shape[2:])
        return pad_to(pixels.to(self.last_layer.dtype), height, width)
