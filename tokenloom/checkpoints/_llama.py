"""What the published models built from LlamaGen's layers share: names of blocks, conditions and transformer options.

Knows the names and constructor arguments, not the orders and heads of the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenloom.checkpoints._renames import Rename, setting


def transformer_options(
    family: str, state: Mapping[str, Tensor], config: Mapping[str, Any], taps: tuple[int, ...]
) -> dict[str, Any]:
    """Fields of `TransformerConfig`; `taps[-1]` is the depth."""
    return {
        "width": state["tok_embeddings.weight"].shape[1],
        "heads": setting(family, config, "n_head"),
        "kv_heads": config.get("n_kv_head"),
        "depth": taps[-1],
        "taps": list(taps),
        "mlp_width": state["layers.0.feed_forward.w1.weight"].shape[0],
        "norm_eps": config.get("norm_eps", 1e-5),
        "rope_base": float(config.get("rope_base", 10000)),
        "dropout": config.get("resid_dropout_p", 0.0),
    }


def condition_options(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """A class table, with a null row if labels were dropped in training, or caption features."""
    if config.get("model_type", "c2i") == "t2i":
        length, features = state["cls_embedding.uncond_embedding"].shape
        return {"kind": "features", "features": features, "length": length}
    rows = state["cls_embedding.embedding_table.weight"].shape[0]
    null = config.get("class_dropout_prob", 0.1) > 0
    return {"kind": "class", "num_classes": rows - null, "null_class": null}


def generator_options(
    family: str, state: Mapping[str, Tensor], config: Mapping[str, Any], taps: tuple[int, ...]
) -> dict[str, Any]:
    """Arguments of a `Generator`, without its order."""
    return {
        "vocab_size": state["tok_embeddings.weight"].shape[0],
        "transformer_config": transformer_options(family, state, config, taps),
        "condition_config": condition_options(family, state, config),
        "causal_prefix": True,
        "prefix_rope": "zero",
        "share_head": False,
    }


def renames(depth: int, captions: bool, heads: Mapping[str, str]) -> list[Rename]:
    """The table of a model of `depth` layers.

    Args:
        depth: Number of layers.
        captions: Whether the condition is caption features, not a class table.
        heads: Official name of the norm to the official name of the output matrix, in the order of our heads.
    """
    table = [Rename.of("tokens.codes.weight", "tok_embeddings.weight")]
    if captions:
        table += [
            Rename.of("condition.absent", "cls_embedding.uncond_embedding"),
            Rename.of("condition.up.weight", "cls_embedding.cap_proj.fc1.weight"),
            Rename.of("condition.down.weight", "cls_embedding.cap_proj.fc2.weight"),
        ]
    else:
        table.append(Rename.of("condition.table.weight", "cls_embedding.embedding_table.weight"))
    for index in range(depth):
        ours, theirs = f"transformer.blocks.{index}", f"layers.{index}"
        table += [
            Rename.of(f"{ours}.attention.qkv.weight", f"{theirs}.attention.wqkv.weight"),
            Rename.of(f"{ours}.attention.out.weight", f"{theirs}.attention.wo.weight"),
            Rename.of(
                f"{ours}.mlp.up.weight",
                f"{theirs}.feed_forward.w1.weight",
                f"{theirs}.feed_forward.w3.weight",
            ),
            Rename.of(f"{ours}.mlp.down.weight", f"{theirs}.feed_forward.w2.weight"),
            Rename.of(f"{ours}.norm1.weight", f"{theirs}.attention_norm.weight"),
            Rename.of(f"{ours}.norm2.weight", f"{theirs}.ffn_norm.weight"),
        ]
    for index, (norm, output) in enumerate(heads.items()):
        table += [
            Rename.of(f"transformer.norms.{index}.weight", f"{norm}.weight"),
            Rename.of(f"heads.{index}.weight", f"{output}.weight"),
        ]
    return table
