"""Whether the codes of an audio codec depend on its batch, on padding, or on being worked out piece by piece.

Works with any weights: what is held against one another are codes of the same network. Knows the contract of audio codecs.
Knows no codec by name, but for the small random ones of `small_codecs`.

Shapes: B sounds, S samples, K codebooks, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.evaluation.tables import markdown_table
from tokenloom.tokenizers.audio import AudioTokenizer
from tokenloom.tokenizers.audio_base import AudioCodec
from tokenloom.tokenizers.audio_hub import HubAudioTokenizer
from tokenloom.tokenizers.audio_mimo import MimoAudioTokenizer

_FRAMES = 23  # of the longest sound
_SHARES = (1.0, 0.62, 0.31)  # lengths of the three sounds
_GAIN = 2.0
_SPREADS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0)
_PIECE = 0.37  # frames of a piece, so that pieces and frames never agree

_CODES = {"codebook_size": 32}
_DAC_SHAPE = {"encoder_hidden_size": 4, "decoder_hidden_size": 32}
_MIMI = {
    "hidden_size": 16,
    "num_filters": 4,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 4,
    "upsample_groups": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
}
_XCODEC = {
    "acoustic_model_config": {
        "model_type": "dac",
        **_DAC_SHAPE,
        "downsampling_ratios": [8, 5, 4, 2],
        "upsampling_ratios": [8, 5, 4, 2],
        "hidden_size": 16,
    },
    "semantic_model_config": {
        "model_type": "hubert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    },
    "target_bandwidths": [0.25, 1.0],
}
_ENCODEC = {"num_filters": 4, "hidden_size": 8}
_ENCODEC_48 = {"sampling_rate": 48000, "audio_channels": 2, "normalize": True, "chunk_length_s": 1.0}
_MIMO = {
    "width": 32,
    "mels": 16,
    "encoder": (4, 2, 64),
    "decoder": (2, 2, 64),
    "vocoder": (2, 2, 32, 16),
    "skip": 2,
    "windows": ((-1, -1), (-1, -1), (4, 2)),
    "codebook_sizes": (32, 32, 16, 16),
}

Build = Callable[[], AudioCodec]


def small_codecs() -> dict[str, Build]:
    """Every codec that can be used, with the structure of the published one, few channels and random weights."""
    shape = {"widths": (4, 6, 8, 8, 12), "latent_channels": 8, "codebooks": 3, "codebook_size": 32}
    window = {"depth": 1, "heads": 2, "window": 5}
    return {
        "AudioTokenizer, convolutions": lambda: AudioTokenizer(**shape),
        "AudioTokenizer, with transformer": lambda: AudioTokenizer(**shape, transformer=window),
        "EnCodec 24 kHz": lambda: HubAudioTokenizer(
            "encodec", _ENCODEC | _CODES | {"target_bandwidths": [0.75, 1.5]}
        ),
        "EnCodec 48 kHz": lambda: HubAudioTokenizer("encodec", _ENCODEC | _CODES | _ENCODEC_48),
        "DAC": lambda: HubAudioTokenizer("dac", _DAC_SHAPE | _CODES | {"n_codebooks": 3}),
        "Mimi": lambda: HubAudioTokenizer("mimi", _MIMI | _CODES),
        "X-Codec": lambda: HubAudioTokenizer("xcodec", _XCODEC | _CODES),
        "MiMo-Audio": lambda: MimoAudioTokenizer(_MIMO),
    }


@torch.no_grad()
def liven(codec: AudioCodec) -> None:
    """Changes random weights so that codes differ from frame to frame, as those of a trained codec do.

    The encoder's convolutions get a gain, and codebooks, which may begin as zeros, random vectors of that size that gives the
    most different codes.
    """
    for name, value in codec.named_parameters():
        if "encoder" in name and value.ndim == 3:
            value.mul_(_GAIN)
    audio = _noise(codec, 1)
    best = max(_SPREADS, key=lambda spread: _codes_with(codec, spread, audio))
    _codes_with(codec, best, audio)


def _codes_with(codec: AudioCodec, spread: float, audio: Tensor) -> int:
    """Number of different codes after the codebooks got random vectors of a standard deviation."""
    generator = torch.Generator().manual_seed(0)
    for name, value in codec.named_buffers():
        if name.endswith(("embed", "embed_sum", "codebook")):
            value.copy_(spread * torch.randn(value.shape, generator=generator))
        elif name.endswith("cluster_usage"):
            value.fill_(1.0)
    return len(codec.encode(audio).unique())


def _noise(codec: AudioCodec, seed: int) -> Tensor:
    """Three sounds (3, 1, S) that are now loud and now quiet."""
    size = _FRAMES * codec.hop_length + codec.hop_length // 2
    audio = torch.randn(3, 1, size, generator=torch.Generator().manual_seed(seed))
    swell = 1 + (torch.arange(size) / (1.7 * codec.hop_length)).sin()
    return (0.3 * swell * audio).clamp(-1, 1).to(codec.device)


@torch.no_grad()
def conformance(codec: AudioCodec, seed: int = 0) -> dict[str, Any]:
    """Holds the codes of three sounds of different lengths against those of each alone.

    Args:
        codec: In evaluation mode.
        seed: Of the sounds.

    Returns:
        "lengths": whether a batch with `lengths` gives the codes of each sound alone; "padding": the share of codes that stay
        the same if the network sees the padding as sound; "beginning": the share of codes of the first half of a sound that
        are those of the whole; "streaming": whether pieces give the codes of the whole, or why it is refused; "sound": the
        largest difference of a decoded sample in a batch and alone, and "sound_streaming" the same of pieces; "codes":
        number of different codes, which must be more than a few for the rest to mean anything.
    """
    audio = _noise(codec, seed)
    size = audio.shape[2]
    sizes = [round(share * size) for share in _SHARES]
    alone = [codec.encode(audio[row : row + 1, :, :length]) for row, length in enumerate(sizes)]
    batch = codec.encode(audio, lengths=sizes)
    inside = torch.arange(size, device=codec.device) < torch.tensor(sizes, device=codec.device)[:, None, None]
    padded = codec.encode(audio * inside)
    half = codec.encode(audio[:1, :, : size // 2])
    made = codec.decode(batch, lengths=sizes)
    parts = [codec.decode(codes, lengths=length) for codes, length in zip(alone, sizes, strict=True)]
    return {
        "lengths": all(torch.equal(batch[r : r + 1, :, : c.shape[2]], c) for r, c in enumerate(alone)),
        "padding": _share(
            [
                (padded[r : r + 1, :, : c.shape[2]], c)
                for r, c in enumerate(alone)
                if c.shape[2] < batch.shape[2]
            ]
        ),
        "beginning": _share([(half[:, :, : _FRAMES // 2], alone[0][:, :, : _FRAMES // 2])]),
        "sound": max(
            float((made[r, 0, : part.shape[2]] - part[0, 0]).abs().max()) for r, part in enumerate(parts)
        ),
        "codes": len(torch.cat([codes.flatten() for codes in alone]).unique()),
        **_streaming(codec, audio[:1], alone[0]),
    }


def _share(pairs: list[tuple[Tensor, Tensor]]) -> float:
    equal = torch.cat([(one == other).flatten() for one, other in pairs])
    return float(equal.float().mean())


def _streaming(codec: AudioCodec, audio: Tensor, codes: Tensor) -> dict[str, Any]:
    try:
        with codec.streaming() as stream:
            pieces = [codec.encode(part) for part in audio.split(max(1, int(_PIECE * codec.hop_length)), 2)]
            pieces.append(stream.finish())
            sounds = [codec.decode(part) for part in codes.split(2, dim=2)]
    except TokenloomError as error:
        return {"streaming": None, "sound_streaming": None, "reason": str(error)}
    whole, made = codec.decode(codes), torch.cat(sounds, dim=2)
    same = torch.equal(torch.cat(pieces, dim=2), codes)
    return {"streaming": same, "sound_streaming": float((made - whole).abs().max()), "reason": ""}


def measure_small_codecs(seed: int = 0) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(name, `conformance`, or why the codec is refused) of all `small_codecs`."""
    for name, build in small_codecs().items():
        torch.manual_seed(seed)
        try:
            codec = build().eval()
        except TokenloomError as error:
            yield name, str(error)
            continue
        liven(codec)
        yield name, conformance(codec, seed)


def conformance_table(rows: dict[str, dict[str, Any] | str]) -> str:
    """The results of several codecs as markdown."""
    header = (
        "codec",
        "batched == single",
        "streaming == whole",
        "sound, batched",
        "codes that padding would keep",
        "codes of a beginning",
    )
    lines = []
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append((name, "refused", "refused", "-", "-", "-"))
            continue
        streaming = {True: "exact", False: "**no**", None: "refused"}[row["streaming"]]
        lines.append(
            (
                name,
                "exact" if row["lengths"] else "**no**",
                streaming,
                "exact" if row["sound"] == 0 else f"{row['sound']:.0e}",
                f"{100 * row['padding']:.0f} %",
                f"{100 * row['beginning']:.0f} %",
            )
        )
    return markdown_table(header, lines)
