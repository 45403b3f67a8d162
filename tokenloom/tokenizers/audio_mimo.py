"""`MimoAudioTokenizer`: MiMo-Audio's tokenizer of speech and sound, 25 frames a second.

Knows samples, the mel spectrogram in front, and residual codebooks of different sizes. Knows nothing of the language model
(`tokenloom.generators.patches`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tokenloom.errors import check_options
from tokenloom.tokenizers.audio_base import PADDING, AudioCodec
from tokenloom.tokenizers.mimo_layers import MimoConfig, MimoDecoder, MimoEncoder
from tokenloom.tokenizers.quantizers import VQ, Residual
from tokenloom.tokenizers.quantizers.base import Quantizer

_QUIETEST = 1e-7  # the least energy of a mel band


class MimoAudioTokenizer(AudioCodec):
    """Mono sound to K codes a frame and back (MiMo-Audio, 2025); the language model uses the first 8 codebooks of 20.

    A sound of S samples has one mel frame at its very end, so that T is `num_frames(S)`, often one more than S / hop_length.
    Sounds of different lengths run apart: published batches let neighbours and padding into the last frames and the norms.

    Args:
        model_config: Fields of `MimoConfig`; `None` = the published model.
        frames: Frames of `layout`, for generators.
    """

    @register_to_config
    def __init__(self, model_config: dict[str, Any] | None = None, frames: int = 50) -> None:
        super().__init__()
        check_options(MimoConfig, model_config or {}, "option of the tokenizer")
        self.shape = MimoConfig(**(model_config or {}))
        shape = self.shape
        self.mel_hop = shape.hop
        hop = shape.hop * shape.upsample[1] * shape.pool
        self.describe(shape.sample_rate, hop, shape.codebook_sizes, frames)
        self.encoder, self.decoder = MimoEncoder(shape), MimoDecoder(shape)
        layers: list[Quantizer] = [
            VQ(size, shape.width, normalize=False, ema_decay=0.99, kmeans_init=50)
            for size in shape.codebook_sizes
        ]
        self.quantizer = Residual(layers)

    def num_frames(self, samples: int) -> int:
        """Frames T of a sound of `samples` samples."""
        return self.shape.frames(samples // self.mel_hop + 1)[1]

    def mel(self, audio: Tensor) -> Tensor:
        """Log-mel spectrogram (B, L, M) of samples (B, 1, S), L = S // hop + 1."""
        from torchaudio.transforms import MelSpectrogram

        shape = self.shape
        frames = audio.shape[2] // shape.hop + 1
        audio = F.pad(
            audio, (0, max(0, shape.fft // 2 + 1 - audio.shape[2]))
        )  # what reflection at the edges needs
        transform = MelSpectrogram(
            shape.sample_rate,
            shape.fft,
            shape.window_size,
            shape.hop,
            shape.bounds[0] or 0.0,
            shape.bounds[1],
            n_mels=shape.mels,
            power=1.0,
        ).to(audio.device)
        energy = transform(audio[:, 0].float())[:, :, :frames]
        return energy.clamp(min=_QUIETEST).log().transpose(1, 2)

    def features(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, T, D) before quantization, and their number (B,), of a padded batch (B, L, M), as published."""
        return self.encoder(mel, lengths)

    def encode_mel(self, mel: Tensor, lengths: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Codes (B, k, T) of a padded batch of log-mel spectrograms, with all the flaws of published batches.

        Args:
            mel: (B, L, M).
            lengths: LongTensor (B,) frames that count.
            num_codebooks: Use only the first k codebooks; `None` = all.
        """
        vectors, frames = self.features(mel, lengths)
        codes = self.quantizer.encode(vectors).codes[..., : self.count_codebooks(num_codebooks)]
        ended = torch.arange(codes.shape[1], device=codes.device) >= frames[:, None]
        return codes.masked_fill(ended[:, :, None], PADDING).transpose(1, 2)

    def sound(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Samples (B, 1, S) of a padded batch of quantized vectors (B, T, D), with all the flaws of published batches."""
        return self.decoder(vectors, lengths)

    def _lengths_of(self, values: Tensor) -> Tensor:
        return torch.full((values.shape[0],), values.shape[1], device=values.device)

    def _encode_equal(self, audio: Tensor, count: int) -> Tensor:
        mel = self.mel(audio)
        return self.encode_mel(mel, self._lengths_of(mel), count)

    def _decode_equal(self, codes: Tensor) -> Tensor:
        vectors = self.quantizer.decode(codes.transpose(1, 2))
        return self.sound(vectors, self._lengths_of(vectors))


def plain(config: MimoConfig) -> dict[str, Any]:
    """The fields of a configuration as JSON-able values."""
    return {
        key: [list(v) if isinstance(v, tuple) else v for v in value]
        if isinstance(value, (tuple, list))
        else value
        for key, value in asdict(config).items()
    }
