"""Pictures as a row of codes, coarse to fine, of which any number from the front is enough to paint the picture.

`ImageFlexTokenizer` is FlexTok (Bachmann et al. 2025): a transformer with registers, a quantizer, and a decoder that either
follows a flow from noise or paints at once. It works on pixels, or on the latents of diffusers' `AutoencoderKL`. Knows pixels,
latents and codes; knows nothing of generators, captions or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.layouts import Layout
from tokenloom.tokenizers.flex import DecoderConfig, FlexDecoder, FlexEncoder, StackConfig
from tokenloom.tokenizers.flow import Guide, integrate, make_levels, mix, start_noise
from tokenloom.tokenizers.image import ImageTokenizer
from tokenloom.tokenizers.pixels import Size, as_size, pad_to
from tokenloom.tokenizers.quantizers import Quantized, make_quantizer

NESTED = ("uniform", "pow2", "uniform_pow2")
_NULL_PROBABILITY = 0.1
_LATENT_RANGE = (-5.0, 5.0)
_LEVELS = [8, 8, 8, 5, 5, 5]


class ImageFlexTokenizer(ImageTokenizer):
    """Pictures to a line of N codes and back from the first k of them.

    Args:
        image_size: Side of the pictures in pixels, or (height, width). Smaller ones work as well.
        registers: Number N of codes of a picture.
        patch: Side of a patch: pixels, or places of the latents.
        channels: Channels of a picture; not 3 for a tokenizer of latents without its autoencoder.
        table: Rows and columns of patches for which there are positions; `None`: those of `image_size`.
        encoder_config: Fields of `tokenloom.tokenizers.flex.StackConfig`.
        decoder_config: Fields of `tokenloom.tokenizers.flex.DecoderConfig`; "kind" is "flow" or "direct".
        quantizer_type: "fsq" or another quantizer with one code a vector.
        quantizer_options: Keyword options of the quantizer; by default 64,000 codes of FSQ.
        nested: How training draws the number of codes that are kept: "uniform" from 1..N, "pow2" from the powers of two,
            "uniform_pow2" from 1..N, rounded up to a power of two.
        sampling: What `decode` does if it is not told: "steps" (25), "guidance" (1) and "projected" (false) of a flow, and
            "clamp" (true), whether pictures are clamped to [-1, 1].
        vae_config: Arguments of diffusers' `AutoencoderKL`, whose latents, times its "scaling_factor", are then what is coded. It is
            never trained here. `None`: pixels are coded.
    """

    any_size = True
    parts = {  # noqa: RUF012
        "encoder": ("encoder",),
        "quantizer": ("quantizer",),
        "decoder": ("decoder",),
    }

    @register_to_config
    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        registers: int = 64,
        patch: int = 4,
        channels: int = 3,
        table: int | None = None,
        encoder_config: dict[str, object] | None = None,
        decoder_config: dict[str, object] | None = None,
        quantizer_type: str = "fsq",
        quantizer_options: dict[str, object] | None = None,
        nested: str = "uniform_pow2",
        sampling: dict[str, object] | None = None,
        vae_config: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        if nested not in NESTED:
            raise unknown_name("way to draw numbers of codes", nested, NESTED)
        if min(registers, patch, channels) < 1:
            raise TokenloomError(
                f"registers, patch and channels must be at least 1, got {registers}, {patch} and {channels}."
            )
        height, width = as_size(image_size)
        self.image_size: int | Size = height if height == width else (height, width)
        self.channels, self.nested, self.layout = channels, nested, Layout.line(registers)
        if channels != 3:
            self.pixel_range = _LATENT_RANGE
        check_options(_sampling, sampling or {}, "sampling option")
        self.steps, self.guidance, self.projected, self.clamp = _sampling(**(sampling or {}))  # type: ignore[arg-type]
        if quantizer_options is None and quantizer_type == "fsq":
            quantizer_options = {"levels": list(_LEVELS)}
        self.quantizer = make_quantizer(quantizer_type, dict(quantizer_options or {}))
        if self.quantizer.codebooks > 1:
            raise TokenloomError(
                f"ImageFlexTokenizer needs one code a register, but {quantizer_type} gives {self.quantizer.codebooks}."
            )
        self.vocab_size = self.quantizer.codebook_size
        self.vae = None if vae_config is None else _autoencoder(vae_config)
        self.factor = 1 if self.vae is None else 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        self.stride = patch * self.factor
        self.depth = channels if self.vae is None else int(self.vae.config["latent_channels"])
        side = table or math.ceil(max(height, width) / self.stride)
        shape = (self.depth, patch, side, registers, self.quantizer.dim)
        self.encoder = FlexEncoder(StackConfig.of(encoder_config, "option of encoder_config"), *shape)
        self.decoder = FlexDecoder(DecoderConfig.of(decoder_config, "option of decoder_config"), *shape)

    @property
    def lengths(self) -> Sequence[int]:
        """Any number of codes decodes."""
        return range(1, self.layout.size + 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that paints the map that is coded."""
        return self.decoder.last_layer

    def train(self, mode: bool = True) -> ImageFlexTokenizer:
        """Sets the mode of all but the autoencoder, which always evaluates."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def any_pixels(self, media: Any) -> Tensor:
        """Float pixels (B, C, H, W) of pictures of any accepted kind; with another C than 3 only float tensors are."""
        if self.channels == 3:
            return super().any_pixels(media)
        good = isinstance(media, Tensor) and media.is_floating_point() and media.ndim == 4
        if not good or media.shape[1] != self.channels or 0 in media.shape[2:]:
            given = f"{media.dtype} {tuple(media.shape)}" if isinstance(media, Tensor) else repr(type(media))
            raise TokenloomError(
                f"This ImageFlexTokenizer codes latents: float (B, {self.channels}, H, W) of an autoencoder, got {given}."
            )
        return media

    def latents(self, pixels: Tensor) -> Tensor:
        """The map (B, C', H', W') that is coded: pixels (B, C, H, W), padded to whole patches, or their latents."""
        height, width = (side + -side % self.stride for side in pixels.shape[2:])
        pixels = pad_to(pixels.to(self.last_layer.dtype), height, width)
        if self.vae is None:
            return pixels
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config["scaling_factor"]

    def to_pixels(self, latents: Tensor, size: Size) -> Tensor:
        """Pixels (B, C, height, width), not clamped, of a map that `latents` made; cropped to `size`."""
        if self.vae is not None:
            latents = self.vae.decode(latents / self.vae.config["scaling_factor"]).sample
        return latents[..., : size[0], : size[1]]

    def features(self, pixels: Tensor) -> Tensor:
        """Continuous vectors (B, N, d) before quantization of pixels (B, C, H, W)."""
        return self.encoder(self.latents(pixels))

    def paint_vectors(self, z_q: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (B, C, H, W), not clamped, of the first quantized vectors (B, k, d), as `decode` paints unless told."""
        return self._paint(z_q, as_size(self.image_size if size is None else size), {})

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        size: int | Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        projected: bool | None = None,
        seeds: int | list[int] | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Pixels (B, C, H, W) of the first k codes (B, k) of pictures, k from 1 to N.

        The same codes, seeds and settings give the same picture, in any batch. The direct decoder takes `size` alone into account.

        Args:
            codes: LongTensor (B, k).
            size: Height and width of the picture; `None`: `image_size`.
            steps: Steps from noise to picture.
            guidance: Scale of guidance away from the picture without codes; 1: none.
            projected: Adaptive projected guidance instead of classifier-free guidance.
            seeds: As for `tokenloom.tokenizers.flow.start_noise`; `None`: the same noise for every picture.
            noise: The noise itself, in the shape of the map that is coded (pixels, or latents).

        Raises:
            TokenloomError: For codes of another kind or number, or settings that do not work.
        """
        self.check_codes(codes)
        place = as_size(self.image_size if size is None else size)
        z_q = self.quantizer.decode(codes.long()).to(self.last_layer.dtype)
        given = {"steps": steps, "guidance": guidance, "projected": projected, "seeds": seeds, "noise": noise}
        pixels = self._paint(z_q, place, {key: value for key, value in given.items() if value is not None})
        return pixels.clamp(*self.pixel_range) if self.clamp else pixels

    def flow(
        self,
        latents: Tensor,
        z_q: Tensor,
        times: Tensor,
        noise: Tensor,
        keep: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One noisy look at the flow: the noisy map, its velocity as the decoder sees it, and the loss.

        Args:
            latents: (B, C', H', W') the map that is coded.
            z_q: (B, N, d) its quantized vectors.
            times: (B,) levels of noise, 0 to 1.
            noise: Of the shape of `latents`.
            keep: LongTensor (B,) how many codes count; `None`: all.
            dropped: Boolean (B,) pictures whose codes do not count at all.

        Returns:
            Map and velocity (B, C', H', W'), and the mean squared error to `noise - latents`.
        """
        noisy = mix(latents, noise, times)
        velocity = self.decoder.velocity(noisy, times, self.decoder.registers(z_q, keep, dropped))
        return noisy, velocity, F.mse_loss(velocity.float(), (noise - latents).float())

    def forward(self, media: Any) -> tuple[Tensor, Quantized]:
        """The training pass, differentiable: a picture (B, C, H, W), not clamped, and what the quantizer returned.

        While training every picture keeps as many codes as `nested` draws. The direct decoder paints from them. The flow decoder
        sees one random level of noise, its "flow" loss is among the quantizer's losses, a tenth of the pictures
        loses all codes so that guidance has something to subtract, and the picture is what the velocity points at. In
        evaluation mode all codes are kept, nothing is random, and the picture is `reconstruct`'s before clamping.
        """
        pixels = self.pixels(media)
        size, latents = (pixels.shape[2], pixels.shape[3]), self.latents(pixels)
        quantized = self.quantizer.encode(self.encoder(latents))
        if not self.training:
            return self.paint_vectors(quantized.z_q, size), quantized
        keep = self.draw_lengths(len(pixels)).to(pixels.device)
        if not self.decoder.flow:
            registers = self.decoder.registers(quantized.z_q, keep)
            return self.to_pixels(self.decoder.paint_map(registers, self.map_size(size)), size), quantized
        dropped = torch.rand(len(pixels), device=pixels.device) < _NULL_PROBABILITY
        times = torch.randn(len(pixels), device=pixels.device).sigmoid()
        noise = torch.randn_like(latents)
        noisy, velocity, loss = self.flow(latents, quantized.z_q, times, noise, keep, dropped)
        painted = noisy - times.view(-1, 1, 1, 1).to(velocity) * velocity
        quantized = quantized._replace(losses=quantized.losses | {"flow": loss})
        return self.to_pixels(painted, size), quantized

    def draw_lengths(self, count: int) -> Tensor:
        """LongTensor (count,): how many codes to keep, as `nested` says, by torch's global random numbers."""
        most = self.layout.size
        if self.nested == "pow2":
            return 2 ** torch.randint(most.bit_length(), (count,))
        drawn = torch.randint(1, most + 1, (count,))
        if self.nested == "uniform":
            return drawn
        return (2 ** drawn.double().log2().ceil()).long().clamp(max=most)

    def map_size(self, size: Size) -> Size:
        """Sides of the map that is coded of a picture of (height, width) pixels."""
        rows, columns = (math.ceil(side / self.stride) for side in size)
        return rows * self.encoder.patch, columns * self.encoder.patch

    def _paint(self, z_q: Tensor, size: Size, options: Mapping[str, Any]) -> Tensor:
        """Pixels (B, C, H, W), not clamped, of the first quantized vectors (B, k, d); `options` are `decode`'s."""
        batch, count = z_q.shape[:2]
        missing = self.layout.size - count
        keep = torch.full((batch,), count, device=z_q.device) if missing else None
        registers = self.decoder.registers(F.pad(z_q, (0, 0, 0, missing)), keep)
        sides = self.map_size(size)
        if not self.decoder.flow:
            return self.to_pixels(self.decoder.paint_map(registers, sides), size)
        guide = Guide(options.get("guidance", self.guidance), options.get("projected", self.projected))
        start = start_noise((batch, self.depth, *sides), z_q, options.get("seeds"), options.get("noise"))
        return self.to_pixels(self._sample(registers, start, options.get("steps", self.steps), guide), size)

    def _sample(self, registers: Tensor, noise: Tensor, steps: int, guide: Guide) -> Tensor:
        """The map at the end of the flow from noise, given register rows (B, N, D)."""
        if guide.enabled:
            registers = torch.cat([registers, self.decoder.no_registers(len(noise))])

        def velocity(sample: Tensor, step: int, level: float) -> Tensor:
            times = torch.full((len(registers),), level, device=sample.device)
            if not guide.enabled:
                return self.decoder.velocity(sample, times, registers)
            both = self.decoder.velocity(torch.cat([sample, sample]), times, registers)
            return guide(*both.chunk(2))

        return integrate(velocity, noise, make_levels(steps))


def _sampling(
    steps: int = 25, guidance: float = 1.0, projected: bool = False, clamp: bool = True
) -> tuple[int, float, bool, bool]:
    make_levels(steps)
    return steps, float(guidance), bool(projected), bool(clamp)


def _autoencoder(options: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    check_options(AutoencoderKL, options, "option of the autoencoder")
    autoencoder: Any = AutoencoderKL(**options)
    return autoencoder.requires_grad_(False).eval()
