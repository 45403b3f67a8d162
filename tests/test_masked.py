"""Masked prediction: what is seen, visits, rungs, kept positions, seeds, the loss, and sequences learned by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_codes import real_codes, tokenizer
from tiny_generators import CONDITIONS, VOCAB, conditions, make, random_codes

from tokenloom import MaskedGenerator
from tokenloom.errors import TokenloomError
from tokenloom.generators import CaptionFeatures, Guidance, Sampling, Step, guide, orders, sample_tokens
from tokenloom.generators.masked import MaskRule, draw_hidden
from tokenloom.layouts import Layout
from tokenloom.rng import gumbel

ORDER = orders.random(Layout.grid(4, 3), 5, 3)
LINE = orders.random(Layout.line(7), 3, 1, "equal")
GREEDY = Sampling(temperature=0)
REVEALS = ("confidence", "random", "order")


def build(reveal: str = "confidence", order: Any = ORDER, condition: str = "words", **options: Any) -> Any:
    return make(MaskedGenerator, order, condition, rule_config={"reveal": reveal}, **options)


# ---- teacher forcing ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_codes_are_not_seen_and_others_are(causal: bool) -> None:
    model, codes, words = build(causal_prefix=causal), random_codes(ORDER, 2), conditions("words", 2)
    masked = torch.arange(12) % 3 == 0
    before = model.logits(codes, words, masked=masked)
    assert before.shape == (2, 12, VOCAB)
    for position in range(12):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        moved = (model.logits(changed, words, masked=masked) - before).abs().amax((0, 2))
        assert moved.max() == 0 if masked[position] else moved[masked].min() > 1e-4
    samples = torch.stack((masked, ~masked))
    each = model.logits(codes, words, masked=samples)
    assert torch.allclose(each[0], before[0], atol=1e-5)
    assert torch.allclose(each[1], model.logits(codes, words, masked=~masked)[1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", [ORDER, LINE], ids=str)
def test_logits_along_the_order(order: Any) -> None:
    """Without `masked`, a position is predicted from earlier steps alone, as by every generator."""
    model, codes, words = build("order", order), random_codes(order, 2), conditions("words", 2)
    got = model.logits(codes, words)
    for step in range(order.num_steps):
        now = order.step == step
        want = model.logits(codes, words, masked=order.step >= step)
        assert torch.equal(got[:, now], want[:, now])


@torch.no_grad()
def test_loss_is_the_mean_over_hidden_positions() -> None:
    model, codes, words = build(), random_codes(ORDER, 3), conditions("words", 3)
    masked = torch.arange(12) < torch.tensor([[3], [12], [1]])
    logits = model.logits(codes, words, masked=masked)
    want = F.cross_entropy(logits[masked], codes[masked])
    torch.testing.assert_close(model.loss(codes, words, masked=masked), want)
    torch.testing.assert_close(model(codes, words, masked), want)
    draws = [model.loss(codes, words, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0] != model.loss(codes, words, generator=torch.Generator().manual_seed(6))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["words", "class", "none", "features"])
def test_dropped_conditions(kind: str) -> None:
    """In training mode, a share of the samples is told nothing; in evaluation none."""
    rule = {"label_drop": 1.0}
    if kind == "features":
        CONDITIONS["features"] = {"kind": "features", "features": 5, "length": 3}
        given: Any = CaptionFeatures(torch.randn(2, 3, 5), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    else:
        given = conditions(kind, 2)
    model = make(MaskedGenerator, ORDER, kind, rule_config=rule)
    codes, masked = random_codes(ORDER, 2), torch.arange(12) < 6
    told = model.loss(codes, given, masked)
    untold = model.loss(
        codes, None if kind != "features" else model.condition.null_like(given, codes.device), masked
    )
    assert torch.equal(model.train().loss(codes, given, masked), untold)
    assert (told == untold) == (kind == "none")
    CONDITIONS.pop("features", None)


def test_shares_of_hidden_positions() -> None:
    """cos(pi r / 2) has the mean 2 / pi; the cut normal of MAR the mean 1 - 0.25 * 0.6526."""
    source = torch.Generator().manual_seed(0)
    cosine = draw_hidden(4000, 64, MaskRule(), generator=source).float().mean(1)
    assert cosine.min() > 0 and abs(cosine.mean() - (2 / torch.pi + 0.5 / 64)) < 0.01
    rule = MaskRule(mask_schedule="truncnorm", mask_min=0.7)
    normal = draw_hidden(4000, 256, rule, generator=source).float().mean(1)
    places = torch.linspace(0.7, 1, 3001)
    density = torch.exp(-((places - 1) ** 2) / (2 * 0.25**2))
    assert (
        normal.min() >= 0.7
        and abs(normal.mean() - (places * density).sum() / density.sum() - 0.5 / 256) < 5e-3
    )


# ---- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("reveal", REVEALS)
def test_both_rungs_give_the_same_codes(reveal: str, batch: int) -> None:
    flavours: list[dict[str, Any]] = [
        {"transformer": {"modulation": "own", "final_modulation": True}},
        {"causal_prefix": True, "tie_embeddings": True, "code_levels": [3, 4]},
        {"transformer": {"rope": False, "learned_positions": 15}, "head_bias": True},
    ]
    samplings = (Sampling(), Sampling(temperature=0.8, top_k=5, top_p=0.9), GREEDY)
    keeps = (None, torch.arange(12) % 3 == 1, torch.arange(12) < 3 * torch.arange(batch)[:, None])
    for index, kind in enumerate(CONDITIONS):
        model, given = build(reveal, condition=kind, **flavours[index]), conditions(kind, batch)
        for turn, guidance in enumerate((1.0, Guidance(3.0, schedule="linear"))):
            sampling, keep = samplings[(index + batch) % 3], keeps[(index + turn) % 3]
            kept = {} if keep is None else {"known": random_codes(ORDER, batch), "keep": keep}
            made = [
                model.generate(
                    given,
                    batch_size=batch if given is None else None,
                    guidance=guidance,
                    sampling=sampling,
                    seeds=list(range(7, 7 + batch)),
                    decode=decode,
                    **kept,
                )
                for decode in ("reference", "cached", "auto")
            ]
            assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
            assert made[0].shape == (batch, 12) and 0 <= made[0].min() <= made[0].max() < VOCAB
            if keep is not None:
                where = keep.expand(batch, -1)
                assert torch.equal(made[0][where], kept["known"][where])


@torch.no_grad()
@pytest.mark.parametrize("reveal", REVEALS)
def test_codes_that_stay_are_draws_of_their_visit(reveal: str) -> None:
    """Replays every visit from the public parts: how many stay, which, and with which noise."""
    model, words, seeds = build(reveal), conditions("words", 1), torch.tensor([4])
    seen: list[Step] = []
    codes = model.generate(words, guidance=2.0, seeds=seeds, on_step=seen.append)
    assert torch.equal(seen[-1].codes, codes) and [step.index for step in seen] == list(range(5))
    hidden, places = torch.ones(12, dtype=torch.bool), torch.arange(12)
    for visit, (step, part) in enumerate(zip(seen, ORDER.slices, strict=True)):
        given, null = (model.logits(codes, told, masked=hidden) for told in (words, None))
        logits = guide(given, null, 2.0)
        drawn = sample_tokens(logits, seeds, places + 12 * visit)
        stays = hidden & step.committed
        assert int(step.committed.sum()) == part.stop and bool(step.committed[~hidden].all())
        assert torch.equal(step.codes[0, stays], drawn[0, stays]) and not step.codes[0, ~step.committed].any()
        if reveal == "order":
            assert torch.equal(stays, ORDER.step == visit)
        if reveal == "confidence":
            sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[0, :, 0]
            sure += 4.5 * (1 - (visit + 1) / 5) * gumbel(seeds[:, None], places + 12 * visit, 0xFFFFFFFE)[0]
            assert visit == 4 or sure[stays].min() > sure[hidden & ~stays].max()
        hidden = ~step.committed


def test_a_sample_is_its_own() -> None:
    """Alone, among others, and with other sets of kept positions beside it."""
    for reveal in REVEALS:
        model, words = build(reveal), conditions("words", 5)
        seeds = [31, 2**63 + 5, 0, 7, 31]
        together = model.generate(words, guidance=2.0, seeds=seeds)
        for index in range(5):
            alone = model.generate(words[index : index + 1], guidance=2.0, seeds=seeds[index : index + 1])
            assert torch.equal(alone[0], together[index])
        assert len({tuple(row.tolist()) for row in together}) == 5
        keep = torch.arange(12) < torch.tensor([[0], [3], [12], [7], [1]])
        known = random_codes(ORDER, 5)
        kept = model.generate(words, guidance=2.0, seeds=seeds, known=known, keep=keep)
        assert torch.equal(kept[0], together[0]) and torch.equal(kept[2], known[2])


def test_greedy_needs_no_seed() -> None:
    model, words = build("confidence"), conditions("words", 2)
    made = [model.generate(words, sampling=GREEDY, seeds=seed) for seed in (1, 2)]
    assert torch.equal(*made)


def test_other_numbers_of_visits(tmp_path: Path) -> None:
    """One visit, or one a position; the weights stay, the configuration follows."""
    model, words, steps = build("confidence"), conditions("words", 2), []
    before = model.generate(words, seeds=1)
    for count in (1, 12, 5):
        model.revisit(orders.random(ORDER.layout, count, 3))
        steps.clear()
        codes = model.generate(words, seeds=1, on_step=lambda step: steps.append(int(step.index)))
        assert len(steps) == count == model.order.num_steps
        assert torch.equal(codes, before) == (count == 5)
    model.revisit(orders.random(ORDER.layout, 2, 3))
    model.save_pretrained(tmp_path)
    again = MaskedGenerator.from_pretrained(tmp_path)
    assert again.order == model.order and again.rule == model.rule
    assert torch.equal(again.generate(words, seeds=1), model.generate(words, seeds=1))


# ---- training ----------------------------------------------------------------------------------------------------


def test_learns_real_sequences_by_heart() -> None:
    """16 crops of a photograph: from ln 4096 to below 0.05 nats with everything hidden, and greedily back."""
    codes, labels = real_codes(), torch.arange(16)
    torch.manual_seed(0)
    model = MaskedGenerator(
        orders.random(tokenizer().layout, 8, 0).to_config(),
        tokenizer().vocab_size,
        {"width": 64, "heads": 2, "depth": 2, "modulation": "own", "final_modulation": True}
        | {"rope": False, "learned_positions": codes.shape[1] + 1},
        {"kind": "class", "num_classes": 16},
        rule_config={"label_drop": 0.05},
    ).train()
    with torch.no_grad():
        for table in (model.condition.table, model.transformer.positions, model.tokens.codes):
            table.weight.normal_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 160)
    losses = []
    for _ in range(160):
        loss = model(codes, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == [] and losses[0] > 8
    model.eval()
    everything = torch.ones(codes.shape[1], dtype=torch.bool)
    assert model.loss(codes, labels, everything).item() < 0.05
    assert model.loss(codes, labels).item() < 0.05
    assert torch.equal(model.generate(labels, sampling=GREEDY, seeds=0), codes)
    assert torch.equal(model.generate(labels, sampling=GREEDY, guidance=2.0, decode="reference"), codes)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"reveal": "confident"}, "Did you mean 'confidence'"),
        ({"mask_schedule": "cos"}, "Did you mean 'cosine'"),
        ({"label_drop": 2}, "label_drop is a share from 0 to 1, got 2"),
        ({"revealing": "order"}, "rule option of MaskedGenerator 'revealing'"),
    ],
)
def test_bad_rules(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenloomError, match=message):
        make(MaskedGenerator, ORDER, rule_config=rule)


def test_bad_arguments() -> None:
    model, codes = build(), random_codes(ORDER, 2)
    with pytest.raises(TokenloomError, match=r"masked must be a boolean tensor \(2, 12\) or \(12,\)"):
        model.logits(codes, masked=torch.ones(2, 11, dtype=torch.bool))
    with pytest.raises(TokenloomError, match="masked hides nothing"):
        model.loss(codes, masked=torch.zeros(12, dtype=torch.bool))
    with pytest.raises(TokenloomError, match=r"The layout of this generator is grid\(4, 3\)"):
        model.revisit(LINE)
    with pytest.raises(TokenloomError, match="no special tokens"):
        make(MaskedGenerator, ORDER, special_tokens=2)
