"""`kandinsky22 config`: show the settings in effect, print where the settings file is, and change it."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from kandinsky22.cli.settings import (
    FALSE,
    IGNORES_SETTINGS,
    TRUE,
    Setting,
    check_keys,
    find_settings,
    leaf_parsers,
    options_of,
)
from kandinsky22.cli.settings_file import read_settings, settings_path, toml_value, write_setting
from kandinsky22.errors import InputError, describe, printable

HIDDEN_KEYS = ("token", "hub-token")  # not shown: terminals are recorded and shared


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], build: Callable[[], argparse.ArgumentParser]
) -> None:
    """Add the subcommand `config`.

    Args:
        subparsers: Subcommands of the command's parser.
        build: Function that returns the parser of the whole command line.
    """
    parser = subparsers.add_parser(
        "config",
        help="show and change the defaults of options",
        description="Show and change the defaults of options. A value is looked up on the command line, in variables\n"
        "KANDINSKY22_*, in the settings file, and in the program, in this order.",
        epilog="examples:\n  kandinsky22 config set generate.steps 25\n  kandinsky22 config set device cuda\n"
        "  kandinsky22 config show",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = functools.partial(_add_action, actions, build)
    show = add("show", "print all settings in effect and where they come from", _show)
    show.add_argument("--json", action="store_true", help="print one JSON object per line")
    add("path", "print the path of the settings file", _path)
    change = add("set", "set the default of an option in the settings file", _set)
    change.add_argument("key", metavar="[COMMAND.]OPTION", help="such as generate.steps, or device for all subcommands")
    change.add_argument(
        "value", nargs="+", metavar="VALUE", help="value as on the command line; true or false for flags"
    )
    remove = add("unset", "remove a value from the settings file", _unset)
    remove.add_argument("key", metavar="[COMMAND.]OPTION", help="as for set")


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    build: Callable[[], argparse.ArgumentParser],
    name: str,
    help: str,
    run: Callable[[argparse.Namespace, argparse.ArgumentParser], None],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
    # A damaged settings file must not keep anybody from mending it.
    parser.set_defaults(run=lambda args: run(args, build()), needs_no_torch=True, **{IGNORES_SETTINGS: True})
    return parser


def _show(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for path, leaf in leaf_parsers(parser):
        if leaf.get_default(IGNORES_SETTINGS):
            continue
        for key, setting in find_settings(parser, path).items():
            setting.store(leaf, argparse.Namespace())
            value = "(hidden)" if key in HIDDEN_KEYS else setting.value
            name = ".".join([*path, key])
            if args.json:
                print(json.dumps({"option": name, "value": value, "origin": setting.origin}, default=str))
            else:
                print(printable(f"{name} = {toml_value(value)}  ({setting.origin})"))


def _path(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    print(printable(str(settings_path())))


def _set(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    section, key, options = _find_options(parser, args.key)
    file = settings_path()
    value = _typed_value(args.value, options[0][1])
    for leaf, action in options:
        Setting(key, action, value, "config set").store(leaf, argparse.Namespace())
    write_setting(file, section, key, value)
    check_keys(parser, read_settings(file), file)


def _unset(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    *section, key = args.key.split(".")
    write_setting(settings_path(), section, key.replace("_", "-"), None)


def _find_options(
    parser: argparse.ArgumentParser, name: str
) -> tuple[list[str], str, list[tuple[argparse.ArgumentParser, argparse.Action]]]:
    """Return the table of a setting, its key, and the options that it concerns."""
    *section, key = name.split(".")
    key = key.replace("_", "-")
    options = [
        (leaf, options_of(leaf)[key])
        for path, leaf in leaf_parsers(parser)
        if list(path[: len(section)]) == section and key in options_of(leaf) and not leaf.get_default(IGNORES_SETTINGS)
    ]
    if not options:
        # The error of the settings file names the nearest key.
        content: Any = ""
        for part in [key, *reversed(section)]:
            content = {part: content}
        check_keys(parser, content, settings_path())
        raise InputError(f"{describe(name)} is not an option with a default")
    return section, key, options


def _typed_value(words: Sequence[str], action: argparse.Action) -> Any:
    """Return the value of TOML for words of a command line."""
    if action.nargs == 0:
        is_flag = len(words) == 1 and words[0].lower() in (*TRUE, *FALSE)
        return words[0].lower() in TRUE if is_flag else words[0]
    values = [_number(word) for word in words]
    return values[0] if len(values) == 1 else values


def _number(word: str) -> str | int | float:
    for kind in (int, float):
        try:
            number = kind(word)
        except ValueError:
            continue
        if str(number) == word:
            return number
    return word
