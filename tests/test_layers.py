"""Layers: every switch of a block against a formula written with elementary operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.layers import (
    MLP,
    Attention,
    Block,
    BlockConfig,
    TimeEmbedding,
    apply_rope,
    make_norm,
    rope_table,
)

B, N, D, H = 2, 5, 16, 4
State = dict[str, Tensor]


def config(**options: Any) -> BlockConfig:
    return BlockConfig(**{"width": D, "heads": H, "mlp_width": 24, **options})


def randomize(module: torch.nn.Module, seed: int = 0) -> State:
    """Fills all parameters and returns them by name."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    module.eval()
    return dict(module.named_parameters())


def tokens(n: int = N, seed: int = 1, width: int = D) -> Tensor:
    return torch.randn(B, n, width, generator=torch.Generator().manual_seed(seed))


# ---- the plain formulas ------------------------------------------------------------------------------------------


def plain_norm(x: Tensor, kind: str, eps: float, state: State, name: str) -> Tensor:
    if kind == "rms":
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    else:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * state.get(f"{name}.weight", torch.tensor(1.0)) + state.get(f"{name}.bias", torch.tensor(0.0))


def plain_linear(x: Tensor, state: State, name: str) -> Tensor:
    return torch.einsum("bnd,ed->bne", x, state[f"{name}.weight"]) + state.get(
        f"{name}.bias", torch.tensor(0.0)
    )


def plain_rope(x: Tensor, angles: Tensor, visible: Tensor) -> Tensor:
    """(B, N, d) by angles (N, d / 2), as a product of complex numbers."""
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double())
    turned = pairs * torch.polar(visible.double()[:, None].expand_as(angles), angles)
    return torch.view_as_real(turned).flatten(-2).float()


def plain_attention(
    x: Tensor,
    c: BlockConfig,
    state: State,
    prefix: str,
    rope: Any = None,
    mask: Any = None,
    context: Any = None,
) -> Tensor:
    size, kv_heads = c.head_size, c.num_kv_heads
    if context is None:
        fused = plain_linear(x, state, f"{prefix}qkv")
        queries, rest = fused[..., : c.heads * size], fused[..., c.heads * size :]
    else:
        queries, rest = plain_linear(x, state, f"{prefix}q"), plain_linear(context, state, f"{prefix}kv")
    keys, values = rest[..., : kv_heads * size], rest[..., kv_heads * size :]
    outputs = []
    for head in range(c.heads):
        group = head // (c.heads // kv_heads)
        q = queries[..., head * size : (head + 1) * size]
        k = keys[..., group * size : (group + 1) * size]
        v = values[..., group * size : (group + 1) * size]
        scale = size**-0.5 if c.attention_scale is None else c.attention_scale
        if c.qk_norm == "l2":
            k = k / k.norm(dim=-1, keepdim=True)
            learned = min(state[f"{prefix}log_scale"][head].item(), math.log(100))
            q = q / q.norm(dim=-1, keepdim=True) * math.exp(learned)
            scale = 1.0 if c.attention_scale is None else c.attention_scale
        elif c.qk_norm:
            q = plain_norm(q, c.qk_norm, c.norm_eps, state, f"{prefix}q_norm")
            k = plain_norm(k, c.qk_norm, c.norm_eps, state, f"{prefix}k_norm")
        if rope is not None:
            q, k = plain_rope(q, *rope), plain_rope(k, *rope)
        scores = torch.einsum("bqd,bkd->bqk", q, k) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = powers / powers.sum(-1, keepdim=True)
        outputs.append(weights @ v)
    return plain_linear(torch.cat(outputs, -1), state, f"{prefix}out")


def plain_mlp(x: Tensor, c: BlockConfig, state: State, prefix: str) -> Tensor:
    def gelu(y: Tensor) -> Tensor:
        return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))

    hidden = plain_linear(x, state, f"{prefix}up")
    if c.mlp in ("swiglu", "geglu"):
        gate, value = hidden[..., : c.hidden], hidden[..., c.hidden :]
        hidden = (gate * torch.sigmoid(gate) if c.mlp == "swiglu" else gelu(gate)) * value
    elif c.mlp == "silu":
        hidden = hidden * torch.sigmoid(hidden)
    elif c.mlp == "gelu":
        hidden = gelu(hidden)
    else:
        cubic = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = hidden * 0.5 * (1 + torch.tanh(cubic))
    return plain_linear(hidden, state, f"{prefix}down")


def plain_block(
    x: Tensor,
    c: BlockConfig,
    state: State,
    prefix: str = "",
    rope: Any = None,
    mask: Any = None,
    modulation: Any = None,
    context: Any = None,
    context_mask: Any = None,
) -> Tensor:
    gate1, gate2, scale1, scale2, shift1, shift2 = (
        (1.0, 1.0, 0.0, 0.0, 0.0, 0.0) if modulation is None else (modulation[:, :, i] for i in range(6))
    )

    def norm(y: Tensor, name: str) -> Tensor:
        return plain_norm(y, c.norm, c.norm_eps, state, f"{prefix}{name}")

    inner = norm(x, "norm1") * (1 + scale1) + shift1
    x = x + gate1 * plain_attention(inner, c, state, f"{prefix}attention.", rope, mask)
    if context is not None:
        name = f"{prefix}cross_attention."
        x = x + plain_attention(norm(x, "norm_cross"), c, state, name, None, context_mask, context)
    return x + gate2 * plain_mlp(norm(x, "norm2") * (1 + scale2) + shift2, c, state, f"{prefix}mlp.")


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


# ---- norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_formula(kind: str, affine: bool, eps: float) -> None:
    norm = make_norm(kind, D, eps, affine)
    state = {f"n.{name}": value for name, value in randomize(norm).items()}
    assert sorted(state) == ([] if not affine else ["n.weight"] if kind == "rms" else ["n.bias", "n.weight"])
    close(norm(tokens()), plain_norm(tokens(), kind, eps, state, "n"))


# ---- rotary positions --------------------------------------------------------------------------------------------


def angles_of(coords: Tensor, size: int, base: float, scale: tuple[float, ...] | None = None) -> Tensor:
    """(N, d / 2), pair by pair."""
    axes = coords.shape[1]
    rows = []
    for coord in coords.tolist():
        row = []
        for axis in range(axes):
            factor = 1.0 if scale is None else scale[axis]
            width = size // axes
            row += [coord[axis] * factor * base ** (-2 * j / width) for j in range(width // 2)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("scale", [None, (0.5, 2.0, 3.0)])
def test_rope_formula(axes: int, scale: tuple[float, ...] | None) -> None:
    coords = torch.randint(0, 9, (N, axes), generator=torch.Generator().manual_seed(axes))
    coords[2, 0] = -1
    scale = scale and scale[:axes]
    cos, sin = rope_table(coords, 12, 100.0, scale)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (N, 6)
    assert not cos[2].any() and not sin[2].any()
    visible = coords[:, 0] >= 0
    x = tokens(width=12)
    close(
        apply_rope(x[:, None], (cos, sin))[:, 0], plain_rope(x, angles_of(coords, 12, 100.0, scale), visible)
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rope_scores_depend_on_differences_alone(axes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.randint(0, 6, (N, axes), generator=generator)
    shift = torch.tensor([3, 5, 11])[:axes]
    x, y = tokens(seed=2, width=12)[:, None], tokens(seed=3, width=12)[:, None]

    def scores(at: Tensor) -> Tensor:
        table = rope_table(at, 12)
        return apply_rope(x, table) @ apply_rope(y, table).mT

    close(scores(coords), scores(coords + shift))
    moved = coords.clone()
    moved[0, -1] += 2
    assert (scores(coords) - scores(moved)).abs().max() > 1e-2


def test_rope_keeps_dtype_and_rejects_odd_heads() -> None:
    table = rope_table(torch.arange(N)[:, None], 4)
    assert apply_rope(tokens(width=4)[:, None].bfloat16(), table).dtype == torch.bfloat16
    with pytest.raises(TokenloomError, match="divisible by 6, got 8"):
        rope_table(torch.zeros(1, 3), 8)


# ---- attention ---------------------------------------------------------------------------------------------------

ATTENTION: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True},
    {"out_bias": True},
    {"head_width": 6},
    {"kv_heads": 2},
    {"kv_heads": 1, "qk_norm": "rms"},
    {"attention_scale": 0.7},
    {"qk_norm": "l2"},
    {"qk_norm": "l2", "attention_scale": 0.3},
    {"qk_norm": "l2", "kv_heads": 2, "qkv_bias": True},
    {"qk_norm": "layer"},
    {"qk_norm": "layer", "qk_norm_affine": False, "norm_eps": 0.1},
    {"qk_norm": "rms"},
    {"qk_norm": "rms", "qk_norm_affine": False},
]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["plain", "rope+mask"])
def test_attention_formula(options: dict[str, Any], turned: bool) -> None:
    c = config(**options)
    attention = Attention(c)
    state = randomize(attention)
    rope = plain = mask = None
    if turned:
        coords = torch.arange(N)[:, None] - 1
        rope = rope_table(coords, c.head_size)
        plain = (angles_of(coords, c.head_size, 10000.0), coords[:, 0] >= 0)
        mask = torch.ones(N, N, dtype=torch.bool).tril()
    got = attention(tokens(), rope=rope, mask=mask)
    close(got, plain_attention(tokens(), c, state, "", plain, mask))


def test_learned_l2_scale_stops_at_log_100() -> None:
    attention = Attention(config(qk_norm="l2"))
    torch.testing.assert_close(attention.log_scale, torch.full((H, 1, 1), 4.0).log())
    randomize(attention)
    outputs = []
    for value in (9.0, math.log(100), math.log(50)):
        attention.log_scale.data.fill_(value)
        outputs.append(attention(tokens()))
    close(outputs[0], outputs[1], 1e-6)
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "qkv_bias": True}, {"qk_norm": "l2"}], ids=str)
def test_cross_attention_formula(options: dict[str, Any]) -> None:
    c = config(**options)
    attention = Attention(c, context_width=10)
    state = randomize(attention)
    context = tokens(7, seed=4, width=10)
    mask = torch.rand(N, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, 0] = True
    got = attention(tokens(), mask=mask, context=context)
    close(got, plain_attention(tokens(), c, state, "", None, mask, context))


# ---- MLP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_formula(kind: str, bias: bool) -> None:
    c = config(mlp=kind, mlp_bias=bias)
    mlp = MLP(c)
    state = randomize(mlp)
    assert ("up.bias" in state) == ("down.bias" in state) == bias
    close(mlp(tokens()), plain_mlp(tokens(), c, state, ""))


def test_the_two_gelus_differ() -> None:
    outputs = []
    for kind in ("gelu", "gelu_tanh"):
        mlp = MLP(config(mlp=kind))
        randomize(mlp)
        outputs.append(mlp(tokens() * 3))
    assert 1e-5 < (outputs[0] - outputs[1]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("mlp", "width", "hidden"),
    [("gelu", 48, 192), ("silu", 48, 192), ("swiglu", 48, 128), ("geglu", 100, 288)],
)
def test_default_hidden_width(mlp: str, width: int, hidden: int) -> None:
    assert BlockConfig(width=width, heads=4, mlp=mlp).hidden == hidden


# ---- block -------------------------------------------------------------------------------------------------------

BLOCKS: list[dict[str, Any]] = [
    {},
    {"norm": "layer"},
    {"norm": "layer", "norm_affine": False, "norm_eps": 1e-6, "mlp": "gelu_tanh", "mlp_bias": True},
    {"norm_affine": False},
    {"norm_eps": 0.5},
    {"kv_heads": 2, "qk_norm": "rms", "mlp": "geglu"},
]


@pytest.mark.parametrize("options", BLOCKS, ids=str)
@pytest.mark.parametrize("modulated", [False, True], ids=["", "modulated"])
def test_block_formula(options: dict[str, Any], modulated: bool) -> None:
    c = config(**options, modulation="own" if modulated else None)
    block = Block(c)
    state = randomize(block)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    modulation = None
    if modulated:
        generator = torch.Generator().manual_seed(3)
        modulation = torch.randn(B, N if c.norm == "layer" else 1, 6, D, generator=generator)
    want = plain_block(tokens(), c, state, mask=mask, modulation=modulation)
    close(block(tokens(), mask=mask, modulation=modulation), want)


def test_modulation_order_is_gates_scales_shifts() -> None:
    block = Block(config(modulation="own"))
    randomize(block)
    x = tokens()
    zero = torch.zeros(B, 1, 6, D)
    assert torch.equal(block(x, modulation=zero), x)  # both gates closed
    only_attention, only_mlp = zero.clone(), zero.clone()
    only_attention[:, :, 0], only_mlp[:, :, 1] = 1, 1
    close(block(x, modulation=only_attention), x + block.attention(block.norm1(x)))
    close(block(x, modulation=only_mlp), x + block.mlp(block.norm2(x)))
    shifted = only_mlp.clone()
    shifted[:, :, 3], shifted[:, :, 5] = 0.5, 2.0
    close(block(x, modulation=shifted), x + block.mlp(block.norm2(x) * 1.5 + 2))
    assert block.modulation.weight.shape == (6 * D, D)
    assert Block(config(modulation="shared")).modulation_offset.shape == (6, D)
    assert Block(config(modulation="own", condition_width=5)).modulation.in_features == 5


@pytest.mark.parametrize("modulated", [False, True])
def test_block_with_context(modulated: bool) -> None:
    c = config(cross_attention=True, modulation="own" if modulated else None, norm="layer", qkv_bias=True)
    block = Block(c, context_width=10)
    state = randomize(block)
    context, mask = tokens(7, seed=4, width=10), torch.ones(N, 7, dtype=torch.bool).tril()
    modulation = torch.randn(B, 1, 6, D) if modulated else None
    got = block(tokens(), context=context, context_mask=mask, modulation=modulation)
    want = plain_block(tokens(), c, state, modulation=modulation, context=context, context_mask=mask)
    close(got, want)
    changed = context.clone()
    changed[:, 6] += 1  # hidden from every row by the mask
    assert torch.equal(got, block(tokens(), context=changed, context_mask=mask, modulation=modulation))


def test_layer_scale_multiplies_both_branches() -> None:
    block, plain = Block(config(layer_scale=0.1)), Block(config())
    state = randomize(block)
    plain.load_state_dict({name: value for name, value in state.items() if "scale" not in name})
    x = tokens()
    middle = x + state["scale1"] * plain.attention(plain.norm1(x))
    close(block(x), middle + state["scale2"] * plain.mlp(plain.norm2(middle)))
    assert torch.equal(Block(config(layer_scale=0.1)).scale2, torch.full((D,), 0.1))


def test_rope_turns_queries_over_a_context_and_nothing_else() -> None:
    attention = Attention(config(), context_width=10)
    randomize(attention)
    coords, context = torch.arange(N)[:, None], tokens(7, seed=4, width=10)
    rope = rope_table(coords, D // H)
    got = attention(tokens(), context=context, rope=rope)
    query, key, value = attention._project(tokens(), context)
    mixed = torch.nn.functional.scaled_dot_product_attention(apply_rope(query, rope), key, value)
    close(got, attention.out(mixed.transpose(1, 2).flatten(2)))
    assert (got - attention(tokens(), context=context)).abs().max() > 1e-3


@pytest.mark.parametrize("frequencies", [8, 9])
def test_time_embedding_formula(frequencies: int) -> None:
    embedding = TimeEmbedding(D, frequencies, period=256.0, scale=1000.0)
    randomize(embedding)
    times = torch.tensor([[0.0, 0.3], [0.55, 1.0]])
    waves = torch.zeros(2, 2, frequencies)
    for index in range(4):
        angles = 1000 * 256 ** (-index / 4) * times
        waves[..., index], waves[..., index + 4] = angles.cos(), angles.sin()
    hidden = torch.nn.functional.silu(embedding.up(waves))
    close(embedding(times), embedding.down(hidden), 1e-3)


def test_dropout_only_in_training() -> None:
    block, plain = Block(config(dropout=0.5)), Block(config())
    state = randomize(block)
    plain.load_state_dict(state)
    assert torch.equal(block(tokens()), plain(tokens()))
    block.train()
    assert (block(tokens()) - block(tokens())).abs().max() > 1e-3


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rsm"}, "Unknown norm 'rsm'.*'rms'"),
        ({"mlp": "swigl"}, "Unknown mlp 'swigl'.*'swiglu'"),
        ({"qk_norm": "layers"}, "Unknown qk_norm 'layers'.*'layer'"),
        ({"modulation": "share"}, "Unknown modulation 'share'.*'shared'"),
        ({"heads": 3}, "width 16 is not a multiple of heads 3"),
        ({"kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        config(**options)


def test_rotary_pairs_of_halves_are_those_of_neighbours_in_another_order():
    torch.manual_seed(0)
    x, rope = torch.randn(2, 3, 5, 8), rope_table(torch.arange(5)[:, None], 8)
    order = torch.arange(8).view(4, 2).T.flatten()  # neighbours to halves
    torch.testing.assert_close(apply_rope(x[..., order], rope, halves=True), apply_rope(x, rope)[..., order])
