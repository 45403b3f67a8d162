"""NBP: next block over the codes of a video, hybrid (class or text ids, first block one a step) or from known frames.

Official constructor arguments read: n_head, n_layer, num_tokens, token_number_per_step, first_stage_vocab_size,
class_cond_dim, cond_token_num, hybrid, starts_with_bov. The hybrid vocabulary is: begin of video, k-1 learned rows, the
condition ids, the video codes; all of them are predicted. Codes here count from the first video code, so that predicted
special ids are negative. The layout is a line of tokens in time-row-column order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenloom.checkpoints._renames import DERIVABLE, Rename, check_keys, load, setting, unload
from tokenloom.errors import TokenloomError
from tokenloom.generators import NextBlockGenerator, orders
from tokenloom.generators.conditions import TokenCondition
from tokenloom.layouts import Layout

_ROOT = "transformer."
_EMPTY = f"{_ROOT}uncond_embedding"


def _renames(depth: int, conditional: bool) -> list[Rename]:
    table = [
        Rename.of("tokens.codes.weight", f"{_ROOT}tok_emb.weight"),
        Rename.of("transformer.positions.weight", f"{_ROOT}pos_emb", leading=1),
        Rename.of("heads.0.weight", f"{_ROOT}head.weight"),
    ]
    if conditional:
        table.append(Rename.of("condition.absent", f"{_ROOT}uncond_embedding"))
    for kind in ("weight", "bias"):
        table.append(Rename.of(f"transformer.norms.0.{kind}", f"{_ROOT}ln_f.{kind}"))
        for index in range(depth):
            ours, theirs = f"transformer.blocks.{index}", f"{_ROOT}blocks.{index}"
            parts = [f"{theirs}.attn.{name}.{kind}" for name in ("query", "key", "value")]
            table += [
                Rename.of(f"{ours}.norm1.{kind}", f"{theirs}.ln1.{kind}"),
                Rename.of(f"{ours}.norm2.{kind}", f"{theirs}.ln2.{kind}"),
                Rename.of(f"{ours}.attention.qkv.{kind}", *parts),
                Rename.of(f"{ours}.attention.out.{kind}", f"{theirs}.attn.proj.{kind}"),
                Rename.of(f"{ours}.mlp.up.{kind}", f"{theirs}.mlp.0.{kind}"),
                Rename.of(f"{ours}.mlp.down.{kind}", f"{theirs}.mlp.2.{kind}"),
            ]
    return table


def _transformer(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": state[f"{_ROOT}tok_emb.weight"].shape[1],
        "heads": setting(family, config, "n_head"),
        "depth": setting(family, config, "n_layer"),
        "mlp": "gelu",
        "mlp_width": state[f"{_ROOT}blocks.0.mlp.0.weight"].shape[0],
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "rope": False,
        "learned_positions": state[f"{_ROOT}pos_emb"].shape[1],
    }


def from_official(family: str, state: dict[str, Tensor], config: dict[str, Any]) -> NextBlockGenerator:
    """Builds the generator; weights of the tokenizer that a training checkpoint also holds are left out."""
    block, hybrid = setting(family, config, "token_number_per_step"), bool(config.get("hybrid", False))
    table = _renames(setting(family, config, "n_layer"), hybrid)
    ignored = (*DERIVABLE, r"first_stage_model\..*", *(() if hybrid else (_EMPTY.replace(".", r"\."),)))
    check_keys(family, state, table, ignored)
    absent = state[_EMPTY].shape[0] if hybrid else 0
    ids = config.get("cond_token_num", absent)
    if hybrid != bool(config.get("starts_with_bov", hybrid)) or hybrid != (ids > 0):
        raise TokenloomError(
            "An NBP model is either hybrid, with condition tokens and a begin-of-video token, or has none of the three; "
            f"got hybrid={hybrid}, cond_token_num={ids}, starts_with_bov={config.get('starts_with_bov')}."
        )
    codes = setting(family, config, "first_stage_vocab_size")
    layout = Layout.line(setting(family, config, "num_tokens"))
    condition: dict[str, Any] = {"kind": "none", "length": 0}
    special = 0
    if hybrid:
        special = block + setting(family, config, "class_cond_dim")
        condition = {"kind": "tokens", "vocabulary": special - block, "ids": ids, "offset": block}
    model = NextBlockGenerator(
        orders.blocks(layout, block, sequential_first=hybrid).to_config(),
        codes,
        _transformer(family, state, config),
        condition,
        causal_prefix=True,
        share_head=False,
        special_tokens=special,
        rule_config={"plan": "groups" if hybrid else "shift"},
    )
    return load(model, family, state, table, ignored)


def to_official(family: str, module: nn.Module) -> dict[str, Tensor]:
    """The official state dict."""
    conditional = isinstance(module.get_submodule("condition"), TokenCondition)
    depth = len(module.get_submodule("transformer.blocks"))  # type: ignore[arg-type]
    official = unload(module, _renames(depth, conditional))
    if not conditional:
        table = official[f"{_ROOT}tok_emb.weight"]
        official[_EMPTY] = table.new_zeros(0, table.shape[1])
    return official
