"""Orders: which tokens are predicted together, and in what sequence.

An order gives every position of a layout a step, 0 to S-1. That is all a paradigm (next token, next scale, next
neighbour, next block, regions, delay, random sets) adds to the shared machinery, which is in `order`.

To add an order, write one function that returns the steps, and decorate it with `register`; `build`, configurations and
the property tests then know it.

Legend: N tokens, S steps, H rows, W columns, T time steps, K codebooks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.order import Constructor, Order, Steps, build, names, register
from tokenloom.layouts import Layout
from tokenloom.rng import noise

__all__ = [
    "Constructor",
    "Order",
    "Steps",
    "blocks",
    "build",
    "coarse_first",
    "delay",
    "flat",
    "names",
    "neighbors",
    "parallel",
    "patches",
    "random",
    "raster",
    "regions",
    "register",
    "scales",
]

_ORDER_NOISE_ID = (
    0xFFFFFFFF  # vocabulary id reserved for `random`, so that it shares no noise with token sampling
)


@register
def raster(layout: Layout) -> Steps:
    """Next token: one position a step, in layout order. Fits every layout; frames give the flat codec order."""
    return torch.arange(layout.size, device="cpu")


@register
def scales(layout: Layout) -> Steps:
    """Next scale (VAR, MVAR): one whole map a step, from coarse to fine.

    Raises:
        TokenloomError: If the layout is not a scales layout.
    """
    _require(layout, "scales", ("scales",), "Use Layout.scales([1, 2, 4]).")
    return layout.coords[:, 0].clone()


@register
def neighbors(layout: Layout) -> Steps:
    """Next neighbour (NAR): the step is the sum of the coordinates, so 2-D anti-diagonals or 3-D planes.

    Positions inside a step follow the layout: increasing row (and time before it).

    Raises:
        TokenloomError: If the layout is not a grid or a clip.
    """
    _require(
        layout,
        "neighbors",
        ("grid", "clip"),
        "Use Layout.grid(h, w) or Layout.clip(t, h, w); a line has raster.",
    )
    return layout.coords.sum(dim=1)


@register
def blocks(layout: Layout, block: int | tuple[int, ...], sequential_first: bool = False) -> Steps:
    """Next block (NBP) or next cell (xAR): equal boxes of positions, one box a step, boxes in raster order.

    Args:
        layout: The layout to cut into boxes.
        block: An int for a run of that many positions in layout order, or one length per axis: (8, 8) cells of a grid,
            (1, w) rows, (1, h, w) frames or (1, 1, w) row blocks of a clip, (1, K) codec frames.
        sequential_first: Whether the positions of the first box come one a step (the hybrid schedule of NBP).

    Raises:
        TokenloomError: If the boxes do not tile the layout.
    """
    if isinstance(block, tuple):
        box = _index(layout, block)
    else:
        run = _count("block", block, layout.size)
        if layout.size % run:
            fits = ", ".join(str(d) for d in range(1, layout.size + 1) if layout.size % d == 0)
            raise TokenloomError(
                f"A block of {run} does not divide the {layout.size} positions of {layout}. Use {fits}."
            )
        box = torch.arange(layout.size, device="cpu") // run
    if not sequential_first:
        return box
    first = box == 0
    return torch.where(first, first.cumsum(0) - 1, box - 1 + first.sum())


@register
def regions(layout: Layout, n: int) -> Steps:
    """Parallel regions (PAR): a grid cut into n = sub * sub regions that are generated side by side.

    The first position of every region comes one a step, region by region; then each step predicts n positions, one per
    region, in raster order inside the regions. Decode order inside a step: regions in raster order.

    Args:
        layout: A grid layout.
        n: Number of regions, a square number whose root divides both sides of the grid.

    Raises:
        TokenloomError: If the layout is not a grid, n is not square, or the regions do not tile the grid.
    """
    _require(layout, "regions", ("grid",), "Use Layout.grid(h, w).")
    n = _count("n", n, layout.size)
    sub = math.isqrt(n)
    if sub * sub != n:
        raise TokenloomError(
            f"The number of regions must be a square, got n={n}. Use {sub**2} or {(sub + 1) ** 2}."
        )
    height, width = layout.coords[-1].add(1).tolist()
    if height % sub or width % sub:
        side = math.gcd(height, width)
        fits = ", ".join(str(d * d) for d in range(1, side + 1) if side % d == 0)
        raise TokenloomError(f"{n} regions ({sub} x {sub}) do not tile {layout}. Use n = {fits}.")
    height, width = height // sub, width // sub  # of one region
    row, column = layout.coords.unbind(1)
    region = (row // height) * sub + column // width
    inside = (row % height) * width + column % width
    return torch.where(inside == 0, region, inside + n - 1), region


@register
def flat(layout: Layout) -> Steps:
    """Flat order of codec frames: one code a step, frame by frame, codebook 0 first.

    Raises:
        TokenloomError: If the layout is not a frames layout.
    """
    _require(layout, "flat", ("frames",), "Use Layout.frames(t, codebooks), or raster for other layouts.")
    return torch.arange(layout.size, device="cpu")


@register
def parallel(layout: Layout) -> Steps:
    """Parallel pattern (MusicGen): all codebooks of a frame in one step.

    Raises:
        TokenloomError: If the layout is not a frames layout.
    """
    _require(layout, "parallel", ("frames",), "Use Layout.frames(t, codebooks).")
    return layout.coords[:, 0].clone()


@register
def delay(layout: Layout, delays: tuple[int, ...] | None = None) -> Steps:
    """Delay pattern (MusicGen): codebook k of frame t at step t + k, or t + delays[k]. Inside a step, increasing codebook.

    Args:
        layout: A frames layout.
        delays: Steps by which each codebook is late, at least 0; steps in which nothing would come are left out.

    Raises:
        TokenloomError: If the layout is not a frames layout, or there is not one delay a codebook.
    """
    _require(layout, "delay", ("frames",), "Use Layout.frames(t, codebooks).")
    time, codebook = layout.coords.unbind(1)
    if delays is None:
        return time + codebook, codebook
    if len(delays) != layout.shape[1] or not all(isinstance(d, int) and d >= 0 for d in delays):
        raise TokenloomError(
            f"delays must be {layout.shape[1]} integers of at least 0, one a codebook; got {delays}."
        )
    late = time + torch.tensor(delays, device="cpu")[codebook]
    return late.unique(return_inverse=True)[1], codebook


@register
def coarse_first(layout: Layout, together: bool = False) -> Steps:
    """Coarse-first pattern (AudioLM): codebook 0 of all frames, then codebook 1 of all frames, and so on.

    Args:
        layout: A frames layout.
        together: Whether, after codebook 0, all other codebooks of a frame come in one step (MusicGen's variant).

    Raises:
        TokenloomError: If the layout is not a frames layout.
    """
    _require(layout, "coarse_first", ("frames",), "Use Layout.frames(t, codebooks).")
    time, codebook = layout.coords.unbind(1)
    frames = int(time[-1]) + 1
    return time + frames * (codebook.clamp(max=1) if together else codebook), codebook


@register
def patches(
    layout: Layout,
    frames: int,
    inner: str = "delay",
    delays: tuple[int, ...] | None = None,
    together: bool = False,
) -> Steps:
    """Patches of codec frames (MiMo-Audio), one after the other; inside a patch any order of codec frames.

    Args:
        layout: A frames layout.
        frames: Frames a patch, a divisor of the number of frames.
        inner: "delay", "flat", "parallel" or "coarse_first".
        delays: Option of "delay".
        together: Option of "coarse_first".

    Raises:
        TokenloomError: If the layout is not a frames layout, the patches do not tile it, or `inner` is another order.
    """
    _require(layout, "patches", ("frames",), "Use Layout.frames(t, codebooks).")
    total, books = (int(side) for side in layout.shape)  # type: ignore[arg-type]
    frames = _count("frames", frames, total)
    if total % frames:
        fits = ", ".join(str(d) for d in range(1, total + 1) if total % d == 0)
        raise TokenloomError(f"Patches of {frames} frames do not divide the {total} of {layout}. Use {fits}.")
    options: dict[str, dict[str, object]] = {
        "coarse_first": {"together": together},
        "delay": {"delays": delays},
        "flat": {},
        "parallel": {},
    }
    if inner not in options:
        raise unknown_name("order inside patches", inner, options)
    order = build(inner, Layout.frames(frames, books), **options[inner])
    place = order.inverse.repeat(total // frames)
    patch = torch.arange(layout.size, device="cpu") // (frames * books)
    return patch * order.num_steps + order.step.repeat(total // frames), place


@register
def random(layout: Layout, steps: int, seed: int, schedule: str = "cosine") -> Steps:
    """Random sets of positions (MaskGIT, MAR): a random permutation cut into steps.

    The permutation comes from counter-based noise, so a seed gives the same order on every machine.

    Args:
        layout: Any layout.
        steps: Number of steps, 1 to N.
        seed: int in [0, 2**64).
        schedule: "cosine" (few positions first: after a share r of the steps, cos(pi r / 2) of the positions are left)
            or "equal" (sizes differ by at most one, larger first). Every step has at least one position.

    Raises:
        TokenloomError: For a bad number of steps, seed or schedule.
    """
    count = _count("steps", steps, layout.size)
    sizes = {"cosine": _cosine_sizes, "equal": _equal_sizes}
    if schedule not in sizes:
        raise unknown_name("schedule of the order 'random'", schedule, sizes)
    ranks = noise(seed, torch.arange(layout.size, device="cpu"), _ORDER_NOISE_ID).argsort(stable=True)
    sequence = torch.tensor(sizes[schedule](layout.size, count), device="cpu")
    step = torch.empty_like(ranks)
    step[ranks] = torch.arange(count, device="cpu").repeat_interleave(sequence)
    return step


def _cosine_sizes(size: int, steps: int) -> list[int]:
    """Number of positions of each step of the cosine schedule, each at least 1."""
    left, sizes = size, []
    for step in range(1, steps + 1):
        # The small offset keeps the rounding the same for every math library where the cosine is exactly 1/2 or 0.
        target = math.floor(size * math.cos(math.pi / 2 * step / steps) + 1e-6)
        after = min(max(target, steps - step), left - 1)
        sizes.append(left - after)
        left = after
    return sizes


def _equal_sizes(size: int, steps: int) -> list[int]:
    """Number of positions of each step, differing by at most one."""
    return [size // steps + (step < size % steps) for step in range(steps)]


def _index(layout: Layout, block: tuple[int, ...]) -> Tensor:
    """Raster index of the box of side `block` that holds each position, LongTensor (N,)."""
    if layout.kind == "scales":
        raise TokenloomError(
            f"Boxes {block} do not fit the maps of {layout}. Use an int block, or the order 'scales'."
        )
    shape = [int(length) for length in layout.shape]  # type: ignore[arg-type]
    if len(block) != len(shape):
        raise TokenloomError(f"A block of {layout} has one length for each of {layout.axes}, got {block}.")
    index = torch.zeros_like(layout.coords[:, 0])
    for axis, (length, side) in enumerate(zip(shape, block, strict=True)):
        side = _count("block", side, length)
        if length % side:
            fits = ", ".join(str(d) for d in range(1, length + 1) if length % d == 0)
            raise TokenloomError(
                f"A block side of {side} does not divide the axis {layout.axes[axis]!r} of {layout}. Use {fits}."
            )
        index = index * (length // side) + layout.coords[:, axis] // side
    return index


def _require(layout: Layout, name: str, kinds: tuple[str, ...], fix: str) -> None:
    if layout.kind not in kinds:
        raise TokenloomError(f"The order {name!r} needs a {' or '.join(kinds)} layout, got {layout}. {fix}")


def _count(name: str, value: object, limit: int) -> int:
    """Checks a positive integer option."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise TokenloomError(f"The option {name!r} must be an integer from 1 to {limit}, got {value!r}.")
    return value
