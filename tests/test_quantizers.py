"""Quantizers: published codes and values, straight-through gradients, moving averages, revival, usage, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tokenloom import TokenloomError
from tokenloom.tokenizers.quantizers import FSQ, VQ, codebook_usage, make_quantizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"


@pytest.fixture(scope="module")
def fsq_values() -> dict[str, Tensor]:
    return load_file(FIXTURES / "vqpt_fsq.safetensors")


@pytest.fixture(scope="module")
def vq_values() -> dict[str, Tensor]:
    return load_file(FIXTURES / "vqpt_vq.safetensors")


def vq_with_state(values: dict[str, Tensor], name: str, **options: object) -> VQ:
    """A quantizer with the published state `name`."""
    quantizer = VQ(24, 6, **options)  # type: ignore[arg-type]
    prefix = f"state.m.{name}._codebook."
    with torch.no_grad():
        quantizer.codebook.copy_(values[prefix + "embed"][0])
        if quantizer.ema_decay is not None:
            quantizer.ema_count.copy_(values[prefix + "cluster_size"][0])
            quantizer.ema_sum.copy_(values[prefix + "embed_avg"][0])
    return quantizer


# FSQ


@pytest.mark.parametrize(("name", "levels"), [("l8555", [8, 5, 5, 5]), ("l64k", [8, 8, 8, 5, 5, 5])])
def test_fsq_gives_the_published_codes_and_values(fsq_values, name, levels):
    quantizer = FSQ(levels)
    result = quantizer.encode(fsq_values[f"input.{name}"])
    assert torch.equal(result.codes, fsq_values[f"output.{name}.indices"].long())
    torch.testing.assert_close(result.z_q, fsq_values[f"output.{name}.out"], rtol=0, atol=1e-6)
    assert torch.equal(quantizer.decode(result.codes), fsq_values[f"output.{name}.from_indices"])


def test_fsq_codebook_starts_like_the_published_one(fsq_values):
    head = fsq_values["output.l8555.codebook_head"]
    assert torch.equal(FSQ([8, 5, 5, 5]).decode(torch.arange(len(head))), head)


def test_fsq_of_a_picture_grid_gives_the_published_codes(fsq_values):
    z = fsq_values["input.image"].flatten(2).transpose(1, 2)
    codes = FSQ([8, 5, 5, 5]).encode(z).codes
    assert torch.equal(codes, fsq_values["output.image.indices"].long().flatten(1))


@pytest.mark.parametrize("levels", [[2], [3, 2], [8, 5, 4], [2, 2, 2, 2]])
def test_every_fsq_code_is_reached_and_survives_the_round_trip(levels):
    quantizer = FSQ(levels)
    assert quantizer.codebook_size == math.prod(levels)
    codes = torch.arange(quantizer.codebook_size)[None]
    vectors = quantizer.decode(codes)
    assert vectors.abs().max() <= 1
    half = quantizer.level_count // 2
    scale = (quantizer.level_count - 1) * (1 + 1e-3) / 2
    offset = (quantizer.level_count % 2 == 0) * 0.5
    before = ((vectors * half + offset) / scale).atanh() - (offset / scale).atanh()  # inverse of `bound`
    result = quantizer.encode(before)
    assert torch.equal(result.codes, codes)
    torch.testing.assert_close(result.z_q, vectors)


def test_fsq_gradient_is_that_of_the_bound_and_reaches_every_dimension():
    quantizer = FSQ([8, 5, 3])
    z = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (through,) = torch.autograd.grad(quantizer.encode(z).z_q.sum(), z)
    (smooth,) = torch.autograd.grad((quantizer.bound(z) / (quantizer.level_count // 2)).sum(), z)
    torch.testing.assert_close(through, smooth)
    assert (through > 0).all()


def test_fsq_of_values_that_are_no_numbers_gives_valid_codes_and_keeps_them_visible():
    quantizer = FSQ([8, 5])
    result = quantizer.encode(torch.tensor([[[math.nan, math.inf], [-math.inf, 0.0]]]))
    assert ((result.codes >= 0) & (result.codes < 40)).all()
    assert result.z_q[0, 0, 0].isnan()
    assert result.z_q[0, 1].isfinite().all()


@pytest.mark.parametrize("levels", [[], [1], [8, 0], [4, -3]])
def test_fsq_refuses_useless_levels(levels):
    with pytest.raises(TokenloomError, match="two or more levels"):
        FSQ(levels)


# VQ


@pytest.mark.parametrize("name", ["euclid_ema", "rotation", "learned"])
def test_euclidean_lookup_gives_the_published_codes_and_values(vq_values, name):
    quantizer = vq_with_state(vq_values, name, normalize=False).eval()
    result = quantizer.encode(vq_values[f"input.{name}"])
    assert torch.equal(result.codes, vq_values[f"output.{name}.indices"])
    torch.testing.assert_close(result.z_q, vq_values[f"output.{name}.out"], rtol=0, atol=1e-6)
    assert torch.equal(quantizer.decode(result.codes), vq_values[f"output.{name}.from_indices"])


@pytest.mark.parametrize(("name", "commitment"), [("euclid_ema", 0.5), ("rotation", 1.0)])
def test_one_training_step_moves_the_averages_as_published(vq_values, name, commitment):
    quantizer = vq_with_state(vq_values, name, normalize=False, ema_decay=0.9, commitment=commitment)
    result = quantizer.train().encode(vq_values[f"input.{name}"])
    after = f"output.{name}.after._codebook."
    torch.testing.assert_close(quantizer.ema_count, vq_values[after + "cluster_size"][0])
    torch.testing.assert_close(quantizer.ema_sum, vq_values[after + "embed_avg"][0])
    # The published code divides by counts smoothed with 1e-5, hence the tolerance.
    torch.testing.assert_close(quantizer.codebook.data, vq_values[after + "embed"][0], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(result.losses["commitment"], vq_values[f"output.{name}.train.loss"])


def test_cosine_lookup_takes_the_code_of_the_smallest_angle(vq_values):
    quantizer = vq_with_state(vq_values, "cosine").eval()
    z = vq_values["input.cosine"]
    table = F.normalize(vq_values["state.m.cosine._codebook.embed"][0], dim=-1)
    result = quantizer.encode(z)
    assert torch.equal(result.codes, (z @ table.T).argmax(-1))
    torch.testing.assert_close(result.z_q.norm(dim=-1), torch.ones(z.shape[:-1]))
    assert torch.equal(quantizer.encode(5 * z).codes, result.codes)


@pytest.mark.parametrize("normalize", [True, False])
def test_vq_gradient_passes_straight_through(normalize):
    torch.manual_seed(0)
    quantizer = VQ(16, 4, normalize=normalize)
    z, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    result = quantizer.encode(z)
    (got,) = torch.autograd.grad((result.z_q * weight).sum(), z, retain_graph=True)
    source = F.normalize(z, dim=-1) if normalize else z
    (wanted,) = torch.autograd.grad((source * weight).sum(), z)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(result.z_q, quantizer.decode(result.codes))
    result.losses["codebook"].backward()
    used = torch.bincount(result.codes.flatten(), minlength=16) > 0
    assert quantizer.codebook.grad is not None
    assert torch.equal(quantizer.codebook.grad.abs().sum(1) > 0, used)


def test_every_vq_code_survives_the_round_trip():
    torch.manual_seed(1)
    quantizer = VQ(32, 8).eval()
    codes = torch.arange(32)[None]
    assert torch.equal(quantizer.encode(quantizer.decode(codes)).codes, codes)


def test_lookup_is_float32_under_autocast():
    torch.manual_seed(2)
    quantizer, z = VQ(512, 8).eval(), torch.randn(1, 200, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer.encode(z).codes
    assert torch.equal(codes, quantizer.encode(z).codes)


@pytest.mark.parametrize("ema_decay", [None, 0.8])
@pytest.mark.parametrize("normalize", [True, False])
def test_dead_codes_are_revived_and_training_goes_on(ema_decay, normalize):
    torch.manual_seed(3)
    quantizer = VQ(32, 4, normalize=normalize, ema_decay=ema_decay, revive_after=2).train()
    z = torch.randn(1, 200, 4, requires_grad=True)
    with torch.no_grad():  # 31 codes stand where no vector comes near
        quantizer.codebook.copy_(torch.tensor([1.0, 0, 0, 0]).expand(32, 4) * 50)
        quantizer.codebook[1:, 0] *= -1 if normalize else 2
    first = quantizer.encode(z)
    for _ in range(6):
        result = quantizer.encode(z)
        sum(result.losses.values(), result.z_q.sum()).backward()
    assert len(first.codes.unique()) <= 2
    assert len(result.codes.unique()) > 16
    assert quantizer.codebook.isfinite().all()


def test_without_revival_dead_codes_stay():
    quantizer = VQ(8, 2, normalize=False, ema_decay=0.5)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.arange(16.0).view(8, 2) + 100)
        quantizer.ema_sum.copy_(quantizer.codebook)
    before = quantizer.codebook.detach().clone()
    for _ in range(100):
        quantizer.train().encode(torch.zeros(1, 4, 2))
    torch.testing.assert_close(quantizer.codebook[1:], before[1:])
    torch.testing.assert_close(quantizer.codebook[0], torch.zeros(2), atol=1e-5, rtol=0)


def test_evaluation_changes_nothing():
    quantizer = VQ(8, 2, ema_decay=0.5, revive_after=1).eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.encode(torch.randn(3, 4, 2))
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def _train_in_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, decay in (("gradient", None), ("ema", 0.9)):
        torch.manual_seed(0)
        quantizer = VQ(32, 4, ema_decay=decay, revive_after=1).train()
        torch.manual_seed(1 + rank)
        for _ in range(4):
            quantizer.encode(torch.randn(1, 12, 4))
        torch.save(quantizer.state_dict(), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_different_data_keep_one_codebook(tmp_path):
    torch.multiprocessing.spawn(_train_in_process, (str(tmp_path),), nprocs=2)
    for name in ("gradient", "ema"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        torch.manual_seed(0)
        untouched = VQ(32, 4).codebook
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["codebook"], untouched)


# Figures and construction


def test_codebook_usage_of_hand_made_counts():
    assert codebook_usage(torch.tensor([5, 5, 5, 5])) == pytest.approx(
        {"usage": 1.0, "perplexity": 4.0, "dead": 0.0}
    )
    assert codebook_usage(torch.tensor([9, 0, 0, 0])) == pytest.approx(
        {"usage": 0.25, "perplexity": 1.0, "dead": 3.0}
    )
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    figures = codebook_usage(torch.tensor([3, 1, 0]))
    assert figures == pytest.approx({"usage": 2 / 3, "perplexity": math.exp(entropy), "dead": 1.0})
    assert codebook_usage(torch.zeros(4, dtype=torch.long))["dead"] == 4


def test_make_quantizer_names_what_is_wrong():
    assert isinstance(make_quantizer("vq", {"codebook_size": 4, "dim": 2}), VQ)
    with pytest.raises(TokenloomError, match="'fsq'"):
        make_quantizer("fqs", {})
    with pytest.raises(TokenloomError, match="'codebook_size'"):
        make_quantizer("vq", {"codebok_size": 4, "dim": 2})
    with pytest.raises(TokenloomError, match="Missing option of the vq quantizer: dim"):
        make_quantizer("vq", {"codebook_size": 4})
    for bad in ({"codebook_size": 1, "dim": 2}, {"codebook_size": 4, "dim": 0}):
        with pytest.raises(TokenloomError, match="codebook_size >= 2 and dim >= 1"):
            make_quantizer("vq", bad)
    with pytest.raises(TokenloomError, match="ema_decay"):
        VQ(4, 2, ema_decay=1.5)
