"""Transformer: the whole stack against elementary operations, the cache against the mask, and official weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_layers import angles_of, close, plain_block, plain_linear, plain_norm, randomize
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators.cache import Cache
from tokenloom.generators.transformer import Transformer, TransformerConfig

FIXTURES = Path(__file__).parent / "fixtures" / "generators"
B, N, D = 2, 6, 16


def build(seed: int = 0, **options: Any) -> tuple[Transformer, TransformerConfig, dict[str, Tensor]]:
    settings = TransformerConfig(**{"width": D, "heads": 4, "depth": 3, "mlp_width": 24, **options})
    model = Transformer(settings)
    return model, settings, randomize(model, seed)


def rows(n: int = N, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(B, n, width, generator=torch.Generator().manual_seed(seed))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def plain_stack(x: Tensor, c: TransformerConfig, state: dict[str, Tensor], **inputs: Any) -> list[Tensor]:
    """The stack in elementary operations; `inputs` as in `Transformer.forward`, coordinates for the rope."""
    condition, coords = inputs.get("condition"), inputs.get("coords")
    if c.learned_positions:
        x = x + state["positions.weight"][inputs["position_ids"]]
    plain = (
        None if coords is None else (angles_of(coords, c.head_size, c.rope_base), torch.ones(len(coords)) > 0)
    )
    depths = []
    for index in range(c.depth):
        prefix, modulation = f"blocks.{index}.", None
        if c.modulation == "own":
            modulation = plain_linear(silu(condition), state, f"{prefix}modulation")
        elif c.modulation == "shared":
            modulation = plain_linear(silu(condition), state, "modulation")
        if modulation is not None:
            modulation = modulation.reshape(*modulation.shape[:2], 6, c.width)
        if c.modulation == "shared":
            modulation = modulation + state[f"{prefix}modulation_offset"]
        named = {key: inputs.get(key) for key in ("mask", "context", "context_mask")}
        x = plain_block(x, c, state, prefix, rope=plain, modulation=modulation, **named)
        depths.append(x)
    outputs = []
    for index, tap in enumerate(c.taps):
        hidden = depths[tap - 1]
        if c.final_norm:
            hidden = plain_norm(hidden, c.norm, c.norm_eps, state, f"norms.{index}")
        if c.final_modulation:
            factors = plain_linear(silu(condition), state, "final_modulation")
            hidden = hidden * (1 + factors[..., : c.width]) + factors[..., c.width :]
        outputs.append(hidden)
    return outputs


VARIANTS: list[dict[str, Any]] = [
    {},
    {"rope": False},
    {"rope": False, "learned_positions": 11},
    {"rope_base": 50.0, "learned_positions": 11},
    {"taps": (2, 3)},
    {"taps": (1, 2, 3), "norm": "layer"},
    {"final_norm": False, "taps": (3, 1)},
    {"modulation": "own"},
    {"modulation": "own", "condition_width": 7, "final_modulation": True, "taps": (2, 3)},
    {"modulation": "shared"},
    {"modulation": "shared", "condition_width": 7, "norm": "layer", "norm_affine": False},
    {"final_modulation": True},
    {"cross_attention": True, "context_width": 10},
    {"cross_attention": True, "modulation": "own", "qk_norm": "l2"},
    {"kv_heads": 2, "qk_norm": "rms", "mlp": "geglu", "head_width": 8},
    {"norm": "layer", "mlp": "gelu", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "rope": False},
    {"mlp": "silu", "qk_norm": "layer", "attention_scale": 0.5},
]


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_stack_formula(options: dict[str, Any], axes: int) -> None:
    model, c, state = build(**options)
    coords = torch.randint(0, 5, (N, axes), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    ids = torch.tensor([4, 0, 10, 2, 2, 7])
    needs = c.modulation or c.final_modulation
    condition = rows(N if axes == 2 else 1, 5, c.condition_width or D) if needs else None
    context = rows(4, 6, c.context_width or D) if c.cross_attention else None
    hidden = torch.tensor([[True, True, False, True]]).expand(N, -1)
    context_mask = hidden if c.cross_attention and axes == 2 else None
    shared = {"mask": mask, "condition": condition, "context": context, "context_mask": context_mask}
    got = model(rows(), rope=model.rope(coords), position_ids=ids, **shared)
    want = plain_stack(rows(), c, state, coords=coords if c.rope else None, position_ids=ids, **shared)
    assert len(got) == len(want) == len(c.taps)
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-4)
    again = model(
        rows(), rope=model.rope(coords), position_ids=ids, modulations=model.modulations(condition), **shared
    )
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


def test_rope_is_none_without() -> None:
    assert build(rope=False)[0].rope(torch.zeros(3, 1)) is None


def test_taps_have_their_own_norms() -> None:
    model, _, _ = build(taps=(3, 3))
    first, second = model(rows())
    assert (first - second).abs().max() > 1e-2
    model.norms[1].load_state_dict(model.norms[0].state_dict())
    first, second = model(rows())
    assert torch.equal(first, second)
    assert build()[1].taps == (3,)


def test_final_norm_weights() -> None:
    assert build(final_modulation=True)[0].norms[0].weight is None
    assert build(norm_affine=False)[0].norms[0].weight is None
    assert build()[0].norms[0].weight is not None


def test_dropout_is_off_in_eval() -> None:
    model, _, _ = build(dropout=0.4)
    assert torch.equal(model(rows())[0], model(rows())[0])
    model.train()
    assert (model(rows())[0] - model(rows())[0]).abs().max() > 1e-2


def test_fresh_weights() -> None:
    """Normal(0, 0.02), residual outputs smaller, modulations closed: a fresh modulated block is the identity."""
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(width=64, heads=4, depth=2, modulation="own", qkv_bias=True, learned_positions=50)
    )
    weights = dict(model.named_parameters())
    assert abs(weights["blocks.0.attention.qkv.weight"].std().item() - 0.02) < 2e-3
    assert abs(weights["positions.weight"].std().item() - 0.02) < 2e-3
    for name in ("attention.out", "mlp.down"):
        assert abs(weights[f"blocks.1.{name}.weight"].std().item() - 0.02 / 4**0.5) < 1e-3
    assert not weights["blocks.0.attention.qkv.bias"].any()
    x, condition = rows(width=64), rows(1, 2, 64)
    assert torch.equal(model(x, condition=condition)[0], model.norms[0](x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 8, "heads": 2, "depth": 1, "headz": 3}, "Unknown transformer option 'headz'.*'heads'"),
        ({"width": 8, "heads": 2, "depth": 1, "mpl": "gelu"}, "Unknown transformer option 'mpl'.*'mlp'"),
        ({"width": 8, "heads": 2, "depth": 1, "mlp": "gelu_tan"}, "Unknown mlp 'gelu_tan'.*'gelu_tanh'"),
        ({"heads": 2}, "lack width, depth"),
        ({"width": 8, "heads": 2, "depth": 2, "taps": [3]}, r"taps \(3,\) must lie in 1..depth, got depth 2"),
        ({"width": 8, "heads": 2, "depth": 0}, "got depth 0"),
    ],
)
def test_bad_config(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        TransformerConfig.from_dict(values)


def test_from_dict_takes_json() -> None:
    values = {"width": 8, "heads": 2, "depth": 2, "taps": [1, 2], "qk_norm": None}
    assert TransformerConfig.from_dict(values) == TransformerConfig(width=8, heads=2, depth=2, taps=(1, 2))


@pytest.mark.parametrize(
    "options", [{"modulation": "own"}, {"modulation": "shared"}, {"final_modulation": True}]
)
def test_missing_condition(options: dict[str, Any]) -> None:
    with pytest.raises(TokenloomError, match="needs a condition"):
        build(**options)[0](rows())


# ---- cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"qk_norm": "l2", "modulation": "own"},
        {"taps": (2, 3), "rope": False, "learned_positions": N},
        {"cross_attention": True, "context_width": 10, "qk_norm": "rms"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(1,) * N, (2, 1, 3), (N,)], ids=str)
@torch.no_grad()
def test_cache_equals_the_masked_forward(options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """Rows of a call see each other and everything before, exactly as under the step-causal mask."""
    model, c, _ = build(**options)
    rope = model.rope(torch.arange(N)[:, None])
    condition = rows(1, 5) if c.modulation else None
    context = rows(4, 6, 10) if c.cross_attention else None
    step = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    extra = {"condition": condition, "context": context}
    full = model(
        rows(), rope=rope, position_ids=torch.arange(N), mask=step[None, :] <= step[:, None], **extra
    )
    cache, parts, start = model.new_cache(B, N), [], 0
    for size in sizes:
        place = slice(start, start + size)
        turned = None if rope is None else (rope[0][place], rope[1][place])
        parts.append(
            model(rows()[:, place], rope=turned, position_ids=torch.arange(N)[place], cache=cache, **extra)
        )
        cache.commit(size)
        start += size
    assert cache.length == N
    for index, want in enumerate(full):
        close(torch.cat([part[index] for part in parts], dim=1), want, 1e-5)


@torch.no_grad()
def test_rows_that_are_not_committed_are_overwritten() -> None:
    model, _, _ = build(rope=False)
    cache = model.new_cache(B, 4)
    model(rows(2), cache=cache)
    cache.commit(2)
    model(rows(2, seed=9), cache=cache)  # two rows that only ask
    got = model(rows(2, seed=3), cache=cache)[0]
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2, 2:] = False
    want = model(torch.cat((rows(2), rows(2, seed=3)), dim=1), mask=mask)[0]
    close(got, want[:, 2:], 1e-5)


@torch.no_grad()
def test_cache_capacity_error() -> None:
    model, _, _ = build()
    cache = model.new_cache(B, 3)
    model(rows(2), cache=cache)
    cache.commit(2)
    with pytest.raises(TokenloomError, match="cache holds 3 rows, but row 4 was written"):
        model(rows(2), cache=cache)


def test_cache_shape_and_dtype() -> None:
    model, _, _ = build(kv_heads=2, head_width=8)
    cache = model.new_cache(5, 7)
    assert len(cache.layers) == 3 and cache.layers[0].keys.shape == (5, 2, 7, 8)
    assert cache.layers[0].keys.dtype == torch.float32
    assert model.bfloat16().new_cache(1, 1).layers[0].values.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float().new_cache(1, 1).layers[0].values.dtype == torch.bfloat16
    layer = Cache(1, 1, 1, 4, 2, torch.device("cpu"), torch.float32).layers[0]
    keys, values = layer.append(torch.ones(1, 1, 3, 2), torch.full((1, 1, 3, 2), 2.0))
    assert keys.shape == (1, 1, 3, 2) and keys.data_ptr() == layer.keys.data_ptr()  # a view, not a copy
    assert bool((values == 2).all())


# ---- official weights --------------------------------------------------------------------------------------------


def test_var_blocks() -> None:
    """VAR (tiny): both block outputs and the logits of the teacher-forced pass, class and null condition."""
    data = load_file(FIXTURES / "var_tiny.safetensors")
    old = {key[6:]: value for key, value in data.items() if key.startswith("state.")}
    settings = TransformerConfig(
        width=64,
        heads=4,
        depth=2,
        taps=(1, 2),
        mlp="gelu_tanh",
        mlp_width=256,
        norm="layer",
        norm_affine=False,
        norm_eps=1e-6,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm="l2",
        modulation="own",
        final_norm=False,
        rope=False,
    )
    new = {}
    for index in range(2):
        source, target = f"blocks.{index}.", f"blocks.{index}."
        names = {
            "attn.mat_qkv.weight": "attention.qkv.weight",
            "attn.proj.weight": "attention.out.weight",
            "attn.proj.bias": "attention.out.bias",
            "ffn.fc1.weight": "mlp.up.weight",
            "ffn.fc1.bias": "mlp.up.bias",
            "ffn.fc2.weight": "mlp.down.weight",
            "ffn.fc2.bias": "mlp.down.bias",
            "ada_lin.1.weight": "modulation.weight",
            "ada_lin.1.bias": "modulation.bias",
        }
        new |= {target + name: old[source + official] for official, name in names.items()}
        biases = [old[f"{source}attn.{name}"] for name in ("q_bias", "zero_k_bias", "v_bias")]
        new[f"{target}attention.qkv.bias"] = torch.cat(biases)
        new[f"{target}attention.log_scale"] = old[f"{source}attn.scale_mul_1H11"][0]
    blocks = Transformer(settings).eval()
    blocks.load_state_dict(new, strict=True)
    head = Transformer(
        TransformerConfig(
            width=64, heads=4, depth=1, norm="layer", norm_affine=False, norm_eps=1e-6, final_modulation=True
        )
    )
    head.final_modulation.load_state_dict(
        {name: old[f"head_nm.ada_lin.1.{name}"] for name in ("weight", "bias")}
    )

    level = old["lvl_1L"][0]
    mask = level[None, :] <= level[:, None]
    place = old["lvl_embed.weight"][level] + old["pos_1LC"][0]
    words = torch.nn.functional.linear(
        data["output.tf_x_in"], old["word_embed.weight"], old["word_embed.bias"]
    )
    label = data["input.label"]
    for labels, name in (
        (label, "output.tf_logits"),
        (torch.full_like(label, 10), "output.tf_logits_uncond"),
    ):
        condition = old["class_emb.weight"][labels][:, None]
        start = condition + old["pos_start"]
        x = torch.cat((start, words), dim=1) + place
        taps = blocks(x, mask=mask, condition=condition)
        if labels is label:
            for index, tap in enumerate(taps):
                want = data[f"output.tf_block.{index}"]
                assert (tap - want).abs().max() <= 2e-4 * want.abs().max()
        hidden = head._finish(head.norms[0](taps[-1]), condition)
        logits = torch.nn.functional.linear(hidden, old["head.weight"], old["head.bias"])
        assert (logits - data[name]).abs().max() <= 2e-4 * data[name].abs().max()
    loss = torch.nn.functional.cross_entropy(
        data["output.tf_logits"].flatten(0, 1), data["input.gt_ids"].flatten()
    )
    assert math.isclose(float(loss), float(data["output.tf_loss"]), rel_tol=1e-5)
