"""The networks of MiMo-Audio's tokenizer: mel spectrogram to vectors, vectors to a coarse mel spectrogram, that to sound.

Written after the technical report of MiMo-Audio (2025) and its published code. Every function takes a padded batch with
lengths, and treats it as published: at the ends of shorter samples neighbours leak in. `MimoAudioTokenizer` runs samples of
one length together, so that nothing leaks. Knows nothing of codes.

Legend: B batch, L mel frames, T code frames, D width, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.layers import Block, BlockConfig, make_norm, rope_table

_LOUDEST = 100.0  # the largest magnitude of a bin of the vocoder


@dataclass(frozen=True, kw_only=True)
class MimoConfig:
    """Shape of the tokenizer; the defaults are those of the published 1.2 B model.

    Attributes:
        width: Width D of encoder and decoder.
        mels: Mel bands M.
        encoder: Depth, heads and hidden width of the encoder.
        decoder: The same of the decoder.
        vocoder: The same of the vocoder, and its width as a fourth number.
        skip: The output of this block of the encoder, counted from 1, is added to that of the last; 0 = none.
        causal: Whether encoder and decoder see earlier frames only.
        windows: Frames to the left and right that encoder, decoder and vocoder see; -1 = all.
        kernel: Length of the encoder's two convolutions.
        stride: Mel frames that become one encoder frame.
        upsample: Length and stride of the decoder's last convolution.
        pool: Encoder frames that become one code frame.
        fft: Length of the Fourier transforms.
        hop: Samples a mel frame.
        window_size: Samples of the window of the mel spectrogram.
        bounds: Lowest and highest frequency of the mel bands, Hz; `None` = half the sample rate.
        sample_rate: Samples a second.
        codebook_sizes: Codes of each codebook.
        rope_base: Base of the rotary frequencies.
        norm: "layer" or "rms".
    """

    width: int = 1280
    mels: int = 128
    encoder: Sequence[int] = (32, 20, 5120)
    decoder: Sequence[int] = (32, 20, 5120)
    vocoder: Sequence[int] = (16, 16, 1024, 256)
    skip: int = 3
    causal: Sequence[bool] = (False, True)
    windows: Sequence[Sequence[int]] = ((-1, -1), (-1, -1), (40, 10))
    kernel: int = 3
    stride: int = 2
    upsample: Sequence[int] = (3, 2)
    pool: int = 2
    fft: int = 960
    hop: int = 240
    window_size: int = 960
    bounds: Sequence[float | None] = (0.0, None)
    sample_rate: int = 24000
    codebook_sizes: Sequence[int] = field(default=(1024, 1024, *[128] * 18))
    rope_base: float = 10000.0
    norm: str = "layer"

    def __post_init__(self) -> None:
        if self.upsample[0] < self.upsample[1] or not 0 <= self.skip <= self.encoder[0]:
            raise TokenloomError(
                f"The last convolution must be at least as long as its stride, got {tuple(self.upsample)}; skip must lie in "
                f"0..{self.encoder[0]}, got {self.skip}."
            )
        if self.window_size > self.fft or self.fft < self.hop or (self.fft - self.hop) % 2:
            raise TokenloomError(
                f"fft must be at least window_size and hop, and differ from hop by an even number; got fft {self.fft}, "
                f"window_size {self.window_size}, hop {self.hop}."
            )

    @property
    def eps(self) -> float:
        """Epsilon of every norm."""
        return 1e-5 if self.norm == "layer" else 1e-6

    def frames(self, mel: int) -> tuple[int, int]:
        """Encoder frames, and code frames, of a number of mel frames."""
        inner = (mel + 5 - 2 * self.kernel) // self.stride + 1
        return inner, -(-inner // self.pool)


def inside(lengths: Tensor, size: int) -> Tensor:
    """Bool (B, size): the places before the end of each sample."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Layers(nn.Module):
    """Transformer blocks over padded sequences, with rotary positions that begin at 0.

    Args:
        width: Width D.
        shape: Depth, heads and hidden width.
        config: Norm and rotary base.
        causal: Whether a position sees earlier ones only.
        window: Positions to the left and right that it sees; -1 = all.
    """

    def __init__(
        self, width: int, shape: Sequence[int], config: MimoConfig, causal: bool, window: Sequence[int]
    ) -> None:
        super().__init__()
        depth, heads, hidden = shape[:3]
        block = BlockConfig(
            width=width,
            heads=heads,
            mlp="gelu",
            mlp_width=hidden,
            norm=config.norm,
            norm_eps=config.eps,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rope_halves=True,
        )
        self.head_size, self.base = block.head_size, config.rope_base
        self.left, self.right = window[0], 0 if causal else window[1]
        self.blocks = nn.ModuleList(Block(block) for _ in range(depth))
        self.norm = make_norm(config.norm, width, config.eps, True)

    def forward(self, x: Tensor, lengths: Tensor, skip: int = 0) -> Tensor:
        """Maps (B, N, D) to (B, N, D); the output of block number `skip` is added to that of the last."""
        places = torch.arange(x.shape[1], device=x.device)
        apart = places - places[:, None]  # key minus query
        seen = torch.ones_like(apart, dtype=torch.bool)
        if self.left >= 0:
            seen &= apart >= -self.left
        if self.right >= 0:
            seen &= apart <= self.right
        # a place behind the end of its sample sees itself, so that its softmax is not empty
        mask = (seen & inside(lengths, x.shape[1])[:, None]) | (apart == 0)
        rope = rope_table(places[:, None], self.head_size, self.base)
        kept: Tensor | None = None
        for number, block in enumerate(self.blocks, 1):
            x = block(x, rope=rope, mask=mask[:, None])
            kept = x if number == skip else kept
        return self.norm(x if kept is None else x + kept)


class MimoEncoder(nn.Module):
    """Mel spectrogram to one vector a code frame."""

    def __init__(self, config: MimoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv1d(config.mels, width, config.kernel, padding=1)
        self.conv2 = nn.Conv1d(width, width, config.kernel, config.stride, padding=1)
        self.layers = Layers(width, config.encoder, config, config.causal[0], config.windows[0])
        if config.pool > 1:
            self.down = nn.Conv1d(width, width, config.pool, config.pool, bias=False)
            self.down_norm = make_norm(config.norm, width, config.eps, True)

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, T, D) and their number (B,), of a mel spectrogram (B, L, M) and its lengths (B,)."""
        config = self.config
        mel = mel.to(self.conv1.weight.dtype) * inside(lengths, mel.shape[1])[:, :, None]
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel.transpose(1, 2))))).transpose(1, 2)
        inner = (lengths + 5 - 2 * config.kernel) // config.stride + 1
        x = self.layers(x, inner, config.skip)
        if config.pool == 1:
            return x, inner
        # behind its end a sample repeats its last vector; the whole batch is filled up with zeros
        last = torch.minimum(torch.arange(x.shape[1], device=x.device), inner[:, None] - 1)
        x = x.gather(1, last[:, :, None].expand_as(x))
        x = F.pad(x, (0, 0, 0, -x.shape[1] % config.pool))
        x = F.gelu(self.down(x.transpose(1, 2))).transpose(1, 2)
        return self.down_norm(x), -(-inner // config.pool)


class NormedUpsample(nn.Module):
    """A transposed convolution without look-ahead, and a norm over the whole sample."""

    def __init__(self, before: int, after: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(before, after, kernel, stride)
        self.norm = nn.GroupNorm(1, after)
        self.stride, self.extra = stride, kernel - stride

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, N, D) and its lengths to (B, N stride, D') and the new lengths."""
        x = x * inside(lengths, x.shape[1])[:, :, None]
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x, lengths = x[:, : x.shape[1] - self.extra], lengths * self.stride
        return x * inside(lengths, x.shape[1])[:, :, None], lengths


class Vocoder(nn.Module):
    """Mel spectrogram to sound: windowed attention, then an inverse Fourier transform (after Vocos, Siuzdak 2023)."""

    window: Tensor

    def __init__(self, config: MimoConfig) -> None:
        super().__init__()
        width = config.vocoder[3]
        self.fft, self.hop = config.fft, config.hop
        self.embed = nn.Linear(config.mels, width, bias=False)
        self.layers = Layers(width, config.vocoder, config, False, config.windows[2])
        self.out = nn.Linear(width, config.fft + 2)
        self.register_buffer("window", torch.hann_window(config.fft))

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """Samples (B, 1, L hop) of (B, L, M)."""
        x = self.layers(self.embed(mel), lengths) * inside(lengths, mel.shape[1])[:, :, None]
        size, phase = self.out(x).transpose(1, 2).float().chunk(2, dim=1)
        spectrum = torch.polar(size.exp().clamp(max=_LOUDEST), phase)
        return self._overlap(torch.fft.irfft(spectrum, self.fft, dim=1)).to(mel.dtype)

    def _overlap(self, pieces: Tensor) -> Tensor:
        """Adds windowed pieces (B, fft, L) at distances of `hop`, and divides by what the windows add up to."""
        window = self.window.float()[None, :, None]
        count = pieces.shape[2]
        edge = (self.fft - self.hop) // 2

        def add(values: Tensor) -> Tensor:
            size = (1, (count - 1) * self.hop + self.fft)
            whole = F.fold(values, size, (1, self.fft), stride=(1, self.hop))
            return whole[:, 0, :, edge : edge + count * self.hop]

        return add(pieces * window) / add(window.square().expand(1, -1, count))


class MimoDecoder(nn.Module):
    """One vector a code frame to sound."""

    def __init__(self, config: MimoConfig) -> None:
        super().__init__()
        width = config.width
        self.up1 = NormedUpsample(width, width, config.pool, config.pool) if config.pool > 1 else None
        self.layers = Layers(width, config.decoder, config, config.causal[1], config.windows[1])
        self.up2 = NormedUpsample(width, config.mels, *config.upsample)
        self.vocoder = Vocoder(config)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Samples (B, 1, S) of vectors (B, T, D) and their number (B,)."""
        x = x.to(self.vocoder.out.weight.dtype)
        if self.up1 is not None:
            x, lengths = self.up1(x, lengths)
        mel, lengths = self.up2(self.layers(x, lengths), lengths)
        return self.vocoder(mel, lengths)
