"""Published guidance settings to `Guidance`, under the names the official scripts give them.

Every family counts its scale and its interval in its own way; each rule below says how. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.sampling import Guidance

_SCALES = ("cfg_scale", "cfg", "cfg_ratio")
_OTHER = "ar_token_num formula greedy sample_logits seed spe_token_num steps temperature top_k top_p token_number_per_step".split()
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


def _limit(settings: Mapping[str, Any], offset: int) -> int | None:
    """Tokens up to which guidance is on; the published value -1 (or nothing) means no limit."""
    interval = settings.get("cfg_interval")
    return None if interval is None or interval < 0 else int(interval) + offset


def _above_one(offset: int) -> Callable[[str, Mapping[str, Any]], Guidance]:
    """u + s (c - u) where s > 1, else c; on while at most `cfg_interval + offset` tokens exist."""

    def rule(family: str, settings: Mapping[str, Any]) -> Guidance:
        scale = _scale(family, settings)
        number = 1.0 if scale is None else max(1.0, _number(family, scale))
        return Guidance(number, tokens=_limit(settings, offset))

    return rule


def _ramp(family: str, settings: Mapping[str, Any]) -> Guidance:
    """ "a,b" is a straight line from a at the first token to b at the last; a = 1 means 1.001, as published."""
    scale, limit = _scale(family, settings), _limit(settings, 1)
    if not isinstance(scale, str) or "," not in scale:
        return _above_one(1)(family, settings)
    ends = scale.split(",")
    if len(ends) != 2:
        raise TokenloomError(f"A guidance ramp is two numbers such as '1.2,8.0', got {scale!r}.")
    start, end = (_number(family, part) for part in ends)
    return Guidance(end, "linear", start + 1e-3 if start == 1 else start, tokens=limit)


def _scales(family: str, settings: Mapping[str, Any]) -> Guidance:
    """(1 + t) c - t u with t = scale * s / (S - 1) at step s: from 1, without guidance, to 1 + scale at the last."""
    scale = _scale(family, settings)
    number = 0.0 if scale is None else _number(family, scale)
    return Guidance(1 + number, "linear", 1.0)


def _scales_or_off(family: str, settings: Mapping[str, Any]) -> Guidance:
    """As `_scales`, but 1 means no guidance."""
    return Guidance() if _scale(family, settings) == 1 else _scales(family, settings)


_RULES: dict[str, Callable[[str, Mapping[str, Any]], Guidance]] = {
    "dar": _ramp,
    "llamagen": _above_one(1),  # the interval counts from the second token
    "mvar": _scales_or_off,
    "nar": _above_one(0),
    "nar_video": _above_one(0),
    "var": _scales,
}


def official_guidance(family: str, **settings: Any) -> Guidance:
    """The `Guidance` that does what the official sampler of a family does.

    Args:
        family: A family of `tokenloom.checkpoints.families()` that has guidance.
        **settings: Published settings: `cfg_scale` (also `cfg`, `cfg_ratio`), `cfg_interval`; "a,b" is a ramp.
            Sampling settings are accepted and ignored.

    Raises:
        TokenloomError: For an unknown family or setting, or a value that is no number.

    Example:
        >>> official_guidance("llamagen", cfg_scale=2.0, cfg_interval=4).tokens
        5
    """
    if family not in _RULES:
        raise unknown_name("family with published guidance", family, _RULES)
    known = (*_SCALES, "cfg_interval", *_OTHER)
    for name in settings:
        if name not in known:
            raise unknown_name(f"guidance setting of {family!r}", name, known)
    return _RULES[family](family, settings)
