"""D-AR's tokenizer, whose codes condition the steps of a diffusion.

Official arguments read: of the model (in `config`, or in its "dar" entry) num_all_queries, num_denoising_steps,
num_query_groups, queries_per_step, sampling_resolution, rope_base_len, and of its diff_decoder data_std, time_shift, repa_layer
and rope_base_len; beside them head_dim (64) and repa_grid (16). Every other size follows from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._renames import Rename, load, setting, tensor, unload, unwrap
from tokenloom.tokenizers.image_step import ImageStepTokenizer

_USED = "quantize.codebook_used"  # a history of chosen codes, kept for a log
_NET = "diff_decoder.net."
_LINEAR = ("weight", "bias")
_GATES_SCALES_SHIFTS = (2, 5, 1, 4, 0, 3)  # official: shift, scale and gate of attention, then of the MLP


def _pairs(ours: str, official: str, **options: Any) -> list[Rename]:
    return [Rename.of(f"{ours}.{name}", f"{official}.{name}", **options) for name in _LINEAR]


def _attention(ours: str, official: str, cross: bool) -> list[Rename]:
    renames = [
        *_pairs(f"{ours}.out", f"{official}.proj"),
        *_pairs(f"{ours}.q_norm", f"{official}.q_norm"),
        *_pairs(f"{ours}.k_norm", f"{official}.k_norm"),
    ]
    for name in _LINEAR:
        q, k, v = (f"{official}.{letter}.{name}" for letter in "qkv")
        if cross:
            renames += [Rename.of(f"{ours}.q.{name}", q), Rename.of(f"{ours}.kv.{name}", k, v)]
        else:
            renames.append(Rename.of(f"{ours}.qkv.{name}", q, k, v))
    return renames


def _mlp(ours: str, official: str) -> list[Rename]:
    return [
        *_pairs(f"{ours}.mlp.up", f"{official}.mlp.fc1"),
        *_pairs(f"{ours}.mlp.down", f"{official}.mlp.fc2"),
    ]


def _time(ours: str, official: str) -> list[Rename]:
    return [*_pairs(f"{ours}.up", f"{official}.mlp.0"), *_pairs(f"{ours}.down", f"{official}.mlp.2")]


def _block(ours: str, official: str) -> list[Rename]:
    """A block of the encoder or of the condition tokens."""
    renames = [*_attention(f"{ours}.attention", f"{official}.attention", False), *_mlp(ours, official)]
    for number in (1, 2):
        renames += _pairs(f"{ours}.norm{number}", f"{official}.norm{number}")
        renames.append(Rename.of(f"{ours}.scale{number}", f"{official}.gate{number}"))
    return renames


def _painter(module: ImageStepTokenizer) -> list[Rename]:
    shape = module.shape
    renames = [
        *_pairs("painter.from_condition", f"{_NET}cond_mlp"),
        Rename.of("painter.patches.weight", f"{_NET}conv_in.weight", trailing=2),
        Rename.of("painter.patches.bias", f"{_NET}conv_in.bias"),
    ]
    for index in range(shape.depth):
        ours, theirs = f"painter.blocks.{index}", f"{_NET}blocks.{index}"
        renames += [
            *_attention(f"{ours}.look", f"{theirs}.cross_attn", True),
            *_attention(f"{ours}.block.attention", f"{theirs}.attention", False),
            *_mlp(f"{ours}.block", theirs),
            *_pairs(f"{ours}.condition.0", f"{theirs}.cond_embed.0"),
            *_pairs(f"{ours}.condition.2", f"{theirs}.cond_embed.2"),
            *_pairs(f"{ours}.block.modulation", f"{theirs}.adaLN_modulation.1", blocks=_GATES_SCALES_SHIFTS),
        ]
        if not shape.shared_time:
            renames += _time(f"{ours}.time", f"{theirs}.time_embed")
    if shape.shared_time:
        renames += _time("painter.time", f"{_NET}time_embed")
    if shape.modulated_head:
        renames += _pairs("painter.head_modulation", f"{_NET}linear_out.adaLN_modulation.1")
        renames += _pairs("painter.head", f"{_NET}linear_out.linear")
    else:
        renames.append(Rename.of("painter.head.weight", f"{_NET}conv_out.weight", trailing=2))
        renames.append(Rename.of("painter.head.bias", f"{_NET}conv_out.bias"))
    for layer in (0, 2, 4) if shape.align_width else ():
        renames += _pairs(f"painter.align.{layer}", f"{_NET}repa_out.{layer}")
    return renames


def _renames(module: ImageStepTokenizer) -> list[Rename]:
    renames = [
        *_pairs("encoder.patches", "patchify"),
        Rename.of("encoder.queries", "query_embedding.weight"),
        Rename.of("encoder.to_code.weight", "quant_in_conv.weight", trailing=2),
        Rename.of("quantizer.codebook", "quantize.embedding.weight"),
        Rename.of("conditioner.from_code.weight", "quant_out_conv.weight", trailing=2),
        Rename.of("conditioner.positions", "decoder_embedding.weight"),
        *_painter(module),
    ]
    if module.encoder.config.rank:
        renames += _pairs("encoder.from_rank", "query_linear")
    for index in range(len(module.encoder.blocks)):
        renames += _block(f"encoder.blocks.{index}", f"encoder_layers.{index}")
    for index in range(len(module.conditioner.blocks)):
        renames += _block(f"conditioner.blocks.{index}", f"decoder_layers.{index}")
    return renames


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for key in state if (found := pattern.match(key))), default=-1)


def _stack(
    state: Mapping[str, Tensor], prefix: str, width: int, head: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of `QueryConfig` of a transformer of this width."""
    depth = _depth(state, prefix)
    hidden = state.get(f"{prefix}0.mlp.fc1.weight")
    return {
        "width": width,
        "depth": depth,
        "heads": max(1, width // head),
        "mlp_width": None if hidden is None else hidden.shape[0],
        "rope_base": float(settings.get("rope_base_len") or 10000.0),
    }


def _painter_config(
    family: str, state: Mapping[str, Tensor], settings: Mapping[str, Any], head: int, grid: int
) -> dict[str, Any]:
    width, area = tensor(family, state, f"{_NET}conv_in.weight").shape[:2]
    align = state.get(f"{_NET}repa_out.0.weight")
    last = state.get(f"{_NET}repa_out.4.weight")
    return _stack(state, f"{_NET}blocks.", width, head, settings) | {
        "patch": round((area // 3) ** 0.5),
        "deviation": float(settings.get("data_std") or 1.0),
        "shift": float(settings.get("time_shift") or 1.0),
        "shared_time": f"{_NET}time_embed.mlp.0.weight" in state,
        "modulated_head": f"{_NET}linear_out.linear.weight" in state,
        "align_layer": int(settings.get("repa_layer", 8)),
        "align_width": 0 if align is None else align.shape[0],
        "align_features": 0 if last is None else last.shape[0],
        "align_grid": grid,
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> ImageStepTokenizer:
    """Builds the tokenizer of "dar_tokenizer" weights; its `decode` does not clamp, as published.

    Weights that lie under "ema", "model" or "state_dict", as in published files, are taken from there.
    """
    state = unwrap(state)
    settings = config.get("dar") or config
    head = int(config.get("head_dim") or settings.get("head_dim") or 64)
    patches = tensor(family, state, "patchify.weight")
    codes, dim = tensor(family, state, "quantize.embedding.weight").shape
    queries = tensor(family, state, "query_embedding.weight")
    tokens = tensor(family, state, "quant_out_conv.weight").shape[0]
    encoder = _stack(state, "encoder_layers.", patches.shape[0], head, settings)
    module = ImageStepTokenizer(
        image_size=settings.get("sampling_resolution") or 256,
        registers=int(setting(family, settings, "num_all_queries")),
        steps=int(setting(family, settings, "num_denoising_steps")),
        groups=int(setting(family, settings, "num_query_groups")),
        group_size=settings.get("queries_per_step"),
        encoder_config=encoder
        | {"patch": patches.shape[-1], "rank": queries.shape[1] if "query_linear.weight" in state else None},
        condition_config=_stack(state, "decoder_layers.", tokens, head, settings),
        painter_config=_painter_config(
            family, state, settings.get("diff_decoder") or {}, head, int(config.get("repa_grid") or 16)
        ),
        quantizer_options={"codebook_size": codes, "dim": dim},
        rows=queries.shape[0],
        clamp=False,
    )
    load(module, family, state, _renames(module), derivable=(re.escape(_USED),))
    kept: Any = module  # a statistic of training that no tensor of ours holds
    kept.official_used = state.get(_USED)
    return module


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict, with the history of chosen codes that it came with."""
    tokenizer: Any = module
    used: Tensor | None = getattr(tokenizer, "official_used", None)
    return unload(tokenizer, _renames(tokenizer)) | ({} if used is None else {_USED: used.clone()})
