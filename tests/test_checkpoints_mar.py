"""MAR and Hi-MAR checkpoints: features, diffusion networks, losses and recorded generations of the official code, and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden import build, close, read, state_of
from torch import Tensor

from tokenloom.checkpoints import from_official, official_guidance, to_official
from tokenloom.errors import TokenloomError
from tokenloom.generators import Guidance, MaskedLatentGenerator, orders
from tokenloom.generators.continuous import Denoising
from tokenloom.generators.masked_visits import hidden_counts
from tokenloom.layouts import Layout

FAMILIES = ("mar", "himar")


def draws(prefix: str, data: dict[str, Tensor]) -> Iterator[Tensor]:
    """Recorded draws in the order of the official calls."""
    for index in range(sum(key.startswith(f"{prefix}.") for key in data)):
        yield data[f"{prefix}.{index}"]


def rows_noise(noise: Tensor, drawn: Iterator[Tensor], sequence: Tensor, visits: int, steps: int) -> None:
    """Fills noise (K, B, N, C) of a perceptron head: a visit draws for all its places of all samples, rising."""
    left = [sequence.shape[1], *hidden_counts(sequence.shape[1], visits)]
    for before, after in itertools.pairwise(left):
        made = sequence[:, sequence.shape[1] - before : sequence.shape[1] - after].sort(dim=1).values
        for step in range(steps + 1):
            part = next(drawn)[: made.numel()].unflatten(0, made.shape)
            if step < steps:
                noise[step].scatter_(1, made[..., None].expand_as(part), part)


# ---- MAR ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mar_features_and_network() -> None:
    data, model = read("mar")[0], build("mar", "mar")
    assert isinstance(model, MaskedLatentGenerator) and not model.training
    masked = data["input.mask"].bool()
    z = model.features(data["input.tokens"], data["input.label"], masked)
    assert close(z, data["output.z"])
    assert close(model.features(data["input.tokens"], None, masked), data["output.z_uncond"])
    network = model.heads[0].network
    assert close(network(data["input.xt"], data["input.t"], z[0, :8]), data["output.diffloss_net"])


@torch.no_grad()
def test_mar_loss() -> None:
    """Squared error and variational bound of every token, and their mean over the hidden ones."""
    data, model = read("mar")[0], build("mar", "mar")
    tokens, masked = data["input.tokens"], data["input.mask"].bool()
    z = model.features(tokens, data["input.label"], masked)
    rows = model.heads[0].loss(tokens, z, data["input.loss_t"], data["input.loss_noise"])
    assert (data["input.loss_t"] == 0).any()
    want = data["output.loss_mse"] + data["output.loss_vb"]
    torch.testing.assert_close(rows, want, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(rows[masked].mean()[None], data["output.loss"], rtol=2e-4, atol=0)


@pytest.mark.parametrize("decode", ["reference", "cached"])
@pytest.mark.parametrize("run", ["gen", "gen_nocfg", "gen_const", "gen_uncond"])
def test_mar_generation(run: str, decode: str) -> None:
    (data, meta), model = read("mar"), build("mar", "mar")
    gen, size = meta["gen"], model.order.layout.size
    sequence = data[f"input.{run}_orders"].flip(1)
    noise = torch.zeros(gen["diffloss_steps"], len(sequence), size, model.channels)
    rows_noise(noise, draws(f"input.{run}_noise", data), sequence, gen["num_iter"], gen["diffloss_steps"])
    guidance = {
        "gen": official_guidance("mar", **gen),
        "gen_const": official_guidance("mar", cfg=1.7, cfg_schedule="constant"),
    }
    latents = model.generate(
        None if run == "gen_uncond" else data["input.label"],
        batch_size=2 if run == "gen_uncond" else None,
        guidance=guidance.get(run, official_guidance("mar", cfg=1.0)),
        sampling=Denoising(gen["diffloss_steps"], temperature=gen["temperature"] if run == "gen" else 1.0),
        noise=noise,
        sequence=sequence,
        visits=gen["num_iter"],
        decode=decode,
    )
    want = data[f"output.{run}"].flatten(2).transpose(1, 2)
    assert close(latents, want)


# ---- Hi-MAR ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_himar_features_and_networks() -> None:
    """The second stage is told the features of the first."""
    data, model = read("himar")[0], build("himar", "himar")
    latents = torch.cat((data["input.cond_tokens"], data["input.tokens"]), dim=1)
    small = data["input.cond_tokens"].shape[1]
    first = model.features(latents, data["input.label"], data["input.mask1"].bool())
    assert close(first, data["output.z_stage1"])
    context = (first, torch.ones(first.shape[:2], dtype=torch.bool))
    second = model.features(latents, data["input.label"], data["input.mask2"].bool(), 1, context)
    assert close(second, data["output.z_stage2"])
    times, noisy = data["input.t"], data["input.xt2d"]
    rows, whole = (head.network for head in model.heads)
    assert close(rows(data["input.xt"], times, first[0, :8]), data["output.diffloss_net"])
    got = whole(noisy.flatten(2).transpose(1, 2), times[:1, None], second[:, small:])
    assert close(got.transpose(1, 2).unflatten(2, noisy.shape[2:]), data["output.global_net"])


@pytest.mark.parametrize("decode", ["reference", "cached"])
def test_himar_generation(decode: str) -> None:
    """Both grids, from the recorded noise and sequences."""
    (data, meta), model = read("himar"), build("himar", "himar")
    gen, size, small = meta["gen"], model.order.layout.size, data["input.cond_tokens"].shape[1]
    orders = data["input.orders"]
    sequence = torch.cat((orders[:, :small].flip(1), orders[:, small:].flip(1)), dim=1)
    steps, whole = gen["diffloss_steps"], gen["global_steps"]
    noise = torch.zeros(max(steps, gen["num_iter"] * whole), len(orders), size, model.channels)
    drawn = draws("input.noise", data)
    rows_noise(noise, drawn, sequence[:, :small], gen["small_iters"], steps)
    for visit in range(gen["num_iter"]):
        first = [next(drawn)] + [(next(drawn), next(drawn))[1] for _ in range(whole)]
        for step in range(whole):
            noise[visit * whole + step, :, small:] = first[step][: len(orders)].flatten(2).transpose(1, 2)
    latents = model.generate(
        data["input.label"],
        guidance=official_guidance("himar", **gen),
        sampling=[Denoising(steps), Denoising(whole)],
        noise=noise,
        sequence=sequence,
        visits=[gen["small_iters"], gen["num_iter"]],
        decode=decode,
    )
    for part, name in ((latents[:, :small], "small"), (latents[:, small:], "big")):
        assert close(part, data[f"output.gen_{name}"].flatten(2).transpose(1, 2)), name


def test_published_settings() -> None:
    """Steps, visits and training as the constructors and scripts have them."""
    model, config = build("himar", "himar"), read("himar")[1]["config"]
    assert model.rule.visits == (4 * config["cond_scale"], 4) and model.rule.loss_weights == (2.0, 0.75)
    assert [head.config.steps for head in model.heads] == [int(config["num_sampling_steps"]), 250]
    assert model.rule.mask_schedules == ("truncnorm", "cosine") and model.rule.label_drop == 0.1
    assert build("mar", "mar").rule.repeats == read("mar")[1]["config"]["diffusion_batch_mul"]


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str) -> None:
    state, back = state_of(family), to_official(build(family, family))
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


def test_the_unused_table_is_not_needed() -> None:
    state = {key: value for key, value in state_of("himar").items() if not key.endswith("c_pos_embed")}
    back = to_official(from_official("himar", state, read("himar")[1]["config"]))
    assert back.keys() == state_of("himar").keys() and not back["cond_diffloss.net.c_pos_embed"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_keep_their_type(family: str) -> None:
    state = {key: value.bfloat16() for key, value in state_of(family).items()}
    model = from_official(family, state, read(family)[1]["config"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    latents = model.generate(torch.tensor([1]), guidance=2.0, sampling=Denoising(1), visits=1, seeds=1)
    assert latents.dtype == torch.float32 and latents.isfinite().all()


def other_sizes(family: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint of other sizes: everything doubled or halved in name only, with random weights."""
    state, config = state_of(family), dict(read(family)[1]["config"])
    noise = torch.Generator().manual_seed(0)
    grown = {key: torch.randn(value.shape, generator=noise) * 0.1 for key, value in state.items()}
    for key in list(grown):
        for name in ("encoder_blocks.0.", "diffloss.net.res_blocks.0.", "cond_diffloss.net.blocks.0."):
            if key.startswith(name):
                depth = len({k[len(name) - 2 :].split(".")[0] for k in state if k.startswith(name[:-2])})
                grown[key.replace(name, f"{name[:-2]}{depth}.", 1)] = grown[key] + 1
    grown["class_emb.weight"] = torch.randn(23, grown["class_emb.weight"].shape[1], generator=noise)
    extra = torch.randn(1, 2, grown["encoder_pos_embed_learned"].shape[2], generator=noise)
    for key in ("encoder_pos_embed_learned", "decoder_pos_embed_learned"):
        extra = torch.randn(1, 2, grown[key].shape[2], generator=noise)
        grown[key] = torch.cat((grown[key], extra), dim=1)
    return grown, config | {"buffer_size": config["buffer_size"] + (2 if family == "mar" else 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_sizes(family: str) -> None:
    """More blocks, classes and rows for the condition are read from the weights; all of them come back; rungs agree."""
    state, config = other_sizes(family)
    model = from_official(family, state, config)
    back = to_official(model)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert model.condition.num_classes == 23 and model.repeats == config["buffer_size"]
    made = [
        model.generate(
            torch.tensor([22, 0]),
            guidance=official_guidance(family, cfg=2.0),
            sampling=Denoising(2),
            visits=3,
            seeds=3,
            decode=decode,
        )
        for decode in ("reference", "cached")
    ]
    assert close(made[1], made[0]) and made[0].std() > 0


@pytest.mark.parametrize(
    ("sides", "widths", "depths", "heads", "channels", "map_width"),
    [
        ((5,), (24, 40), (1, 2), (3, 5), 5, 0),
        ((2,), (32, 18), (2, 1), (1, 3), 16, 0),
        ((3, 5), (24, 40), (1, 2), (3, 5), 5, 12),
        ((2, 6), (32, 18), (2, 1), (4, 2), 3, 40),
    ],
)
def test_other_shapes(
    sides: tuple[int, ...],
    widths: tuple[int, int],
    depths: tuple[int, int],
    heads: tuple[int, int],
    channels: int,
    map_width: int,
) -> None:
    """A model of other grids, widths, heads and channels goes to official names and back, and computes the same."""
    torch.manual_seed(0)
    two, layout = len(sides) == 2, Layout.scales(list(sides)) if len(sides) == 2 else Layout.grid(*sides * 2)
    first, second = (
        {
            "width": width,
            "heads": head,
            "depth": depth,
            "norm": "layer",
            "norm_eps": 1e-6,
            "mlp": "gelu",
            "mlp_width": 3 * width,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "rope": False,
        }
        for width, head, depth in zip(widths, heads, depths, strict=True)
    )
    rows = {"kind": "rows", "width": 20, "depth": 2}
    wide = {"kind": "map", "width": map_width, "depth": 3, "heads": 2, "mlp_width": 28}
    model: Any = MaskedLatentGenerator(
        (orders.scales(layout) if two else orders.blocks(layout, sides * 2)).to_config(),
        channels,
        first,
        second,
        [rows, wide] if two else [rows],
        {"kind": "class", "num_classes": 7},
        prefix_repeats=3,
        rule_config={"visits": [3, 2], "mask_schedules": ["truncnorm"] * 2, "loss_weights": [1, 1]}
        if two
        else {},
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.official_family, model.official_unused = "himar" if two else "mar", None
    config: dict[str, Any] = {"img_size": 16 * sides[-1]}
    config |= {
        "encoder_num_heads": heads[0],
        "decoder_num_heads": heads[1],
        "cond_scale": sides[0],
        "head": 2,
    }
    state = to_official(model)
    again = from_official(model.official_family, state, config)
    assert again.channels == channels and again.order == model.order and again.repeats == 3
    settings: dict[str, Any] = {"guidance": 2.0, "sampling": Denoising(3), "seeds": 1, "visits": 3}
    made = [one.generate(torch.tensor([0, 6, 3]), **settings) for one in (model, again)]
    assert torch.equal(*made) and made[0].std() > 0
    back = to_official(again)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    labels, latents = torch.tensor([0, 6, 3]), torch.randn(3, layout.size, channels)
    assert torch.isfinite(again.train().loss(latents, labels))


def test_unknown_and_missing_keys_are_listed() -> None:
    for family in FAMILIES:
        state, config = state_of(family), read(family)[1]["config"]
        extra = state | {"encoder_blocks.0.attn.extra": torch.zeros(1)}
        with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): encoder_blocks.0.attn.extra"):
            from_official(family, extra, config)
        lacking = {k: v for k, v in state.items() if k not in ("decoder_norm.bias", "mask_token")}
        with pytest.raises(TokenloomError, match=r"Missing keys \(2\): decoder_norm.bias, mask_token"):
            from_official(family, lacking, config)
        with pytest.raises(TokenloomError, match="needs 'encoder_num_heads'"):
            from_official(family, state, {k: v for k, v in config.items() if k != "encoder_num_heads"})
    with pytest.raises(TokenloomError, match="num_sampling_steps of a 'mar' checkpoint"):
        from_official("mar", state_of("mar"), read("mar")[1]["config"] | {"num_sampling_steps": "ddim50"})
    with pytest.raises(TokenloomError, match="do not leave a row for the condition"):
        from_official("mar", state_of("mar"), read("mar")[1]["config"] | {"img_size": 128})


def test_guidance() -> None:
    assert official_guidance("mar", cfg=2.9, num_iter=256) == Guidance(2.9, "linear")
    assert official_guidance("mar", cfg=3.0, cfg_schedule="constant") == Guidance(3.0)
    assert not official_guidance("mar", cfg=1.0).enabled and not official_guidance("himar").enabled
    guidance = official_guidance("himar", cfg=2.5, re_cfg=2.7)
    assert guidance == official_guidance("himar", re_cfg=2.7, cfg=2.5)
    assert [guidance.at(place) for place in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [1, 1.85, 1, 1.75, 2.5]
    )
    with pytest.raises(TokenloomError, match="guidance schedule of 'mar'"):
        official_guidance("mar", cfg=2.0, cfg_schedule="cosine")
