"""TwoLevelGenerator: step by step equals teacher forcing, seeds, batches, guidance, continuation, training, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import Sampling, TokenloomError, TwoLevelGenerator, orders
from tokenloom.generators import Parallel, ParallelStats, Step
from tokenloom.layouts import Layout

SIZES = (6, 5, 9)
CONDITIONS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "class": {"kind": "class", "num_classes": 4},
    "words": {"kind": "words", "vocabulary": 9, "length": 3, "factor": 8},
}
ORDERS: list[dict[str, Any]] = [
    {"name": "delay"},
    {"name": "flat"},
    {"name": "parallel"},
    {"name": "coarse_first"},
    {"name": "delay", "options": {"delays": [0, 1, 1]}},
]
GREEDY = Sampling(temperature=0)


def build(
    order: dict[str, Any] | None = None, condition: str = "class", frames: int = 8, **options: Any
) -> TwoLevelGenerator:
    torch.manual_seed(0)
    shape = {"width": 16, "heads": 2, "depth": 2}
    model = TwoLevelGenerator(
        frames, 2, SIZES, {**shape, **options}, shape, {**shape, "width": 24}, CONDITIONS[condition], order
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.4)
    return model


def given(condition: str) -> Tensor | None:
    return {"none": None, "class": torch.tensor([0, 3]), "words": torch.tensor([[2, 3, 0], [5, 6, 7]])}[
        condition
    ]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_step_by_step_is_what_teacher_forcing_says(order, condition):
    model = build(order, condition)
    codes = model.generate(given(condition), batch_size=2, sampling=GREEDY)
    assert codes.shape == (2, 24) and len(codes.unique()) > 3
    assert torch.equal(model.logits(codes, given(condition)).argmax(-1), codes)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_code_never_changes_logits_of_its_own_or_earlier_steps(order):
    model, label = build(order), torch.tensor([1])
    assert model.order.layout == Layout.frames(8, 3) and model.order.name == "patches"
    codes = model.generate(label, seeds=3)
    logits = model.logits(codes, label)
    for place in range(24):
        changed = codes.clone()
        changed[0, place] = (changed[0, place] + 1) % 5
        other = model.logits(changed, label)
        same = model.order.step <= model.order.step[place]
        torch.testing.assert_close(other[:, same], logits[:, same])
        later = model.order.step > model.order.step[place]
        assert not later.any() or not torch.equal(other[:, later], logits[:, later])


def test_codes_stay_in_their_codebooks():
    codes = build().generate(torch.arange(4), seeds=1, sampling=Sampling(temperature=3.0))
    most = codes.view(4, 8, 3).amax((0, 1))
    assert bool((most < torch.tensor(SIZES)).all()) and int(most[2]) > 5


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_sample_depends_on_its_seed_alone(guidance):
    model = build(condition="words")
    words = torch.cat([given("words"), torch.tensor([[8, 0, 0]])])  # type: ignore[list-item]
    together = model.generate(words, seeds=[5, 6, 7], guidance=guidance)
    alone = model.generate(words[2:], seeds=[7], guidance=guidance)
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together, model.generate(words, seeds=[8, 9, 10], guidance=guidance))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("draft", ["neighbor", "repeat"])
@pytest.mark.parametrize("window", [2, 5])
def test_guessed_steps_give_the_same_codes(order, draft, window):
    """With guidance, kept codes and samples that differ; greedy decoding accepts many guesses, hot sampling few."""
    model, label = build(order), torch.tensor([0, 3])
    known, keep = model.generate(label, seeds=9), torch.arange(24) % 5 == 1
    for options in (
        {"sampling": GREEDY},
        {"guidance": 2.0, "sampling": Sampling(0.7, 4)},
        {"known": known, "keep": keep, "sampling": Sampling(1.5)},
    ):
        stats = ParallelStats()
        decode = Parallel(window, draft, stats=stats)
        want, got = (model.generate(label, seeds=5, decode=rung, **options) for rung in ("cached", decode))
        assert torch.equal(want, got)
        steps = model.order.num_steps
        assert stats.steps == steps and steps / window <= stats.forwards <= steps
        assert stats.accepted <= stats.tested
    assert torch.equal(model.generate(label, seeds=5), model.generate(label, seeds=5, decode="parallel"))


def test_a_right_guess_saves_a_forward():
    """A decoder that repeats itself: after the first patch every guess is right."""
    model = build({"name": "flat"}, "none")
    with torch.no_grad():
        model.decoder.start.weight.zero_()
        for table in model.tables:
            table.weight.zero_()
    stats = ParallelStats()
    codes = model.generate(batch_size=1, sampling=GREEDY, decode=Parallel(6, "neighbor", stats=stats))
    assert torch.equal(codes, model.generate(batch_size=1, sampling=GREEDY))
    assert stats.steps == 24 and stats.forwards <= 6 + 3


def test_guessing_says_what_it_cannot_do():
    for options in (Parallel(draft="recycle"), Parallel(accept="speculative")):
        with pytest.raises(TokenloomError, match="Inside a patch"):
            build().generate(torch.tensor([1]), decode=options)
    with pytest.raises(TokenloomError, match="parallel"):
        build().generate(torch.tensor([1]), decode="paralel")


def test_guidance_mixes_logits():
    model, label = build(), torch.tensor([2])
    plain, guided = (model.generate(label, sampling=GREEDY, guidance=g) for g in (1.0, 4.0))
    null = torch.tensor([4])  # the null class
    mixed = 4 * model.logits(guided, label) - 3 * model.logits(guided, null)
    mixed = mixed.nan_to_num(nan=-torch.inf)
    assert torch.equal(mixed.argmax(-1), guided) and not torch.equal(plain, guided)


def test_kept_codes_stay_and_the_rest_follows():
    model, label = build(), torch.tensor([0, 3])
    known = model.generate(label, seeds=1)
    keep = torch.zeros(24, dtype=torch.bool)
    keep[:11] = True  # three frames and two codes
    again = model.generate(label, seeds=[1, 40], known=known, keep=keep)
    assert torch.equal(again[:, :11], known[:, :11])
    assert torch.equal(again[0], known[0]) and not torch.equal(again[1], known[1])


def test_patches_are_reported_as_they_are_made():
    seen: list[Step] = []
    codes = build().generate(torch.tensor([1]), seeds=1, on_step=seen.append)
    assert [step.index for step in seen] == [0, 1, 2, 3] and seen[0].num_steps == 4
    for index, step in enumerate(seen, 1):
        assert int(step.committed.sum()) == 6 * index
        assert torch.equal(step.codes[:, step.committed], codes[:, step.committed])


def test_modulated_transformers_work_too():
    model = build(modulation="own", final_modulation=True, frames=4)
    codes = model.generate(torch.tensor([0, 1]), sampling=GREEDY)
    assert torch.equal(model.logits(codes, torch.tensor([0, 1])).argmax(-1), codes)


def test_training_learns_a_repeated_phrase():
    model = build(condition="none", frames=4).train()
    phrase = torch.tensor([[0, 1, 2, 3, 4, 8, 5, 0, 1, 2, 2, 7]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(phrase)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    assert torch.equal(model.eval().generate(sampling=GREEDY), phrase)


def test_files_restore_everything(tmp_path):
    model = build(ORDERS[4])
    model.save_pretrained(tmp_path)
    again = TwoLevelGenerator.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(torch.tensor([1]), seeds=2), model.generate(torch.tensor([1]), seeds=2))
    assert again.order == model.order == orders.patches(Layout.frames(8, 3), 2, "delay", (0, 1, 1))


def test_wrong_arguments_are_named():
    model = build()
    with pytest.raises(TokenloomError, match="do not divide"):
        build(frames=7)
    with pytest.raises(TokenloomError, match="order inside patches"):
        build({"name": "raster"})
    with pytest.raises(TokenloomError, match=r"\(B, 24\)"):
        model.logits(torch.zeros(1, 23, dtype=torch.long))
    with pytest.raises(TokenloomError, match="below the codebook sizes"):
        model.logits(torch.full((1, 24), 8))
    with pytest.raises(TokenloomError, match="belong together"):
        model.generate(torch.tensor([1]), known=torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(TokenloomError, match="rows of its own"):
        TwoLevelGenerator(
            4, 2, SIZES, *[{"width": 8, "heads": 2, "depth": 1}] * 3, {"kind": "none", "length": 0}
        )
