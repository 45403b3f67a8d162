"""One-dimensional image tokenizers: a line of a few codes instead of a grid (TiTok, TA-TiTok, and your own).

Knows pixels, the register transformers, a quantizer or a posterior, and text features that help to paint. Knows nothing of
generators, prompts or files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options
from tokenloom.layouts import Layout
from tokenloom.tokenizers.cnn import CNNConfig, CNNDecoder
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import check_values
from tokenloom.tokenizers.posterior import Posterior
from tokenloom.tokenizers.quantizers import Quantized, Quantizer, make_quantizer
from tokenloom.tokenizers.registers import (
    FeatureHead,
    PixelHead,
    RegisterConfig,
    RegisterDecoder,
    RegisterEncoder,
)

CONTINUOUS = "kl"
"""The `quantizer_type` of a tokenizer whose codes are float vectors."""


class PixelCodes(nn.Module):
    """The second stage of the first TiTok models: logits over codes of a grid tokenizer, and its decoder.

    Args:
        codebook_size: Codes of the grid tokenizer.
        latent_channels: Width of its codes.
        channels: Width of its decoder at full resolution.
        multipliers: Width of every level as a multiple of `channels`; each level after the first halves the resolution.
        blocks: Residual blocks a level.
        norm_groups: Groups of the group norms.
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        latent_channels: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        shape = CNNConfig(channels, tuple(multipliers), blocks, latent_channels, norm_groups, "maskgit")
        self.stride = shape.stride
        self.codebook = nn.Parameter(torch.randn(codebook_size, latent_channels) * latent_channels**-0.5)
        self.decoder = CNNDecoder(shape)

    def forward(self, logits: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of logits (B, codebook_size, h, w): the mean code of every place is painted."""
        return self.decoder(torch.einsum("bchw,cd->bdhw", logits.softmax(1), self.codebook))


class ImageLineTokenizer(ImageTokenizer):
    """Square RGB pictures to a line of codes and back.

    With `quantizer_type="kl"` the tokenizer is continuous: `encode` gives float vectors (B, N, d), the means of the
    posterior, and `decode` takes such vectors; `vocab_size` is 0.

    Args:
        image_size: Side of the pictures in pixels.
        registers: Codes a picture N.
        encoder_config: Options of `RegisterConfig` for the encoder.
        decoder_config: Options of `RegisterConfig` for the decoder.
        quantizer_type: "vq", "fsq" or another quantizer with one code a vector; or "kl".
        quantizer_options: Keyword options of the quantizer, of "kl" {"dim": d}; by default a cosine codebook of 4,096
            codes of width 12.
        pixel_config: Options of `PixelCodes` to paint by way of codes of a grid tokenizer; `None` = paint pixels.
        text_config: {"features": F, "length": T} for a decoder that takes T text features of width F a picture.
        flexible: Any prefix of the codes decodes: registers are causal, and training drops codes from the end.
        scrambled: See `RegisterEncoder`; only for the first TiTok models.
        pixel_range: Lowest and highest value of a pixel.
        clamp: Whether `decode` clamps to `pixel_range`; official weights do not.
    """

    image_size: int
    quantizer: Quantizer | None  # type: ignore[assignment]
    parts = {  # noqa: RUF012  (a constant of the class)
        "encoder": ("encoder",),
        "quantizer": ("quantizer",),
        "decoder": ("decoder", "painter"),
    }

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        registers: int = 32,
        encoder_config: dict[str, Any] | None = None,
        decoder_config: dict[str, Any] | None = None,
        quantizer_type: str = "vq",
        quantizer_options: dict[str, object] | None = None,
        pixel_config: dict[str, Any] | None = None,
        text_config: dict[str, int] | None = None,
        flexible: bool = False,
        scrambled: bool = False,
        pixel_range: Sequence[float] = (-1.0, 1.0),
        clamp: bool = True,
    ) -> None:
        super().__init__()
        if flexible and scrambled:
            raise TokenloomError("Scrambled registers have no order; set flexible or scrambled, not both.")
        self.image_size, self.registers, self.flexible = image_size, registers, flexible
        self.layout = Layout.line(registers)
        self.pixel_range = (float(pixel_range[0]), float(pixel_range[1]))
        self.clamp, self.continuous = clamp, quantizer_type == CONTINUOUS
        self.quantizer = None
        if self.continuous:
            dim, self.vocab_size = _dim(quantizer_options), 0
        else:
            self.quantizer = _quantizer(quantizer_type, quantizer_options)
            dim, self.vocab_size = self.quantizer.dim, self.quantizer.codebook_size
        shape = RegisterConfig.of(encoder_config, "option of encoder_config")
        self.encoder = RegisterEncoder(
            shape,
            shape.grid(image_size),
            registers,
            2 * dim if self.continuous else dim,
            causal=flexible,
            scrambled=scrambled,
        )
        shape = RegisterConfig.of(decoder_config, "option of decoder_config")
        self.painter = _painter(pixel_config, shape.patch)
        self.text_size = _text_size(text_config)
        length, features = self.text_size or (0, 0)
        head: nn.Module = PixelHead(shape.width, shape.patch, 3)
        if self.painter is not None:
            head = FeatureHead(shape.width, self.painter.codebook.shape[0])
        self.decoder = RegisterDecoder(shape, shape.grid(image_size), registers, dim, head, features, length)

    @property
    def bits_per_sample(self) -> float:
        """Bits of one picture's codes; infinite for a continuous tokenizer."""
        return math.inf if self.continuous else super().bits_per_sample

    @property
    def lengths(self) -> Sequence[int]:
        """Every number of codes for a flexible tokenizer, else all of them."""
        return range(1, self.registers + 1) if self.flexible else (self.registers,)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that paints pixels."""
        last = "decoder.head.smooth.weight" if self.painter is None else "painter.decoder.conv_out.weight"
        return self.get_parameter(last)

    def features(self, pixels: Tensor) -> Tensor:
        """Vectors (B, N, d) before quantization of pixels (B, 3, S, S); of a continuous tokenizer (B, N, 2 d)."""
        return self.encoder(pixels.to(self.encoder.head.weight.dtype))

    def posterior(self, media: Any) -> Posterior:
        """The distribution (B, N, d) that a continuous tokenizer gives for pictures.

        Raises:
            TokenloomError: If the tokenizer has codes.
        """
        if not self.continuous:
            raise TokenloomError("This tokenizer has codes and no posterior; call quantize().")
        return Posterior.of(self.features(self.pixels(media)))

    def quantize(self, media: Any) -> Quantized:
        """Codes, vectors, losses and statistics of pictures.

        Raises:
            TokenloomError: If the tokenizer is continuous.
        """
        if self.quantizer is None:
            raise TokenloomError("This tokenizer is continuous and has no codes; call posterior().")
        return super().quantize(media)

    @torch.no_grad()
    def encode(self, media: Any, *, num_tokens: int | None = None) -> Tensor:
        """Codes (B, N) of pictures; of a continuous tokenizer float vectors (B, N, d). See `ImageTokenizer.encode`."""
        if not self.continuous:
            return super().encode(media, num_tokens=num_tokens)
        pixels = self.pixels(media)
        check_values(pixels, self.pixel_range)
        if num_tokens is not None:
            self.check_num_tokens(num_tokens)
        return self.posterior(pixels).mean[:, :num_tokens]

    @torch.no_grad()
    def decode(  # type: ignore[override]
        self, codes: Tensor, text: Tensor | None = None
    ) -> Tensor:
        """Pixels (B, 3, S, S) of codes.

        Args:
            codes: What `encode` returns: LongTensor (B, N), or float (B, N, d) of a continuous tokenizer. A flexible
                tokenizer takes any n <= N of them.
            text: Float features (B, T, F) of the caption for a decoder with text; `None` leaves the text out, with a
                warning, for published weights were trained with it.

        Raises:
            TokenloomError: For codes or text features of another kind.
        """
        dtype = self.decoder.embed.weight.dtype
        if self.quantizer is None:
            vectors = self._check_vectors(codes).to(dtype)
        else:
            self.check_codes(codes)
            vectors = self.quantizer.decode(codes.long()).to(dtype)
        if self.text_size is not None and text is None:
            warnings.warn(
                "This decoder takes text features; pass text=... of the caption for its best pictures.",
                stacklevel=2,
            )
        pixels = self.paint_vectors(vectors, text)
        return pixels.clamp(*self.pixel_range) if self.clamp else pixels

    def paint_vectors(  # type: ignore[override]
        self, z: Tensor, text: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Pixels (B, 3, S, S), not clamped, of vectors (B, n, d).

        Args:
            z: Quantized vectors, or draws from the posterior.
            text: See `decode`.
            kept: LongTensor (B,): how many vectors of each picture to use; `None` = all.
        """
        painted = self.map_vectors(z, text, kept)
        return painted if self.painter is None else self.painter(painted)

    def map_vectors(self, z: Tensor, text: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """What the register decoder paints: pixels, or with `pixel_config` logits (B, codebook_size, h, w)."""
        text = None if text is None else self._check_text(text, z.shape[0]).to(z.dtype)
        return self.decoder(z, kept, text)

    @torch.no_grad()
    def reconstruct(self, media: Any, text: Tensor | None = None, **options: Any) -> Tensor:
        """Pixels after encoding and decoding, see `ImageTokenizer.reconstruct`; `text` as in `decode`, without tiles."""
        if text is None:
            return super().reconstruct(media, **options)
        return self.decode(self.encode(media, **options), text)

    def forward(
        self, media: Any, text: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Quantized]:
        """Differentiable reconstruction (B, 3, S, S), not clamped, and what the quantizer returned.

        A flexible tokenizer in training drops codes from the end unless `kept` says how many to keep. A continuous
        tokenizer paints a draw from its posterior in training and the mean otherwise; its codes are empty, and its loss
        is the divergence "kl", a mean over pictures, not weighted.
        """
        pixels = self.pixels(media)
        if self.continuous:
            posterior = self.posterior(pixels)
            z = posterior.sample() if self.training else posterior.mean
            empty = torch.zeros(z.shape[0], 0, dtype=torch.long, device=z.device)
            quantized = Quantized(empty, z, {"kl": posterior.divergence().sum(1).mean()}, {})
        else:
            quantized = self.quantize(pixels)
        if kept is None and self.flexible and self.training:
            kept = torch.randint(1, self.registers + 1, pixels.shape[:1], device=pixels.device)
        z = quantized.z_q.to(self.decoder.embed.weight.dtype)
        return self.paint_vectors(z, text, kept), quantized

    def _check_vectors(self, vectors: Tensor) -> Tensor:
        dim = self.decoder.embed.in_features
        given = f"{vectors.dtype} {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors)
        right = isinstance(vectors, Tensor) and vectors.is_floating_point() and vectors.ndim == 3
        if not right or vectors.shape[2] != dim or vectors.shape[1] not in self.lengths:
            raise TokenloomError(
                f"{type(self).__name__}.decode expects float vectors of shape (B, {self.registers}, {dim}), got {given}; "
                "this tokenizer is continuous and has no codes."
            )
        return vectors

    def _check_text(self, text: Tensor, batch: int) -> Tensor:
        if self.text_size is None:
            raise TokenloomError("This decoder takes no text features; leave text out.")
        wanted = (batch, *self.text_size)
        given = f"{text.dtype} {tuple(text.shape)}" if isinstance(text, Tensor) else type(text)
        if not isinstance(text, Tensor) or not text.is_floating_point() or tuple(text.shape) != wanted:
            raise TokenloomError(f"Text features must be float of shape {wanted}, got {given}.")
        return text


def _dim(options: Mapping[str, object] | None) -> int:
    dim = (options or {}).get("dim", 16)
    if set(options or {}) - {"dim"} or not isinstance(dim, int) or dim < 1:
        raise TokenloomError(f'The options of "kl" are {{"dim": d}} with d at least 1, got {options}.')
    return dim


def _quantizer(kind: str, options: dict[str, object] | None) -> Quantizer:
    if options is None and kind == "vq":
        options = {"codebook_size": 4096, "dim": 12}
    quantizer = make_quantizer(kind, dict(options or {}))
    if quantizer.codebooks > 1:
        raise TokenloomError(
            f"ImageLineTokenizer needs one code a register, but {kind} gives {quantizer.codebooks}."
        )
    return quantizer


def _painter(options: dict[str, Any] | None, patch: int) -> PixelCodes | None:
    if options is None:
        return None
    check_options(PixelCodes, options, "option of pixel_config")
    painter = PixelCodes(**options)
    if painter.stride != patch:
        raise TokenloomError(
            f"A place of the grid tokenizer has {painter.stride} pixels a side, but a patch of the decoder {patch}; "
            "change patch in decoder_config or the number of multipliers in pixel_config."
        )
    return painter


def _text_size(options: dict[str, int] | None) -> tuple[int, int] | None:
    if options is None:
        return None
    if set(options) != {"features", "length"} or min(options.values()) < 1:
        raise TokenloomError(
            f'text_config is {{"features": F, "length": T}}, both at least 1, got {options}.'
        )
    return options["length"], options["features"]
