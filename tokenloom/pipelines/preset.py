"""What pipelines with prompts share: sampling presets, and prompts turned into word ids with warnings.

Knows words, guidance and sampling rules. Knows nothing of media or generators.

Shapes: T words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenloom.errors import TokenloomError, unknown_name
from tokenloom.generators.sampling import Guidance, Sampling, Schedule
from tokenloom.tokenizers.text import WordTokenizer, split_words

_GUIDANCE_KEYS = {
    "guidance_scale": "scale",
    "guidance_schedule": "schedule",
    "guidance_start": "start",
    "guidance_interval": "interval",
}
_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "nucleus")


def check_preset(preset: Mapping[str, Any] | None) -> dict[str, Any]:
    """The preset as a dictionary.

    Raises:
        TokenloomError: For an unknown key, with the closest match.
    """
    for key in preset or {}:
        if key not in _GUIDANCE_KEYS and key not in _SAMPLING_KEYS:
            raise unknown_name("sampling setting", key, [*_GUIDANCE_KEYS, *_SAMPLING_KEYS])
    return dict(preset or {})


def merge_settings(
    preset: Mapping[str, Any],
    guidance_scale: float | None = None,
    guidance: Guidance | Schedule | None = None,
    **sampling: Any,
) -> tuple[Guidance, Sampling]:
    """The arguments of a call over the preset of a model.

    Args:
        preset: As `check_preset` gives it.
        guidance_scale: Replaces the scale of the preset; 1 is no guidance at all.
        guidance: Replaces the whole guidance of the preset.
        sampling: temperature, top_k, top_p; `None` leaves the preset.

    Raises:
        TokenloomError: If both ways of guidance are given.
    """
    options = {key: preset[key] for key in _SAMPLING_KEYS if key in preset}
    options.update({key: value for key, value in sampling.items() if value is not None})
    sampler = Sampling(**options)
    if guidance is not None:
        if guidance_scale is not None:
            raise TokenloomError(
                "Expected either guidance_scale or guidance, got both. Leave one of them out."
            )
        return Guidance.of(guidance), sampler
    rule = {name: preset[key] for key, name in _GUIDANCE_KEYS.items() if key in preset}
    if "interval" in rule:
        rule["interval"] = tuple(rule["interval"])
    if guidance_scale is not None:
        rule["scale"] = guidance_scale
    off = guidance_scale == 1  # also where the preset ramps up from another scale
    return Guidance() if off else Guidance(**rule), sampler


def read_prompts(words: WordTokenizer, prompts: list[str], logger: logging.Logger, what: str) -> Tensor:
    """Word ids, LongTensor (len(prompts), T); warns of words that the model cannot read.

    Args:
        words: The model's words.
        prompts: The prompts.
        logger: Receives the warnings.
        what: What may come of a prompt without words, "picture" or "clip".
    """
    for text in prompts:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        unknown = words.unknown(text)
        if unknown:
            listed = ", ".join(repr(word[:40]) for word in unknown[:8])
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            logger.warning("The model does not know %s%s in the prompt %r.", listed, more, shown)
        length, limit = len(split_words(text)), words.max_length
        if length > limit:
            logger.warning("The prompt %r has %d words; the model reads the first %d.", shown, length, limit)
        elif length == 0:
            logger.warning("The prompt %r has no word that the model reads; any %s may come.", shown, what)
    return words(prompts)
