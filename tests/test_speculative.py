"""Speculative Jacobi decoding: the published acceptance rule, and the distribution of whole generations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_generators import conditions, make, random_codes
from torch import Tensor

from tokenloom.generators import (
    Generator,
    NextBlockGenerator,
    NextTokenGenerator,
    Parallel,
    ParallelStats,
    Sampling,
    orders,
)
from tokenloom.generators.orders import Order
from tokenloom.generators.parallel import acceptance
from tokenloom.generators.parallel.acceptance import accept, probabilities, residual
from tokenloom.layouts import Layout

GOLDEN = Path(__file__).parent / "fixtures" / "generators" / "sjd_accept.safetensors"
CODES = 3
SAMPLING = Sampling(temperature=0.8)


@pytest.mark.parametrize("case", range(6))
def test_published_verification_rounds(case: int) -> None:
    """Recorded rounds of the official sampler: what is accepted, the residual, the draw from it, the next drafts.

    Position 0 of a round is the last accepted token; the logits of position i - 1 check the draft at i.
    """
    data = {
        key.removeprefix(f"input.case{case}.").removeprefix(f"output.case{case}."): value[0]
        for key, value in load_file(GOLDEN).items()
        if f".case{case}." in key
    }
    drafts = data["draft_tokens"][1:]
    target, proposal = data["advanced_prob"][:-1], data["draft_prob"][1:]
    uniform = data["rs"][1:].gather(1, drafts[:, None])[:, 0]
    taken = accept(target, proposal, drafts, uniform)
    right = int(taken.int().cumprod(0).sum())
    assert right + 1 == int(data["num_matched"])
    tokens = torch.cat((drafts[:right], data["advanced_tokens"][right:]))
    if right < len(drafts):
        left = residual(target, proposal)[right]
        torch.testing.assert_close(left, data["resample_probs"], rtol=1e-5, atol=1e-7)
        tokens[right] = int((left.cumsum(0) <= data["u_resample"]).sum())
    else:
        assert not data["resample_probs"].any()
    assert torch.equal(tokens, data["tokens"])
    torch.testing.assert_close(
        data["scores"][right:], data["advanced_prob"][right:]
    )  # what the next drafts were drawn from


def test_edges_of_the_rule() -> None:
    certain, other = torch.eye(3)[0], torch.eye(3)[1]
    ids, uniform = torch.tensor([0, 0]), torch.tensor([1e-7, 1 - 1e-7])
    assert accept(certain.expand(2, 3), certain.expand(2, 3), ids, uniform).all()
    assert not accept(other.expand(2, 3), certain.expand(2, 3), ids, uniform).any()
    assert torch.equal(residual(other, certain), other)
    assert torch.equal(residual(certain, certain), certain)  # nothing is left: p itself


# ---- the distribution of generations -----------------------------------------------------------------------------------


def tiny(cls: type[Generator], order: Order) -> Generator:
    """A generator of 3 codes with strong dependence between positions."""
    torch.manual_seed(3)
    model = cls(
        order.to_config(), CODES, {"width": 16, "heads": 2, "depth": 1, "mlp_width": 16}, {"kind": "none"}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def joint(model: Generator, sampling: Sampling) -> Tensor:
    """Probability (V ** N,) of every sequence, codes in layout order as digits, the first one highest."""
    every = torch.tensor(list(itertools.product(range(CODES), repeat=model.order.layout.size)))
    logits, order = model.logits(every), model.order
    progress = (order.step / (order.num_steps - 1)).tolist()
    parts = [probabilities(logits[:, n], sampling.at(value)) for n, value in enumerate(progress)]
    chances = torch.stack(parts, dim=1).double()
    return chances.gather(-1, every[..., None])[..., 0].prod(1)


def fit(model: Generator, sampling: Sampling, decode: Any, draws: int = 12000, seed: int = 0) -> float:
    """p-value of the G-test of generated sequences against the enumerated joint; cells below 5 are pooled."""
    codes = model.generate(batch_size=draws, seeds=seed, sampling=sampling, decode=decode)
    digits = CODES ** torch.arange(codes.shape[1]).flip(0)
    seen = torch.bincount((codes * digits).sum(1), minlength=CODES ** codes.shape[1]).double()
    expected = joint(model, sampling) * draws
    assert not seen[expected == 0].any()
    small = expected < 5
    cells = [(seen[~small], expected[~small])]
    if float(expected[small].sum()) >= 5:
        cells.append((seen[small].sum()[None], expected[small].sum()[None]))
    observed, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    wanted = wanted * observed.sum() / wanted.sum()
    statistic = 2 * torch.special.xlogy(observed, observed / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2))


TOKENS = (NextTokenGenerator, orders.raster(Layout.line(5)))
PAIRS = (NextBlockGenerator, orders.blocks(Layout.line(6), 2))


@pytest.mark.parametrize(
    ("model", "draft", "sampling"),
    [
        (TOKENS, "random", SAMPLING),
        (TOKENS, "repeat", Sampling(temperature=lambda progress: 1.2 - 0.6 * progress, top_k=3)),
        (PAIRS, "neighbor", SAMPLING),
    ],
)
def test_distribution(model: tuple[type[Generator], Order], draft: Any, sampling: Sampling) -> None:
    """Sequences have the joint distribution of sequential sampling, with guesses accepted and rejected on the way."""
    stats = ParallelStats()
    decode = Parallel(3, draft, "speculative", stats)
    generator = tiny(*model)
    assert fit(generator, sampling, "cached") > 1e-3  # the test itself
    assert fit(generator, sampling, decode, seed=10**6) > 1e-3
    assert 0.05 < stats.acceptance < 0.95 and stats.compression > 1.05


def too_easily(target: Tensor, proposal: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Accepts with probability (p / q) ** 0.5."""
    return accept(target, proposal, ids, uniform**2)


def not_the_residual(target: Tensor, proposal: Tensor) -> Tensor:
    """Draws from p after a rejection."""
    return target


@pytest.mark.parametrize(("name", "wrong"), [("accept", too_easily), ("residual", not_the_residual)])
@pytest.mark.parametrize("model", [TOKENS, PAIRS], ids=["tokens", "pairs"])
def test_wrong_rules_are_noticed(
    model: tuple[type[Generator], Order], name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the same test fails for a rule that accepts too much, or draws anew what it rejected."""
    monkeypatch.setattr(acceptance, name, wrong)
    assert fit(tiny(*model), SAMPLING, Parallel(3, "neighbor", "speculative"), seed=10**6) < 1e-6


# ---- generations ----------------------------------------------------------------------------------------------------------


def test_samples_depend_on_their_seed_alone() -> None:
    model, condition = make(NextTokenGenerator, orders.raster(Layout.line(8))), conditions("words", 4)
    decode = Parallel(3, "recycle", "speculative")
    seeds = [31, 2**63 + 5, 0, 7]
    together = model.generate(condition, seeds=seeds, guidance=2.0, decode=decode)
    for place in (1, 3):
        alone = model.generate(
            condition[place : place + 1], seeds=[seeds[place]], guidance=2.0, decode=decode
        )
        assert torch.equal(alone[0], together[place])
    assert not torch.equal(together, model.generate(condition, seeds=seeds, guidance=2.0))


def test_greedy_and_kept_positions() -> None:
    """At temperature 0 both rules give the one answer there is; known codes stay."""
    order = orders.blocks(Layout.line(8), 2)
    model, condition = make(NextBlockGenerator, order), conditions("words", 3)
    known, keep = random_codes(order, 3), torch.arange(8) % 3 == 1
    options: dict[str, Any] = {"known": known, "keep": keep, "seeds": 1}
    decode = Parallel(3, "neighbor", "speculative")
    greedy = {"sampling": Sampling(temperature=0)} | options
    assert torch.equal(
        model.generate(condition, decode=decode, **greedy), model.generate(condition, **greedy)
    )
    free = model.generate(condition, decode=decode, **options)
    assert torch.equal(free[:, keep], known[:, keep])
