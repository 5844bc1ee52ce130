"""Request: the settings of one command, from its options, its preset, and the recipe that it repeats."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.option_values import MixtureOption
from kandinsky22.cli.settings import FROM_SETTINGS
from kandinsky22.errors import InputError, invalid
from kandinsky22.generation.adapters import (
    FoundAdapter,
    adapter_fields,
    distilled_record,
    find_adapter,
    find_distilled_adapter,
    find_recorded_adapter,
    split_weight,
)
from kandinsky22.generation.engine_names import TORCH
from kandinsky22.generation.image_files import PNG, find_format
from kandinsky22.generation.input_images import SUBJECT, check_text
from kandinsky22.generation.limits import DEFAULT_SUBJECT_WEIGHT, MAX_SIDE, MAX_TORCH_SEED
from kandinsky22.generation.recipe import InputFile, MixtureItem, Recipe
from kandinsky22.generation.request import Request, preset_settings
from kandinsky22.generation.tiny_decoders import NO_TINY_DECODER, find_recorded_tiny_decoder, find_tiny_decoder
from kandinsky22.sampling.presets import find_preset

IMAGE_OPTIONS = ("image", "mask", "hint")
NO_ADAPTER = "none"  # value of --lora that leaves out the recipe's adapters
TEXT_OPTIONS = ("prompt", "negative_prompt")


def read_request(
    args: argparse.Namespace, recipe: Recipe | None, inputs: CommandInputs, *, size_option: str | None = None
) -> Request:
    """Return the settings of a command line. Options override the preset, and the preset overrides the recipe.

    Args:
        args: Parsed command line.
        recipe: Recipe to repeat, or None.
        inputs: Collection that receives the opened input images.
        size_option: Name of the image option that determines the size of the result; None if there is none.

    Raises:
        InputError: If an input file is not a readable image, a text cannot be encoded, or only some items of a mixture
            have weights.
        OSError: If an input file cannot be opened.
    """
    preset_values = _preset_values(args, recipe)
    texts = _texts(args, inputs)
    from_settings: frozenset[str] = getattr(args, FROM_SETTINGS, frozenset())
    # A preset of the command line comes before options of the settings file. A guidance scale that belongs to a preset
    # comes before that of the file wherever the preset is from.
    of_preset = preset_values.keys() if "quality" not in from_settings else preset_values.keys() & {"guidance"}
    overridden = from_settings & of_preset

    def resolve(name: str) -> Any:
        option = texts.get(name, getattr(args, name, None))
        if option is not None and name not in overridden:
            return option
        if name in preset_values:
            return preset_values[name]
        return None if recipe is None else getattr(recipe, name)

    derived: dict[str, Any] = {"seeds": _seeds(args, recipe), "parts": _mixture(args, recipe, inputs)}
    derived["subject"] = _subject(args, recipe, inputs)
    derived |= {name: _open_image(name, resolve(name), inputs) for name in IMAGE_OPTIONS}
    # The recipe's size fits the recipe's image: another image gets a size of its own.
    uses_recipe_size = recipe is not None and (size_option is None or getattr(args, size_option) is None)
    recipe_size = (recipe.width, recipe.height) if recipe is not None and uses_recipe_size else (None, None)
    derived["width"], derived["height"] = args.size or recipe_size
    # The recipe's prior belongs to the recipe's model.
    derived["prior"] = resolve("prior") if args.model is None else args.prior
    model = resolve("model")
    derived["model"] = EMBEDDED if model is None else model
    derived["model_location"] = model_location(derived["model"], args.source if args.model is None else None)
    prior_source = args.source if args.prior is None else None
    distilled = _distilled(args, recipe, model=derived["model"], location=derived["model_location"])
    is_new = args.model is not None or getattr(args, "quality", None) is not None
    if distilled is not None and distilled.steps is not None and is_new:
        preset_values["steps"] = distilled.steps
    derived |= _adapters(args, recipe, inputs, distilled)
    derived |= _tiny_decoder(args, recipe, inputs)
    derived["prior_location"] = derived["prior"] and model_location(derived["prior"], prior_source)
    direct = {field.name: resolve(field.name) for field in dataclasses.fields(Request) if field.name not in derived}
    for name in TEXT_OPTIONS:
        direct[name] = None if direct[name] is None else check_text(name, direct[name])
    # Values without effect are left out of recipes.
    direct["prompt_weights"] = direct["prompt_weights"] or None
    direct["crop"] = None if direct["crop"] is False else direct["crop"]
    direct["extend"] = _margins(direct["extend"])
    direct["quantize"] = None if direct["quantize"] == "none" else direct["quantize"]
    direct["engine"] = None if direct["engine"] == TORCH else direct["engine"]
    direct["cache_every"] = None if direct["cache_every"] == 1 else direct["cache_every"]
    direct["device"] = "auto" if direct["device"] is None else direct["device"]
    return Request(**derived, **direct)


def model_location(name: str, recipe_source: Path | None) -> str:
    """Return the folder or Hub id that a model's name stands for.

    Args:
        name: Name of the model on the command line or in a recipe.
        recipe_source: Image file whose recipe contains the name; None for names on the command line. A relative path
            that does not exist in the current folder is searched next to this file.
    """
    if recipe_source is None or name == EMBEDDED or _is_folder(Path(name)):
        return name
    candidate = recipe_source.parent / name
    return str(candidate) if _is_folder(candidate) else name


def _distilled(args: argparse.Namespace, recipe: Recipe | None, *, model: str, location: str) -> FoundAdapter | None:
    """Return the distilled adapter of the model if the preset, else the recipe, has it.

    A server has the adapters of its own models.
    """
    quality = getattr(args, "quality", None)
    record = None if recipe is None else distilled_record(recipe.lora, recipe.model)
    is_distilled = record is not None if quality is None else find_preset(quality).distilled
    if not is_distilled or getattr(args, "server", None) is not None:
        return None
    if record is not None and quality is None and args.model is None:
        return find_recorded_adapter(record, args.source)
    return find_distilled_adapter(model, location)


def _adapters(
    args: argparse.Namespace, recipe: Recipe | None, inputs: CommandInputs, distilled: FoundAdapter | None
) -> dict[str, Any]:
    """Return the adapters and where they are: those of the command line, else those of the recipe; `none` has none.

    The distilled adapter of the model comes first.
    """
    recorded = [] if recipe is None else list(recipe.lora or ())
    record = None if recipe is None else distilled_record(recorded, recipe.model)
    found = [] if distilled is None else [distilled]
    if args.lora is not None:
        texts = [text for text in args.lora if text != NO_ADAPTER]
        if texts and len(texts) < len(args.lora):
            raise invalid("lora", args.lora, f"{NO_ADAPTER!r} alone, or adapters")
        found += [find_adapter(*split_weight(check_text("lora", text))) for text in texts]
    else:
        found += [find_recorded_adapter(other, args.source) for other in recorded if other is not record]
    inputs.paths += [path for adapter in found for path in adapter.paths]
    inputs.changes += [adapter.change for adapter in found if adapter.change is not None]
    return adapter_fields(found)


def _tiny_decoder(args: argparse.Namespace, recipe: Recipe | None, inputs: CommandInputs) -> dict[str, Any]:
    """Return the tiny decoder of the command line, else that of the recipe, and where it is; `none` has none."""
    name, recorded = args.tiny_decoder, None if recipe is None else recipe.tiny_decoder
    if name == NO_TINY_DECODER or (name is None and recorded is None):
        return {"tiny_decoder": None, "tiny_decoder_location": None}
    if name is not None:
        found = find_tiny_decoder(check_text("tiny_decoder", name))
    else:
        assert recorded is not None
        found = find_recorded_tiny_decoder(recorded, args.source)
    inputs.paths += found.paths
    inputs.changes += [] if found.change is None else [found.change]
    return {"tiny_decoder": found.record, "tiny_decoder_location": found.location}


def _margins(margins: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return margins of the command line or of a recipe; None if all are 0."""
    if margins is not None and (len(margins) != 4 or not all(0 <= margin <= MAX_SIDE for margin in margins)):
        raise invalid("extend", margins, f"four integers from 0 to {MAX_SIDE}")
    return margins if any(margins or ()) else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def output_path(args: argparse.Namespace) -> Path:
    """Return the output file: `--output`, else NAME-again.png next to the repeated image, else picture.png.

    Args:
        args: Parsed command line. The repeated image's format is also that of the new one.
    """
    if args.output is not None:
        return Path(args.output)
    if args.source is None or not args.source.name:  # a folder without a name, such as "/", has no recipe
        return Path("picture.png")
    extension = PNG.extensions[0] if find_format(args.source) is None else args.source.suffix
    return Path(args.source.with_name(f"{args.source.stem}-again{extension}"))


def _texts(args: argparse.Namespace, inputs: CommandInputs) -> dict[str, str]:
    """Return the texts of the command line by option, read from standard input and files where it says so."""
    values = {name: getattr(args, name, None) for name in TEXT_OPTIONS}
    return {name: inputs.read_text(name, value) for name, value in values.items() if value is not None}


def _preset_values(args: argparse.Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Return the settings of `--quality`.

    Scheduler settings belong to one scheduler class, so an explicit `--scheduler` resets them. The guidance scale of a
    recipe with the distilled adapter belongs to that adapter.
    """
    name = getattr(args, "quality", None)
    values = {} if name is None else preset_settings(name)
    if name is not None and recipe is not None and distilled_record(recipe.lora, recipe.model) is not None:
        values.setdefault("guidance", None)
    for option in ("scheduler", "prior_scheduler"):
        if getattr(args, option, None) is not None:
            values[f"{option}_settings"] = None
    return values


def _seeds(args: argparse.Namespace, recipe: Recipe | None) -> tuple[int, ...]:
    if recipe is not None and args.seed is None and args.count is None:
        return recipe.seeds
    if args.seed is not None and len(args.seed) > 1:
        return tuple(args.seed)
    if args.seed is not None:
        (first,) = args.seed
    else:
        first = recipe.seeds[0] if recipe is not None else secrets.randbelow(2**32)
    count = args.count or (len(recipe.seeds) if recipe is not None else 1)
    if first + count - 1 > MAX_TORCH_SEED:
        expected = f"at most {MAX_TORCH_SEED - count + 1} for {count} images, whose seeds are consecutive"
        raise invalid("seed", first, expected, "pass another --seed")
    return tuple(range(first, first + count))


def _open_image(name: str, source: Path | InputFile | None, inputs: CommandInputs) -> InputFile | None:
    if isinstance(source, InputFile):
        return inputs.open_recorded(name, source)
    return None if source is None else inputs.open(name, source)


def _mixture(args: argparse.Namespace, recipe: Recipe | None, inputs: CommandInputs) -> tuple[MixtureItem, ...] | None:
    """Return the items of `mix`; without weights, all items have the same weight."""
    options: Sequence[MixtureOption] | None = getattr(args, "parts", None)
    if options is None:
        recorded = None if recipe is None else recipe.parts
        return recorded and tuple(_open_recorded_item(item, inputs) for item in recorded)
    unweighted = [option.weight is None for option in options]
    if any(unweighted) and not all(unweighted):
        raise InputError("only some of the mixed items have a weight; give a weight to each of them or to none")
    return tuple(
        MixtureItem(
            weight=1 / len(options) if option.weight is None else option.weight,
            text=None if option.text is None else check_text("text", inputs.read_text("text", option.text)),
            image=_open_image("image", option.image, inputs),
            subject=_open_image(SUBJECT, option.subject, inputs),
        )
        for option in options
    )


def _open_recorded_item(item: MixtureItem, inputs: CommandInputs) -> MixtureItem:
    """Return an item of a recipe with its file as it is now."""
    return dataclasses.replace(
        item, image=_open_image("image", item.image, inputs), subject=_open_image(SUBJECT, item.subject, inputs)
    )


def _subject(args: argparse.Namespace, recipe: Recipe | None, inputs: CommandInputs) -> MixtureItem | None:
    """Return the learned subject of `generate`."""
    text = getattr(args, SUBJECT, None)
    if text is None:
        recorded = None if recipe is None else recipe.subject
        return recorded and _open_recorded_item(recorded, inputs)
    name, weight = split_weight(check_text(SUBJECT, text))
    weight = DEFAULT_SUBJECT_WEIGHT if name == text else weight
    if not name or not 0 <= weight <= 1:
        raise invalid(SUBJECT, text, "a file, or FILE:WEIGHT with a weight from 0 to 1")
    return MixtureItem(weight, subject=_open_image(SUBJECT, Path(name), inputs))
