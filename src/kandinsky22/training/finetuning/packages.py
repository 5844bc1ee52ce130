"""Optional packages of training, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from kandinsky22.errors import MissingDependencyError


def require(module: str, feature: str, package: str | None = None) -> Any:
    """Import a module.

    Args:
        module: Name of the module.
        feature: What needs it, for the message.
        package: Name of the package that has the module; None for the same name.

    Returns:
        The module.

    Raises:
        MissingDependencyError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module
        raise MissingDependencyError(f"{feature} needs the package {name}: pip install {name}") from error
