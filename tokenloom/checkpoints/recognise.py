"""What the names and shapes of official weights tell: the family, and arguments of the official constructor.

Says only what is unambiguous; what is not has to be given. Knows names, not how anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenloom.errors import TokenloomError

State = Mapping[str, Tensor]

_SIGNATURES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("nar_video",), (r"abs_pe$", r"output_R\.")),
    (("nar",), (r"medusa_output\.",)),
    (("par",), (r"spe_tok_embeddings\.",)),
    (("llamagen", "dar"), (r"tok_embeddings\.weight$", r"layers\.0\.attention\.wqkv\.")),
    (("var", "mvar"), (r"pos_1LC$", r"lvl_embed\.")),
    (("nbp",), (r"transformer\.tok_emb\.weight$", r"transformer\.blocks\.0\.attn\.key\.")),
    (("himar",), (r"cond_diffloss\.",)),
    (("mar",), (r"diffloss\.net\.", r"encoder_pos_embed_learned$")),
    (("xar",), (r"z_proj\.", r"time_embed\.mlp\.")),
    (("llamagen_vq",), (r"encoder\.conv_blocks\.0\.res\.", r"quantize\.embedding\.weight$")),
    (("infinity_bsq",), (r"encoder\.conv_in\.conv\.", r"encoder\.down\.0\.")),
    (("infinity_bsq",), (r"encoder\.down\.0\.", r"quantizer?\.lfq\.mask$")),  # names without wrappers
    (("himtok",), (r"latent_tokens$", r"quantize\.embedding_proj\.")),
    (("tatitok",), (r"latent_tokens$", r"decoder\.text_")),
    (("titok",), (r"latent_tokens$", r"encoder\.latent_token_positional_embedding$")),
    (("var_vq",), (r"encoder\.down\.0\.", r"quantize\.embedding\.weight$", r"quant_conv\.")),
    (("maskgit_vqgan",), (r"encoder\.down\.0\.block\.", r"quantize\.embedding\.weight$")),
    (("flextok",), (r"encoder\.module_dict\.enc_",)),
    (("dar_tokenizer",), (r"diff_decoder\.", r"decoder_layers\.0\.attention\.")),
    (("nbp_video",), (r"encoder_layers\.0\.conv\.", r"decoder_layers\.0\.")),
    (("dac_original",), (r"quantizer\.quantizers\.0\.in_proj\.", r"encoder\.block\.0\.weight_g$")),
    (("dac",), (r"quantizer\.quantizers\.0\.in_proj\.", r"encoder\.block\.0\.res_unit1\.")),
    (("mimi",), (r"quantizer\.semantic_residual_vector_quantizer\.",)),
    (("xcodec",), (r"semantic_model\.", r"acoustic_encoder\.")),
    (("encodec",), (r"quantizer\.layers\.0\.codebook\.", r"encoder\.layers\.0\.")),
    (("mimo_audio_tokenizer",), (r"encoder\.quantizer\.vq\.layers\.0\.", r"decoder\.vocoder\.")),
    (("mimo_audio_patch",), (r"input_local_transformer\.", r"speech_embeddings\.")),
)
"""Families and the beginnings of names that their weights hold; the first row that fits counts."""

_LLAMA = ("n_layer", "n_head", "block_size")
_HALVES = ("img_size", "encoder_num_heads", "decoder_num_heads")
_NEEDS: dict[str, tuple[str, ...]] = {
    "dar": _LLAMA,
    "himar": (*_HALVES, "cond_scale"),
    "llamagen": _LLAMA,
    "mar": _HALVES,
    "mvar": ("patch_nums",),
    "nar": _LLAMA,
    "nar_video": ("n_layer", "n_head", "latent_shape"),
    "nbp": ("n_layer", "n_head", "num_tokens", "token_number_per_step", "first_stage_vocab_size"),
    "nbp_video": ("fsq_levels",),
    "par": (*_LLAMA, "ar_token_num"),
    "var": ("patch_nums",),
    "xar": ("encoder_num_heads", "decoder_num_heads"),
}
"""Arguments of the official constructors without which weights cannot be read."""

_NEEDS_IF: dict[str, dict[str, tuple[str, ...]]] = {"nbp": {"hybrid": ("class_cond_dim",)}}
"""More of them, where another argument is true."""


def guess_families(state: State, containers: Sequence[str] = ()) -> tuple[str, ...]:
    """Families whose weights these may be; empty if none is known, several if names alone do not tell.

    Args:
        state: Official weights.
        containers: Names of the containers that they lay in.
    """
    names = "\n".join(state)
    for families, signs in _SIGNATURES:
        if all(re.search(rf"^{sign}", names, re.MULTILINE) for sign in signs):
            tell = _TELL_APART.get(families)
            return families if tell is None else tell(state, containers) or families
    return ()


def _var_or_mvar(state: State, containers: Sequence[str]) -> tuple[str, ...]:
    """The mask shows whether the last position sees the first."""
    if "mvar_wo_ddp" in containers:
        return ("mvar",)
    mask = state.get("attn_bias_for_masking")
    if mask is None or mask.shape[-1] < 2:
        return ()
    return ("var",) if mask.flatten(0, -3)[0, -1, 0] == 0 else ("mvar",)


def _llamagen_or_dar(state: State, containers: Sequence[str]) -> tuple[str, ...]:
    """The rotary table shows whether the class token is rotated; only one of them has captions."""
    if "cls_embedding.uncond_embedding" in state:
        return ("llamagen",)
    table = state.get("freqs_cis")
    if table is None:
        return ()
    return ("dar",) if bool(table[0].any()) else ("llamagen",)


_TELL_APART: dict[tuple[str, ...], Callable[[State, Sequence[str]], tuple[str, ...]]] = {
    ("llamagen", "dar"): _llamagen_or_dar,
    ("var", "mvar"): _var_or_mvar,
}
"""Families that have the same names: what shows which one it is, if anything does."""


def infer(family: str, state: State) -> dict[str, Any]:
    """Arguments of the official constructor that the weights of a family show beyond doubt."""
    rule = _RULES.get(family)
    return {} if rule is None else rule(state)


def _count(state: State, prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})


def _llama(state: State, extra: int = 0) -> dict[str, Any]:
    captions = state.get("cls_embedding.uncond_embedding")
    known: dict[str, Any] = {
        "n_layer": _count(state, "layers.") - extra,
        "model_type": "c2i" if captions is None else "t2i",
    }
    table, width = state.get("freqs_cis"), state.get("tok_embeddings.weight")
    if table is not None and width is not None and table.ndim == 3:  # (positions, half a head, 2)
        known["n_head"] = width.shape[1] // (2 * table.shape[1])
        known["block_size"] = table.shape[0] - (1 if captions is None else captions.shape[0])
    return known


def _par(state: State) -> dict[str, Any]:
    rows = state.get("spe_tok_embeddings.special_embeddings.weight")
    return _llama(state) | ({} if rows is None else {"ar_token_num": rows.shape[0] + 1})


def _nar_video(state: State) -> dict[str, Any]:
    return {"n_layer": _count(state, "layers.") - 2}


def _nbp(state: State) -> dict[str, Any]:
    known: dict[str, Any] = {"n_layer": _count(state, "transformer.blocks.")}
    empty, table = state.get("transformer.uncond_embedding"), state.get("transformer.tok_emb.weight")
    if empty is not None and table is not None:
        hybrid = empty.shape[0] > 0
        known |= {"hybrid": hybrid, "starts_with_bov": hybrid, "cond_token_num": empty.shape[0]}
        if not hybrid:
            known["first_stage_vocab_size"] = table.shape[0]
    return known


def _scales(state: State) -> dict[str, Any]:
    levels = state.get("lvl_1L")
    if levels is None:
        return {}
    counts = levels.flatten().bincount().tolist()
    sides = [round(count**0.5) for count in counts]
    return {"patch_nums": sides} if [side * side for side in sides] == counts else {}


def _xar(state: State) -> dict[str, Any]:
    """A rotary table is as wide as a head."""
    known = {}
    for half in ("encoder", "decoder"):
        table = state.get(f"{half}_blocks.0.attn.rope.freqs_cos")
        places = state.get(f"{half}_pos_embed_learned")
        if table is not None and places is not None:
            known[f"{half}_num_heads"] = places.shape[-1] // table.shape[-1]
    return known


_RULES: dict[str, Callable[[State], dict[str, Any]]] = {
    "dar": _llama,
    "llamagen": _llama,
    "mvar": _scales,
    "nar": lambda state: _llama(state, extra=1),
    "nar_video": _nar_video,
    "nbp": _nbp,
    "par": _par,
    "var": _scales,
    "xar": _xar,
}


def check_config(family: str, config: Mapping[str, Any], hint: str = "") -> None:
    """Raises one error that lists every argument of the official constructor that is missing."""
    needs = _NEEDS.get(family, ())
    for switch, names in _NEEDS_IF.get(family, {}).items():
        needs += names if config.get(switch) else ()
    missing = [name for name in needs if config.get(name) is None]
    if missing:
        raise TokenloomError(
            f"A {family!r} checkpoint needs arguments of the official constructor that its weights do not show: "
            f"{', '.join(missing)}. Give them as --set {missing[0]}=VALUE or in a file with --config.{hint}"
        )
