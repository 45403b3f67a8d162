"""The same weights over a layout of another size: another grid, more frames, larger scales.

Rotary positions are worked out anew and need nothing. Tables of learned positions have one row a position; they are
interpolated on request, as vision transformers are for pictures of other sizes, and refused otherwise. Knows layouts and
generators. Says nothing of quality: a model that was not trained at a size may need to be.

Legend: N positions, P prefix rows, D width.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom.errors import TokenloomError
from tokenloom.generators.order import Order
from tokenloom.layouts import Layout

G = TypeVar("G", bound=nn.Module)
_MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


def resized(generator: G, layout: Layout, *, interpolate: bool = False) -> G:
    """A copy of a generator for a layout of another size, of the same kind and with the same order.

    Args:
        generator: A `Generator`, `NextCellGenerator` or another module whose config has "order_config".
        layout: The new layout. Scales must be as many as before.
        interpolate: Whether tables of learned positions are interpolated (bicubic on grids and scales, linear on lines,
            trilinear on clips).

    Raises:
        TokenloomError: For a layout of another kind, or if learned positions do not fit and `interpolate` is False; the
            message names the size that was trained.

    Example:
        >>> large = resized(small, Layout.grid(12, 8))
    """
    config: dict[str, Any] = {
        key: value for key, value in dict(cast("Any", generator).config).items() if key[:1] != "_"
    }
    order = Order.from_config(config["order_config"])
    old = order.layout
    if layout.kind != old.kind or (old.kind == "scales" and len(layout.shape) != len(old.shape)):
        raise TokenloomError(
            f"This generator is for {old}, so the new layout must be of that kind, got {layout}."
        )
    config["order_config"] = Order(layout, order.name, order.options).to_config()
    state = generator.state_dict()
    prefix = int(getattr(getattr(generator, "condition", None), "length", 0))
    counts = (old.size, prefix + old.size)  # a longer table counts along a sequence and is left as it is
    changed = {
        name: value
        for name, value in state.items()
        if _is_positions(name) and value.ndim >= 2 and value.shape[-2] in counts
    }
    if changed and layout.size != old.size and not interpolate:
        raise TokenloomError(
            f"{', '.join(sorted(changed))} hold learned positions trained for {old}, not for {layout}. Pass "
            "interpolate=True to interpolate them, and expect to train on."
        )
    for key in ("transformer_config", "decoder_config", "encoder_config"):
        inner = dict(config.get(key) or {})
        rows = inner.get("learned_positions") or 0
        if rows in counts and interpolate:
            config[key] = inner | {"learned_positions": rows + layout.size - old.size}
    made = type(generator)(**config)
    for name, value in changed.items():
        if interpolate:
            state[name] = _interpolated(value, old, layout)
    wanted = made.state_dict()
    wrong = [name for name, value in state.items() if name in wanted and wanted[name].shape != value.shape]
    if wrong:
        raise TokenloomError(
            f"{', '.join(wrong)} depend on the layout {old} and cannot be resized to {layout}."
        )
    made.load_state_dict(state)
    return made.to(dtype=next(generator.parameters()).dtype).train(generator.training)


def _is_positions(name: str) -> bool:
    return any(part in ("positions", "places") for part in name.split("."))


def _interpolated(value: Tensor, old: Layout, new: Layout) -> Tensor:
    """The last N rows of a table, interpolated; rows before them (of a prefix) stay."""
    axis = value.ndim - 2
    first = value.shape[axis] - old.size
    prefix, rows = value.split([first, old.size], dim=axis)
    flat = rows.reshape(-1, old.size, value.shape[-1])
    if old.kind == "scales":
        parts = flat.split([h * w for h, w in old.maps], dim=1)
        pairs = zip(parts, old.maps, new.maps, strict=True)
        flat = torch.cat([_spread(part, before, after) for part, before, after in pairs], dim=1)
    else:
        flat = _spread(flat, _sides(old), _sides(new))
    return torch.cat((prefix, flat.reshape(*value.shape[:axis], new.size, value.shape[-1])), dim=axis)


def _sides(layout: Layout) -> tuple[int, ...]:
    return tuple(int(side) for side in layout.shape)  # type: ignore[arg-type]


def _spread(rows: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """Rows (B, N, D) of a grid of one size at the places of another."""
    if before == after:
        return rows
    grid = rows.float().transpose(1, 2).unflatten(2, before)
    made = F.interpolate(grid, after, mode=_MODES[len(before)], align_corners=False)
    return made.flatten(2).transpose(1, 2).to(rows.dtype)
