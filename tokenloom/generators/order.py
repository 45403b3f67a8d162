"""What an order is: a step for every position of a layout, and everything that follows from it.

The decode sequence, its inverse, the slice of each step and the step-causal attention mask are derived here from the steps
that a registered function returns; the functions are in `orders`. An order does not know which model reads it, what a
model is fed at a step, or how conditions are prepended.

Legend: N tokens, S steps.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.layouts import Layout

P = ParamSpec("P")
# What a registered function returns: the step of every position, LongTensor (N,) in layout order, alone or with a sort
# key (N,) that orders the positions inside a step; without a key they keep their layout order.
Steps = Tensor | tuple[Tensor, Tensor]

_REGISTRY: dict[str, Constructor[Any]] = {}


@dataclass(frozen=True)
class Order:
    """A layout with a step for every position; frozen, hashable, equal by value, cheap to copy and pickle.

    Build one with a function of this module (`raster`, `scales`, ...) or with `build`. Tensors are cached CPU tensors
    shared by all equal orders: do not write into them.

    Attributes:
        layout: The layout whose positions are ordered.
        name: Registered name.
        options: Every option of the order by name, defaults included; sequences are held as tuples. A mapping is
            accepted too.

    Raises:
        TokenloomError: For an unknown name or option, or where the order does not fit the layout.

    Example:
        >>> order = neighbors(Layout.grid(2, 2))
        >>> order.step.tolist(), order.slices
        ([0, 1, 1, 2], (slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)))
    """

    layout: Layout
    name: str
    options: tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        """Checks the arguments, fills in default options and computes the steps once."""
        if not isinstance(self.layout, Layout):
            raise TokenloomError(
                f"An order needs a Layout, got {self.layout!r}. Write e.g. Layout.grid(16, 16)."
            )
        constructor = _constructor(self.name)
        options = constructor.complete(self.layout, dict(self.options))
        object.__setattr__(self, "options", tuple(options.items()))
        _plan(self)

    @property
    def num_steps(self) -> int:
        """Number of steps S."""
        return len(_plan(self).slices)

    @property
    def step(self) -> Tensor:
        """Step of every position, LongTensor (N,) in layout order, values 0 to S-1."""
        return _plan(self).step

    @property
    def permutation(self) -> Tensor:
        """Layout index of every place in decode order, LongTensor (N,): ``decode = codes[:, permutation]``."""
        return _plan(self).permutation

    @property
    def inverse(self) -> Tensor:
        """Place in decode order of every layout index, LongTensor (N,): ``codes = decode[:, inverse]``."""
        return _plan(self).inverse

    @property
    def slices(self) -> tuple[slice, ...]:
        """The decode-order slice of each step; together they cover 0 to N without gaps."""
        return _plan(self).slices

    def mask(self) -> Tensor:
        """The step-causal attention mask, BoolTensor (N, N) in layout order.

        Returns:
            ``mask[q, k]`` is True where position q may attend to position k: ``step[k] <= step[q]``. Cached.
        """
        return _mask(self)

    def to_config(self) -> dict[str, Any]:
        """Returns the order as JSON-able values, for `from_config`."""
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options}
        return {"name": self.name, "layout": self.layout.to_config(), "options": options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Order:
        """Builds an order from the output of `to_config`.

        Raises:
            TokenloomError: If a key is missing, unknown, or holds a bad value.
        """
        for key in config:
            if key not in ("name", "layout", "options"):
                raise unknown_name("order configuration key", key, ("name", "layout", "options"))
        if "name" not in config or "layout" not in config:
            raise TokenloomError(
                f"An order configuration needs the keys 'name' and 'layout', got {dict(config)}."
            )
        return cls(
            Layout.from_config(config["layout"]), config["name"], tuple((config.get("options") or {}).items())
        )

    def __str__(self) -> str:
        """Short form for messages, such as "blocks(grid(4, 4), block=(2, 2))"."""
        return f"{self.name}({', '.join([str(self.layout), *(f'{k}={v!r}' for k, v in self.options)])})"


class Constructor(Generic[P]):
    """What `register` turns a step function into: calling it builds the `Order`."""

    def __init__(self, function: Callable[Concatenate[Layout, P], Steps]) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__
        self.steps = function
        self._signature = inspect.signature(function)
        self._options = list(self._signature.parameters)[1:]

    def __call__(self, layout: Layout, *args: P.args, **kwargs: P.kwargs) -> Order:
        """Builds the order of this name."""
        known = self._options
        if len(args) > len(known):
            raise TokenloomError(
                f"The order {self.name!r} takes the options {known}, got {len(args)} positional ones."
            )
        positional = dict(zip(known, args, strict=False))
        if clash := positional.keys() & kwargs.keys():
            raise TokenloomError(
                f"The order {self.name!r} got the option {min(clash)!r} twice. Give it once."
            )
        return Order(layout, self.name, tuple((positional | kwargs).items()))

    def complete(self, layout: Layout, options: dict[str, Any]) -> dict[str, Any]:
        """Checks option names, adds the defaults, and makes the values hashable, in the order of the signature."""
        for key in options:
            if key not in self._options:
                raise unknown_name(f"option of the order {self.name!r}", key, self._options)
        try:
            bound = self._signature.bind(layout, **options)
        except TypeError as error:
            raise TokenloomError(
                f"The order {self.name!r} takes the options {self._options}: {error}."
            ) from None
        bound.apply_defaults()
        return {key: _canonical(key, bound.arguments[key]) for key in self._options}


def register(function: Callable[Concatenate[Layout, P], Steps]) -> Constructor[P]:
    """Registers an order under the name of `function`, and returns its constructor.

    Args:
        function: Takes the layout and hashable options; returns the step of every position, LongTensor (N,) in layout
            order covering 0 to S-1 without gaps, or a pair of the steps and a sort key (N,) for the places inside a
            step. It must depend on its arguments alone.

    Raises:
        TokenloomError: If the name is taken.
    """
    constructor = Constructor(function)
    if constructor.name in _REGISTRY:
        raise TokenloomError(
            f"The order {constructor.name!r} exists already. Give the function another name."
        )
    _REGISTRY[constructor.name] = constructor
    return constructor


def build(name: str, layout: Layout, **options: Any) -> Order:
    """Builds an order by its registered name.

    Args:
        name: One of `names()`.
        layout: The layout to order.
        **options: Options of that order.

    Raises:
        TokenloomError: For an unknown name or option, or where the order does not fit the layout.

    Example:
        >>> build("blocks", Layout.grid(4, 4), block=(2, 2)).num_steps
        4
    """
    return Order(layout, name, tuple(options.items()))


def names() -> tuple[str, ...]:
    """Names of all registered orders, sorted."""
    importlib.import_module("tokenloom.generators.orders")
    return tuple(sorted(_REGISTRY))


def _canonical(key: str, value: object) -> Any:
    """Brings an option to one hashable form: lists (as JSON gives them) to tuples, whole numbers to ints."""
    if isinstance(value, (list, tuple)):
        return tuple(_canonical(key, entry) for entry in value)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TokenloomError(
            f"The option {key!r} must be a number, a string or a tuple of them, got {value!r}."
        ) from None


def _constructor(name: str) -> Constructor[Any]:
    if name not in _REGISTRY:
        importlib.import_module("tokenloom.generators.orders")  # an order that was pickled may come first
    if name not in _REGISTRY:
        raise unknown_name("order", name, names())
    return _REGISTRY[name]


class _Plan(NamedTuple):
    """Everything derived from the steps."""

    step: Tensor  # (N,)
    permutation: Tensor  # (N,)
    inverse: Tensor  # (N,)
    slices: tuple[slice, ...]  # S


@functools.lru_cache(maxsize=128)
def _plan(order: Order) -> _Plan:
    # Cached tensors must be ordinary CPU tensors even when first asked for under inference_mode or a meta device.
    with torch.inference_mode(False):
        steps = _constructor(order.name).steps(order.layout, **dict(order.options))
        step, key = steps if isinstance(steps, tuple) else (steps, None)
        _check_steps(order, step)
        if key is None:
            permutation = step.argsort(stable=True)
        else:
            by_key = key.argsort(stable=True)
            permutation = by_key[step[by_key].argsort(stable=True)]
        inverse = permutation.argsort()
        ends = [0, *step.bincount().cumsum(0).tolist()]
        slices = tuple(slice(start, stop) for start, stop in itertools.pairwise(ends))
        return _Plan(step, permutation, inverse, slices)


def _check_steps(order: Order, step: Tensor) -> None:
    """Checks that a step function kept its promise."""
    size = order.layout.size
    if step.shape != (size,) or step.dtype != torch.int64:
        raise TokenloomError(
            f"The order {order.name!r} must return a LongTensor ({size},), got {step.dtype} {tuple(step.shape)}."
        )
    if int(step.min()) < 0 or int((step.bincount() == 0).sum()):
        raise TokenloomError(
            f"The order {order.name!r} must use every step from 0 up on {order.layout}, got gaps."
        )


@functools.lru_cache(maxsize=8)  # masks are large: N = 5120 takes 26 MB
def _mask(order: Order) -> Tensor:
    with torch.inference_mode(False):
        step = order.step
        return step[None, :] <= step[:, None]
