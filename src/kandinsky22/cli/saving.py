"""Saving of finished images with their recipes, and the line that reports each of them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.cli.console import print_path
from kandinsky22.cli.output_files import OutputFiles, OutputName
from kandinsky22.generation.image_files import (
    RECIPE_KEYWORD,
    ImageFormat,
    check_image,
    contact_sheet_size,
    encode_image,
)
from kandinsky22.generation.recipe import Recipe
from kandinsky22.generation.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class ImageSaver:
    """Writer of images with their recipes.

    Attributes:
        files: The output files.
        format: Format of the files.
        with_recipes: Whether recipes are written into the files.
        as_json: Whether a line of JSON is printed for each file instead of its path.
    """

    files: OutputFiles
    format: ImageFormat
    with_recipes: bool
    as_json: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, files: OutputFiles, format: ImageFormat) -> ImageSaver:
        """Return the writer for a command line.

        Args:
            args: Parsed command line.
            files: The output files.
            format: Format of the files.
        """
        return cls(files, format, with_recipes=args.recipe, as_json=args.json)

    def check(self, recipe: Recipe, request: Request) -> None:
        """Raise an error, before any network runs, if the format cannot hold the images or their recipes.

        Args:
            recipe: Recipe of the command.
            request: Settings of the command.

        Raises:
            InputError: If the format has a limit that the images exceed.
        """
        size = (request.width or 1, request.height or 1)
        count = len(request.seeds)
        sheet = dataclasses.replace(recipe, seeds=request.seeds)
        check_image(
            self.format,
            contact_sheet_size(size, count) if count > 1 else size,
            sheet.texts() if self.with_recipes else {},
        )

    def save(self, image: Image, name: OutputName, texts: Mapping[str, str]) -> Path | None:
        """Write an image and print its path, or a line of JSON.

        Args:
            image: The image.
            name: Name of the file.
            texts: The recipe and other texts, written into the file unless recipes are not wanted.

        Returns:
            Path of the file, or None for standard output.

        Raises:
            InputError: If the file cannot be written.
        """
        content = encode_image(image, self.format, texts if self.with_recipes else {})
        path = self.files.write(name, content)
        if path is not None and self.as_json:
            print_json_line(path, content, image.size, texts)
        elif path is not None:
            print_path(path)
        return path


def print_json_line(
    path: Path, content: bytes, size: tuple[int, int] | None = None, texts: Mapping[str, str] | None = None
) -> None:
    """Print a finished file as a line of JSON: path, sha256, and for images seed, width, height and recipe.

    Args:
        path: Path of the file.
        content: Its content.
        size: Width and height of an image; None for other files.
        texts: Texts of an image, with or without a recipe; None for other files.
    """
    entry: dict[str, Any] = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest()}
    if size is not None:
        recipe = json.loads((texts or {}).get(RECIPE_KEYWORD, "null"))
        seeds = recipe["seeds"] if recipe else []
        # A contact sheet has several seeds.
        entry |= {"seed": seeds[0] if len(seeds) == 1 else None, "width": size[0], "height": size[1], "recipe": recipe}
    print(json.dumps(entry), flush=True)  # ASCII: nothing in a prompt or a name controls the terminal
