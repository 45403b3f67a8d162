"""The compiled rung: the work of `cached` with what one call leaves to the next.

On a processor: key/value buffers that are reused, and few rows by kernels that are built on first use
(`tokenloom.generators.kernels`); without them, what `cached` does. On CUDA the steps are recorded once and replayed
(`tokenloom.generators.capture`). The codes are those of `cached`, up to rounding. "compiled-int8" reads weights rounded to
int8 for few rows, and "compiled-w8a8" rounds the rows as well: another model by a little, and never chosen unasked. Knows
rungs, plans and modules; knows no paradigm.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenloom.errors import unknown_name
from tokenloom.generators import capture
from tokenloom.generators.cache import Cache
from tokenloom.generators.decoding.cached import CachedStepper
from tokenloom.generators.decoding.rows import RowModel
from tokenloom.generators.kernels import QuickDraw, RowTransformer, SkinnyLinear, kernels
from tokenloom.generators.transformer import Transformer

if TYPE_CHECKING:
    from tokenloom.generators.arguments import Run

MOST_PROGRAMS = 4
"""Recorded generations kept a model: each holds its buffers."""
FORMS = {"compiled": "float32", "compiled-int8": "int8", "compiled-w8a8": "w8a8"}
"""The rungs of this module, and the form of their products of few rows."""
CAPTURED = {"cuda"}
"""Kinds of devices on which steps are recorded and replayed."""


class _State:
    """What a generator leaves for its next call; dropped when its tensors move or its plan changes."""

    def __init__(self, fingerprint: tuple[object, ...], plan: object, fast: Any) -> None:
        self.fingerprint, self.plan, self.fast = fingerprint, plan, fast
        self.lock = threading.Lock()
        self.caches: dict[tuple[object, ...], tuple[Cache, weakref.ref[Any]]] = {}
        self.programs: OrderedDict[tuple[object, ...], capture.Program] = OrderedDict()


_STATES: weakref.WeakKeyDictionary[Any, dict[str, _State]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _fingerprint(module: nn.Module) -> tuple[object, ...]:
    tensors = [*module.parameters(), *module.buffers()]
    return (module.training, *((id(each), each.data_ptr(), each.dtype, each.device) for each in tensors))


def _state(generator: Any, form: str) -> _State:
    """The state of a generator, or a new one."""
    mark, plan = _fingerprint(generator), getattr(generator, "plan", None)
    with _LOCK:
        states = _STATES.setdefault(generator, {})
        state = states.get(form)
        if state is None or state.fingerprint != mark or state.plan is not plan:
            state = states[form] = _State(mark, plan, _fast(generator, form))
        return state


def worker(name: str, generator: Any, *others: str) -> Any:
    """Who does the work of a rung for generators without steppers: the generator, or its twin with kernels.

    Raises:
        TokenloomError: For a name that is no rung of such generators, nor one of `others`.
    """
    names = ("auto", "cached", *FORMS, *others)
    if name not in names:
        raise unknown_name("decode rung", name, names)
    return _state(generator, FORMS[name]).fast if name in FORMS else generator


def forget(generator: nn.Module) -> None:
    """Frees what calls with this rung have left: buffers, recorded steps, rounded weights."""
    with _LOCK:
        _STATES.pop(generator, None)


def _fast(generator: Any, form: str) -> Any:
    """The same generator over the same tensors, with kernels for few rows; itself where that is no gain."""
    weights = list(generator.parameters())
    ready = bool(weights) and all(each.device.type == "cpu" for each in weights)
    if (
        not ready
        or weights[0].dtype != torch.float32
        or any(hasattr(m, "_hf_hook") for m in generator.modules())
    ):
        return generator
    loaded = kernels()
    if loaded is None:
        return generator
    shared: dict[int, Any] = {id(each): each for each in (*weights, *generator.buffers())}
    for name in ("plan", "order", "rule"):
        value = getattr(generator, name, None)
        shared[id(value)] = value
    twin = copy.deepcopy(generator, shared)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, SkinnyLinear(child, loaded, form))
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Transformer and (made := RowTransformer.of(child, loaded)) is not None:
                setattr(module, name, made)
    twin.draw = QuickDraw(loaded)
    return twin


class CompiledStepper(CachedStepper):
    """A cached stepper on buffers that outlive it; `run` makes a whole generation of it."""

    state: _State

    @classmethod
    def of(
        cls, generator: RowModel, prefix: Tensor, visible: Tensor | None, form: str = "float32"
    ) -> CachedStepper:
        """The stepper of a generation.

        Args:
            generator: The generator.
            prefix: Prefix rows (B, P, D).
            visible: Which of them may be looked at, (B, P), or `None`.
            form: Of products of few rows (`tokenloom.generators.kernels.linear.MOST_ROWS`).
        """
        state = _state(generator, form)
        cache = _lease(state, generator, prefix)
        made = cls(state.fast, prefix, visible, cache)
        made.state = state
        if isinstance(cache, Cache):
            key = _cache_key(generator, prefix)
            state.caches[key] = (cache, weakref.ref(made))
        return made

    def run(self, generator: Any, run: Run) -> Tensor:
        """Codes (B, N) of a generation."""
        from tokenloom.generators.base import Generator

        whole = run.on_step is None and run.limit is None
        recordable = whole and type(generator)._run is Generator._run  # which never waits
        if generator.device.type not in CAPTURED or not recordable:
            return self.generator._run(run)  # type: ignore[attr-defined]
        if not self.state.lock.acquire(blocking=False):  # another thread uses the buffers
            return generator._run(run)
        try:
            return self._program(generator, run)(run, self.visible)
        finally:
            self.state.lock.release()

    def _program(self, generator: Any, run: Run) -> capture.Program:
        programs, key = self.state.programs, capture.key_of(generator, run, self.visible)
        if key not in programs:
            while len(programs) >= MOST_PROGRAMS:
                programs.popitem(last=False)
            programs[key] = capture.record(self.generator, run, self.visible)
        programs.move_to_end(key)
        return programs[key]


class _Later:
    """A cache that is made when it is first used."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.made = make, None

    def __getattr__(self, name: str) -> Any:
        if self.made is None:
            self.made = self.make()
        return getattr(self.made, name)


def _cache_key(generator: Any, prefix: Tensor) -> tuple[object, ...]:
    kind = prefix.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (
        prefix.shape[0],
        generator.plan.capacity,
        cast,
        getattr(generator.transformer, "cache_dtype", None),
    )


def _lease(state: _State, generator: Any, prefix: Tensor) -> Any:
    """The buffers of the last generation of this size, if it is over; else new ones, which the pool keeps."""
    if (
        prefix.device.type in CAPTURED
    ):  # a recording has buffers of its own; these are for what is not recorded
        return _Later(lambda: generator.transformer.new_cache(prefix.shape[0], generator.plan.capacity))
    held = state.caches.get(_cache_key(generator, prefix))
    if held is not None and held[1]() is None:
        held[0].reset()
        return held[0]
    if held is not None:  # in use: this generation gets buffers of its own
        return None
    made = generator.transformer.new_cache(prefix.shape[0], generator.plan.capacity)
    return made if isinstance(made, Cache) else None


@contextmanager
def captured_on(*kinds: str) -> Iterator[None]:
    """Records and replays on these kinds of devices while the context lasts; on a processor a replay runs the steps."""
    before = set(CAPTURED)
    CAPTURED.clear()
    CAPTURED.update(kinds)
    try:
        yield
    finally:
        CAPTURED.clear()
        CAPTURED.update(before)
