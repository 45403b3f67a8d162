"""MiMo-Audio: its audio tokenizer, and the patch encoder and decoder of its language model.

Official arguments are read as they are published, alone or under "mimo". Sizes that the weights show are taken from them.
Of the language model's file only the patch networks and the text table are wanted: leave out `model.layers.*`,
`model.norm.*` and `lm_head.*`, which are those of a Qwen2 of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload
from tokenloom.errors import unknown_name
from tokenloom.generators.patches import PatchNetworks
from tokenloom.tokenizers.audio_mimo import MimoAudioTokenizer, plain
from tokenloom.tokenizers.mimo_layers import MimoConfig

_DERIVABLE = (r".*\.inv_freq",)
_NORMS = {"LayerNorm": "layer", "RMSNorm": "rms"}
_SHORT = {  # names in the published config.json -> those that are read
    "local_attn_heads": "local_heads",
    "group_size": "group",
    "delay_pattern": "delay",
    "input_full_attention": "full_attention",
}
_CHOICES = {
    "rope_type": ("default",),
    "activation_function": ("gelu",),
    "vocoder_padding": ("same",),
    "ln_type": tuple(_NORMS),
}
_BOOK = r"encoder.quantizer.vq.layers.\1._codebook."
_TOKENIZER = (
    (r"\.layers\.norm\.", ".layer_norm."),
    (r"\.layers\.blocks\.", ".layers."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.mlp\.up\.", ".fc1."),
    (r"\.mlp\.down\.", ".fc2."),
    (r"^encoder\.down\.", "encoder.down_sample_layer.0."),
    (r"^encoder\.down_norm\.", "encoder.down_sample_norm."),
    (r"^decoder\.up([12])\.", r"decoder.dconv\1."),
    (r"\.vocoder\.embed\.", ".vocoder.embeddings."),
    (r"\.vocoder\.out\.", ".vocoder.head.out."),
    (r"\.vocoder\.window$", ".vocoder.head.istft.window"),
    (r"^quantizer\.layers\.(\d+)\.codebook$", _BOOK + "embed"),
    (r"^quantizer\.layers\.(\d+)\.ema_sum$", _BOOK + "embed_avg"),
    (r"^quantizer\.layers\.(\d+)\.ema_count$", _BOOK + "cluster_size"),
    (r"^quantizer\.layers\.(\d+)\.initialized$", _BOOK + "inited"),
)
_PATCH = (
    (r"^(encoder|decoder)\.layers\.blocks\.", r"\1.layers."),
    (r"^(encoder|decoder)\.layers\.norms\.0\.", r"\1.norm."),
    (r"\.norm1\.", ".input_layernorm."),
    (r"\.norm2\.", ".post_attention_layernorm."),
    (r"\.attention\.out\.", ".self_attn.o_proj."),
    (r"\.mlp\.down\.", ".mlp.down_proj."),
    (r"^text\.", "model.embed_tokens."),
    (r"^tables\.", "speech_embeddings."),
    (r"^encoder\.out\.", "speech_group_downcast."),
    (r"^decoder\.start\.", "hidden_states_downcast."),
    (r"^decoder\.widen\.", "speech_embeddings_to_local."),
    (r"^decoder\.heads\.", "local_transformer_lm_heads."),
    (r"^encoder\.", "input_local_transformer."),
    (r"^decoder\.", "local_transformer."),
)
_QKV = re.compile(r"(.*)\.attention\.qkv\.(weight|bias)")
_GATED = re.compile(r"(.*)\.mlp\.up\.weight")


def _official(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, text in table:
        name = re.sub(pattern, text, name)
    return name


def _renames(family: str, module: nn.Module) -> list[Rename]:
    table = _TOKENIZER if family == "mimo_audio_tokenizer" else _PATCH
    renames = []
    for name in module.state_dict():
        if found := _QKV.fullmatch(name):
            stem = _official(found[1] + ".", table) + "self_attn."
            renames.append(Rename.of(name, *(f"{stem}{part}_proj.{found[2]}" for part in "qkv")))
        elif table is _PATCH and (found := _GATED.fullmatch(name)):
            stem = _official(found[1] + ".", table) + "mlp."
            renames.append(Rename.of(name, f"{stem}gate_proj.weight", f"{stem}up_proj.weight"))
        else:
            renames.append(
                Rename.of(name, _official(name, table), leading=int(name.endswith(".initialized")))
            )
    return renames


def _depth(state: Mapping[str, Tensor], stem: str) -> int:
    pattern = re.compile(re.escape(stem) + r"\.layers\.(\d+)\.")
    return len({found[1] for name in state if (found := pattern.match(name))})


def _layers(state: Mapping[str, Tensor], stem: str, heads: int) -> list[int]:
    """Depth, heads and hidden width of a stack of blocks."""
    hidden = tensor("mimo_audio_tokenizer", state, f"{stem}.layers.0.fc1.weight").shape[0]
    return [_depth(state, stem), heads, hidden]


def _window(config: Mapping[str, Any], name: str, default: tuple[int, int]) -> list[int]:
    return list(config.get(name) or default)


def _tokenizer(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> MimoAudioTokenizer:
    for key, known in _CHOICES.items():
        if key in config and config[key] not in known:
            raise unknown_name(f"{key} of MiMo's tokenizer", config[key], known)
    conv1, embed = (
        tensor(family, state, "encoder.conv1.weight"),
        tensor(family, state, "decoder.vocoder.embeddings.weight"),
    )
    up = tensor(family, state, "decoder.dconv2.conv.weight")
    down = state.get("encoder.down_sample_layer.0.weight")
    books = len({name for name in state if name.endswith("._codebook.embed")})
    sizes = [
        tensor(family, state, f"encoder.quantizer.vq.layers.{index}._codebook.embed").shape[0]
        for index in range(books)
    ]
    skip = config.get("encoder_skip_layer_id")
    shape = MimoConfig(
        width=conv1.shape[0],
        mels=conv1.shape[1],
        encoder=_layers(state, "encoder", setting(family, config, "encoder_attention_heads")),
        decoder=_layers(state, "decoder", setting(family, config, "decoder_attention_heads")),
        vocoder=[
            *_layers(state, "decoder.vocoder", config.get("vocoder_attention_heads", 4)),
            embed.shape[0],
        ],
        skip=skip or 0,
        causal=(bool(config.get("encoder_causal", False)), bool(config.get("decoder_causal", True))),
        windows=(
            _window(config, "encoder_attn_window_size", (-1, -1)),
            _window(config, "decoder_attn_window_size", (-1, -1)),
            _window(config, "vocoder_attn_window_size", (40, 10)),
        ),
        kernel=conv1.shape[2],
        stride=config.get("stride_size", 2),
        upsample=(up.shape[2], config.get("decoder_stride_size", 2)),
        pool=1 if down is None else down.shape[2],
        fft=tensor(family, state, "decoder.vocoder.head.out.weight").shape[0] - 2,
        hop=config.get("hop_length", 240),
        window_size=config.get("window_size", 1024),
        bounds=(config.get("fmin", 0), config.get("fmax")),
        sample_rate=config.get("sampling_rate", 24000),
        codebook_sizes=sizes,
        rope_base=float(config.get("rope_theta", 10000)),
        norm=_NORMS[config.get("ln_type", "LayerNorm")],
    )
    return MimoAudioTokenizer(plain(shape))


def _patches(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> PatchNetworks:
    config = {_SHORT.get(key, key): value for key, value in config.items()}
    books = len({name for name in state if name.startswith("speech_embeddings.")})
    tables = [tensor(family, state, f"speech_embeddings.{index}.weight") for index in range(books)]
    text = tensor(family, state, "model.embed_tokens.weight")
    heads = setting(family, config, "local_heads")
    delay = setting(family, config, "delay")
    delays = [int(d) for d in delay.split("-")] if isinstance(delay, str) else list(delay)
    base, eps = float(config.get("rope_theta", 640000.0)), float(config.get("rms_norm_eps", 1e-6))

    def transformer(stem: str) -> dict[str, Any]:
        up = tensor(family, state, f"{stem}.layers.0.mlp.up_proj.weight")
        return {
            "width": up.shape[1],
            "heads": heads,
            "depth": _depth(state, stem),
            "mlp_width": up.shape[0],
            "norm_eps": eps,
            "qkv_bias": True,
            "rope_halves": True,
            "rope_base": base,
        }

    return PatchNetworks(
        frames=setting(family, config, "group"),
        codebook_sizes=[table.shape[0] - 1 for table in tables],
        width=text.shape[1],
        encoder_config=transformer("input_local_transformer"),
        decoder_config=transformer("local_transformer"),
        order={"name": "delay", "options": {"delays": delays}},
        causal_encoder=not config.get("full_attention", True),
        text_vocab=text.shape[0],
        no_text=setting(family, config, "empty_idx"),
    )


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """Builds the tokenizer, or the patch networks, of MiMo-Audio's weights."""
    inside = config.get("mimo")
    config = dict(inside) if isinstance(inside, Mapping) else config
    build = _tokenizer if family == "mimo_audio_tokenizer" else _patches
    module: nn.Module = build(family, state, config)
    for name in [name for name in state if name.endswith(".self_attn.k_proj.weight")]:
        if family == "mimo_audio_tokenizer":  # keys have no bias as published, ours has one of zeros
            state.setdefault(name.replace("weight", "bias"), torch.zeros_like(state[name][:, 0]))
    return load(module, family, state, _renames(family, module), _DERIVABLE)


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    state = unload(module, _renames(family, module))
    if family == "mimo_audio_tokenizer":
        state = {name: value for name, value in state.items() if not name.endswith(".k_proj.bias")}
    return state
