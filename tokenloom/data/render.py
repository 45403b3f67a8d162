"""Draws icons of an Iconify icon set as pictures.

Knows the Iconify JSON format (bodies, aliases, flips, turns) and the optional renderer resvg-py. Knows
nothing of emoji, captions or packages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.media import to_rgb

_MAX_ALIASES = 8
_SUPERSAMPLING = 2
_DEFAULT_SIDE = 16  # Iconify's own default where a set states no size
_BOX = ("left", "top", "width", "height")


def require_renderer() -> Any:
    """Returns the module resvg_py.

    Raises:
        TokenloomError: If it is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise TokenloomError(
            "Drawing SVG pictures needs the package resvg-py, which is not installed. "
            "Run: pip install tokenloom[data]"
        ) from error
    return resvg_py


def icon_names(icons: Mapping[str, Any]) -> set[str]:
    """Returns every name an icon set can draw, aliases included."""
    return {*icons.get("icons", {}), *icons.get("aliases", {})}


def icon_svg(icons: Mapping[str, Any], name: str) -> str:
    """Returns an icon as a complete square SVG document.

    Args:
        icons: The parsed icons.json of an Iconify set.
        name: An icon or alias. Flips and quarter turns add up along a chain of aliases.

    Returns:
        SVG text with a square viewBox; an oblong icon stands in its middle.

    Raises:
        TokenloomError: If the name is unknown, its aliases form a ring, or the icon has no body.
    """
    icon, flip_x, flip_y, turns = _resolve(icons, name)
    body = icon.get("body")
    if not isinstance(body, str):
        raise TokenloomError(
            f"The icon {name!r} of the set {icons.get('prefix')!r} has no body; expected SVG text."
        )
    left, top, width, height = (
        float(icon.get(key, icons.get(key, 0 if key in ("left", "top") else _DEFAULT_SIDE))) for key in _BOX
    )
    side = max(width, height)
    middle_x, middle_y = left + width / 2, top + height / 2
    if flip_x or flip_y or turns:
        sx, sy = -1 if flip_x else 1, -1 if flip_y else 1
        # Flip first, then turn, both about the middle of the box.
        move = (
            f"translate({middle_x:g} {middle_y:g}) rotate({90 * turns}) scale({sx} {sy}) "
            f"translate({-middle_x:g} {-middle_y:g})"
        )
        body = f'<g transform="{move}">{body}</g>'
    box = f"{middle_x - side / 2:g} {middle_y - side / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{body}</svg>'
    )


def render_svg(svg: str, size: int, transparent: bool = False) -> Image.Image:
    """Draws an SVG document, by default on white.

    Args:
        svg: SVG text with a square viewBox.
        size: Side of the picture in pixels. It is drawn twice as large and reduced, which keeps thin lines
            even.
        transparent: Keep the background transparent.

    Returns:
        An RGB picture of `size` x `size`, RGBA if it is transparent.

    Raises:
        TokenloomError: If resvg-py is missing or cannot read the text.
    """
    renderer = require_renderer()
    side = size * _SUPERSAMPLING
    try:
        data = renderer.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    except ValueError as error:
        raise TokenloomError(
            f"The renderer refused an SVG picture ({error}). It begins: {svg[:120]!r}"
        ) from error
    with Image.open(io.BytesIO(bytes(data))) as drawn:
        picture = drawn.convert("RGBA") if transparent else to_rgb(drawn)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _resolve(icons: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], bool, bool, int]:
    """Follows aliases to an icon.

    Returns:
        The icon (with the alias's own box, if it has one), whether to flip left-right and top-bottom, and
        quarter turns 0-3.
    """
    flip_x, flip_y, turns = False, False, 0
    box: dict[str, Any] = {}
    current = name
    for _ in range(_MAX_ALIASES):
        icon = icons.get("icons", {}).get(current)
        entry = icons.get("aliases", {}).get(current) if icon is None else icon
        if entry is None:
            raise unknown_name(f"icon of the set {icons.get('prefix')!r}", current, icon_names(icons))
        flip_x ^= bool(entry.get("hFlip"))
        flip_y ^= bool(entry.get("vFlip"))
        turns += int(entry.get("rotate", 0))
        box = {**{key: entry[key] for key in _BOX if key in entry}, **box}
        if icon is not None:
            return {**icon, **box}, flip_x, flip_y, turns % 4
        current = entry["parent"]
    raise TokenloomError(
        f"The aliases of icon {name!r} of the set {icons.get('prefix')!r} form a ring; expected an icon."
    )
