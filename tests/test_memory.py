"""Memory: estimates are what is allocated, errors say what would fit, keys in another format, offloaded components."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from tiny_generators import conditions, make
from tiny_models import tiny_pipeline
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.generators import NextBlockGenerator, NextTokenGenerator, memory, orders
from tokenloom.generators.base import Generator
from tokenloom.layouts import Layout

GRID = orders.raster(Layout.grid(3, 4))


def held(generator: Generator, rows: int) -> int:
    """Bytes of the buffers that a generation allocates."""
    cache = generator.transformer.new_cache(rows, generator.plan.capacity)
    return sum(
        each.numel() * each.element_size() for layer in cache.layers for each in (layer.keys, layer.values)
    )


@pytest.mark.parametrize("cls", [NextTokenGenerator, NextBlockGenerator])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_estimates_of_weights_and_keys_are_exact(cls: type[Generator], kv_heads: int | None) -> None:
    model = make(cls, GRID, "class", transformer={"kv_heads": kv_heads})
    for batch, guided in ((1, False), (3, True)):
        estimate = memory.estimate_memory(model, batch, guided=guided)
        assert estimate.cache == held(model, batch * (2 if guided else 1))
        tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
        assert estimate.weights == sum(each.numel() * each.element_size() for each in tensors)
        assert estimate.total == estimate.weights + estimate.cache + estimate.step and estimate.step > 0
    assert "weights" in str(estimate) and "kB" in str(estimate)
    with pytest.raises(TokenloomError, match="at least 1"):
        memory.estimate_memory(model, 0)


def test_keys_in_bfloat16_take_half_and_change_little() -> None:
    model, label = make(NextTokenGenerator, GRID, "class"), conditions("class", 2)
    whole, codes = held(model, 4), model.generate(label, guidance=2.0, seeds=1)
    model.transformer.cache_dtype = torch.bfloat16
    assert held(model, 4) * 2 == whole
    assert memory.estimate_memory(model, 2).cache == held(model, 4)
    for rung in ("cached", "compiled"):
        again = model.generate(label, guidance=2.0, seeds=1, decode=rung)
        assert again.shape == codes.shape and float((again == codes).float().mean()) > 0.3
    model.transformer.cache_dtype = None
    assert torch.equal(model.generate(label, guidance=2.0, seeds=1), codes)


def test_an_error_before_allocating_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, label = make(NextTokenGenerator, GRID, "class"), conditions("class", 8)
    one = memory.estimate_memory(model, 1).new
    monkeypatch.setattr(memory, "available_memory", lambda device: one * 5 + 1)
    with pytest.raises(TokenloomError, match=r"a batch of 5 would fit.*without guidance"):
        model.generate(label, guidance=2.0)
    assert model.generate(label[:5], guidance=2.0).shape == (5, 12)  # type: ignore[index]
    eight = memory.estimate_memory(model, 8, kv_dtype=torch.bfloat16).new
    monkeypatch.setattr(memory, "available_memory", lambda device: eight)
    with pytest.raises(TokenloomError, match="bfloat16"):
        model.generate(label, guidance=2.0)
    monkeypatch.setattr(memory, "available_memory", lambda device: 10)
    with pytest.raises(TokenloomError, match="not even one sample"):
        model.generate(label)
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    assert model.generate(label).shape == (8, 12)


def test_free_memory_of_this_machine_is_plausible() -> None:
    free = memory.available_memory(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e15
    assert memory.available_memory(torch.device("meta")) is None


def test_offloaded_components_are_woken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `enable_model_cpu_offload` chains them: the tokenizer's turn sends the generator away."""
    pipe = tiny_pipeline()
    want = pipe("red lion", seed=1, output_type="pt").images
    _, first = cpu_offload_with_hook(pipe.generator, "cpu")
    cpu_offload_with_hook(pipe.tokenizer, "cpu", prev_module_hook=first)
    turns: list[str] = []
    for name in ("generator", "tokenizer"):
        hook: Any = getattr(pipe, name)._hf_hook
        original = hook.pre_forward

        def woken(module: Any, *args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            turns.append(name)
            return original(module, *args, **options)

        monkeypatch.setattr(hook, "pre_forward", woken)
    for rung in ("cached", "compiled"):
        turns.clear()
        got = pipe("red lion", seed=1, output_type="pt", decode=rung).images
        assert isinstance(got, Tensor) and torch.allclose(got, want, atol=1e-5)
        assert turns[:2] == ["generator", "tokenizer"]
    turns.clear()
    pipe("lion", seed=1, callback_on_step_end=lambda p, i, t, values: values["preview"]())
    assert turns[1:3] == ["tokenizer", "generator"]  # a preview, then the generation goes on


def test_layer_by_layer_is_a_component_at_a_time(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pipe, asked = tiny_pipeline(), []
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", lambda **options: asked.append(options))
    pipe.enable_sequential_cpu_offload(device="cuda:1")
    assert asked == [{"gpu_id": None, "device": "cuda:1"}] and "as a whole" in caplog.text
