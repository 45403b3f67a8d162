"""Names of a package that are imported from their modules on first use (PEP 562).

Keeps `import tokenloom.x` cheap. Knows nothing of what the names are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: `__name__` of the package.
        homes: Public name -> module of the package that defines it.

    Returns:
        The three, to be bound to these names in the package.

    Example:
        >>> __getattr__, __dir__, __all__ = lazy_exports("tokenloom.generators", {"Order": "orders"})
        >>> __getattr__("Order").__name__
        'Order'
    """

    def getter(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return getter, names, sorted(homes)
