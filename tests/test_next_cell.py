"""Next-cell prediction: rungs, kept tokens, seeds, causality, solvers, training on real latents, storage, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from tokenloom import ImageVQTokenizer
from tokenloom.demo import PHOTO
from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    CaptionFeatures,
    Denoising,
    Guidance,
    LatentStep,
    NextCellGenerator,
    Order,
    Sampling,
    orders,
)
from tokenloom.generators.continuous import LatentNoise, TimeEmbedding
from tokenloom.generators.flow import SOLVERS, make_solver
from tokenloom.layouts import Layout

CHANNELS = 3
SQUARE = orders.blocks(Layout.grid(4, 4), (2, 2))
ORDERS: dict[str, Order] = {
    "square": SQUARE,
    "wide": orders.blocks(Layout.grid(2, 6), (2, 3)),
    "line": orders.blocks(Layout.line(6), 2),
    "clip": orders.blocks(Layout.clip(2, 2, 2), (1, 2, 2)),
    "uneven": orders.random(Layout.grid(3, 3), 3, 5),
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "class": {"kind": "class", "num_classes": 4},
    "words": {"kind": "words", "vocabulary": 9, "length": 3, "factor": 8},
    "features": {"kind": "features", "features": 5, "length": 3},
}
FEW = Denoising(steps=3)
TOKENIZER = Path(__file__).parent.parent / "tokenloom" / "assets" / "tokenloom-emoji-64" / "tokenizer"


def make(order: Order = SQUARE, condition: str = "class", **options: Any) -> NextCellGenerator:
    """A tiny generator whose velocities depend strongly on everything it sees."""
    torch.manual_seed(0)
    transformer = {"width": 24, "heads": 2, "depth": 1, "mlp_width": 32} | options.pop("transformer", {})
    options = {"decoder_config": {"heads": 1}, "rule_config": {"frequencies": 16}} | options
    model = NextCellGenerator(order.to_config(), CHANNELS, transformer, CONDITIONS[condition], **options)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    return model.eval()


def given(kind: str, batch: int) -> Any:
    """A condition, different from sample to sample."""
    if kind == "none":
        return None
    if kind == "class":
        return torch.arange(batch) % 4
    words = torch.tensor([[2, 3, 0], [4, 0, 0], [5, 6, 7], [8, 1, 2], [3, 3, 3]])[torch.arange(batch) % 5]
    if kind == "words":
        return words
    return CaptionFeatures(words[..., None].float().expand(-1, -1, 5).cos(), (words > 0).flip(1))


def latents_of(order: Order, batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, order.layout.size, CHANNELS, generator=torch.Generator().manual_seed(seed))


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# ---- rungs, guidance, kept tokens, seeds ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("order", "condition"),
    [
        ("square", "class"),
        ("square", "words"),
        ("wide", "features"),
        ("line", "none"),
        ("clip", "class"),
        ("uneven", "words"),
    ],
)
def test_reference_equals_cached(order: str, condition: str, batch: int) -> None:
    options: dict[str, Any] = {"transformer": {"rope": False}} if order == "clip" else {}
    model = make(ORDERS[order], condition, causal_prefix=order == "uneven", **options)
    known = latents_of(model.order, batch)
    keep = torch.rand(known.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.4
    for settings in (
        {"guidance": 1.0},
        {"guidance": Guidance(3.0, "linear", 1.0)},
        {"guidance": 2.0, "known": known, "keep": keep, "sampling": Denoising(4, "euler")},
    ):
        fixed: dict[str, Any] = {"batch_size": batch, "seeds": list(range(batch)), "sampling": FEW} | settings
        want = model.generate(given(condition, batch), decode="reference", **fixed)
        same(model.generate(given(condition, batch), decode="cached", **fixed), want)
        assert want.shape == known.shape and want.dtype == torch.float32


def test_a_sample_depends_on_its_own_seed_and_condition() -> None:
    model = make()
    fixed: dict[str, Any] = {"guidance": 2.0, "sampling": FEW}
    together = model.generate(given("class", 5), seeds=[3, 1, 4, 1, 5], **fixed)
    for index, seed in enumerate([3, 1, 4, 1, 5]):
        label = torch.tensor([index % 4])
        same(model.generate(label, seeds=[seed], **fixed), together[index : index + 1])
    assert torch.equal(model.generate(given("class", 5), seeds=[3, 1, 4, 1, 5], **fixed), together)
    assert not torch.equal(together[1], together[3])
    assert not torch.equal(
        model.generate(torch.tensor([0]), seeds=1, **fixed),
        model.generate(torch.tensor([0]), seeds=2, **fixed),
    )


def test_recorded_noise_takes_the_place_of_seeds() -> None:
    model = make()
    source = LatentNoise(torch.tensor([7, 8]), CHANNELS)
    noise = torch.stack([source(torch.arange(16), draw) for draw in range(3)])
    fixed: dict[str, Any] = {"batch_size": 2, "sampling": FEW}
    assert torch.equal(model.generate(**fixed, noise=noise, seeds=0), model.generate(**fixed, seeds=[7, 8]))
    places = torch.tensor([[3, 1], [0, 15]])  # other positions in every sample
    drawn = LatentNoise(torch.tensor([7, 8]), CHANNELS, noise)(places, 2)
    assert torch.equal(drawn, source(places, 2))
    assert torch.equal(drawn[1], noise[2, 1, places[1]])


def test_guidance_one_runs_one_half() -> None:
    """Cell 0 of xAR's schedule is not guided: the null half only runs once, to be there for later cells."""
    model, batches = make(), []
    model.head.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    model.generate(given("class", 2), guidance=Guidance(3.0, "linear", 1.0), sampling=FEW)
    assert batches == [2] * 3 + [4] * 9
    same(
        model.generate(given("class", 2), guidance=Guidance(), sampling=FEW, seeds=1),
        model.generate(given("class", 2), guidance=lambda progress: 1.0, sampling=FEW, seeds=1),
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_kept_tokens_stay_and_are_seen_later(solver: str) -> None:
    model = make()
    known = latents_of(SQUARE, 1)
    keep = torch.zeros(16, dtype=torch.bool)
    keep[[0, 1, 4, 5, 10]] = True  # cell 0, and one token of cell 3
    fixed: dict[str, Any] = {"batch_size": 2, "seeds": [4, 5], "sampling": Denoising(4, solver)}
    first = model.generate(known=known, keep=keep, **fixed)
    assert torch.equal(first[:, keep], known[:, keep].expand(2, -1, -1))
    changed = known.clone()
    changed[:, 10] += 1
    second = model.generate(known=changed, keep=keep, **fixed)
    cell = SQUARE.step == 3
    assert torch.equal(first[:, ~cell], second[:, ~cell])
    assert not torch.equal(first[:, cell & ~keep], second[:, cell & ~keep])
    changed[:, 0] += 1
    third = model.generate(known=changed, keep=keep, **fixed)
    assert all(
        not torch.equal(third[:, SQUARE.step == later], second[:, SQUARE.step == later]) for later in (1, 2)
    )
    assert torch.equal(model.generate(known=first, keep=keep | True, **fixed), first)


def test_steps_are_cells() -> None:
    seen: list[LatentStep] = []
    made = make().generate(given("class", 2), sampling=FEW, seeds=1, on_step=seen.append)
    assert [(step.index, step.num_steps, int(step.committed.sum())) for step in seen] == [
        (0, 4, 4),
        (1, 4, 8),
        (2, 4, 12),
        (3, 4, 16),
    ]
    assert torch.equal(seen[-1].latents, made)


# ---- teacher forcing ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("condition", ["class", "words"])
def test_cells_see_themselves_and_earlier_ones(condition: str) -> None:
    model, latents = make(condition=condition), latents_of(SQUARE, 2)
    base = model.logits(latents, given(condition, 2))
    for cell in range(4):
        changed = latents.clone()
        changed[:, (SQUARE.step == cell).nonzero()[0, 0]] += 1
        moved = (model.logits(changed, given(condition, 2)) - base).abs().amax(-1)  # (2, 16)
        assert moved[:, SQUARE.step < cell].eq(0).all()
        assert all(moved[:, SQUARE.step == later].max() > 1e-3 for later in range(cell, 4))


@torch.no_grad()
def test_loss_is_the_squared_error_of_the_velocity() -> None:
    model, latents, labels = make(), latents_of(SQUARE, 3), given("class", 3)
    noise, times = latents_of(SQUARE, 3, 1), torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    predicted = model.logits(latents, labels, noise=noise, times=times)
    want = (predicted - (noise - latents)).square().mean()
    torch.testing.assert_close(model.loss(latents, labels, noise=noise, times=times), want)
    torch.testing.assert_close(model(latents, labels, noise=noise, times=times), want)
    time = times[:, SQUARE.step, None]
    noisy = (1 - time) * latents + time * noise
    torch.testing.assert_close(model.velocity(noisy, times, labels), predicted)
    coarse = (times * 1000).floor() / 1000 + 4e-4  # the network sees whole thousandths
    torch.testing.assert_close(model.velocity(noisy, coarse, labels), predicted)
    assert not torch.isclose(model.velocity(noisy, 1 - times, labels), predicted).all()
    torch.manual_seed(5)
    drawn = model.loss(latents, labels)
    torch.manual_seed(5)
    assert torch.equal(model.loss(latents, labels), drawn)
    assert not torch.equal(model.loss(latents, labels), drawn)


@torch.no_grad()
def test_velocities_of_generation_are_those_of_teacher_forcing() -> None:
    """One Euler step from noise: the velocity at time 1 over clean earlier cells, at time 0."""
    model, labels = make(condition="words"), given("words", 2)
    noise = latents_of(SQUARE, 2)
    made = model.generate(labels, sampling=Denoising(1, "euler"), noise=noise[None])
    for cell in range(4):
        times = torch.zeros(2, 4)
        times[:, cell] = 1
        here = SQUARE.step == cell
        noisy = torch.where(here[:, None], noise, made)
        same(made[:, here], (noise - model.velocity(noisy, times, labels))[:, here])


@torch.no_grad()
def test_labels_are_dropped_in_training_only() -> None:
    model, latents, labels = (
        make(rule_config={"label_drop": 1.0, "frequencies": 16}),
        latents_of(SQUARE, 2),
        given("class", 2),
    )
    recorded = {"noise": latents_of(SQUARE, 2, 1), "times": torch.full((2, 4), 0.3)}
    null = model.loss(latents, None, **recorded)
    assert not torch.isclose(model.loss(latents, labels, **recorded), null)
    torch.testing.assert_close(model.train().loss(latents, labels, **recorded), null)


def test_every_weight_learns() -> None:
    model = make(condition="words").train()
    model.loss(latents_of(SQUARE, 4), given("words", 4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- solvers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "steps", "within"),
    [("euler", 1, 1e-4), ("euler", 7, 1e-4), ("heun", 1, 1e-4), ("heun", 7, 1e-3), ("sde", 200, 0.3)],
)
def test_solvers_follow_the_flow_of_one_point(solver: str, steps: int, within: float) -> None:
    """Data of one value a: the velocity is (x - a) / t, and the flow ends at a."""
    value, flow = torch.tensor([3.0, -1.0]), make_solver(solver, steps)
    draws = torch.randn(64, 200, 2, generator=torch.Generator().manual_seed(0))
    x = draws[:, 0]
    assert flow.times[0] == 1 and all(0 < time <= 1 for time in flow.times)
    assert len(flow.times) == (2 * steps - 1 if solver == "heun" else steps)
    for index, time in enumerate(flow.times):
        x = flow.step(x, (x - value) / time, index, lambda draw: draws[:, draw])
    torch.testing.assert_close(x, value.expand(64, -1), rtol=0, atol=within)


def test_the_sde_keeps_the_spread_of_the_data() -> None:
    """Data N(0, 0.5^2): the velocity is linear in x; the solver ends with this deviation."""
    draws = torch.randn(101, 20000, generator=torch.Generator().manual_seed(0))
    flow, x, variance = make_solver("sde", 100), draws[0], 0.25
    for index, time in enumerate(flow.times):
        slope = (time - (1 - time) * variance) / ((1 - time) ** 2 * variance + time**2)
        x = flow.step(x, slope * x, index, lambda draw: draws[draw])
    assert flow.draws == 100
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_clip_bounds_the_data_that_velocities_predict(solver: str) -> None:
    """One step ends there; a bound that nothing reaches changes no more than rounding does."""
    model, noise = make(), latents_of(SQUARE, 2)[None].expand(3, -1, -1, -1)
    for steps, clip in ((1, 0.1), (3, 1e4)):
        free, made = (
            model.generate(batch_size=2, noise=noise, sampling=Denoising(steps, solver, 0.0, bound))
            for bound in (None, clip)
        )
        if steps == 1:
            assert made.abs().max() <= 0.1 + 1e-6 < free.abs().max()
        else:
            same(made, free)


def test_temperature_is_that_of_the_added_noise() -> None:
    model = make()
    noise = torch.cat((latents_of(SQUARE, 2)[None], torch.full((2, 2, 16, CHANNELS), 9.0)))
    fixed: dict[str, Any] = {"batch_size": 2, "sampling": Denoising(3, "sde", 0.0)}
    still = model.generate(**fixed, noise=noise)
    assert torch.equal(still, model.generate(**fixed, noise=torch.cat((noise[:1], 0 * noise[1:]))))
    assert not torch.isclose(still, model.generate(batch_size=2, sampling=FEW, noise=noise)).all()
    default = Denoising(3, "sde")
    assert Denoising.of(Sampling(temperature=0), default) == Denoising(3, "sde", 0.0)
    assert Denoising.of(Denoising(5), default) == Denoising(5, "sde")
    assert Denoising.of(None, default) is default


def test_times_are_embedded_by_sinusoids() -> None:
    embed = TimeEmbedding(8, 6)
    embed.up.weight.data = torch.eye(8, 6)
    embed.up.bias.data.zero_()
    seen: list[Tensor] = []
    embed.up.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert embed(torch.tensor([[0.0, 500.0]])).shape == (1, 2, 8)
    angles = 500 * 10000 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(seen[0][0, 1], torch.cat((angles.cos(), angles.sin())), rtol=1e-4, atol=1e-4)
    assert seen[0][0, 0].tolist() == [1, 1, 1, 0, 0, 0]


# ---- training and storage -------------------------------------------------------------------------------------------


@torch.no_grad()
def real_latents() -> Tensor:
    """Features of 16 crops of a photograph before quantization, a quarter of each, with unit variance: (16, 16, C)."""
    tokenizer = ImageVQTokenizer.from_pretrained(TOKENIZER).eval()
    side = tokenizer.image_size
    photo = Image.open(PHOTO).convert("RGB").resize((4 * side, 4 * side))
    pixels = pil_to_tensor(photo).float() / 127.5 - 1
    crops = pixels.unfold(1, side, side).unfold(2, side, side).movedim(0, 2).flatten(0, 1)
    features = tokenizer.features(crops).unflatten(1, (tokenizer.grid, -1))[:, 2:6, 2:6].flatten(1, 2)
    return (features - features.mean((0, 1))) / features.std((0, 1))


def test_overfits_real_latents_and_repeats_them() -> None:
    latents, labels = real_latents(), torch.arange(16)
    torch.manual_seed(0)
    model = NextCellGenerator(
        SQUARE.to_config(),
        latents.shape[2],
        {"width": 64, "heads": 4, "depth": 2},
        {"kind": "class", "num_classes": 16},
        rule_config={"label_drop": 0.0, "frequencies": 64},
    )
    draw = torch.Generator().manual_seed(1)
    recorded = {
        "noise": torch.randn(512, *latents.shape[1:], generator=draw),
        "times": torch.randn(512, 4, generator=draw).sigmoid(),
    }

    def error() -> float:
        with torch.no_grad():
            return model.loss(latents.repeat(32, 1, 1), labels.repeat(32), **recorded).item()

    initial, steps = error(), 400
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(latents, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert error() < 0.05 * initial
    model.eval()
    for solver in ("euler", "sde"):
        again = model.generate(labels, seeds=3, sampling=Denoising(20, solver))
        assert (again - latents).square().mean() < 0.05
        closest = torch.cdist(again.flatten(1), latents.flatten(1)).argmin(1)
        assert torch.equal(closest, labels)


@pytest.mark.parametrize("condition", ["class", "words"])
def test_storage(condition: str, tmp_path: Path) -> None:
    model, told = make(condition=condition), given(condition, 2)
    model.save_pretrained(tmp_path)
    again = NextCellGenerator.from_pretrained(tmp_path)
    assert again.rule == model.rule and again.order == model.order
    same(again.generate(told, seeds=1, sampling=FEW), model.generate(told, seeds=1, sampling=FEW))


def test_runs_in_bfloat16() -> None:
    model = make(condition="words").to(torch.bfloat16)
    made = model.generate(given("words", 2), guidance=2.0, seeds=1, sampling=FEW)
    assert made.dtype == torch.float32 and bool(made.isfinite().all())
    assert model.loss(latents_of(SQUARE, 2), given("words", 2)).isfinite()


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule_config": {"label_dro": 0.1}}, "Did you mean 'label_drop'"),
        ({"transformer": {"modulation": None}}, "modulation must be 'own' or 'shared'"),
        ({"transformer": {"taps": [1, 1]}}, "without final_modulation and taps"),
        ({"decoder_config": {"widt": 3}}, "Did you mean 'width'"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "condition", [{"kind": "none", "length": 0}, {"kind": "tokens", "vocabulary": 3, "ids": 1, "offset": 1}]
)
def test_conditions_that_do_not_fit(condition: dict[str, Any]) -> None:
    with pytest.raises(TokenloomError, match="at least one row, and has no token table"):
        NextCellGenerator(SQUARE.to_config(), 3, {"width": 8, "heads": 2, "depth": 1}, condition)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "positive integer"),
        ({"condition": torch.tensor([9])}, "labels must lie"),
        ({"condition": torch.tensor([1]), "batch_size": 2}, "batch_size is 2"),
        ({"sampling": Denoising(3, "eulr")}, "Did you mean 'euler'"),
        ({"sampling": Sampling(top_k=3)}, "not drawn from a softmax"),
        ({"sampling": 7}, "sampling must be Denoising"),
        ({"decode": "cashed"}, "Did you mean 'cached'"),
        ({"known": torch.zeros(1, 16, 3)}, "belong together"),
        ({"known": torch.zeros(1, 15, 3), "keep": torch.ones(16) > 0}, r"known must be .* \(B, 16, 3\)"),
        ({"known": torch.zeros(1, 16, 3), "keep": torch.ones(16)}, "boolean"),
        ({"known": torch.full((1, 16, 3), torch.nan), "keep": torch.ones(16) > 0}, "NaN"),
        ({"noise": torch.zeros(2, 1, 16, 3)}, "K >= 50"),
        ({"noise": torch.zeros(50, 2, 16, 3)}, r"\(K, 1, 16, 3\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        make().generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(2, 16, 3).long()}, "floating tensor"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, r"map\.flatten\(2\)"),
        ({"latents": torch.zeros(2, 16, 4)}, r"\(B, 16, 3\)"),
        ({"times": torch.zeros(2, 3)}, r"times must be floating \(2, 4\)"),
        ({"times": torch.full((2, 4), 1.5)}, r"in \[0, 1\]"),
        ({"noise": torch.zeros(2, 16, 1)}, "noise must have the shape"),
        ({"condition": torch.tensor([1])}, "one a sample"),
    ],
)
def test_bad_teaching(arguments: dict[str, Any], message: str) -> None:
    fixed = {"latents": torch.zeros(2, 16, 3), "times": torch.zeros(2, 4)}
    for call in (make().loss, make().logits):
        with pytest.raises(TokenloomError, match=message):
            call(**(fixed | arguments))


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"steps": 2.0}, {"temperature": -1.0}, {"temperature": "a"}, {"clip": 0}, {"clip": "1"}],
)
def test_bad_denoising(values: dict[str, Any]) -> None:
    with pytest.raises(TokenloomError, match="got"):
        Denoising(**values)


def test_broken_weights_are_named() -> None:
    model = make()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(TokenloomError, match=r"Step 0 of 4: .* weights of head\.bias are not finite"):
        model.generate(batch_size=1, sampling=FEW)
    large = make()
    large.head.weight.data.fill_(1e38)
    with pytest.raises(TokenloomError, match="activations overflowed"):
        large.generate(batch_size=1, sampling=FEW)


def test_unknown_solver() -> None:
    with pytest.raises(TokenloomError, match="Did you mean 'heun'"):
        make_solver("huen", 3)
