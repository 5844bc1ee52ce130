"""Vector drawings of things, from npm packages of named versions whose digests are checked.

The drawings are fetched by the training recipe alone. Neither the repository nor the wheel contains them; NOTICE names
their sources and licences.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky22.errors import CheckpointError
from kandinsky22.training.drawings.vocabulary import DRAWINGS, STYLE_PACKS


@dataclass(frozen=True)
class Package:
    """A version of an npm package.

    Attributes:
        version: Its version.
        sha256: Digest of its archive.
        licence: SPDX identifier of its licence.
    """

    version: str
    sha256: str
    licence: str


PACKAGES = {
    "@iconify-json/fluent-emoji-flat": Package(
        "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"
    ),
    "@iconify-json/fluent-emoji": Package(
        "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT"
    ),
    "@iconify-json/noto": Package(
        "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"
    ),
    "@iconify-json/twemoji": Package(
        "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"
    ),
}


def fetch(folder: Path) -> None:
    """Download the archives of all packages that are missing, by `npm pack`, and check their digests.

    Args:
        folder: Folder of the archives.

    Raises:
        CheckpointError: If npm is missing or fails, or an archive has another digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        path = _archive(folder, name)
        if not path.is_file():
            command = ["npm", "pack", f"{name}@{package.version}", "--pack-destination", str(folder)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or error
                raise CheckpointError(f"{name} cannot be downloaded by npm: {reason}") from error
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise CheckpointError(f"{path} has the SHA-256 digest {digest}, expected {package.sha256}")


def read_drawings(folder: Path) -> dict[str, dict[str, str]]:
    """Return the SVG document of each thing in each style.

    Args:
        folder: Folder of the archives that `fetch` has downloaded.

    Returns:
        Documents by thing, by style.
    """
    drawings = {}
    for style, name in STYLE_PACKS.items():
        with tarfile.open(_archive(folder, name)) as archive:
            file = archive.extractfile("package/icons.json")
            assert file is not None
            icons = json.load(file)
        drawings[style] = {thing: _svg(icons, drawing) for thing, drawing in DRAWINGS.items()}
    return drawings


def _archive(folder: Path, name: str) -> Path:
    return folder / f"{name.lstrip('@').replace('/', '-')}-{PACKAGES[name].version}.tgz"


def _svg(icons: Mapping[str, Any], name: str) -> str:
    """Return the document of an icon in iconify's format: a body, and a view box with defaults for all icons."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
