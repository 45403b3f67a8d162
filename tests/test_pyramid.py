"""The residual pyramid: phi choice, reconstruction, teacher-forced views and encoding, against official numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.pyramid import ResidualPyramid, phi_index

FIXTURE = Path(__file__).parent / "fixtures" / "tokenizers" / "var_msvqvae.safetensors"


def official() -> tuple[ResidualPyramid, dict[str, Tensor]]:
    """The quantizer of the tiny VAR tokenizer."""
    with safe_open(FIXTURE, "pt") as file:
        config = json.loads(file.metadata()["config"])
        data = {name: file.get_tensor(name) for name in file.keys()}
    pyramid = ResidualPyramid(
        [(side, side) for side in config["v_patch_nums"]],
        config["vocab_size"],
        config["z_channels"],
        config["share_quant_resi"],
        config["quant_resi"],
    )
    state = {"codes.weight": data["state.quantize.embedding.weight"]}
    for index in range(config["share_quant_resi"]):
        for name in ("weight", "bias"):
            source = f"state.quantize.quant_resi.qresi_ls.{index}.{name}"
            state[f"phis.{index}.{name}"] = data[source]
    pyramid.load_state_dict(state, strict=True)
    return pyramid.eval(), data


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2e-4 * want.abs().max()


@torch.no_grad()
def test_official_reconstruction() -> None:
    pyramid, data = official()
    codes = data["output.tokens"]
    for scale in range(5):
        close(pyramid.decode(codes, scale + 1), data[f"output.fhat.{scale}"])
    close(pyramid.decode(codes), data["output.fhat.4"])


@torch.no_grad()
def test_official_views() -> None:
    """The inputs of the generator: all at once as in training, and scale by scale as in generation."""
    pyramid, data = official()
    codes = data["output.tokens"]
    close(pyramid.views(codes), data["output.var_input"])
    for scale in range(1, 5):
        want = data[f"output.next_input.{scale - 1}"].flatten(2).transpose(1, 2)
        close(pyramid.shrink(pyramid.decode(codes, scale), scale), want)
        later = codes.clone()
        later[:, pyramid.slices[scale].start :] = 0
        known = pyramid.slices[scale].stop - 1  # the first scale has no view
        assert torch.equal(pyramid.views(later)[:, :known], pyramid.views(codes)[:, :known])


def test_official_codes() -> None:
    pyramid, data = official()
    assert torch.equal(pyramid.encode(data["output.features"]), data["output.tokens"])


def test_official_phi_choice() -> None:
    _, data = official()
    assert [phi_index(scale, 5, 4) for scale in range(5)] == data["output.phi_index_per_scale"].tolist()


def test_phi_choice() -> None:
    """With four ticks 2/9, 1/2 and 7/9 lie half way between two of them; float64 decides."""
    assert [phi_index(scale, 10, 4) for scale in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_index(2, 5, 4) == 2
    assert {phi_index(scale, 7, 1) for scale in range(7)} == {0}
    assert [phi_index(scale, 3, 3) for scale in range(3)] == [0, 1, 2]
    assert phi_index(0, 1, 4) == 0


@torch.no_grad()
def test_one_scale_and_no_phi() -> None:
    """Without convolutions the details are enlarged codes alone."""
    torch.manual_seed(0)
    pyramid = ResidualPyramid([(1, 2), (2, 2), (3, 4)], 9, 5, phis=0)
    codes = torch.randint(9, (2, 18))
    small = pyramid.codes(codes[:, 2:6]).transpose(1, 2).unflatten(2, (2, 2))
    torch.testing.assert_close(pyramid.detail(codes[:, 2:6], 1), F.interpolate(small, (3, 4), mode="bicubic"))
    finest = pyramid.codes(codes[:, 6:]).transpose(1, 2).unflatten(2, (3, 4))
    assert torch.equal(pyramid.detail(codes[:, 6:], 2), finest)
    assert pyramid.views(codes).shape == (2, 16, 5)
    assert ResidualPyramid([(2, 2)], 9, 5).views(codes[:, :4]).shape == (2, 0, 5)
    assert not pyramid.decode(codes, 0).any()


@torch.no_grad()
def test_cosine_compares_directions() -> None:
    pyramid = ResidualPyramid([(1, 1)], 2, 2, phis=0, cosine=True)
    pyramid.codes.weight.copy_(torch.tensor([[10.0, 0.0], [0.6, 0.8]]))
    features = torch.tensor([1.0, 0.2]).view(1, 2, 1, 1)
    assert pyramid.encode(features).item() == 0
    pyramid.cosine = False
    assert pyramid.encode(features).item() == 1


def test_errors() -> None:
    with pytest.raises(TokenloomError, match="last scale of a pyramid must be the largest"):
        ResidualPyramid([(1, 1), (3, 3), (2, 4)], 4, 2)
    with pytest.raises(TokenloomError, match="last scale"):
        ResidualPyramid([], 4, 2)
    with pytest.raises(TokenloomError, match="odd kernel"):
        ResidualPyramid([(1, 1)], 4, 2, kernel=2)
    with pytest.raises(TokenloomError, match=r"Expected features \(B, 2, 1, 3\), got \(1, 2, 3, 1\)"):
        ResidualPyramid([(1, 3)], 4, 2).encode(torch.zeros(1, 2, 3, 1))
