"""The generators that can be trained by name, and how one is built from the options of a config.

Knows the layout and the vocabulary of a tokenizer, and the pyramid of one that has many scales; knows nothing of pictures,
captions or loops. A new generator joins by one line of `FAMILIES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators import (
    BlockDiffusionGenerator,
    MaskedGenerator,
    NextBlockGenerator,
    NextNeighborGenerator,
    NextScaleGenerator,
    NextTokenGenerator,
    orders,
)
from tokenloom.generators.base import Generator
from tokenloom.generators.orders import Order
from tokenloom.layouts import Layout
from tokenloom.tokenizers.base import Tokenizer

_OWN_KEYS = ("order", "order_options", "transformer")


def _rows(layout: Layout) -> dict[str, Any]:
    """Blocks of one row; of a line, blocks of about the root of its length."""
    if layout.kind == "line":
        fitting = (b for b in range(1, layout.size + 1) if layout.size % b == 0 and b * b <= layout.size)
        return {"block": max(fitting)}
    return {"block": int(layout.coords[-1, -1]) + 1}


def _nothing(layout: Layout) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A generator that can be trained.

    Attributes:
        cls: The class.
        order: Name of the order where the config names none.
        order_options: Options of that order for a layout.
        rule: What `rule_config` holds where the config says nothing else. Dropping captions is the task's business.
    """

    cls: type[Generator]
    order: str = "raster"
    order_options: Callable[[Layout], dict[str, Any]] = _nothing
    rule: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "next_token": Family(NextTokenGenerator),
    "next_neighbor": Family(NextNeighborGenerator, "neighbors"),
    "next_block": Family(NextBlockGenerator, "blocks", _rows),
    "block_diffusion": Family(BlockDiffusionGenerator, "blocks", _rows),
    "next_scale": Family(NextScaleGenerator, "scales"),
    "masked": Family(MaskedGenerator, "random", lambda _: {"steps": 8, "seed": 0}, {"label_drop": 0.0}),
}


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        TokenloomError: For an unknown name, with the closest one.
    """
    if name not in FAMILIES:
        raise unknown_name("generator", name, FAMILIES)
    return FAMILIES[name]


def build_order(name: str, layout: Layout, options: Mapping[str, Any]) -> Order:
    """The order of a config, `{"order": name, "order_options": {...}}`, or that of the family."""
    kind = family(name)
    given = dict(options.get("order_options") or {})
    if options.get("order", kind.order) == kind.order:
        given = kind.order_options(layout) | given
    return orders.build(options.get("order", kind.order), layout, **given)


def build_generator(
    name: str,
    tokenizer: Tokenizer,
    condition: dict[str, Any],
    options: Mapping[str, Any],
    layout: Layout | None = None,
) -> Generator:
    """A generator of the codes of a tokenizer.

    Args:
        name: One of `FAMILIES`.
        tokenizer: Names the layout and the vocabulary; a pyramid of scales is copied from it.
        condition: `condition_config` of the generator.
        options: "order", "order_options", "transformer" (fields of `TransformerConfig`), and arguments of the generator.
        layout: Layout of the codes where it is not that of the tokenizer, for instance of clips of another length.

    Raises:
        TokenloomError: For an unknown name or option, or if the generator does not fit the tokenizer.
    """
    kind = family(name)
    fixed = {"order_config", "vocab_size", "transformer_config", "condition_config"}
    allowed = [key for key in inspect.signature(kind.cls).parameters if key not in fixed]
    for key in options:
        if key not in (*allowed, *_OWN_KEYS):
            raise unknown_name("model option", key, [*allowed, *_OWN_KEYS])
    rest = {key: value for key, value in options.items() if key not in _OWN_KEYS}
    pyramid = getattr(getattr(tokenizer, "quantizer", None), "pyramid", None)
    scaled = issubclass(kind.cls, NextScaleGenerator)
    if scaled and pyramid is None:
        raise TokenloomError(
            f"{name} predicts maps of many scales, but {type(tokenizer).__name__} has codes in {tokenizer.layout} and no "
            "pyramid; train a tokenizer of many scales, or take another generator."
        )
    rule = dict(kind.rule) | (NextScaleGenerator.rule_for(pyramid) if scaled else {})
    if rule or "rule_config" in rest:
        rest["rule_config"] = rule | (rest.get("rule_config") or {})
    order = build_order(name, layout or tokenizer.layout, options)
    generator = kind.cls(
        order_config=order.to_config(),
        vocab_size=tokenizer.vocab_size,
        transformer_config=dict(options.get("transformer") or {}),
        condition_config=condition,
        **rest,
    )
    if isinstance(generator, NextScaleGenerator):
        codes = torch.arange(tokenizer.vocab_size)[None]
        inner = getattr(tokenizer.quantizer, "inner", tokenizer.quantizer)
        generator.take_pyramid(pyramid, inner.decode(codes.to(tokenizer.device))[0])
    return generator
