"""Official weights of xAR: velocities, loss, both samplers with recorded noise, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import build, close, read, state_of
from torch import Tensor

from tokenloom.checkpoints import from_official, official_guidance, to_official
from tokenloom.errors import TokenloomError
from tokenloom.generators import Denoising, Guidance, NextCellGenerator, orders
from tokenloom.layouts import Layout

rungs = pytest.mark.parametrize("decode", ["reference", "cached"])


def rows(maps: Tensor) -> Tensor:
    """Latents (B, N, C) of maps (B, C, H, W)."""
    return maps.flatten(2).transpose(1, 2)


def from_cells(cells: Tensor) -> Tensor:
    """Layout order (..., B, N, C) of official cells (S, ..., B, n, C)."""
    model = build("xar", "xar")
    return cells.movedim(0, -3).flatten(-3, -2)[..., model.order.inverse, :]


def taught() -> dict[str, Any]:
    """The recorded latents, labels, noise and times of the training forward."""
    data = read("xar")[0]
    cells = build("xar", "xar").order.num_steps
    return {
        "latents": rows(data["input.latents"]),
        "condition": data["input.label"],
        "noise": from_cells(data["input.tf_noise"]),
        "times": data["input.time"].view(cells, -1).T,
    }


def recorded() -> Tensor:
    """The noise of the samplers (K, B, N, C)."""
    data, meta = read("xar")
    cells = data["input.gen_noise"].unflatten(0, (-1, meta["gen"]["num_steps"]))
    return from_cells(cells)


@torch.no_grad()
def test_velocity_loss_and_stages() -> None:
    model, data, given = build("xar", "xar"), read("xar")[0], taught()
    seen: list[Tensor] = []
    handle = model.transformer.parts[0].register_forward_hook(lambda *call: seen.append(call[2]))
    velocity = model.logits(**given)
    handle.remove()
    order = model.order.permutation
    assert close(seen[0], data["output.tf_enc_out"])
    assert close(velocity[:, order], data["output.tf_velocity"])
    torch.testing.assert_close(model.loss(**given), data["output.tf_loss"][0], rtol=1e-5, atol=0)
    noisy = model._mix(given["latents"], given["noise"], given["times"])
    again = model.velocity(noisy, given["times"], given["condition"])
    assert torch.equal(again, velocity)
    null = model.logits(given["latents"], None, noise=given["noise"], times=given["times"])
    assert not close(null, velocity)


@torch.no_grad()
def test_times_and_classes_make_the_condition() -> None:
    model, given = build("xar", "xar"), taught()
    made = model._modulators(model._prefix(given["condition"], 2), given["times"])
    assert close(made.transpose(0, 1).flatten(0, 1), read("xar")[0]["output.tf_cond"])


def test_masks() -> None:
    assert torch.equal(build("xar", "xar").plan.mask, state_of("xar")["mask"][0, 0] == 0)


@rungs
@pytest.mark.parametrize(("solver", "key"), [("sde", "gen_latent"), ("euler", "gen_latent_ode")])
def test_guided_samples(solver: str, key: str, decode: str) -> None:
    model, (data, meta) = build("xar", "xar"), read("xar")
    latents = model.generate(
        data["input.label"],
        guidance=official_guidance("xar", **meta["gen"]),
        sampling=Denoising(meta["gen"]["num_steps"], solver),
        noise=recorded(),
        decode=decode,
    )
    assert close(latents, rows(data[f"output.{key}"]))


def test_guidance() -> None:
    guidance = official_guidance("xar", cfg=2.7)
    assert [guidance.at(cell / 3) for cell in range(4)] == pytest.approx([1 + 1.7 * k / 3 for k in range(4)])
    assert official_guidance("xar", cfg=0.5) == official_guidance("xar") == Guidance(1.0, "linear", 1.0)
    assert not official_guidance("xar").enabled
    with pytest.raises(TokenloomError, match="Did you mean 'cfg'"):
        official_guidance("xar", cgf=2.0)


def test_the_way_back() -> None:
    state, official = state_of("xar"), to_official(build("xar", "xar"))
    assert official.keys() == state.keys()
    assert [key for key in state if not torch.equal(official[key], state[key])] == []


def test_weights_alone_are_enough() -> None:
    state = {key: value for key, value in state_of("xar").items() if "rope" not in key and key != "mask"}
    model = from_official("xar", state, read("xar")[1]["config"])
    assert to_official(model).keys() == state_of("xar").keys()


@pytest.mark.parametrize(
    ("size", "clusters", "widths", "depths", "heads", "channels"),
    [
        (64, 4, (24, 40), (1, 2), (3, 5), 4),
        (96, 9, (32, 32), (3, 1), (4, 2), 6),
        (64, 16, (16, 16), (1, 1), (1, 2), 16),
    ],
)
def test_other_sizes(
    size: int,
    clusters: int,
    widths: tuple[int, int],
    depths: tuple[int, int],
    heads: tuple[int, int],
    channels: int,
) -> None:
    """A model of another shape goes to official names and back, and computes the same."""
    torch.manual_seed(size)
    side = size // 16
    cell = round(side / clusters**0.5)
    first, second = (
        {
            "width": width,
            "heads": head,
            "depth": depth,
            "mlp": "geglu",
            "norm_affine": False,
            "norm_eps": 1e-6,
            "final_norm_affine": True,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
        }
        for width, head, depth in zip(widths, heads, depths, strict=True)
    )
    model = NextCellGenerator(
        orders.blocks(Layout.grid(side, side), (cell, cell)).to_config(),
        channels,
        first,
        {"kind": "class", "num_classes": 7},
        decoder_config=second,
        rule_config={"frequencies": 64},
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.official_family = "xar"
    config = {
        "img_size": size,
        "clusters": clusters,
        "vae_embed_dim": channels,
        "encoder_num_heads": heads[0],
        "decoder_num_heads": heads[1],
    }
    again = from_official("xar", to_official(model), config)
    labels = torch.tensor([0, 6, 3])
    settings: dict[str, Any] = {"guidance": 2.0, "sampling": Denoising(3), "seeds": 1}
    assert torch.equal(again.generate(labels, **settings), model.generate(labels, **settings))


def test_errors() -> None:
    state, config = state_of("xar"), read("xar")[1]["config"]
    with pytest.raises(TokenloomError, match=r"Unknown keys \(1\): surplus"):
        from_official("xar", {**state, "surplus": torch.zeros(1)}, config)
    with pytest.raises(TokenloomError, match=r"Missing keys \(1\): pred\.bias"):
        from_official("xar", {key: value for key, value in state.items() if key != "pred.bias"}, config)
    with pytest.raises(TokenloomError, match=r"holds 'z_proj\.weight'"):
        from_official("xar", {key: value for key, value in state.items() if key != "z_proj.weight"}, config)
    with pytest.raises(TokenloomError, match="square number whose root divides the side 16, got 9"):
        from_official("xar", state, {**config, "clusters": 9})
    with pytest.raises(TokenloomError, match="Shapes do not fit"):
        from_official("xar", state, {**config, "img_size": 128})
    with pytest.raises(TokenloomError, match="encoder_blocks"):
        from_official(
            "xar", {key: value for key, value in state.items() if "encoder_blocks" not in key}, config
        )
