"""The compiled rung: the codes of `cached` on every path, buffers that outlive calls, and nothing that waits for a device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_generators import CONDITIONS, cases, conditions, make, random_codes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tokenloom.errors import TokenloomError
from tokenloom.generators import (
    Guidance,
    NextScaleGenerator,
    NextTokenGenerator,
    Sampling,
    capture,
    compiled,
    orders,
)
from tokenloom.generators.arguments import Run
from tokenloom.generators.base import Generator
from tokenloom.generators.block_diffusion import BlockDiffusionGenerator
from tokenloom.generators.decoding.cached import CachedStepper
from tokenloom.generators.kernels import SkinnyLinear, build
from tokenloom.layouts import Layout

ALL = list(cases())
LONG = orders.raster(Layout.grid(6, 6))
SETTINGS: list[dict[str, Any]] = [
    {"guidance": 1.0, "sampling": Sampling(top_k=5)},
    {"guidance": 3.0, "sampling": Sampling()},
    {"guidance": Guidance(4.0, interval=(0.0, 0.5)), "sampling": Sampling(0.7, top_p=0.9)},
    {"guidance": Guidance(3.0, "linear"), "sampling": Sampling(lambda progress: 1.5 - progress, top_k=7)},
]


@pytest.fixture
def on_cpu() -> Any:
    """Programs run where a GPU would replay them."""
    with compiled.captured_on("cpu"):
        yield


def scales() -> Generator:
    """A next-scale generator of adaLN blocks."""
    torch.manual_seed(1)
    model = NextScaleGenerator(
        orders.scales(Layout.scales([1, 2, 3])).to_config(),
        12,
        {"width": 24, "heads": 2, "depth": 2, "rope": False, "modulation": "own", "final_modulation": True},
        {"kind": "class", "num_classes": 4},
        rule_config={"channels": 6},
    )
    for value in model.parameters():
        torch.nn.init.normal_(value.data, std=0.3)
    return model.eval()


def both(
    model: Generator, condition: Tensor | None, decode: str = "compiled", **options: Any
) -> tuple[Tensor, Tensor]:
    return model.generate(condition, decode="cached", **options), model.generate(
        condition, decode=decode, **options
    )


@pytest.mark.parametrize("case", range(len(ALL)), ids=[f"{name}-{order}" for name, _, order in ALL])
@pytest.mark.parametrize("captured", [False, True], ids=["kernels", "programs"])
def test_codes_are_those_of_cached(case: int, captured: bool) -> None:
    """For every order, twice in a row, so that reused buffers hold what an earlier generation left."""
    _, cls, order = ALL[case]
    kind, setting = list(CONDITIONS)[case % 3], SETTINGS[case % 4]
    model = make(
        cls, order, kind, transformer={"modulation": "own"} if case % 2 else None, share_head=case % 3 > 0
    )
    with compiled.captured_on(*(["cpu"] if captured else [])):
        for batch, seeds in ((1, 3), (2, 11), (1, 8)):
            condition = conditions(kind, batch)
            options = setting | {"batch_size": batch if condition is None else None, "seeds": seeds}
            if case % 2:
                options |= {
                    "known": random_codes(order, batch),
                    "keep": torch.arange(order.layout.size) % 3 == 1,
                }
            want, got = both(model, condition, **options)
            assert torch.equal(want, got), (batch, setting)


@pytest.mark.parametrize("setting", range(3))
def test_steps_in_buckets_give_the_same_codes(
    setting: int, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    """36 steps of one shape, buckets of 8 rows, with and without adaLN, kept positions and batches."""
    monkeypatch.setattr(capture, "WHOLE_STEPS", 4)
    monkeypatch.setattr(capture, "BUCKET", 8)
    model = make(NextTokenGenerator, LONG, "class", transformer={"modulation": "own" if setting else None})
    for batch in (1, 3):
        options = SETTINGS[setting] | {"seeds": batch}
        if setting == 2:
            options |= {"known": random_codes(LONG, batch), "keep": torch.arange(36) % 5 == 1}
        for _ in range(2):
            want, got = both(model, conditions("class", batch), **options)
            assert torch.equal(want, got)
    programs = compiled._state(model, "float32").programs
    assert {type(each) for each in programs.values()} == {capture.StepProgram}
    assert len({id(step) for step in next(iter(programs.values())).others}) == 5  # type: ignore[attr-defined]


def test_a_changing_temperature_is_one_recording(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    monkeypatch.setattr(capture, "WHOLE_STEPS", 4)
    model = make(NextTokenGenerator, LONG, "class")
    want, got = both(model, conditions("class", 2), seeds=1, **SETTINGS[3])
    assert torch.equal(want, got)
    assert {type(each) for each in compiled._state(model, "float32").programs.values()} == {capture.Program}


def test_next_scale_with_programs_and_without() -> None:
    model, label = scales(), torch.tensor([1, 3])
    for kinds in ((), ("cpu",)):
        with compiled.captured_on(*kinds):
            for seeds in (1, 2):
                want, got = both(
                    model, label, guidance=Guidance(4.0, "linear"), sampling=Sampling(top_k=6), seeds=seeds
                )
                assert torch.equal(want, got)


def test_programs_are_kept_and_the_oldest_goes(on_cpu: None) -> None:
    model = make(NextTokenGenerator, orders.raster(Layout.grid(2, 3)), "class")
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 2.0):
        model.generate(conditions("class", 1), guidance=scale, seeds=1, decode="compiled")
    assert len(compiled._state(model, "float32").programs) == compiled.MOST_PROGRAMS
    compiled.forget(model)
    assert model not in compiled._STATES


def test_changed_weights_are_used(on_cpu: None) -> None:
    """In place, by loading, and by moving to another number format."""
    model, label = make(NextTokenGenerator, orders.raster(Layout.grid(2, 3)), "class"), conditions("class", 2)
    other = make(NextTokenGenerator, orders.raster(Layout.grid(2, 3)), "class", seed=5)
    before, _ = both(model, label, seeds=1)
    with torch.no_grad():
        model.heads[0].get_parameter("weight").mul_(-1)
    assert torch.equal(*both(model, label, seeds=1))
    model.load_state_dict(other.state_dict())
    want, got = both(model, label, seeds=1)
    assert torch.equal(want, got) and not torch.equal(want, before)
    model.double()
    assert torch.equal(*both(model, label, seeds=1))


@pytest.mark.parametrize("kinds", [(), ("cpu",)])
def test_bad_logits_name_the_step(kinds: tuple[str, ...]) -> None:
    model = make(NextTokenGenerator, LONG, "class")
    with torch.no_grad():
        model.heads[0].get_parameter("weight")[0] = torch.nan
    with compiled.captured_on(*kinds), pytest.raises(TokenloomError, match=r"Step 0 of 36.*finite"):
        model.generate(conditions("class", 1), seeds=1, decode="compiled")


def test_bad_logits_of_one_generation_do_not_reach_the_next(
    monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    """A NaN in the buffers would survive a masked product."""
    monkeypatch.setattr(capture, "WHOLE_STEPS", 4)
    model, label = make(NextTokenGenerator, LONG, "class"), conditions("class", 1)
    weight = model.transformer.blocks[0].get_parameter("attention.qkv.weight")
    saved = weight.clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(TokenloomError, match="finite"):
        model.generate(label, seeds=1, decode="compiled")
    with torch.no_grad():
        weight.copy_(saved)
    assert torch.equal(*both(model, label, seeds=1))


def test_two_generations_at_once_do_not_share_buffers() -> None:
    model = make(NextTokenGenerator, LONG, "class")
    want = [model.generate(conditions("class", 1), seeds=seed) for seed in range(4)]
    got: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        got[seed] = model.generate(conditions("class", 1), seeds=seed, decode="compiled")

    for kinds in ((), ("cpu",)):
        with compiled.captured_on(*kinds):
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert all(torch.equal(got[seed], want[seed]) for seed in range(4))
        got.clear()


def test_a_generation_inside_a_generation_has_its_own_buffers() -> None:
    model, label = make(NextTokenGenerator, LONG, "class"), conditions("class", 1)
    inner: list[Tensor] = []

    def on_step(step: Any) -> None:
        if step.index == 3:
            inner.append(model.generate(label, seeds=9, decode="compiled"))

    outer = model.generate(label, seeds=4, decode="compiled", on_step=on_step)
    assert torch.equal(outer, model.generate(label, seeds=4))
    assert torch.equal(inner[0], model.generate(label, seeds=9))


def test_steps_are_reported() -> None:
    model, seen = make(NextTokenGenerator, LONG, "class"), []
    with compiled.captured_on("cpu"):
        model.generate(
            conditions("class", 1), decode="compiled", on_step=lambda step: seen.append(step.index)
        )
    assert seen == list(range(36))


def test_a_loop_of_its_own_runs_with_the_kernels() -> None:
    torch.manual_seed(0)
    model = BlockDiffusionGenerator(
        orders.blocks(Layout.line(8), 4).to_config(),
        12,
        {"width": 24, "heads": 2, "depth": 2},
        rule_config={"passes": 2},
    ).eval()
    with compiled.captured_on("cpu"):
        assert torch.equal(*both(model, None, seeds=3, batch_size=2))
        assert torch.equal(
            model.generate(seeds=3, passes=4), model.generate(seeds=3, passes=4, decode="compiled")
        )


class _NoCopies(TorchDispatchMode):
    """Raises where a tensor of the host meets one of the device during a generation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = tree_flatten((args, kwargs or {}))
        kinds = {each.device.type for each in flat if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        made, _ = tree_flatten(out)
        kinds |= {each.device.type for each in made if isinstance(each, Tensor)}
        if len(kinds) > 1:
            raise AssertionError(f"{func} copies between {sorted(kinds)}")
        return out


def _waits_for_nothing(model: Generator, condition: Any, kept: bool, **options: Any) -> None:
    """Runs the recorded work on the meta device, which has no values to wait for."""
    model = copy.deepcopy(model).to("meta")
    model.register_buffer("_place", torch.zeros((), device="meta"), persistent=False)
    batch, guidance = 2, Guidance.of(options["guidance"])
    rows = batch * (2 if guidance.enabled else 1)
    prefix = torch.zeros(rows, model.condition.length, model.transformer.config.width, device="meta")
    seeds, size = torch.zeros(batch, dtype=torch.long, device="meta"), model.order.layout.size
    known = (
        torch.zeros(batch, size, dtype=torch.long, device="meta"),
        torch.zeros(batch, size, dtype=torch.bool, device="meta"),
    )
    stepper: Any = None
    run = Run(batch, seeds, guidance, options["sampling"], prefix, stepper, known if kept else None, None)
    program = capture.record(model, run, condition)
    model.plan.on(torch.device("meta"))
    with _NoCopies():
        program.play()


@pytest.mark.parametrize(
    "case", range(0, len(ALL), 2), ids=[f"{name}-{order}" for name, _, order in ALL[::2]]
)
@torch.no_grad()
def test_recorded_steps_never_wait_nor_copy(case: int) -> None:
    """No value is read on the host and no tensor of the host is used: what a recording cannot hold."""
    _, cls, order = ALL[case]
    _waits_for_nothing(make(cls, order, "class"), None, bool(case % 4), **SETTINGS[1 + case % 3])


@torch.no_grad()
def test_recorded_scales_and_buckets_never_wait_nor_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    _waits_for_nothing(scales(), None, False, **SETTINGS[1])
    monkeypatch.setattr(capture, "WHOLE_STEPS", 4)
    _waits_for_nothing(make(NextTokenGenerator, LONG, "class"), None, True, **SETTINGS[1])
    _waits_for_nothing(make(NextTokenGenerator, LONG, "class"), None, True, **SETTINGS[0])


def test_the_detector_detects() -> None:
    with pytest.raises(AssertionError, match="copies"), _NoCopies():
        torch.zeros(2).to("meta")


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _fresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[], Any]:
    monkeypatch.setenv("TOKENLOOM_CACHE", str(folder))
    build.kernels.cache_clear()
    return build.kernels


@pytest.fixture(autouse=True)
def _restore() -> Any:
    yield
    build.kernels.cache_clear()


def test_kernels_agree_with_torch() -> None:
    loaded = build.kernels()
    if loaded is None:  # no compiler here: then the rung must still work
        assert build._library_path("").suffix == ".so"
        return
    for rows, width, outputs in ((1, 24, 72), (2, 37, 5), (3, 8, 1), (4, 64, 33), (7, 19, 16)):
        x, weight, bias = torch.randn(rows, width), torch.randn(outputs, width), torch.randn(outputs)
        want = torch.nn.functional.linear(x, weight, bias)
        assert torch.allclose(loaded.linear(x, weight, None, bias), want, atol=1e-5)
        codes, scale = torch.randint(-127, 128, (outputs, width), dtype=torch.int8), torch.rand(outputs)
        exact = torch.nn.functional.linear(x, codes.float() * scale[:, None], bias)
        assert torch.allclose(loaded.linear(x, codes, scale, bias), exact, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 77), (2, 64), (3, 31), (4, 96), (7, 200), (16, 33)])
def test_products_of_whole_numbers_are_exact(size: tuple[int, int]) -> None:
    """Rows rounded to a 127th of their largest number, times int8 weights, without an overflow at the largest of both."""
    loaded = build.kernels()
    if loaded is None:
        return
    rows, width = size
    x, bias = torch.randn(rows, width), torch.randn(29)
    codes, scale = torch.randint(-127, 128, (29, width), dtype=torch.int8), torch.rand(29) / 64
    codes[3], codes[4], x[0] = 127, -127, x[0].sign()
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / step).round()
    want = (rounded.double() @ codes.double().T * step * scale + bias).float()
    got = loaded.linear(x, codes, scale, bias, whole=True)
    assert torch.allclose(got, want, atol=2e-3, rtol=1e-4), (got - want).abs().max()
    nothing = loaded.linear(torch.zeros(rows, width), codes, scale, bias, whole=True)
    assert torch.equal(nothing, bias.expand(rows, -1))
    x[0, 1] = torch.nan
    assert loaded.linear(x, codes, scale, bias, whole=True)[0].isnan().all()


def test_a_broken_file_in_the_cache_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that was killed half way leaves the old state, and a file that was cut off is replaced."""
    if _fresh(monkeypatch, tmp_path / "whole")() is None:
        return  # no compiler here
    (library,) = (tmp_path / "whole" / "tokenloom").glob("*.so")
    broken = (
        tmp_path / "broken" / "tokenloom" / library.name
    )  # another path: this process has loaded the first
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\x7fELF")
    assert _fresh(monkeypatch, tmp_path / "broken")() is not None
    assert broken.stat().st_size > 1000


@pytest.mark.parametrize("broken", ["off", "no compiler", "failing compiler", "wrong results", "no folder"])
def test_without_kernels_the_rung_is_cached(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_kernels = _fresh(monkeypatch, tmp_path)
    if broken == "off":
        monkeypatch.setenv("TOKENLOOM_KERNELS", "0")
    elif broken == "no compiler":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif broken == "failing compiler":
        monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/false")
    elif broken == "wrong results":
        monkeypatch.setattr(build, "_correct", lambda loaded: False)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "file"))
    assert make_kernels() is None
    model = make(NextTokenGenerator, LONG, "class")
    assert torch.equal(*both(model, conditions("class", 2), seeds=1))
    assert compiled._state(model, "float32").fast is model


def test_other_thread_counts_give_the_same_codes() -> None:
    model, threads = make(NextTokenGenerator, LONG, "class"), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(model.generate(conditions("class", 2), seeds=1, decode="compiled"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("form", "most"), [("int8", 8), ("w8a8", 16)])
def test_int8_is_near_and_follows_the_weights(form: str, most: int) -> None:
    """Each weight is off by at most half a step of its output; the name has to be asked for."""
    loaded = build.kernels()
    if loaded is None:
        return
    linear = torch.nn.Linear(64, 48)
    layer, x = SkinnyLinear(linear, loaded, form), torch.randn(2, 64)
    codes, scale = layer.rounded()
    assert float((codes * scale[:, None] - linear.weight.detach()).abs().amax() / scale.amax()) <= 0.5 + 1e-3
    with torch.no_grad():
        assert torch.allclose(layer(x), linear(x), atol=0.05) and not torch.equal(layer(x), linear(x))
        linear.weight.mul_(2)
        assert torch.allclose(layer(x), linear(x), atol=0.1)
        many = torch.randn(most + 1, 64)
        assert torch.equal(layer(many), linear(many))
    model = make(NextTokenGenerator, LONG, "class")
    codes_int8 = model.generate(conditions("class", 2), seeds=1, decode=f"compiled-{form}")
    assert codes_int8.shape == (2, 36)
    fast: Any = compiled._state(model, form).fast
    layers = [each for each in fast.modules() if isinstance(each, SkinnyLinear)]
    assert layers and all(each.int8 and each._made is not None for each in layers)


def test_bfloat16_runs_without_kernels() -> None:
    model = make(NextTokenGenerator, orders.raster(Layout.grid(2, 3)), "class").to(torch.bfloat16)
    want, got = both(model, conditions("class", 2), seeds=1)
    assert torch.equal(want, got)
    assert compiled._state(model, "float32").fast is model
    assert isinstance(CachedStepper(model, torch.zeros(1, 1, 24, dtype=torch.bfloat16)), CachedStepper)
