"""The one exception type of the toolkit, and the helper that suggests close names.

Knows nothing of tensors or media: it only builds messages that say what was expected, what came, and how to fix it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


class TokenloomError(ValueError):
    """Raised for every mistake a user can make and repair.

    The message states what was expected, what came, and how to fix it.
    """


def unknown_name(kind: str, name: object, options: Iterable[str], hint: str = "") -> TokenloomError:
    """Builds the error for a name that is not in a list of known names.

    Args:
        kind: What the name names, in words ("order", "configuration key").
        name: What the user wrote.
        options: Every valid name.
        hint: One more sentence on how to fix it.

    Returns:
        A `TokenloomError` that lists the closest matches, or all options if none is close.
    """
    known = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if close:
        advice = "Did you mean " + " or ".join(repr(match) for match in close) + "?"
    else:
        advice = f"Known: {', '.join(known) if known else 'none'}."
    return TokenloomError(f"Unknown {kind} {name!r}. {advice}{' ' + hint if hint else ''}")


def check_options(target: Callable[..., Any], options: Iterable[str], kind: str) -> None:
    """Raises a clear error unless `target(**options)` would find every name it needs and no other.

    Args:
        target: A function or class with named parameters.
        options: Names that shall be passed by keyword.
        kind: What such a name is, in words ("option of the vq quantizer").

    Raises:
        TokenloomError: For an unknown name, with the closest matches, or a missing one.
    """
    parameters = inspect.signature(target).parameters
    names = list(options)
    for name in names:
        if name not in parameters:
            raise unknown_name(kind, name, parameters)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in names
    ]
    if missing:
        raise TokenloomError(f"Missing {kind}: {', '.join(missing)}.")
