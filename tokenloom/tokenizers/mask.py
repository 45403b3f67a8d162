"""Masks to a line of codes and back, coarse to fine: any prefix of the codes decodes (HiMTok, Wang et al. 2025).

Knows masks, the register transformers and a quantizer with a linear layer. Knows nothing of pictures, phrases or files.

Empty and full masks: a network paints them nearly right at best, and the difference between "nothing" and "a few pixels" is
what an answer hangs on. With `blank_codes` the vocabulary therefore has two more codes, `empty_code` and `full_code`, which
stand for the whole mask at every length of the prefix. They hold without training, and the network never has to learn them.

Frames: where a mask lies is a matter of arithmetic as well. With `frame_codes` the first codes say its box, coarse to fine, and
the network codes the shape inside, whatever its place and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, check_options, unknown_name
from tokenloom.layouts import Layout
from tokenloom.tokenizers.base import Tokenizer
from tokenloom.tokenizers.cnn import CNNConfig, CNNDecoder
from tokenloom.tokenizers.mask_frames import MaskFrame
from tokenloom.tokenizers.quantizers import Quantized, SimVQ
from tokenloom.tokenizers.registers import (
    FeatureHead,
    PixelHead,
    RegisterConfig,
    RegisterDecoder,
    RegisterEncoder,
)

Size = tuple[int, int]

OUTPUTS = ("logits", "probabilities", "mask")
_GAIN, _MIDDLE = 5.0, 0.5  # logits = 5 (x - 0.5), x the mean of the painted channels (HiMTok)
_SURE = 16.0  # the logit of a mask that is known to be full
_LEAST_BRIGHT = (
    128  # a uint8 mask with values above 1 is a picture of a mask, and its brightest value at least this
)


class MaskTokenizer(Tokenizer):
    """Masks of any size to K codes and back.

    A mask is padded to a square below and to the right, and resampled to `image_size`; `decode` goes the same way back.
    In the encoder registers are causal: the first k codes of a mask do not depend on how many follow.

    Attributes:
        levels: Codes a mask K; every length from 1 to K decodes.
        empty_code: The code of a mask without a pixel, `None` without `blank_codes`. All K codes of such a mask are it.
        full_code: The code of a mask of all pixels.
        frame: What makes the first codes of boxes; `None` without frames.
        shapes: Codes a mask that the network makes: K less those of the frame.
        canvas: Side C of the square that the networks see: that of a frame's inside, or S.

    Args:
        image_size: Side S of the square that masks are brought to.
        levels: K.
        encoder_config: Options of `RegisterConfig` for the encoder.
        decoder_config: Options of `RegisterConfig` for the decoder.
        quantizer_options: Keyword options of `SimVQ`; by default 1,024 unit-length codes of width 12, all of it trained.
        pixel_config: Options of `tokenloom.tokenizers.cnn.CNNConfig` of a convolutional decoder of the form "maskgit"
            behind the register decoder; `None` = the register decoder paints.
        channels: Channels that the mask is repeated to for the encoder.
        scrambled: See `RegisterEncoder`; only for official weights, whose codes each mix all registers.
        blank_codes: Whether empty and full masks have codes of their own.
        soft_normalized: Whether `decode_probabilities` mixes the unit-length codes that `decode` uses, so that a sure
            choice gives the same mask. Official weights were trained on a mix of codes of any length.
        antialias: Whether masks are resampled with an area that fits the scale. Official code does not.
        frame_codes: How many of the K codes say the box of the mask; 0 = the network codes masks in their place.
        frame_side: C with `frame_codes`.
    """

    modality = "mask"

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        levels: int = 32,
        encoder_config: dict[str, Any] | None = None,
        decoder_config: dict[str, Any] | None = None,
        quantizer_options: dict[str, Any] | None = None,
        pixel_config: dict[str, Any] | None = None,
        channels: int = 1,
        scrambled: bool = False,
        blank_codes: bool = True,
        soft_normalized: bool = True,
        antialias: bool = True,
        frame_codes: int = 0,
        frame_side: int = 64,
    ) -> None:
        super().__init__()
        self.image_size, self.levels, self.channels = image_size, levels, channels
        self.soft_normalized, self.antialias = soft_normalized, antialias
        self.layout = Layout.line(levels)
        options: dict[str, Any] = {"codebook_size": 1024, "dim": 12, "normalize": True, "frozen": False}
        options |= quantizer_options or {}
        check_options(SimVQ, options, "option of quantizer_options")
        self.quantizer = SimVQ(**options)
        codes, dim = self.quantizer.codebook_size, self.quantizer.dim
        self.empty_code = codes if blank_codes else None
        self.full_code = codes + 1 if blank_codes else None
        self.vocab_size = codes + 2 * blank_codes
        if not 0 <= frame_codes < levels:
            raise TokenloomError(f"frame_codes must lie in 0..{levels - 1}, got {frame_codes}.")
        self.frame = MaskFrame(frame_codes, frame_side, codes) if frame_codes else None
        self.shapes, self.canvas = levels - frame_codes, frame_side if frame_codes else image_size
        shape = RegisterConfig.of(encoder_config, "option of encoder_config")
        grid = shape.grid(self.canvas)
        self.encoder = RegisterEncoder(
            shape, grid, self.shapes, dim, channels, causal=True, scrambled=scrambled
        )
        shape = RegisterConfig.of(decoder_config, "option of decoder_config")
        head: nn.Module = PixelHead(shape.width, shape.patch, 1)
        self.painter: nn.Module = nn.Identity()
        if pixel_config is not None:
            check_options(CNNConfig, pixel_config, "option of pixel_config")
            cnn = CNNConfig(**{"form": "maskgit", **pixel_config})
            if cnn.stride != shape.patch:
                raise TokenloomError(
                    f"The convolutional decoder paints {cnn.stride} pixels a place and side, but a patch of the decoder "
                    f"has {shape.patch}; change patch in decoder_config or the number of multipliers in pixel_config."
                )
            head, self.painter = FeatureHead(shape.width, cnn.latent), CNNDecoder(cnn)
        self.decoder = RegisterDecoder(shape, shape.grid(self.canvas), self.shapes, dim, head)

    @property
    def lengths(self) -> Sequence[int]:
        """Any prefix decodes: 1 to K codes."""
        return range(1, self.levels + 1)

    def prepare(self, masks: Tensor) -> Tensor:
        """Float masks (B, 1, S, S) in [0, 1] of masks (B, H, W); differentiable.

        Raises:
            TokenloomError: For masks of another kind, without pixels, or with values that no mask has.
        """
        masks = _as_float(masks).to(self.encoder.head.weight.dtype)[:, None]
        height, width = masks.shape[2:]
        side = max(height, width)
        masks = F.pad(masks, (0, side - width, 0, side - height))
        return self._resample(masks, self.image_size)

    def canvases(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What the networks see of masks (B, H, W): float (B, C, C) in [0, 1]; and the codes of frames (B, 0 or more)."""
        square = self.prepare(masks)[:, 0]
        if self.frame is None:
            return square, torch.zeros(len(square), 0, dtype=torch.long, device=square.device)
        codes = self.frame.encode(self.frame.boxes(square), self.image_size)
        return self.frame.cut(square, self.frame.decode(codes, self.image_size)), codes

    def features(self, masks: Tensor) -> Tensor:
        """Vectors before quantization, (B, K, d) or, behind a frame, fewer, of masks (B, H, W)."""
        return self._features(self.canvases(masks)[0])

    def _features(self, canvases: Tensor) -> Tensor:
        return self.encoder(canvases[:, None].expand(-1, self.channels, -1, -1))

    def quantize(self, masks: Tensor) -> Quantized:
        """Codes (B, K), vectors, losses and statistics of masks (B, H, W)."""
        canvases, frames = self.canvases(masks)
        return self._quantize(self._features(canvases), frames, masks)

    def _quantize(self, z: Tensor, frames: Tensor, masks: Tensor) -> Quantized:
        quantized = self.quantizer.encode(z)
        codes = torch.cat((frames, quantized.codes), dim=1)
        if self.empty_code is not None and self.full_code is not None:
            inside = _as_float(masks).flatten(1) > 0.5
            codes = codes.masked_fill(~inside.any(1, keepdim=True), self.empty_code)
            codes = codes.masked_fill(inside.all(1, keepdim=True), self.full_code)
        return quantized._replace(codes=codes)

    @torch.no_grad()
    def encode(self, masks: Tensor, *, num_tokens: int | None = None) -> Tensor:
        """Codes (B, K), coarse to fine.

        Args:
            masks: (B, H, W) of any size: bool; float in [0, 1]; or uint8, either 0 and 1 or 0 to 255.
            num_tokens: How many codes to return; `None` = all K.

        Raises:
            TokenloomError: For masks of another kind, without pixels, or with NaN or values that no mask has.
        """
        if num_tokens is not None:
            self.check_num_tokens(num_tokens)
        return self.quantize(masks).codes[:, :num_tokens]

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        num_tokens: int | None = None,
        size: Size | None = None,
        output: str = "logits",
    ) -> Tensor:
        """Masks of codes, or of their first few.

        Args:
            codes: LongTensor (B, n), n <= K. A blank code behind the first place ends the prefix.
            num_tokens: How many codes to use; `None` = all that are there.
            size: Height and width (H, W) of the masks; `None` = (S, S).
            output: "logits" (above 0 = in the mask), "probabilities", or "mask" (bool).

        Returns:
            (B, H, W) float, or bool.

        Raises:
            TokenloomError: For codes of another kind, more codes than levels, or a size below 1.
        """
        if output not in OUTPUTS:
            raise unknown_name("output", output, OUTPUTS)
        codes = self._first(codes, num_tokens)
        known = codes < self.quantizer.codebook_size
        kept = None if bool(known.all()) else known.long().cumprod(1).sum(1)
        first = self.levels - self.shapes
        z = self.quantizer.decode(codes[:, first:].clamp(max=self.quantizer.codebook_size - 1))
        inner = None if kept is None else (kept - first).clamp(min=0)
        logits = self.paint_vectors(z.to(self.decoder.embed.weight.dtype), inner)
        logits = self.fit(self._fill(self._paste(logits, codes, kept), codes[:, 0]), size)
        if output == "mask":
            return logits > 0
        return logits if output == "logits" else logits.sigmoid()

    def decode_probabilities(
        self, probabilities: Tensor, num_tokens: int | None = None, size: Size | None = None
    ) -> Tensor:
        """Soft masks of probabilities of codes, differentiable: each place decodes the mean of its codes.

        Args:
            probabilities: (B, n, vocab_size), n <= K. The probabilities that the first place gives to the blank codes
                mix the empty and the full mask in; at other places blank codes count as nothing. Frames are those of the
                likeliest codes.
            num_tokens: How many places to use; `None` = all that are there.
            size: Height and width of the masks; `None` = (S, S).

        Returns:
            (B, H, W) float in [0, 1].
        """
        self._check_probabilities(probabilities)
        probabilities = probabilities[:, : self._count(probabilities.shape[1], num_tokens)]
        table = self.quantizer.table() if self.soft_normalized else self.quantizer.projected()
        chances = probabilities[..., : self.quantizer.codebook_size]
        z = chances[:, self.levels - self.shapes :].to(table.dtype) @ table
        masks = self._paste(self.paint_vectors(z), chances.argmax(-1)).sigmoid()
        if self.empty_code is not None and self.full_code is not None:
            first = probabilities[:, 0, :, None, None].to(masks.dtype)
            empty, full = first[:, self.empty_code], first[:, self.full_code]
            masks = (1 - empty - full) * masks + full
        return self.fit(masks, size)

    def paint_vectors(self, z: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits (B, C, C) of vectors (B, n, d); `kept` (B,) says how many vectors of each mask to use."""
        return _GAIN * (self.raw(z, kept).mean(1) - _MIDDLE)

    def raw(self, z: Tensor, kept: Tensor | None = None) -> Tensor:
        """What the decoder paints before channels are averaged, (B, channels, C, C)."""
        return self.painter(self.decoder(z, kept))

    def _paste(self, logits: Tensor, codes: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits (B, S, S) of logits (B, C, C) in the frames of codes (B, n), of which `kept` (B,) count."""
        if self.frame is None:
            return logits
        codes = codes[:, : self.frame.codes].clamp(max=self.quantizer.codebook_size - 1)
        boxes = self.frame.decode(codes, self.image_size, None if kept is None else kept.clamp(min=1))
        return self.frame.paste(logits, boxes, self.image_size, -_GAIN * _MIDDLE)

    def fit(self, masks: Tensor, size: Size | None) -> Tensor:
        """Logits or soft masks (B, S, S) at the given height and width, the padding cut off."""
        if size is None:
            return masks
        if isinstance(size, str) or len(size) != 2 or min(size) < 1:
            raise TokenloomError(f"The size of a mask is (height, width), each at least 1; got {size!r}.")
        height, width = int(size[0]), int(size[1])
        return self._resample(masks[:, None], max(height, width))[:, 0, :height, :width]

    def reconstruct(self, media: Tensor, num_tokens: int | None = None, output: str = "logits") -> Tensor:
        """`decode(encode(media))` at the size of the masks (B, H, W)."""
        return self.decode(self.encode(media), num_tokens, (media.shape[1], media.shape[2]), output)

    def forward(
        self, masks: Tensor, kept: Tensor | None = None, soft: Tensor | None = None
    ) -> tuple[Tensor, Quantized]:
        """Differentiable logits of masks (B, H, W), at their size if it is (S, S), and what the quantizer returned.

        Args:
            masks: As for `encode`.
            kept: LongTensor (B,) of how many codes of each mask to decode from; `None` = all of them.
            soft: BoolTensor (B,), which masks are decoded from their vectors as they were before quantization.

        Returns:
            Logits (B, H, W); constant for blank masks where they have codes of their own.
        """
        _, logits, quantized = self.on_canvas(masks, kept, soft)
        logits = self._fill(self._paste(logits, quantized.codes, kept), quantized.codes[:, 0])
        return self.fit(logits, (masks.shape[1], masks.shape[2])), quantized

    def on_canvas(
        self, masks: Tensor, kept: Tensor | None = None, soft: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Quantized]:
        """As `forward`, but what the networks see and paint, both (B, C, C); `kept` counts codes of frames, too."""
        canvases, frames = self.canvases(masks)
        z = self._features(canvases)
        quantized = self._quantize(z, frames, masks)
        if soft is not None:
            plain = F.normalize(z, dim=-1) if self.quantizer.normalize else z
            quantized = quantized._replace(z_q=torch.where(soft[:, None, None], plain, quantized.z_q))
        inner = None if kept is None else (kept - frames.shape[1]).clamp(min=0)
        return (
            canvases,
            self.paint_vectors(quantized.z_q.to(self.decoder.embed.weight.dtype), inner),
            quantized,
        )

    def _resample(self, masks: Tensor, side: int) -> Tensor:
        if masks.shape[-1] == side:
            return masks
        return F.interpolate(
            masks, (side, side), mode="bilinear", align_corners=False, antialias=self.antialias
        )

    def _fill(self, logits: Tensor, first: Tensor) -> Tensor:
        """Logits (B, S, S), constant where the first code (B,) of a mask is a blank code."""
        for code, value in ((self.empty_code, -_SURE), (self.full_code, _SURE)):
            if code is not None:
                logits = torch.where((first == code)[:, None, None], value, logits)
        return logits

    def _count(self, given: int, num_tokens: int | None) -> int:
        count = given if num_tokens is None else num_tokens
        if given < 1 or given > self.levels or not 1 <= count <= given:
            raise TokenloomError(
                f"This tokenizer has {self.levels} levels, and {given} are given, so num_tokens must lie in "
                f"1..{min(max(given, 1), self.levels)}; got {count}."
            )
        return count

    def _first(self, codes: Tensor, num_tokens: int | None) -> Tensor:
        given = codes.shape[1] if isinstance(codes, Tensor) and codes.ndim == 2 else self.levels
        count = self._count(given, num_tokens)
        self.check_codes(codes, given)
        return codes[:, :count].long()

    def _check_probabilities(self, probabilities: Tensor) -> None:
        is_tensor = isinstance(probabilities, Tensor)
        given = tuple(probabilities.shape) if is_tensor else type(probabilities)
        if not is_tensor or not probabilities.is_floating_point() or probabilities.ndim != 3:
            raise TokenloomError(f"Probabilities must be float (B, n, {self.vocab_size}), got {given}.")
        if probabilities.shape[2] != self.vocab_size:
            raise TokenloomError(f"There must be {self.vocab_size} probabilities a place, got {given}.")
        if not bool(torch.isfinite(probabilities.detach()).all()):
            raise TokenloomError(
                "The probabilities contain NaN or infinity; look at the logits they come from."
            )


def _as_float(masks: Tensor) -> Tensor:
    """Float masks (B, H, W) in [0, 1], or an error that says what is wrong."""
    given = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else repr(type(masks))
    kinds = (torch.bool, torch.uint8)
    right = isinstance(masks, Tensor) and (masks.dtype in kinds or masks.is_floating_point())
    if not right or masks.ndim != 3 or 0 in masks.shape[1:]:
        raise TokenloomError(
            f"Masks must be bool, uint8 or float of shape (B, H, W), H and W at least 1, got {given}; masks[None] makes "
            "a batch of one, and masks[:, 0] drops an axis of channels."
        )
    if not masks.shape[0] or masks.dtype == torch.bool:
        return masks.float()
    if masks.dtype == torch.uint8:
        most = masks.amax((1, 2))
        if bool(((most > 1) & (most < _LEAST_BRIGHT)).any()):
            raise TokenloomError(
                f"A uint8 mask holds 0 and 1, or 0 to 255 with a brightest value of at least {_LEAST_BRIGHT}; got a mask "
                f"whose largest value is {int(most[(most > 1) & (most < _LEAST_BRIGHT)][0])}. Of a map of labels take "
                "one: masks == label."
            )
        return masks.float() / torch.where(most > 1, 255, 1)[:, None, None]
    low, high = (float(value) for value in masks.detach().aminmax())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise TokenloomError(
            f"Float masks must lie in [0, 1], got values from {low:.3g} to {high:.3g}; divide bytes by 255, take the "
            "sigmoid of logits, and look for NaN before the tokenizer."
        )
    return masks
