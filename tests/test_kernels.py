"""The C kernels: a stack of blocks and draws beside PyTorch's, what they do not cover, and generators that use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenloom import Sampling, TokenloomError, TwoLevelGenerator
from tokenloom.generators import compiled
from tokenloom.generators.kernels import QuickDraw, RowTransformer, SkinnyLinear, build, kernels
from tokenloom.generators.sampling import checks_later, sample_tokens
from tokenloom.generators.transformer import Transformer, TransformerConfig

needs_compiler = pytest.mark.skipif(kernels() is None, reason="there is no C compiler")
KINDS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "mlp": "gelu", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    {"norm_affine": False, "mlp": "geglu", "qk_norm": "l2", "heads": 2},
    {"mlp": "gelu_tanh", "qk_norm": "layer", "kv_heads": 2, "layer_scale": 0.5},
    {"mlp": "silu", "qk_norm": "rms", "rope_halves": True, "attention_scale": 0.2},
    {"taps": (3, 1, 2), "learned_positions": 20},
    {"taps": (2,), "final_norm": False, "head_width": 10},
]


def pair(form: str = "float32", **options: Any) -> tuple[Transformer, RowTransformer]:
    """A transformer of random weights and biases, and the one that runs rows in C."""
    torch.manual_seed(0)
    plain = Transformer(
        TransformerConfig(**{"width": 44, "heads": 4, "head_width": 12, "depth": 3} | options)
    )
    for value in plain.parameters():
        nn.init.normal_(value, std=0.3)
    loaded = kernels()
    assert loaded is not None
    twin = Transformer(plain.config)
    twin.load_state_dict(plain.state_dict())
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, SkinnyLinear(child, loaded, form))
    rows = RowTransformer.of(twin.eval(), loaded)
    assert rows is not None
    return plain.eval(), rows


def counted(rows: RowTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every call of C."""
    calls: list[int] = []
    loaded = rows.loaded
    fake = build.Kernels.__new__(build.Kernels)
    fake.__dict__.update(loaded.__dict__)
    fake.stack = lambda *given: (calls.append(1), loaded.stack(*given))[1]
    monkeypatch.setattr(rows, "loaded", fake)
    return calls


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_stack_is_what_pytorch_computes(options: dict[str, Any], threads: int, monkeypatch) -> None:
    """Step by step on a cache of which rows are taken back, with masks of one or all samples, and without a cache."""
    before = torch.get_num_threads()
    plain, rows = pair(**options)
    calls = counted(rows, monkeypatch)
    caches = [each.new_cache(2, 14) for each in (plain, rows)]
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            for number, (count, commit) in enumerate(((3, 3), (1, 1), (4, 2), (5, 5))):
                x, start = torch.randn(2, count, 44), caches[0].length
                given: dict[str, Any] = {"position_ids": torch.randint(0, 20, (count,))}
                given["rope"] = plain.rope(torch.rand(count, 1) * 9) if number != 1 else None
                mask = torch.rand(2 if number % 2 else 1, 1, count, start + count) > 0.3
                mask[..., 0] = True
                given["mask"] = mask if number else None
                for cache in (caches, (None, None)):
                    if cache[0] is None:
                        given["mask"] = torch.eye(count, dtype=torch.bool) if number == 3 else None
                    want, got = (
                        each(x, cache=own, **given) for each, own in zip((plain, rows), cache, strict=True)
                    )
                    assert len(want) == len(got) == len(plain.config.taps)
                    for a, b in zip(want, got, strict=True):
                        torch.testing.assert_close(b, a, atol=2e-5 * float(a.abs().amax()), rtol=0)
                for cache in caches:
                    cache.commit(commit)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 8


@needs_compiler
def test_what_the_kernel_does_not_cover_runs_as_before(monkeypatch) -> None:
    plain, rows = pair()
    calls = counted(rows, monkeypatch)
    x = torch.randn(1, 3, 44)
    assert rows(x)[0].requires_grad  # gradients
    with torch.no_grad():
        rows(torch.randn(1, 40, 44))  # many rows
        rows(x, rope=tuple(table.expand(1, -1, -1) for table in rows.rope(torch.arange(3)[:, None]) or ()))
        rows(x, mask=torch.ones(1, 4, 3, 3, dtype=torch.bool))  # another mask a head
        with torch.autocast("cpu", torch.bfloat16):
            rows(x)
        rows.cache_dtype = torch.bfloat16
        rows(x, cache=rows.new_cache(1, 3))  # keys in another number format
        rows.cache_dtype = None
        rows.train()(x)
        assert not calls
        assert torch.allclose(rows.eval()(x)[0], plain(x)[0], atol=1e-4) and len(calls) == 1
    loaded = kernels()
    assert loaded is not None
    for options in ({"modulation": "own"}, {"cross_attention": True}):
        config = TransformerConfig(width=16, heads=2, depth=1, **options)  # type: ignore[arg-type]
        assert RowTransformer.of(Transformer(config), loaded) is None
    assert RowTransformer.of(Transformer(plain.config).to(torch.bfloat16), loaded) is None


@needs_compiler
def test_wrong_results_are_not_used(monkeypatch) -> None:
    """A library whose stack does nothing is noticed, and the random state of the caller stays."""
    plain, rows = pair()
    fake = build.Kernels.__new__(build.Kernels)
    fake.__dict__.update(rows.loaded.__dict__)
    fake.stack = lambda *given: 0
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    assert RowTransformer.of(plain, fake) is None
    assert torch.equal(torch.rand(3), want)


@needs_compiler
def test_a_full_cache_is_an_error() -> None:
    _, rows = pair()
    cache = rows.new_cache(1, 4)
    with torch.no_grad(), pytest.raises(TokenloomError, match="holds 4 rows"):
        rows(torch.randn(1, 5, 44), cache=cache)


@needs_compiler
@pytest.mark.parametrize("form", ["int8", "w8a8"])
def test_rounded_weights_are_near_and_follow_changes(form: str, monkeypatch) -> None:
    plain, rows = pair(form, width=48)
    calls, x = counted(rows, monkeypatch), torch.randn(1, 2, 48)
    with torch.no_grad():
        want, got = plain(x)[0], rows(x)[0]
        assert 0 < float((got - want).abs().mean()) < 0.05 * float(want.abs().mean())
        for each in (plain, rows):
            each.blocks[0].get_parameter("mlp.down.weight").mul_(-3)
        want, got = plain(x)[0], rows(x)[0]
        assert float((got - want).abs().mean()) < 0.05 * float(want.abs().mean())
    assert len(calls) == 2


@needs_compiler
@pytest.mark.parametrize(
    "rule",
    [Sampling(0.9, 20), Sampling(1.3), Sampling(0.5, 999), Sampling(1e-30, 5), Sampling(top_k=1)],
    ids=str,
)
def test_draws_are_those_of_sample_tokens(rule: Sampling) -> None:
    loaded = kernels()
    assert loaded is not None
    draw = QuickDraw(loaded)
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 33, 300)
    logits[0, :, ::3] = -torch.inf
    logits[1] = logits[1].round()  # ties with the k-th
    logits[2, :, 5:] = -torch.inf  # fewer than k
    seeds = torch.tensor([1, 2, -3, 1 << 40])
    for positions in (torch.arange(33) * 7, torch.randint(0, 9999, (4, 33))):
        want = sample_tokens(logits, seeds, positions, rule)
        assert torch.equal(draw(logits, seeds, positions, rule), want)
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(
        draw(turned, seeds, torch.arange(33) * 7, rule),
        sample_tokens(logits, seeds, torch.arange(33) * 7, rule),
    )


@needs_compiler
def test_other_draws_and_unusable_logits_are_left_to_sample_tokens() -> None:
    loaded = kernels()
    assert loaded is not None
    draw, logits = QuickDraw(loaded), torch.randn(1, 2, 9)
    seeds, positions = torch.tensor([3]), torch.arange(2)
    for rule in (Sampling(0.8, top_p=0.7), Sampling(0), None):
        assert torch.equal(
            draw(logits, seeds, positions, rule), sample_tokens(logits, seeds, positions, rule)
        )
    assert torch.equal(
        draw(logits.double(), seeds, positions), sample_tokens(logits.double(), seeds, positions)
    )
    for bad in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[0, 1, 4] = bad
        with pytest.raises(TokenloomError, match="must be finite"):
            draw(broken, seeds, positions)
    with pytest.raises(TokenloomError, match="must be finite"):
        draw(torch.full((1, 1, 4), -torch.inf), seeds, torch.arange(1))
    with pytest.raises(TokenloomError, match="one per sample"):
        draw(logits, torch.tensor([1, 2]), positions)
    flags: list[Tensor] = []
    with checks_later(flags):
        draw(logits, seeds, positions)
    assert len(flags) == 1


def two_level(condition: dict[str, Any] | None = None) -> TwoLevelGenerator:
    torch.manual_seed(0)
    shape = {"width": 16, "heads": 2, "depth": 2}
    model = TwoLevelGenerator(12, 2, (6, 5, 9), shape, shape, {**shape, "width": 24}, condition).eval()
    for value in model.parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=0.4)
    return model


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_two_levels_give_the_same_codes(guidance: float) -> None:
    model, labels = two_level({"kind": "class", "num_classes": 4}), torch.tensor([0, 3])
    known, keep = torch.randint(0, 5, (2, 36)), torch.arange(36) < 14
    for options in ({}, {"sampling": Sampling(0.8, 3)}, {"known": known, "keep": keep}):
        for _ in range(2):
            want, got = (
                model.generate(labels, seeds=4, guidance=guidance, decode=rung, **options)  # type: ignore[arg-type]
                for rung in ("cached", "compiled")
            )
            assert torch.equal(want, got)
    fast: Any = compiled.worker("compiled", model)
    if kernels() is not None:
        assert isinstance(fast.transformer, RowTransformer) and isinstance(
            fast.decoder.layers, RowTransformer
        )
    assert compiled.worker("auto", model) is model
    for decode in ("compiled-int8", "compiled-w8a8"):
        assert model.generate(labels, seeds=4, decode=decode).shape == (2, 36)
    with pytest.raises(TokenloomError, match="compiled"):
        model.generate(labels, decode="compield")
