"""VAR and MVAR checkpoints: logits, blocks, loss, greedy codes and reconstructions of the official code, and back."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tokenloom.checkpoints import from_official, official_guidance, to_official
from tokenloom.errors import TokenloomError
from tokenloom.generators import NextScaleGenerator, Sampling, Step, guide

FIXTURES = Path(__file__).parent / "fixtures" / "generators"
FAMILIES = {"var_tiny": "var", "var_tiny_saln": "var", "mvar_tiny": "mvar"}
NAMES = list(FAMILIES)
GREEDY = Sampling(temperature=0)


@lru_cache
def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        data = {key: file.get_tensor(key) for key in file.keys()}
        return data, json.loads(file.metadata()["meta"])


def state_of(name: str) -> dict[str, Tensor]:
    return {key[6:]: value for key, value in read(name)[0].items() if key.startswith("state.")}


@lru_cache
def build(name: str) -> NextScaleGenerator:
    model = from_official(FAMILIES[name], state_of(name), read(name)[1]["config"])
    assert isinstance(model, NextScaleGenerator) and not model.training
    return model


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2e-4 * want.abs().max()


# ---- teacher forcing ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str) -> None:
    data, model = read(name)[0], build(name)
    close(model.logits(data["input.gt_ids"], data["input.label"]), data["output.tf_logits"])
    if "output.tf_logits_uncond" in data:
        close(model.logits(data["input.gt_ids"]), data["output.tf_logits_uncond"])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES[:2])
def test_blocks_and_loss(name: str) -> None:
    data, model = read(name)[0], build(name)
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda *args: seen.append(args[2])) for block in model.transformer.blocks
    ]
    loss = model.loss(data["input.gt_ids"], data["input.label"])
    for handle in handles:
        handle.remove()
    for index, got in enumerate(seen):
        close(got, data[f"output.tf_block.{index}"])
    torch.testing.assert_close(loss, data["output.tf_loss"][0], rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name: str) -> None:
    data, model = read(name)[0], build(name)
    close(model.tokens.pyramid.views(data["input.gt_ids"]), data["output.tf_x_in"])


# ---- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["reference", "cached"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_codes(name: str, decode: str) -> None:
    """With guidance and without, and what the tokenizer's decoder is given."""
    (data, meta), model = read(name), build(name)
    off = 0 if FAMILIES[name] == "var" else 1
    for cfg, run in ((meta["gen"]["cfg"], "gen"), (off, "gen_nocfg")):
        guidance = official_guidance(FAMILIES[name], cfg=cfg)
        assert guidance.enabled == (run == "gen")
        codes = model.generate(data["input.label"], guidance=guidance, sampling=GREEDY, decode=decode)
        assert codes.tolist() == data[f"output.{run}_ids"].tolist()
        close(model.features(codes), data[f"output.{run}_fhat"])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_what_each_step_sees(name: str) -> None:
    """The guided logits of every scale, and the maps fed at the next."""
    (data, meta), model = read(name), build(name)
    codes, last = data["output.gen_ids"], model.order.num_steps - 1
    guidance = official_guidance(FAMILIES[name], **meta["gen"])
    plain, null = model.logits(codes, data["input.label"]), model.logits(codes)
    for step, place in enumerate(model.order.slices):
        guided = guide(plain[:, place], null[:, place], guidance.at(step / last))
        close(guided, data[f"output.gen_step_logits.{step}"])
        if step < last and "output.gen_step_next_map.0" in data:
            want = data[f"output.gen_step_next_map.{step}"].flatten(2).transpose(1, 2)
            pyramid = model.tokens.pyramid
            close(pyramid.shrink(pyramid.decode(codes, step + 1), step + 1), want)


def test_the_cache_of_mvar_does_not_grow() -> None:
    assert build("var_tiny").plan.capacity == 30
    assert build("mvar_tiny").plan.capacity == 25 and sum(build("mvar_tiny").plan.committed) == 0


@pytest.mark.parametrize("name", NAMES)
def test_other_batch_sizes(name: str) -> None:
    """Greedy codes of a sample are the same alone and among others."""
    data, model, family = read(name)[0], build(name), FAMILIES[name]
    labels = torch.cat((data["input.label"], torch.tensor([0, 9, 3])))
    guidance = official_guidance(family, cfg=read(name)[1]["gen"]["cfg"])
    steps: list[Step] = []
    codes = model.generate(labels, guidance=guidance, sampling=GREEDY, on_step=steps.append)
    assert codes[:2].tolist() == data["output.gen_ids"].tolist() and len(steps) == model.order.num_steps
    alone = model.generate(labels[1:2], guidance=guidance, sampling=GREEDY)
    assert alone.tolist() == data["output.gen_ids"][1:].tolist()


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(("run", "top_k", "top_p"), [("k20", 20, 1.0), ("p90", 0, 0.9), ("k20_p80", 20, 0.8)])
def test_filters(name: str, run: str, top_k: int, top_p: float) -> None:
    data = read(name)[0]
    sampling = Sampling(top_k=top_k, top_p=top_p, nucleus="ascending")
    got = sampling.filter(data["input.filter_logits"]).softmax(-1)
    close(got, data[f"output.filter_probs_{run}"])


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str) -> None:
    """Every key comes back with its value and dtype, derived buffers included."""
    state, back = state_of(name), to_official(build(name))
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_derived_buffers_are_not_needed(name: str) -> None:
    state, meta = state_of(name), read(name)[1]
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
    small = {key: value for key, value in state.items() if not key.endswith(derived)}
    model = from_official(FAMILIES[name], small, meta["config"])
    back = to_official(model)
    assert back.keys() == state.keys() - {"vae.quantize.ema_vocab_hit_SV"}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_the_weights_keep_their_type() -> None:
    state = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in state_of("var_tiny").items()
    }
    model = from_official("var", state, read("var_tiny")[1]["config"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    codes = model.generate(torch.tensor([1]), seeds=1)
    assert codes.shape == (1, 30)
    assert not any(parameter.requires_grad for parameter in model.tokens.pyramid.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("style", "count"), [("qresi", 1), ("{}", 4), ("qresi_ls.{}", 11), (None, 0)])
def test_other_numbers_of_convolutions(style: str | None, count: int) -> None:
    """The tokenizer may share one convolution, have one a scale, more than ten, or none."""
    state, config = state_of("var_tiny"), read("var_tiny")[1]["config"]
    prefix = "vae.quantize.quant_resi."
    state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for index in range(count):
        assert style is not None
        name = prefix + style.format(index)
        state |= {f"{name}.weight": torch.full((8, 8, 3, 3), index + 1.0), f"{name}.bias": torch.zeros(8)}
    model = from_official("var", state, config)
    assert [float(phi.weight[0, 0, 0, 0]) for phi in model.tokens.pyramid.phis] == list(range(1, count + 1))
    back = to_official(model)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@torch.no_grad()
def test_plain_attention_is_scaled_by_a_quarter() -> None:
    """Without unit keys the official softmax scale is 0.25 / sqrt(head width)."""
    state = {key: value for key, value in state_of("var_tiny").items() if "scale_mul" not in key}
    config = read("var_tiny")[1]["config"] | {"attn_l2_norm": False}
    model = from_official("var", state, config)
    attention = model.transformer.blocks[0].attention
    assert attention.kind is None and attention.scale == 0.25 / 16**0.5
    assert to_official(model).keys() == state.keys()
    with pytest.raises(TokenloomError, match="needs 'num_heads'"):
        from_official("var", state, {"patch_nums": [1, 2, 3, 4]})


def official_state(sides: list[int], width: int, heads: int, depth: int, **sizes: int) -> dict[str, Tensor]:
    """Random weights of any size under the official names; `shared` is 1 for shared adaLN."""
    size, channels, vocab, hidden = (
        sum(n * n for n in sides),
        sizes["channels"],
        sizes["vocab"],
        sizes["hidden"],
    )
    shapes: dict[str, tuple[int, ...]] = {
        "class_emb.weight": (sizes["classes"] + 1, width),
        "pos_start": (1, sides[0] ** 2, width),
        "pos_1LC": (1, size, width),
        "lvl_embed.weight": (len(sides), width),
        "vae.quantize.embedding.weight": (vocab, channels),
    }
    linear = {
        "word_embed": (width, channels),
        "head_nm.ada_lin.1": (2 * width, width),
        "head": (vocab, width),
    }
    if sizes["shared"]:
        linear["shared_ada_lin.1"] = (6 * width, width)
    for index in range(depth):
        block = f"blocks.{index}."
        shapes |= {f"{block}attn.{name}": (width,) for name in ("q_bias", "v_bias")}
        shapes |= {
            f"{block}attn.mat_qkv.weight": (3 * width, width),
            f"{block}attn.scale_mul_1H11": (1, heads, 1, 1),
        }
        linear |= {
            f"{block}attn.proj": (width, width),
            f"{block}ffn.fc1": (hidden, width),
            f"{block}ffn.fc2": (width, hidden),
        }
        if sizes["shared"]:
            shapes[f"{block}ada_gss"] = (1, 1, 6, width)
        else:
            linear[f"{block}ada_lin.1"] = (6 * width, width)
    for index in range(sizes["phis"]):
        name = f"vae.quantize.quant_resi.qresi_ls.{index}"
        shapes |= {f"{name}.weight": (channels, channels, 3, 3), f"{name}.bias": (channels,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    noise = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=noise) * 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("family", "config", "sizes"),
    [
        ("var", {"patch_nums": [1, 3, 4, 6, 7, 9]}, {"width": 36, "heads": 3, "depth": 3, "shared": 0}),
        (
            "var",
            {"patch_nums": (2, 5), "quant_resi": -0.2},
            {"width": 40, "heads": 5, "depth": 1, "shared": 1},
        ),
        (
            "mvar",
            {"patch_nums": [1, 2, 6, 8], "kernel_size": 5, "refine_step": 2},
            {"width": 24, "heads": 2, "depth": 2, "shared": 1},
        ),
        ("mvar", {"patch_nums": [1, 2, 3]}, {"width": 24, "heads": 2, "depth": 2, "shared": 0}),
    ],
)
def test_other_sizes(family: str, config: dict[str, Any], sizes: dict[str, int]) -> None:
    """Everything follows from the configuration and the shapes; all rungs agree; every weight comes back."""
    state = official_state(
        list(config["patch_nums"]), **sizes, channels=5, vocab=33, hidden=52, classes=7, phis=3
    )
    model = from_official(family, state, config)
    back = to_official(model)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    labels = torch.tensor([6, 0, 3, 7, 1])
    for guidance in (official_guidance(family, cfg=2.5), 1.0):
        made = [
            model.generate(labels, guidance=guidance, seeds=seeds, decode=decode)
            for seeds, decode in (([4, 5, 6, 7, 8], "reference"), (4, "cached"))
        ]
        assert torch.equal(made[0], made[1]) and made[0].unique().numel() > 10
    assert model.tokens.pyramid.ratio == abs(config.get("quant_resi", 0.5))
    assert model.rule.window == (config.get("kernel_size", 7) if family == "mvar" else 0)


# ---- errors ------------------------------------------------------------------------------------------------------


def test_unknown_and_missing_keys_are_listed() -> None:
    state, config = state_of("var_tiny"), read("var_tiny")[1]["config"]
    extra = state | {"blocks.0.attn.extra": torch.zeros(1), "vae.encoder.conv_in.weight": torch.zeros(1)}
    with pytest.raises(
        TokenloomError, match=r"Unknown keys \(2\): blocks.0.attn.extra, vae.encoder.conv_in.weight"
    ):
        from_official("var", extra, config)
    lacking = {key: value for key, value in state.items() if key not in ("head.bias", "pos_start")}
    with pytest.raises(TokenloomError, match=r"Missing keys \(2\): head.bias, pos_start"):
        from_official("var", lacking, config)
    with pytest.raises(TokenloomError, match=r"Shapes do not fit.*tokens.places"):
        from_official("var", state, config | {"patch_nums": [1, 2, 3, 5]})
    with pytest.raises(TokenloomError, match="needs 'patch_nums'"):
        from_official("var", state, {})


@pytest.mark.parametrize("missing", ["class_emb.weight", "blocks.0.ffn.fc1.weight", "blocks.1.attn.q_bias"])
def test_missing_keys_that_tell_sizes(missing: str) -> None:
    state = {key: value for key, value in state_of("var_tiny").items() if key != missing}
    with pytest.raises(TokenloomError, match=f"holds '{missing}'"):
        from_official("var", state, read("var_tiny")[1]["config"])


def test_a_generator_without_its_codebook() -> None:
    """The published file of the generator alone."""
    state = {key: value for key, value in state_of("var_tiny").items() if not key.startswith("vae.")}
    with pytest.raises(TokenloomError, match=r"Add every key 'quantize\.\*' of the tokenizer"):
        from_official("var", state, read("var_tiny")[1]["config"])


def test_guidance() -> None:
    guidance = official_guidance("var", cfg=1.5, top_k=900, top_p=0.96)
    assert [guidance.at(step / 9) for step in (0, 9)] == [1.0, 2.5]
    assert official_guidance("mvar", cfg=2.7).at(1.0) == pytest.approx(3.7)
    assert not official_guidance("mvar", cfg=1.0).enabled
    assert official_guidance("var", cfg=1.0).at(1.0) == 2.0
    assert not official_guidance("var").enabled and not official_guidance("mvar").enabled
    with pytest.raises(TokenloomError, match="scale of 'var' is a number"):
        official_guidance("var", cfg="1.2,8.0")
