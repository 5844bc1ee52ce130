"""Other packages: the oldest versions that work, and optional ones, which are imported where they are used.

Older versions fail in the middle of a call, with other messages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

from kandinsky22.errors import MissingDependencyError

# As in pyproject.toml, which a test compares.
OLDEST_VERSIONS = {
    "torch": "2.4",  # torch.compiler.is_compiling, torch.is_autocast_enabled with a device
    "tokenizers": "0.19",
    "safetensors": "0.4.2",
    "huggingface_hub": "0.25",  # huggingface_hub.errors has the errors of repositories
    "numpy": "1.24",
    "pillow": "10.1",
}


def check_versions() -> None:
    """Check that installed packages are new enough. Packages that are not installed are reported where they are used.

    Raises:
        MissingDependencyError: If one is older. The message names the oldest version that works.
    """
    for name, oldest in OLDEST_VERSIONS.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(oldest):
            raise MissingDependencyError(
                f"kandinsky22 needs {name} {oldest} or newer, and {installed} is installed: "
                f"pip install --upgrade '{name}>={oldest}'"
            )


def require(module: str, feature: str, install: str | None = None) -> Any:
    """Import a module of an optional package.

    Args:
        module: Name of the module.
        feature: What needs it, for the message.
        install: What pip installs, such as "kandinsky22[train]"; None for a package of the module's name.

    Returns:
        The module.

    Raises:
        MissingDependencyError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = install or module
        name, argument = (module, f"'{wanted}'") if "[" in wanted else (wanted, wanted)
        raise MissingDependencyError(f"{feature} needs the package {name}: pip install {argument}") from error


def _numbers(version: str) -> list[int]:
    """Return the numbers of a release such as 2.4.0+cpu or 2.5.0rc1."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else [0]
