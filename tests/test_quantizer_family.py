"""The quantizer family against published values: residual, binary, scalar and projected forms, gradients, averages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from tokenloom import ImageVQTokenizer, TokenloomError
from tokenloom.tokenizers.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    MultiScale,
    Projected,
    Quantizer,
    Residual,
    ResidualFSQ,
    ResidualLFQ,
    ResidualVQ,
    SimVQ,
    make_quantizer,
)

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"


class Golden:
    """One file of published values."""

    def __init__(self, name: str) -> None:
        with safe_open(FIXTURES / f"vqpt_{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.values = {key: file.get_tensor(key) for key in file.keys()}

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]

    def project(self, name: str, module: Projected) -> None:
        """Loads the published projections of case `name`."""
        with torch.no_grad():
            for side in ("project_in", "project_out"):
                layer = getattr(module, side)
                layer.weight.copy_(self[f"state.m.{name}.{side}.weight"])
                layer.bias.copy_(self[f"state.m.{name}.{side}.bias"])

    def codebook(self, prefix: str, module: VQ) -> None:
        """Loads a published codebook with its averages."""
        with torch.no_grad():
            module.codebook.copy_(self[f"state.m.{prefix}._codebook.embed"][0])
            if module.ema_decay is not None:
                module.ema_count.copy_(self[f"state.m.{prefix}._codebook.cluster_size"][0])
                module.ema_sum.copy_(self[f"state.m.{prefix}._codebook.embed_avg"][0])


def near(got: Tensor, wanted: Tensor) -> None:
    """Equal within 2e-4 of the largest published value."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


def same_as_published(golden: Golden, name: str, quantizer: Quantizer) -> None:
    """Codes, values and decoded codes of evaluation."""
    z, wanted = golden[f"input.{name}"], golden[f"output.{name}.out"]
    codes, back = golden[f"output.{name}.indices"].long(), golden[f"output.{name}.from_indices"]
    if name == "image":
        z, wanted, back = (value.flatten(2).transpose(1, 2) for value in (z, wanted, back))
        codes = codes.flatten(1)
    result = quantizer.eval().encode(z)
    assert torch.equal(result.codes, codes)
    near(result.z_q.detach(), wanted)
    near(quantizer.decode(codes).detach(), back)


# scalar


@pytest.mark.parametrize(
    ("name", "bound"), [("l2_sym", "symmetric"), ("hard", "clamp"), ("legacy_tan", "tan"), ("l64k", "atanh")]
)
def test_every_published_bound(name, bound):
    golden = Golden("fsq")
    levels = golden.config["legacy_levels"] if bound == "tan" else golden.config["fsq"][name]["levels"]
    same_as_published(golden, name, FSQ(levels, bound))


def test_two_scalar_codebooks_behind_a_projection():
    golden = Golden("fsq")
    quantizer = Projected(FSQ([5, 5, 4]), 16, codebooks=2)
    golden.project("two_books", quantizer)
    assert quantizer.codebooks == 2
    same_as_published(golden, "two_books", quantizer)


@pytest.mark.parametrize("bound", ["atanh", "tan", "symmetric", "clamp"])
def test_every_code_of_every_bound_decodes_to_its_own_vector(bound):
    quantizer = FSQ([4, 3, 2], bound)
    vectors = quantizer.decode(torch.arange(24)[None])
    assert len(vectors[0].unique(dim=0)) == 24
    assert vectors.abs().max() <= 1
    z = torch.randn(1, 4000, 3, generator=torch.Generator().manual_seed(0)) * 2
    result = quantizer.encode(z)
    assert len(result.codes.unique()) == 24
    torch.testing.assert_close(quantizer.decode(result.codes), result.z_q)


def test_an_unknown_bound_is_named():
    with pytest.raises(TokenloomError, match="'atanh'"):
        FSQ([4], "tanh")


# binary


def binary(family: str, name: str) -> tuple[Golden, Quantizer]:
    golden = Golden(family)
    config = golden.config["lfq"][name]
    bits = config["codebook_size"].bit_length() - 1
    inner = {"lfq": LFQ, "bsq": BSQ}[family](
        bits,
        commitment=config.get("commitment_loss_weight", 0.0),
        entropy_weight=config.get("entropy_loss_weight", 0.1),
        diversity=config.get("diversity_gamma", 1.0),
        entropy="joint",
        inverse_temperature=golden.config["inv_temperature"],
        soft_clamp=config.get("soft_clamp_input_value"),
    )
    if f"state.m.{name}.project_in.weight" not in golden.values:
        return golden, inner
    outer = Projected(inner, config["dim"], config.get("num_codebooks", 1))
    golden.project(name, outer)
    return golden, outer


BINARY = [*(("lfq", name) for name in ("plain", "proj", "multi", "image"))]
BINARY += [("bsq", name) for name in ("plain", "proj", "image")]


@pytest.mark.parametrize(("family", "name"), BINARY)
def test_binary_codes_and_values(family, name):
    golden, quantizer = binary(family, name)
    same_as_published(golden, name, quantizer)


@pytest.mark.parametrize(("family", "name"), BINARY)
def test_binary_losses(family, name):
    golden, quantizer = binary(family, name)
    z = golden[f"input.{name}"]
    z = z.flatten(2).transpose(1, 2) if name == "image" else z
    result = quantizer.train().encode(z)
    wanted = f"output.{name}.train."
    near(result.stats["sample_entropy"], golden[wanted + "per_sample_entropy"])
    near(result.stats["batch_entropy"], golden[wanted + "batch_entropy"])
    near(sum(result.losses.values()).detach(), golden[wanted + "aux_loss"])


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_factorised_entropy_of_one_vector_is_the_joint_one(kind):
    x = kind(6).prepare(torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(1)))
    joint = kind(6, entropy="joint", inverse_temperature=1.0).entropies(x)
    factorised = kind(6, entropy="factorised", inverse_temperature=1.0).entropies(x)
    for got, wanted in zip(factorised, joint, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_factorised_entropy_limits_that_of_the_batch(kind):
    x = kind(5).prepare(torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(2)))
    x[..., 1] = x[..., 0]  # bits that depend on each other
    joint = kind(5, entropy="joint", inverse_temperature=5.0).entropies(x)
    factorised = kind(5, entropy="factorised", inverse_temperature=5.0).entropies(x)
    torch.testing.assert_close(factorised[0], joint[0], rtol=1e-3, atol=1e-3)
    assert factorised[1] > joint[1] + 0.1


def test_bsq_counts_many_bits_and_its_gradient_is_finite():
    quantizer = BSQ(48).train()
    z = torch.randn(2, 5, 48, requires_grad=True)
    result = quantizer.encode(z)
    assert result.codes.max() < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(result.codes), result.z_q)
    sum(result.losses.values()).backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().sum() > 0


def test_binary_quantizers_refuse_what_does_not_work():
    with pytest.raises(TokenloomError, match="factorised"):
        LFQ(20)
    with pytest.raises(TokenloomError, match="1 to 64 bits"):
        BSQ(65)
    with pytest.raises(TokenloomError, match="'joint'"):
        LFQ(4, entropy="jont")


# tables


def train_step(quantizer: Quantizer, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, loss and input gradient of the published training step."""
    z = z.clone().requires_grad_()
    result = quantizer.train().encode(z)
    loss = result.losses["commitment"]
    (result.z_q.square().sum() + loss).backward()
    assert z.grad is not None
    return result.z_q.detach(), loss.detach(), z.grad


TABLES = {
    "euclid_ema": {"normalize": False, "ema_decay": 0.9, "commitment": 0.5},
    "rotation": {"normalize": False, "ema_decay": 0.9, "commitment": 1.0, "rotation": True},
    "cosine": {"normalize": "inputs", "ema_decay": 0.9, "commitment": 1.0},
    "learned": {"normalize": False, "commitment": 1.0},
    "factorised": {"normalize": False, "ema_decay": 0.9, "commitment": 1.0},
}


def table_quantizer(golden: Golden, name: str) -> tuple[VQ, Quantizer]:
    inner = VQ(24, 4 if name == "factorised" else 6, **TABLES[name])  # type: ignore[arg-type]
    golden.codebook(name, inner)
    if name != "factorised":
        return inner, inner
    outer = Projected(inner, 12)
    golden.project(name, outer)
    return inner, outer


@pytest.mark.parametrize("name", TABLES)
def test_table_codes_and_values(name):
    golden = Golden("vq")
    same_as_published(golden, name, table_quantizer(golden, name)[1])


@pytest.mark.parametrize("name", TABLES)
def test_table_training_step(name):
    golden = Golden("vq")
    inner, outer = table_quantizer(golden, name)
    output, loss, gradient = train_step(outer, golden[f"input.{name}"])
    near(output, golden[f"output.{name}.train.out"])
    near(loss, golden[f"output.{name}.train.loss"])
    near(gradient, golden[f"output.{name}.train.input_grad"])
    after = f"output.{name}.after._codebook."
    near(inner.table().detach(), golden[after + "embed"][0])
    if inner.ema_decay is not None:
        near(inner.ema_count, golden[after + "cluster_size"][0])
        near(inner.ema_sum, golden[after + "embed_avg"][0])


def test_rotation_keeps_the_angle_between_gradient_and_vector():
    torch.manual_seed(0)
    quantizer = VQ(16, 5, normalize=False, rotation=True).eval()
    z, weight = torch.randn(1, 9, 5, requires_grad=True), torch.randn(1, 9, 5)
    z_q = quantizer.encode(z).z_q
    (gradient,) = torch.autograd.grad((z_q * weight).sum(), z)
    torch.testing.assert_close(
        F.cosine_similarity(gradient, z, dim=-1),
        F.cosine_similarity(weight, z_q, dim=-1),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kmeans_places_the_codebook_at_the_first_training_batch(normalize, ema_decay):
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(6, 8), dim=-1) * (1 if normalize else 5)
    z = (centres.repeat(30, 1) + 0.01 * torch.randn(180, 8))[None]
    quantizer = VQ(24, 8, normalize=normalize, ema_decay=ema_decay, kmeans_init=5)
    before = float(quantizer.eval().encode(z).stats["quantization_error"])
    assert float(quantizer.train().encode(z).stats["quantization_error"]) < before / 50
    assert bool(quantizer.initialized)
    placed = quantizer.codebook.detach().clone()
    quantizer.encode(torch.randn(1, 50, 8))
    if ema_decay is None:
        assert torch.equal(quantizer.codebook.detach(), placed)
    fresh = VQ(24, 8, normalize=normalize, ema_decay=ema_decay, kmeans_init=5)
    fresh.load_state_dict(quantizer.state_dict())
    assert bool(fresh.initialized)


def test_kmeans_with_fewer_vectors_than_codes():
    quantizer = VQ(32, 3, kmeans_init=3).train()
    quantizer.encode(torch.randn(1, 5, 3))
    assert quantizer.codebook.isfinite().all()


def test_entropy_loss_falls_when_vectors_choose_clearly_and_differently():
    quantizer = VQ(4, 4, normalize=False, entropy_weight=1.0, entropy_temperature=0.1).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    spread = quantizer.encode(torch.eye(4)[None]).losses["entropy"]
    same = quantizer.encode(torch.eye(4)[None, :1].expand(1, 4, 4)).losses["entropy"]
    torch.testing.assert_close(spread, -torch.tensor(4.0).log(), atol=1e-3, rtol=0)
    assert abs(float(same.detach())) < 1e-3


def test_simvq_moves_all_codes_with_one_layer():
    torch.manual_seed(0)
    quantizer = SimVQ(32, 4).train()
    assert [name for name, value in quantizer.named_parameters() if value.requires_grad] == [
        "transform.weight"
    ]
    z = torch.randn(2, 3, 4, requires_grad=True)
    result = quantizer.encode(z)
    assert torch.equal(quantizer.decode(result.codes), quantizer.table()[result.codes])
    before = quantizer.table().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    (result.z_q.sum() + sum(result.losses.values())).backward()
    assert z.grad is not None and z.grad.abs().min() > 0
    optimizer.step()
    assert ((quantizer.table() - before).abs().sum(1) > 0).all()


def test_simvq_learns_to_reach_the_vectors():
    torch.manual_seed(0)
    quantizer, z = SimVQ(16, 4).train(), torch.randn(1, 64, 4) * 3
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        result = quantizer.encode(z)
        optimizer.zero_grad()
        sum(result.losses.values()).backward()
        optimizer.step()
        errors.append(float(result.stats["quantization_error"]))
    assert errors[-1] < errors[0] / 2


# several processes


def averages_after_training(parts: list[Tensor]) -> dict[str, Tensor]:
    """State of EMA quantizers that start the same everywhere and train on `parts`, one a batch."""
    torch.manual_seed(0)
    quantizer = VQ(12, 4, normalize=False, ema_decay=0.8, revive_after=3).train()
    scales = MultiScale(VQ(12, 4, normalize=False, ema_decay=0.8), [(1, 2), (2, 5)], phis=0).train()
    for part in parts:
        quantizer.encode(part)
        scales.encode(part)
    return {**quantizer.state_dict(), **scales.state_dict(prefix="scales.")}


def train_in_process(rank: int, folder: str) -> None:
    """One of two processes: trains on its half of every batch and saves what it holds."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    batches = torch.randn(2, 6, 10, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    torch.save(averages_after_training([batch.chunk(2)[rank] for batch in batches]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_like_one(tmp_path):
    batches = torch.randn(2, 6, 10, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    alone = averages_after_training(list(batches))
    torch.multiprocessing.spawn(train_in_process, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        for name, wanted in alone.items():
            torch.testing.assert_close(state[name], wanted, atol=1e-6, rtol=1e-5)


# residual


@pytest.mark.parametrize("name", ["rvq", "rvq_shared"])
def test_residual_tables(name):
    golden = Golden("vq")
    shared = name == "rvq_shared"
    options: dict[str, object] = {"ema_decay": 0.9, "commitment": 1.0}
    quantizer = ResidualVQ(24, 6, 3, shared=shared, gradient="each", options=options)
    for index, layer in enumerate(quantizer.layers):
        golden.codebook(f"{name}.layers.{index}", layer)
    same_as_published(golden, name, quantizer)
    z = golden[f"input.{name}"].clone().requires_grad_()
    result = quantizer.train().encode(z)
    (result.z_q.square().sum() + result.losses["commitment"]).backward()
    near(result.z_q.detach(), golden[f"output.{name}.train.out"])
    errors = torch.stack([result.stats[f"quantization_error.{index}"] for index in range(3)])
    near(errors, golden[f"output.{name}.train.loss"])
    near(z.grad, golden[f"output.{name}.train.input_grad"])
    for index, layer in enumerate(quantizer.layers):
        after = f"output.{name}.after.layers.{index}._codebook."
        near(layer.codebook.detach(), golden[after + "embed"][0])
        near(layer.ema_count, golden[after + "cluster_size"][0])
        near(layer.ema_sum, golden[after + "embed_avg"][0])


@pytest.mark.parametrize("name", ["rfsq", "rlfq"])
def test_residual_scalar_and_binary(name):
    golden = Golden("residual")
    inner = ResidualFSQ([5, 5, 3, 3], 3) if name == "rfsq" else ResidualLFQ(6, 3)
    quantizer = Projected(inner, golden.config["res"][name]["dim"])
    golden.project(name, quantizer)
    same_as_published(golden, name, quantizer)


RESIDUALS = {
    "vq": lambda **options: ResidualVQ(64, 4, 5, **options),
    "shared": lambda **options: ResidualVQ(64, 4, 5, shared=True, **options),
    "fsq": lambda **options: ResidualFSQ([5, 4, 3, 3], 5, **options),
    "lfq": lambda **options: ResidualLFQ(4, 5, **options),
}


@pytest.mark.parametrize("kind", ["fsq", "lfq"])
def test_more_codes_come_closer(kind):
    torch.manual_seed(0)
    quantizer = RESIDUALS[kind]().eval()
    z = torch.rand(2, 30, 4) * 1.6 - 0.8
    x, codes = quantizer.prepare(z), quantizer.encode(z).codes
    errors = [float(F.mse_loss(quantizer.decode(codes[..., :count]), x)) for count in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("kind", RESIDUALS)
def test_dropped_quantizers_give_no_code_and_decode_to_nothing(kind):
    torch.manual_seed(0)
    quantizer, z, counts = RESIDUALS[kind](keep_at_least=2).train(), torch.randn(2, 3, 4), set()
    for _ in range(30):
        result = quantizer.encode(z)
        kept = int(result.stats["quantizers"])
        counts.add(kept)
        assert (result.codes[..., :kept] >= 0).all() and (result.codes[..., kept:] == -1).all()
        torch.testing.assert_close(quantizer.decode(result.codes), quantizer.decode(result.codes[..., :kept]))
        torch.testing.assert_close(quantizer.decode(result.codes), result.z_q, atol=1e-5, rtol=1e-5)
    assert counts == {2, 3, 4, 5}
    assert (quantizer.eval().encode(z).codes >= 0).all()


def test_the_gradient_of_the_sum_passes_once():
    z = torch.randn(1, 4, 4, requires_grad=True)
    once, each = ResidualVQ(8, 4, 3), ResidualVQ(8, 4, 3, gradient="each")
    for quantizer, factor in ((once, 1.0), (each, 3.0)):
        (gradient,) = torch.autograd.grad(quantizer.encode(z).z_q.sum(), z)
        torch.testing.assert_close(gradient, torch.full_like(z, factor))


def test_a_shared_codebook_is_stored_once():
    quantizer = ResidualVQ(8, 4, 3, shared=True)
    assert list(quantizer.state_dict()) == ["layers.0.codebook"]


def test_residual_quantizers_refuse_what_does_not_work():
    with pytest.raises(TokenloomError, match=r"keep_at_least must lie in 1\.\.3"):
        ResidualVQ(8, 4, 3, keep_at_least=4)
    with pytest.raises(TokenloomError, match="one width"):
        Residual([VQ(8, 4), VQ(8, 5)])
    with pytest.raises(TokenloomError, match="one or more"):
        ResidualVQ(8, 4, 0)
    with pytest.raises(TokenloomError, match="'ema_decay'"):
        ResidualVQ(8, 4, 2, options={"ema_decai": 0.5})
    with pytest.raises(TokenloomError, match="1 to 2 quantizers"):
        ResidualVQ(8, 4, 2).decode(torch.zeros(1, 1, 3, dtype=torch.long))
    with pytest.raises(TokenloomError, match="'each'"):
        ResidualVQ(8, 4, 2, gradient="eac")


# the family

EVERY: dict[str, dict[str, object]] = {
    "bsq": {"dim": 4},
    "fsq": {"levels": [4, 4, 3]},
    "lfq": {"dim": 4},
    "residual_fsq": {"levels": [4, 4], "quantizers": 2},
    "residual_lfq": {"dim": 4, "quantizers": 2},
    "residual_vq": {"codebook_size": 16, "dim": 4, "quantizers": 2},
    "simvq": {"codebook_size": 16, "dim": 4},
    "vq": {"codebook_size": 16, "dim": 4},
}


@pytest.mark.parametrize("kind", EVERY)
def test_every_quantizer_keeps_the_contract(kind):
    torch.manual_seed(0)
    quantizer = make_quantizer(kind, EVERY[kind]).train()
    z = torch.randn(2, 7, quantizer.dim, requires_grad=True)
    result = quantizer.encode(z)
    shape = (2, 7) if quantizer.codebooks == 1 else (2, 7, quantizer.codebooks)
    assert result.codes.shape == shape and result.codes.dtype == torch.long
    assert result.z_q.shape == z.shape and result.z_q.dtype == z.dtype
    assert 0 <= int(result.codes.min()) <= int(result.codes.max()) < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(result.codes), result.z_q, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(result.z_q.square().sum(), z)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    alone = quantizer.eval().encode(z[1:])
    assert torch.equal(alone.codes, quantizer.encode(z).codes[1:])
    half = quantizer.encode(z.detach().bfloat16())
    assert half.z_q.dtype == torch.bfloat16 and half.codes.shape == shape


@pytest.mark.parametrize("kind", EVERY)
def test_picture_tokenizers_take_every_quantizer_of_one_code(kind):
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch": 4, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
    if kind.startswith("residual"):
        with pytest.raises(TokenloomError, match="one code"):
            ImageVQTokenizer(**shape, quantizer_type=kind, quantizer_options=EVERY[kind])
        return
    tokenizer = ImageVQTokenizer(**shape, quantizer_type=kind, quantizer_options=EVERY[kind]).eval()
    assert tokenizer.reconstruct(torch.rand(2, 3, 16, 16)).shape == (2, 3, 16, 16)


def test_a_quantizer_without_methods_says_what_is_missing():
    with pytest.raises(TokenloomError, match=r"define encode\(\)"):
        Quantizer().encode(torch.zeros(1, 1, 1))
    with pytest.raises(TokenloomError, match=r"define decode\(\)"):
        Quantizer().decode(torch.zeros(1, 1, dtype=torch.long))
    assert isinstance(Quantizer(), nn.Module)


def test_simvq_of_unit_length_with_trained_codes():
    torch.manual_seed(0)
    quantizer, z = SimVQ(16, 4, normalize=True, frozen=False), torch.randn(2, 5, 4) * 3
    assert all(value.requires_grad for value in quantizer.parameters())
    torch.testing.assert_close(quantizer.table().norm(dim=-1), torch.ones(16))
    assert (quantizer.projected().norm(dim=-1) - 1).abs().max() > 0.1
    result = quantizer.encode(z)
    nearness = torch.nn.functional.normalize(z, dim=-1) @ quantizer.table().T
    assert torch.equal(result.codes, nearness.argmax(-1))
    assert torch.equal(quantizer.encode(7 * z).codes, result.codes)
