"""Published guidance settings to `Guidance`, under the names the official scripts give them.

Every family counts its scale and its interval in its own way; each rule below says how. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.sampling import Guidance

_SCALES = ("cfg_scale", "cfg", "cfg_ratio")
_OTHER = (
    "ar_token_num diffloss_steps formula global_steps greedy num_iter num_sampling_steps num_steps sample_logits sampler "
    "seed small_iters spe_token_num steps temperature top_k top_p token_number_per_step"
).split()
"""Published settings that do not concern guidance; accepted, so that a whole preset can be passed on."""


def _scale(family: str, settings: Mapping[str, Any]) -> Any:
    given = [name for name in _SCALES if settings.get(name) is not None]
    if len(given) > 1:
        raise TokenloomError(
            f"Guidance of {family!r} got the scale as {' and as '.join(given)}; give it once."
        )
    return settings[given[0]] if given else None


def _number(family: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TokenloomError(f"The guidance scale of {family!r} is a number, got {value!r}.") from None


def _limit(settings: Mapping[str, Any], unit: str) -> dict[str, int]:
    """Where guidance ends; the published value -1 (or nothing) means never.

    Most families count steps from the second one on; NAR counts the tokens that exist.
    """
    interval = settings.get("cfg_interval")
    if interval is None or interval < 0:
        return {}
    return {unit: int(interval) + (2 if unit == "steps" else 0)}


def _above_one(unit: str, opening: bool = False) -> Callable[[str, Mapping[str, Any]], Guidance]:
    """u + s (c - u) where s > 1, else c; `cfg_interval` counts steps or tokens.

    With `opening`, the first step that makes several tokens is guided whatever the interval says.
    """

    def rule(family: str, settings: Mapping[str, Any]) -> Guidance:
        scale = _scale(family, settings)
        number = 1.0 if scale is None else max(1.0, _number(family, scale))
        limit = _limit(settings, unit)
        return Guidance(
            number, tokens=limit.get("tokens"), steps=limit.get("steps"), opening=opening and bool(limit)
        )

    return rule


def _ramp(family: str, settings: Mapping[str, Any]) -> Guidance:
    """ "a,b" is a straight line from a at the first token to b at the last; a = 1 means 1.001, as published."""
    scale = _scale(family, settings)
    if not isinstance(scale, str) or "," not in scale:
        return _above_one("steps")(family, settings)
    ends = scale.split(",")
    if len(ends) != 2:
        raise TokenloomError(f"A guidance ramp is two numbers such as '1.2,8.0', got {scale!r}.")
    start, end = (_number(family, part) for part in ends)
    start += 1e-3 if start == 1 else 0
    return Guidance(end, "linear", start, steps=_limit(settings, "steps").get("steps"))


def _on_top(family: str, settings: Mapping[str, Any]) -> Guidance:
    """(1 + t) c - t u, where t is the ratio, or with `scale_cfg` the ratio times the index of the step."""
    ratio = _scale(family, settings)
    number = 1.0 + (0.0 if ratio is None else _number(family, ratio))
    return Guidance(number, "steps" if settings.get("scale_cfg") else "constant")


def _scales(family: str, settings: Mapping[str, Any]) -> Guidance:
    """(1 + t) c - t u with t = scale * s / (S - 1) at step s: from 1, without guidance, to 1 + scale at the last."""
    scale = _scale(family, settings)
    number = 0.0 if scale is None else _number(family, scale)
    return Guidance(1 + number, "linear", 1.0)


def _scales_or_off(family: str, settings: Mapping[str, Any]) -> Guidance:
    """As `_scales`, but 1 means no guidance."""
    return Guidance() if _scale(family, settings) == 1 else _scales(family, settings)


@dataclass(frozen=True)
class GridScales:
    """A guidance function for generators that make one grid after the other: a line for each, or a constant.

    Attributes:
        scales: The scale that a grid ends with.
        linear: Whether it starts from 1.
    """

    scales: tuple[float, ...]
    linear: bool = True

    def __call__(self, progress: float) -> float:
        """The scale at a progress in [0, 1], of which every grid takes the same share."""
        place = progress * len(self.scales)
        grid = min(int(place), len(self.scales) - 1)
        scale = self.scales[grid]
        return 1 + (scale - 1) * (place - grid) if self.linear else scale


def _grids(*names: str) -> Callable[[str, Mapping[str, Any]], Guidance]:
    """A scale for each grid under its own name, linear in the share of its tokens that are made, or constant."""

    def rule(family: str, settings: Mapping[str, Any]) -> Guidance:
        given = [_scale(family, settings) if name == "cfg" else settings.get(name) for name in names]
        scales = tuple(1.0 if scale is None else _number(family, scale) for scale in given)
        schedule = settings.get("cfg_schedule") or "linear"
        if schedule not in ("linear", "constant"):
            raise unknown_name(f"guidance schedule of {family!r}", schedule, ("linear", "constant"))
        if len(scales) == 1:
            return Guidance(scales[0], "linear" if schedule == "linear" else "constant")
        if set(scales) == {1.0}:
            return Guidance()
        return Guidance(schedule=GridScales(scales, schedule == "linear"))

    return rule


def _cells(family: str, settings: Mapping[str, Any]) -> Guidance:
    """u + s (c - u) with s = 1 + (scale - 1) k / (S - 1) at cell k; below 1 means no guidance."""
    scale = _scale(family, settings)
    number = 1.0 if scale is None else max(1.0, _number(family, scale))
    return Guidance(number, "linear", 1.0)


_RULES: dict[str, Callable[[str, Mapping[str, Any]], Guidance]] = {
    "dar": _ramp,
    "himar": _grids("re_cfg", "cfg"),
    "llamagen": _above_one("steps"),
    "mar": _grids("cfg"),
    "mvar": _scales_or_off,
    "nar": _above_one("tokens"),
    "nar_video": _above_one("tokens"),
    "nbp": _on_top,
    "par": _above_one("steps", opening=True),
    "var": _scales,
    "xar": _cells,
}


def guided_families() -> tuple[str, ...]:
    """Names that `official_guidance` knows."""
    return tuple(sorted(_RULES))


def official_guidance(family: str, **settings: Any) -> Guidance:
    """The `Guidance` that does what the official sampler of a family does.

    Args:
        family: A family of `tokenloom.checkpoints.families()` that has guidance.
        **settings: Published settings: `cfg_scale` (also `cfg`, `cfg_ratio`), `cfg_interval`,
            `scale_cfg`, `cfg_schedule` ("linear" or "constant"), `re_cfg` (the small grid of Hi-MAR); "a,b" is a ramp.
            Sampling settings are accepted and ignored.

    Raises:
        TokenloomError: For an unknown family or setting, or a value that is no number.

    Example:
        >>> official_guidance("llamagen", cfg_scale=2.0, cfg_interval=4).steps
        6
    """
    if family not in _RULES:
        raise unknown_name("family with published guidance", family, _RULES)
    known = (*_SCALES, "cfg_interval", "cfg_schedule", "re_cfg", "scale_cfg", *_OTHER)
    for name in settings:
        if name not in known:
            raise unknown_name(f"guidance setting of {family!r}", name, known)
    return _RULES[family](family, settings)
