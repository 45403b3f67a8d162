"""Masked prediction of continuous tokens: what is seen, visits, rungs, kept latents, seeds, guidance, losses, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_codes import real_codes, tokenizer
from torch import Tensor

from tokenloom import Layout, MaskedLatentGenerator, orders
from tokenloom.errors import TokenloomError
from tokenloom.generators import Guidance, Sampling
from tokenloom.generators.continuous import Denoising, LatentStep
from tokenloom.generators.diffusion_head import DiffusionHead, HeadConfig, process
from tokenloom.generators.masked_visits import hidden_counts

ONE = orders.blocks(Layout.grid(3, 4), (3, 4))
TWO = orders.scales(Layout.scales([2, 3]))
SIDE = {"width": 24, "heads": 2, "depth": 1, "norm": "layer", "mlp": "gelu", "rope": False}
ROWS = {"kind": "rows", "width": 16, "depth": 2, "steps": 3}
MAP = {"kind": "map", "width": 16, "depth": 1, "heads": 2, "steps": 2}
ORDERS = {"one": ONE, "two": TWO}


def build(name: str = "one", condition: str = "class", **rule: Any) -> Any:
    """A generator whose features depend strongly on all it sees, and whose heads keep what they draw small."""
    torch.manual_seed(0)
    two = name == "two"
    rule = {"visits": [3, 2] if two else [4], "mask_schedules": ["truncnorm", "cosine"][: 1 + two]} | rule
    given = {"class": {"kind": "class", "num_classes": 4}, "none": {"kind": "none"}}[condition]
    weights = {"loss_weights": [2.0, 0.75]} if two else {}
    model = MaskedLatentGenerator(
        ORDERS[name].to_config(),
        3,
        SIDE,
        SIDE | {"width": 20},
        [ROWS, MAP] if two else [ROWS],
        given,
        prefix_repeats=2,
        rule_config=rule | weights,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def latents_of(name: str, batch: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, ORDERS[name].layout.size, 3, generator=source)


def alike(got: Tensor, want: Tensor) -> bool:
    """Within rounding, relative to the largest value: untrained heads give large ones."""
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


# ---- the process -------------------------------------------------------------------------------------------------


def test_the_cosine_process() -> None:
    """Against its definition, and consistent when times are left out."""
    full, few = process(), process(7)
    ideal = torch.cos((torch.arange(1, 1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(full.total[:999], (ideal / start)[:999], rtol=1e-9, atol=0)
    assert full.betas.max() == pytest.approx(0.999)
    assert few.times.tolist() == [0, 166, 333, 500, 666, 832, 999]
    assert torch.equal(few.total, full.total[few.times]) and process(1).times.tolist() == [0]
    assert (1 - few.betas).cumprod(0).allclose(few.total)
    with pytest.raises(TokenloomError, match="1 to 1000 steps, got 1001"):
        process(1001)


def test_a_draw_with_the_true_noise_ends_at_the_token() -> None:
    """The mean of the last step is the clean token, and a step of the process inverts `add_noise`."""
    source = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 5, 3, generator=source) for _ in range(2))
    tables = process(10)
    for at in range(9):  # at the last time, float32 cannot tell the token from the noise
        noisy = tables.add_noise(clean, noise, at)
        before = tables.mean(noisy, noise, at)
        assert alike(before, clean) if at == 0 else alike(before, tables.mean_of(clean, noisy, at))


@pytest.mark.parametrize("kind", ["rows", "map"])
def test_losses_of_a_perfect_and_of_a_silent_network(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true noise and the smallest variance cost nothing; no noise costs its square, and the bound."""
    head = DiffusionHead(3, 8, HeadConfig(kind, 16, 1, 2), 5)
    source = torch.Generator().manual_seed(0)
    clean, noise, z = (torch.randn(4, 5, width, generator=source) for width in (3, 3, 8))
    at = torch.randint(1, 1000, (4, 5) if kind == "rows" else (4, 1), generator=source)
    silent = head.loss(clean, z, at, noise)  # the output layer starts at zero
    assert silent.shape == (4, 5) and (silent >= noise.square().mean(-1) - 1e-6).all()
    perfect = torch.cat((noise, -torch.ones_like(noise)), dim=-1) if kind == "rows" else noise
    monkeypatch.setattr(head.network, "forward", lambda *args: perfect)
    assert head.loss(clean, z, at, noise).abs().max() < 1e-4


# ---- features and loss -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ORDERS)
def test_hidden_latents_are_not_seen_and_others_are(name: str) -> None:
    model, latents, labels = build(name), latents_of(name, 2), torch.tensor([1, 3])
    size = latents.shape[1]
    for step in range(model.order.num_steps):
        masked = (model.order.step > step) | ((model.order.step == step) & (torch.arange(size) % 2 == 0))
        before = model.features(latents, labels, masked, step)
        assert before.shape == (2, size, 20)
        for position in range(size):
            changed = latents.clone()
            changed[:, position] += 1
            moved = (model.features(changed, labels, masked, step) - before).abs().amax((0, 2))
            assert moved.max() == 0 if masked[position] else moved.min() > 1e-5
        assert (model.features(latents, None, masked, step) - before).abs().amax((0, 2)).min() > 1e-4
        each = torch.stack((masked, model.order.step >= step))
        mixed = model.features(latents, labels, each, step)  # samples that show different numbers of tokens
        assert alike(mixed[0], before[0])
        assert alike(mixed[1], model.features(latents, labels, None, step)[1])


@torch.no_grad()
def test_the_second_step_is_told_features() -> None:
    model, latents = build("two"), latents_of("two", 1)
    features = torch.randn(1, 13, 20)
    early = model.order.step == 0
    seen = [
        model.features(latents, step=1, context=(features, made.expand(1, -1)))
        for made in (early, early & False, early & (torch.arange(13) < 2))
    ]
    assert min(float((a - b).abs().max()) for a, b in zip(seen, seen[1:] + seen[:1], strict=True)) > 1e-3
    other = model.features(latents + early[:, None], step=1, context=(features, early.expand(1, -1)))
    assert torch.equal(other, seen[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ORDERS)
def test_loss_is_made_of_hidden_rows(name: str) -> None:
    """Of all draws, only those of hidden positions count; the same random state gives the same loss."""
    model, latents, labels = build(name, repeats=3), latents_of(name, 2), torch.tensor([1, 3])
    masked = torch.arange(latents.shape[1]) % 2 == 0
    losses = []
    for given in (masked, masked, None):
        torch.manual_seed(5)
        losses.append(float(model(latents, labels, given)))
    assert losses[0] == losses[1] != losses[2] and min(losses) > 0
    if name == "one":
        torch.manual_seed(5)
        at = torch.randint(1000, (6, 12))
        noise = torch.randn(6, 12, 3)
        z = model.features(latents, labels, masked).repeat(3, 1, 1)
        rows = model.heads[0].loss(latents.repeat(3, 1, 1), z, at, noise)
        assert losses[0] == pytest.approx(float(rows[:, masked].mean()), rel=1e-5)


@pytest.mark.parametrize("name", ORDERS)
def test_every_parameter_learns(name: str) -> None:
    """In training mode with everything dropped at times: labels, and what the second step is told of the first."""
    model, labels = build(name, label_drop=0.5, context_drop=0.3).train(), torch.tensor([0, 1, 2, 3])
    for seed in range(6):
        torch.manual_seed(seed)
        model(latents_of(name, 4), labels).backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


@torch.no_grad()
def test_dropped_labels() -> None:
    """In training mode with a share of 1, the loss is that of no label; in evaluation it is not."""
    model, latents, masked = (
        build("one", label_drop=1.0),
        latents_of("one", 2),
        torch.ones(12, dtype=torch.bool),
    )
    losses = []
    for training, labels in ((True, torch.tensor([1, 3])), (True, torch.tensor([0, 2])), (False, None)):
        torch.manual_seed(1)
        if not training:
            torch.rand(2, 1, 1)  # what dropping draws
        losses.append(float(model.train(training)(latents, labels, masked)))
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    torch.manual_seed(1)
    told = model(latents, torch.tensor([1, 3]), masked)
    torch.manual_seed(1)
    assert told != model(latents, None, masked)


# ---- generation --------------------------------------------------------------------------------------------------


def test_hidden_counts() -> None:
    assert hidden_counts(16, 16) == list(range(15, -1, -1)) and hidden_counts(5, 1) == [0]
    assert hidden_counts(256, 4) == [236, 181, 97, 0] and hidden_counts(2, 5) == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", ORDERS)
def test_both_rungs_give_the_same_latents(name: str, batch: int) -> None:
    """With and without guidance, kept latents (the same or others for each sample), and both conditions."""
    size = ORDERS[name].layout.size
    uneven = torch.arange(size) % 4 < torch.arange(batch)[:, None] % 4
    for kind, guidance, keep in (
        ("class", 1.0, None),
        ("class", Guidance(2.5, "linear"), uneven),
        ("none", 1.0, torch.arange(size) % 3 == 1),
    ):
        model = build(name, kind)
        labels = torch.arange(batch) % 4 if kind == "class" else None
        kept = {} if keep is None else {"known": latents_of(name, batch), "keep": keep}
        made = [
            model.generate(
                labels,
                batch_size=batch if labels is None else None,
                guidance=guidance,
                seeds=3,
                decode=decode,
                **kept,
            )
            for decode in ("reference", "cached", "auto")
        ]
        assert made[0].shape == (batch, size, 3) and made[0].dtype == torch.float32
        assert alike(made[1], made[0]) and torch.equal(made[1], made[2])
        if keep is not None:
            where = keep.expand(batch, -1)
            assert torch.equal(made[1][where], kept["known"][where]) and not torch.equal(
                made[1], kept["known"]
            )


@pytest.mark.parametrize("name", ORDERS)
def test_a_sample_is_its_own(name: str) -> None:
    model, labels, seeds = build(name), torch.tensor([0, 1, 2, 3, 1]), [31, 2**63 + 5, 0, 7, 31]
    together = model.generate(labels, guidance=2.0, seeds=seeds)
    for index in range(5):
        alone = model.generate(labels[index : index + 1], guidance=2.0, seeds=seeds[index : index + 1])
        assert alike(alone[0], together[index])
    assert not alike(together[1], together[4])
    unlike = model.generate(labels, guidance=2.0, seeds=[32, *seeds[1:]])
    assert not alike(unlike[0], together[0]) and torch.equal(unlike[1:], together[1:])


@pytest.mark.parametrize("name", ORDERS)
def test_guidance(name: str) -> None:
    """Scale 1 is the conditional half alone, scale 0 the null half."""
    model, labels = build(name), torch.tensor([2])
    plain = model.generate(labels, seeds=4)
    one = model.generate(labels, guidance=lambda progress: 1.0, seeds=4)
    assert alike(one, plain)
    assert not alike(model.generate(labels, guidance=3.0, seeds=4), plain)
    if name == "one":  # of two steps, the second is told the features of the conditional half
        cold = Denoising(3, temperature=0.0)  # variances come from the conditional half
        zero = model.generate(labels, guidance=lambda progress: 0.0, sampling=cold, seeds=4)
        assert alike(zero, model.generate(batch_size=1, sampling=cold, seeds=4))


def test_progress_of_guidance() -> None:
    """The share of positions a visit leaves made, each step of the order for itself."""
    seen: list[float] = []
    build("two").generate(torch.tensor([1]), guidance=lambda p: seen.append(p) or 2.0, visits=[2, 3], seeds=1)
    want = [(1 - 2 / 4) / 2, (1 - 1 / 4) / 2, (1 + 1 - 7 / 9) / 2, (1 + 1 - 4 / 9) / 2, (1 + 1 - 1 / 9) / 2]
    assert seen == pytest.approx(want)


@pytest.mark.parametrize("name", ORDERS)
def test_visits_and_what_they_leave(name: str) -> None:
    model, seen = build(name), []
    visits = [3, 4][: model.order.num_steps]
    sequence = torch.randperm(model.order.layout.size, generator=torch.Generator().manual_seed(2))[None]
    latents = model.generate(
        torch.tensor([1]), visits=visits, seeds=1, sequence=sequence, on_step=seen.append
    )
    assert all(isinstance(step, LatentStep) and step.num_steps == sum(visits) for step in seen)
    assert torch.equal(seen[-1].latents, latents) and seen[-1].committed.all()
    done = []
    for step, count in enumerate(visits):
        own = [int(place) for place in sequence[0] if model.order.step[place] == step]
        for left in hidden_counts(len(own), count):
            done.append(set(own[: len(own) - left]))
        done = done[:-count] + [set().union(*done[-count - 1 : -count]) | now for now in done[-count:]]
    assert [set(step.committed.nonzero().flatten().tolist()) for step in seen] == done
    for step in seen:
        final = step.committed
        assert torch.equal(step.latents[0, final], latents[0, final]) and not step.latents[0, ~final].any()


def test_recorded_noise_is_the_noise() -> None:
    """What the seeds would draw, given as a recording, gives the same latents; sequences too."""
    for name in ORDERS:
        model, labels, seen = build(name), torch.tensor([1, 2]), []
        real = model._noise

        def spy(seeds: Tensor, recorded: Any, draws: int, real: Any = real, seen: list[Any] = seen) -> Any:
            seen.append((real(seeds, recorded, draws), draws))
            return seen[-1][0]

        model._noise = spy
        latents = model.generate(labels, seeds=9)
        source, draws = seen[0]
        places = torch.arange(model.order.layout.size)
        recorded = torch.stack([source(places, draw) for draw in range(draws)])
        assert recorded.unique().numel() == recorded.numel()
        model._noise = real
        assert torch.equal(model.generate(labels, seeds=9, noise=recorded), latents)
        with pytest.raises(TokenloomError, match=f"K >= {draws} draws"):
            model.generate(labels, seeds=9, noise=recorded[1:])


def test_temperature() -> None:
    """At 0 only the first draw of a position counts."""
    model, labels = build("one"), torch.tensor([1])
    noise = torch.randn(3, 1, 12, 3)
    other = torch.cat((noise[:1], torch.randn(2, 1, 12, 3)))
    for cold in (Denoising(3, temperature=0.0), Sampling(temperature=0)):
        made = [model.generate(labels, sampling=cold, noise=given, seeds=0) for given in (noise, other)]
        assert torch.equal(*made)
    warm = [model.generate(labels, noise=given, seeds=0) for given in (noise, other)]
    assert not torch.equal(*warm)


@pytest.mark.parametrize("name", ORDERS)
def test_clip_bounds_what_is_drawn(name: str) -> None:
    """The last step ends at the predicted clean token; a bound that nothing reaches changes nothing."""
    model, labels = build(name), torch.tensor([1, 2])
    free = model.generate(labels, guidance=2.0, seeds=4, sampling=Denoising(3))
    made = model.generate(labels, guidance=2.0, seeds=4, sampling=Denoising(3, clip=0.5))
    assert made.abs().max() <= 0.5 < free.abs().max()
    assert torch.equal(model.generate(labels, guidance=2.0, seeds=4, sampling=Denoising(3, clip=1e30)), free)


def test_storage(tmp_path: Path) -> None:
    for name in ORDERS:
        model, labels = build(name), torch.tensor([1])
        model.save_pretrained(tmp_path / name)
        again = MaskedLatentGenerator.from_pretrained(tmp_path / name)
        assert again.rule == model.rule and again.order == model.order
        assert alike(again.generate(labels, seeds=1), model.generate(labels, seeds=1))


@torch.no_grad()
def real_latents(scale: float) -> Tensor:
    """The code vectors of 16 crops of a photograph (16, 64, 4), levels 0.25 * scale apart."""
    return scale * tokenizer().quantizer.decode(real_codes())


def learned(order: Any, latents: Tensor, heads: list[Any], steps: int, **rule: Any) -> tuple[Any, float]:
    """A generator that was taught latents and their numbers, and the share of the first loss that is left."""
    torch.manual_seed(0)
    model = MaskedLatentGenerator(
        order.to_config(),
        latents.shape[-1],
        SIDE | {"width": 64},
        SIDE | {"width": 64, "modulation": "own", "final_modulation": True},
        [head | {"width": 64} for head in heads],
        {"kind": "class", "num_classes": len(latents)},
        rule_config={"label_drop": 0.0, "repeats": 2} | rule,
    ).train()
    network, labels = model.network, torch.arange(len(latents))
    places = (network.encoder_places, network.decoder_places, network.places)
    with torch.no_grad():
        for table in (model.condition.table.weight, *places):
            table.normal_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        loss = model(latents, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), sum(losses[-10:]) / 10 / losses[0]


def test_learns_real_sequences_by_heart() -> None:
    """To less than 5 % of the first loss; without noise on the way, 99 % of the tokens are then nearest to their own."""
    latents = real_latents(4)
    model, left = learned(orders.blocks(tokenizer().layout, (8, 8)), latents, [ROWS], 180)
    assert left < 0.05
    still = Denoising(25, temperature=0.0, clip=float(latents.abs().max()))
    made = model.generate(torch.arange(16), sampling=still, seeds=0, visits=2)
    half = 4 * 0.25 / 2  # half the distance of neighbouring levels of the quantizer
    assert ((made - latents).abs() < half).all(-1).float().mean() > 0.99


def test_learns_both_grids_by_heart() -> None:
    """The same crops as a grid of averages and the grid itself: of both, 99 % of the tokens come back within 0.5."""
    fine = real_latents(4)
    coarse = F.avg_pool2d(fine.transpose(1, 2).unflatten(2, (8, 8)), 4).flatten(2).transpose(1, 2)
    latents = torch.cat((2 * coarse, fine), dim=1)
    rule = {"mask_schedules": ["truncnorm", "cosine"], "visits": [2, 2], "loss_weights": [2.0, 0.75]}
    model, left = learned(orders.scales(Layout.scales([2, 8])), latents, [ROWS, MAP], 520, **rule)
    assert left < 0.05
    still = Denoising(25, temperature=0.0, clip=float(latents.abs().max()))
    near = ((model.generate(torch.arange(16), sampling=still, seeds=0) - latents).abs() < 0.5).all(-1)
    assert near[:, :4].float().mean() > 0.99 and near[:, 4:].float().mean() > 0.99


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "cache"}, "Did you mean 'cached'"),
        ({"visits": [1, 2]}, "one for each of 1 steps"),
        ({"visits": 0}, "whole numbers from 1 up"),
        ({"sampling": [Denoising(), Denoising()]}, "2 entries for 1 steps"),
        ({"sampling": Denoising(solver="euler")}, "Unknown solver 'euler'"),
        ({"sampling": Sampling(top_k=3)}, "not drawn from a softmax"),
        ({"sequence": torch.zeros(1, 12, dtype=torch.long)}, "hold each of 0..11 once"),
        ({"sequence": torch.arange(12)}, r"integer tensor \(1, 12\)"),
        ({"known": torch.zeros(1, 12, 3)}, "belong together"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        build("one").generate(torch.tensor([1]), **options)


def test_bad_settings() -> None:
    with pytest.raises(TokenloomError, match="there are 1 heads"):
        MaskedLatentGenerator(TWO.to_config(), 3, SIDE, SIDE, [ROWS])
    with pytest.raises(TokenloomError, match="one entry a step"):
        build("one", visits=[3, 3])
    with pytest.raises(TokenloomError, match="kind of diffusion head 'row'"):
        MaskedLatentGenerator(ONE.to_config(), 3, SIDE, SIDE, [ROWS | {"kind": "row"}])
    with pytest.raises(TokenloomError, match="option of a diffusion head 'widht'"):
        MaskedLatentGenerator(ONE.to_config(), 3, SIDE, SIDE, [ROWS | {"widht": 4}])
    model = build("one")
    with pytest.raises(TokenloomError, match="masked must be boolean"):
        model.features(latents_of("one", 2), masked=torch.ones(2, 12))
    with torch.no_grad():
        model.network.bridge.weight[0, 0] = torch.nan
    with pytest.raises(TokenloomError, match=r"weights of network\.bridge\.weight are not finite"):
        model.generate(torch.tensor([1]), seeds=1)
