"""`AudioTokenizer`: our own small audio codec, causal throughout, so that it streams and padding changes nothing.

Causal convolutions, an optional causal transformer, residual vector quantization with quantizer dropout, and the mirrored
decoder (after SoundStream, Zeghidour et al. 2021). Knows samples and codes. Knows nothing of generators or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.tokenizers.audio_base import PADDING, AudioCodec, Lengths, assemble
from tokenloom.tokenizers.audio_layers import Decoder, Encoder, Shape, State
from tokenloom.tokenizers.quantizers import Quantized, make_quantizer

_BLOCK_SECONDS = 10.0  # long sound is worked on in pieces of this length, so that memory stays bounded
_CODEBOOKS = {"ema_decay": 0.99, "revive_after": 50, "kmeans_init": 10}


class AudioTokenizer(AudioCodec):
    """Mono sound to K codes a frame and back, by a small trainable network.

    A frame's codes depend on its own and earlier samples only. The defaults are 50 frames a second of 16 kHz sound with six
    codebooks of 1,024 codes, 3 kbit/s; strides (4, 4, 5, 6) give the same for 24 kHz.

    Args:
        sample_rate: Samples a second.
        strides: How many positions become one, level by level; their product is the samples a frame.
        widths: Channels at full rate and behind each stride.
        kernel_size: Length of the kernels of the residual units.
        dilations: One residual unit each, behind every stride.
        latent_channels: Width of the vectors that are quantized.
        codebooks: Number of codebooks K.
        codebook_size: Codes of each.
        quantizer_options: Further options of `ResidualVQ`, for instance {"keep_at_least": 2}. By default a random number of
            codebooks is used in training, and the codebooks are moving averages that begin with k-means.
        transformer: Options "depth", "heads" and "window" (in frames) of a causal transformer at the frame rate in encoder
            and decoder; `None` = convolutions alone.
        frames: Frames of `layout`, for generators.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 16000,
        strides: Sequence[int] = (4, 4, 4, 5),
        widths: Sequence[int] = (16, 40, 80, 128, 192),
        kernel_size: int = 7,
        dilations: Sequence[int] = (1, 3),
        latent_channels: int = 64,
        codebooks: int = 6,
        codebook_size: int = 1024,
        quantizer_options: dict[str, object] | None = None,
        transformer: dict[str, int] | None = None,
        frames: int = 100,
    ) -> None:
        super().__init__()
        shape = Shape(widths, strides, kernel_size, dilations, latent_channels, transformer)
        self.describe(sample_rate, math.prod(strides), [codebook_size] * codebooks, frames)
        options = {"keep_at_least": 1, "options": _CODEBOOKS, **(quantizer_options or {})}
        sizes = {"codebook_size": codebook_size, "dim": latent_channels, "quantizers": codebooks}
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        self.quantizer = make_quantizer("residual_vq", {**sizes, **options})
        self._stream: AudioStream | None = None

    def features(self, audio: Tensor, state: State | None = None) -> Tensor:
        """Vectors (B, T, d) before quantization of samples (B, 1, T hop_length)."""
        return self.encoder(audio, state).transpose(1, 2)

    def sound(self, z_q: Tensor, state: State | None = None) -> Tensor:
        """Samples (B, 1, T hop_length) of quantized vectors (B, T, d)."""
        return self.decoder(z_q.transpose(1, 2), state)

    def forward(self, audio: Tensor) -> tuple[Tensor, Quantized]:
        """Differentiable reconstruction (B, 1, S) of samples (B, 1, S), and what the quantizer returned (codes (B, T, K))."""
        audio = self.check_audio(audio)
        quantized = self.quantizer.encode(self.features(self._pad(audio)))
        return self.sound(quantized.z_q)[..., : audio.shape[2]], quantized

    def _pad(self, audio: Tensor) -> Tensor:
        return F.pad(audio, (0, self.num_frames(audio.shape[2]) * self.hop_length - audio.shape[2]))

    @property
    def _block(self) -> int:
        """Frames that are worked on at once."""
        return max(1, round(_BLOCK_SECONDS * self.frame_rate))

    def _encode_pieces(self, audio: Tensor, state: State) -> Tensor:
        """Codes (B, K, T) of samples (B, 1, T hop_length) behind those of the state."""
        pieces = [
            self.quantizer.encode(self.features(piece, state)).codes.transpose(1, 2)
            for piece in audio.split(self._block * self.hop_length, dim=2)
        ]
        return torch.cat(pieces, dim=2)

    def _decode_pieces(self, codes: Tensor, state: State) -> Tensor:
        """Samples (B, 1, T hop_length) of codes (B, k, T) behind those of the state."""
        dtype = self.decoder.conv_in.weight.dtype
        pieces = [
            self.sound(self.quantizer.decode(piece.transpose(1, 2)).to(dtype), state)
            for piece in codes.split(self._block, dim=2)
        ]
        return torch.cat(pieces, dim=2)

    @torch.no_grad()
    def encode(self, media: Tensor, *, lengths: Lengths = None, num_codebooks: int | None = None) -> Tensor:
        """Codes (B, k, T) of sound, see `AudioCodec.encode`. Inside `streaming()` the next piece of a sound."""
        if self._stream is not None:
            return self._stream.encode(media, lengths, num_codebooks)
        audio = self.check_audio(media)
        count, sizes = self.count_codebooks(num_codebooks), self.check_lengths(lengths, audio)
        size = torch.tensor(sizes, device=audio.device)[:, None, None]
        inside = torch.arange(audio.shape[2], device=audio.device) < size
        audio = self._pad((audio * inside)[..., : max(sizes, default=0)])
        if not len(audio):
            return torch.zeros(
                0, count, audio.shape[2] // self.hop_length, dtype=torch.long, device=audio.device
            )
        codes = self._encode_pieces(audio, {})[:, :count]
        frames = torch.arange(codes.shape[2], device=codes.device) * self.hop_length
        return torch.where(frames < size, codes, PADDING)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, lengths: Lengths = None) -> Tensor:
        """Samples (B, 1, S) of codes, see `AudioCodec.decode`. Inside `streaming()` the next piece of a sound."""
        if self._stream is not None:
            return self._stream.decode(codes, lengths)
        valid = self.valid_frames(codes).tolist()
        sizes = self._decoded_lengths(lengths, valid)
        weight = self.decoder.conv_in.weight
        if not codes.numel():
            return assemble([weight.new_zeros(1, 0)] * len(valid), sizes, weight)
        return assemble(list(self._decode_pieces(codes.long(), {})), sizes, weight)

    def reconstruct(
        self, media: Tensor, *, lengths: Lengths = None, num_codebooks: int | None = None
    ) -> Tensor:
        """Samples (B, 1, S) after encoding and decoding sound of the same length; inside `streaming()` of whole frames."""
        if self._stream is not None:
            return self.decode(self.encode(media, lengths=lengths, num_codebooks=num_codebooks))
        return super().reconstruct(media, lengths=lengths, num_codebooks=num_codebooks)

    @contextmanager
    def streaming(self) -> Iterator[AudioStream]:
        """A context in which `encode` and `decode` take one batch of sounds in pieces of any size.

        The codes of the pieces, and of `finish()` at the end, are those of the whole. A sample comes out as soon as the
        last sample of its frame is known.

        Yields:
            The stream, whose `finish()` gives the codes of the samples that do not fill a frame.

        Raises:
            TokenloomError: If the tokenizer streams already.
        """
        if self._stream is not None:
            raise TokenloomError(
                "This tokenizer streams already; leave the first streaming() before the next."
            )
        self._stream = AudioStream(self)
        try:
            yield self._stream
        finally:
            self._stream = None


class AudioStream:
    """What a tokenizer remembers of the pieces of a sound."""

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        self.tokenizer = tokenizer
        self.heard: State = {}
        self.said: State = {}
        self.rest: Tensor | None = None
        self.count: int | None = None
        self.finished = False

    def encode(self, audio: Tensor, lengths: Lengths = None, num_codebooks: int | None = None) -> Tensor:
        """Codes (B, k, t) of the frames that a piece (B, 1, s) completes; t may be 0."""
        if lengths is not None:
            raise TokenloomError(
                "A stream takes pieces of whole batches; lengths=... belong outside of streaming()."
            )
        if self.finished:
            raise TokenloomError("This stream has been finished; open a new streaming() for the next sound.")
        tokenizer = self.tokenizer
        audio = tokenizer.check_audio(audio, empty=True)
        if self.rest is not None:
            if self.rest.shape[0] != audio.shape[0]:
                raise TokenloomError(
                    f"A stream keeps its batch size: it began with {self.rest.shape[0]} sounds, got {audio.shape[0]}."
                )
            audio = torch.cat([self.rest, audio], dim=2)
        self.count = tokenizer.count_codebooks(num_codebooks)
        ready = audio.shape[2] // tokenizer.hop_length * tokenizer.hop_length
        self.rest = audio[:, :, ready:]
        if not ready:
            return torch.zeros(len(audio), self.count, 0, dtype=torch.long, device=audio.device)
        return tokenizer._encode_pieces(audio[:, :, :ready], self.heard)[:, : self.count]

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Codes (B, k, 0 or 1) of the samples that are left, filled up with silence to a frame."""
        if self.rest is None:
            raise TokenloomError("Nothing was encoded in this stream, so there is nothing to finish.")
        fill = -self.rest.shape[2] % self.tokenizer.hop_length
        codes = self.encode(F.pad(self.rest[:, :, :0], (0, fill)), None, self.count)
        self.finished = True
        return codes

    def decode(self, codes: Tensor, lengths: Lengths = None) -> Tensor:
        """Samples (B, 1, t hop_length) of the next codes (B, k, t)."""
        if lengths is not None:
            raise TokenloomError(
                "A stream gives whole frames; cut its end yourself, lengths=... belong outside."
            )
        valid = self.tokenizer.valid_frames(codes)
        if bool((valid < codes.shape[2]).any()):
            raise TokenloomError(
                "A stream takes no padded codes; decode sounds of different lengths as a whole."
            )
        if not codes.numel():
            return self.tokenizer.decoder.conv_in.weight.new_zeros(len(codes), 1, 0)
        return self.tokenizer._decode_pieces(codes.long(), self.said)
