"""`HubAudioTokenizer`: EnCodec, DAC, Mimi and X-Codec of transformers through the contract of `AudioCodec`.

Published codecs give other codes when a sound is padded in a batch; here sounds of different lengths run apart, in groups of
one length. Needs the extra `tokenloom[hub-codecs]`, which is imported when a tokenizer is built. Knows what the libraries'
classes are called. Knows nothing of their networks.

Legend: B batch, S samples, T frames, K codebooks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.tokenizers.audio_base import AudioCodec

_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Kind:
    """How one kind of codec is called.

    Attributes:
        model: Name of its class in transformers.
        rate: Name of its sample rate in its configuration.
        codebooks: Number of codebooks of a configuration.
        encode: Codes (B, K, T) of a model and samples (B, 1, S).
        decode: Samples (B, 1, S) of a model and codes (B, k, T).
        whole_frames: Whether the network wants whole frames; the end is filled with silence, as its own processor does.
        refuse: Why a configuration cannot keep the contract; `None` = it can.
    """

    model: str
    rate: str
    codebooks: Callable[[Any], int]
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    whole_frames: bool = False
    refuse: Callable[[Any], str | None] = lambda config: None


def _refuse_encodec(config: Any) -> str | None:
    if config.audio_channels != 1:
        return f"it takes {config.audio_channels} channels, and the contract is for one"
    if config.normalize:
        return "it scales sound by a loudness that its codes do not hold"
    if config.chunk_length_s is not None:
        return "it cuts sound into overlapping chunks, whose frames do not stand in a row"
    return None


def _rvq_codes(model: Any, vectors: Tensor) -> Tensor:
    """Codes (B, K, T) of all quantizers of EnCodec's kind; the first k are those of a lower bandwidth."""
    return model.quantizer.encode(vectors, None).transpose(0, 1)


def _encode_xcodec(model: Any, audio: Tensor) -> Tensor:
    return model.encode(audio, model.config.target_bandwidths[-1], return_dict=False)


KINDS: dict[str, Kind] = {
    "dac": Kind(
        "DacModel",
        "sampling_rate",
        lambda config: config.n_codebooks,
        lambda model, audio: model.encode(audio).audio_codes,
        lambda model, codes: model.decode(audio_codes=codes).audio_values[:, None],
        whole_frames=True,
    ),
    "encodec": Kind(
        "EncodecModel",
        "sampling_rate",
        lambda config: config.num_quantizers,
        lambda model, audio: _rvq_codes(model, model.encoder(audio)),
        lambda model, codes: model.decode(codes[None], [None]).audio_values,
        refuse=_refuse_encodec,
    ),
    "mimi": Kind(
        "MimiModel",
        "sampling_rate",
        lambda config: config.num_quantizers,
        lambda model, audio: model.encode(audio).audio_codes,
        lambda model, codes: model.decode(codes).audio_values,
    ),
    "xcodec": Kind(
        "XcodecModel",
        "sample_rate",
        lambda config: config.num_quantizers,
        _encode_xcodec,
        lambda model, codes: model.decode(codes).audio_values,
        whole_frames=True,
    ),
}
"""transformers' name of a model type -> how it is called."""


class HubAudioTokenizer(AudioCodec):
    """A codec of transformers as a tokenizer: one contract for all, exact lengths, codes that no padding changes.

    Args:
        model_type: "dac", "encodec", "mimi" or "xcodec".
        model_config: Arguments of its configuration class.
        weight_norm: Keep weights as direction and length, as DAC's own files do.
        frames: Frames of `layout`, for generators; 0 = about two seconds.

    Raises:
        TokenloomError: If transformers is missing, the type is unknown, or the configuration cannot keep the contract.
    """

    @register_to_config
    def __init__(
        self,
        model_type: str,
        model_config: dict[str, Any] | None = None,
        weight_norm: bool = False,
        frames: int = 0,
    ) -> None:
        super().__init__()
        config = make_config(model_type, model_config or {})
        self.kind = KINDS[model_type]
        if reason := self.kind.refuse(config):
            raise TokenloomError(f"This {model_type} model is not supported: {reason}. Use a mono model.")
        self.model = getattr(_transformers(), self.kind.model)(config)
        if weight_norm:
            self.model.apply_weight_norm()
        self._describe_model(frames)

    def _describe_model(self, frames: int) -> None:
        config = self.model.config
        rate = getattr(config, self.kind.rate)
        hop = _hop_length(config, rate)
        sizes = [config.codebook_size] * self.kind.codebooks(config)
        self.describe(rate, hop, sizes, frames or math.ceil(2 * rate / hop))

    @classmethod
    def of(cls, model: Any, frames: int = 0) -> HubAudioTokenizer:
        """The tokenizer of a model of transformers; it shares the model's weights."""
        config = model.config.to_dict()
        tokenizer = cls(model.config.model_type, config, frames=frames)
        tokenizer.model = model
        return tokenizer.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[Any] | None, **options: Any
    ) -> HubAudioTokenizer:
        """Loads what `save_pretrained` wrote, or a model of transformers by folder or hub name.

        Args:
            pretrained_model_name_or_path: A folder, or for instance "facebook/encodec_24khz", "kyutai/mimi",
                "descript/dac_16khz".
            **options: torch_dtype; the rest goes to transformers for its own models.
        """
        if pretrained_model_name_or_path is None:
            raise TokenloomError("from_pretrained needs a folder or the name of a model, got None.")
        folder = Path(pretrained_model_name_or_path)
        dtype = options.pop("torch_dtype", None)
        config = (
            json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        )
        if config.get("_class_name") == cls.__name__:
            settings = {key: value for key, value in config.items() if not key.startswith("_")}
            tokenizer = cls.from_weights(load_file(folder / _WEIGHTS), **settings)
        else:
            tokenizer = cls.of(
                _transformers().AutoModel.from_pretrained(pretrained_model_name_or_path, **options)
            )
        return tokenizer if dtype is None else nn.Module.to(tokenizer, dtype)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:  # type: ignore[override]
        """Writes configuration and weights; the weights have the names of the published files."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        weights = {name: value.contiguous().clone() for name, value in self.weights().items()}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_weights(
        cls,
        state: Mapping[str, Tensor],
        model_type: str,
        model_config: dict[str, Any],
        weight_norm: bool = False,
        frames: int = 0,
    ) -> HubAudioTokenizer:
        """Builds a tokenizer from weights with published names.

        Raises:
            TokenloomError: If keys are unknown or missing, or shapes do not fit; all of them are listed.
        """
        tokenizer = cls(model_type, model_config, weight_norm, frames)
        if weight_norm:
            odd = tokenizer.model.load_state_dict(dict(state), strict=False)
            missing, unknown = set(odd.missing_keys), set(odd.unexpected_keys)
        else:
            model, info = _quietly(
                type(tokenizer.model).from_pretrained,
                None,
                config=tokenizer.model.config,
                state_dict=dict(state),
                output_loading_info=True,
            )
            missing, unknown = set(info["missing_keys"]), set(info["unexpected_keys"])
            tokenizer.model = model
        if missing or unknown:
            raise TokenloomError(
                f"These weights are not those of this {model_type} configuration. Unknown keys ({len(unknown)}): "
                f"{', '.join(sorted(unknown)) or 'none'}. Missing keys ({len(missing)}): {', '.join(sorted(missing)) or 'none'}."
            )
        return tokenizer.eval()

    def weights(self) -> dict[str, Tensor]:
        """The weights by their published names."""
        state = self.model.state_dict()
        try:  # transformers 5 renames modules of some models when it loads them
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:
            return state
        return revert_weight_conversion(self.model, state)

    def _encode_equal(self, audio: Tensor, count: int) -> Tensor:
        samples = audio.shape[2]
        if self.kind.whole_frames:
            audio = F.pad(audio, (0, -samples % self.hop_length))
        codes = self.kind.encode(self.model, audio)[:, :count]
        frames = self.num_frames(samples)
        if codes.shape[2] < frames:
            raise TokenloomError(
                f"{self.kind.model} gives {codes.shape[2]} frames for {samples} samples, expected {frames}: its strides do not "
                "divide the sound evenly. Use a model whose samples a frame are the product of its strides."
            )
        return codes[..., :frames]

    def _decode_equal(self, codes: Tensor) -> Tensor:
        return self.kind.decode(self.model, codes)


def make_config(model_type: str, options: Mapping[str, Any]) -> Any:
    """The configuration object of transformers.

    Values that its class works out itself, such as the latent width of DAC, are set to those of `options`, if given.
    """
    library = _transformers()
    if model_type not in KINDS:
        raise unknown_name("codec of transformers", model_type, KINDS)
    options = {
        key: value for key, value in options.items() if key != "model_type" and not key.startswith("_")
    }
    config = library.AutoConfig.for_model(model_type, **options)
    for key, value in options.items():
        try:
            same = getattr(config, key, None) == value
            if not same and isinstance(value, (int, float, list)):
                setattr(config, key, value)
        except AttributeError:  # worked out, and not to be set
            continue
    return config


def _hop_length(config: Any, rate: int) -> int:
    """Samples a frame."""
    ratios = getattr(config, "frame_size", None) or getattr(config, "hop_length", None)
    return int(ratios) if ratios else round(rate / config.frame_rate)


def _quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a function of transformers, without its progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return function(*arguments, **options)
    finally:
        if shown:
            logging.enable_progress_bar()


def _transformers() -> Any:
    """The library, or an error that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise TokenloomError(
            "Codecs of the hub need transformers, which is not installed. Run: pip install 'tokenloom[hub-codecs]'"
        ) from error
    return transformers
