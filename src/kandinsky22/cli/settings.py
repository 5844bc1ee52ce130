"""Defaults of options from the environment and the settings file, for every subcommand without code of its own.

A value is looked up on the command line, in the environment, in the settings file, and in the program, in this order.
The functions here walk the argument parser: an option that a subcommand declares has a key in the file and a variable.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky22.cli.settings_file import PATH_VARIABLE, read_settings, settings_path
from kandinsky22.errors import InputError, describe

PREFIX = "KANDINSKY22_"
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
SUPERSEDES = "supersedes"  # default of a parser: destination to the destinations whose settings it replaces
SETTINGS_OF = "settings_of"  # default of a parser: names of another subcommand whose settings hold for it too
IGNORES_SETTINGS = "ignores_settings"  # default of a parser whose subcommand has no settings
FROM_SETTINGS = "from_settings"  # attribute of parsed command lines: destinations that settings have filled in


@dataclasses.dataclass(frozen=True)
class Setting:
    """Value of an option that does not come from the command line.

    Attributes:
        key: Name of the option without dashes at its beginning.
        action: The option.
        value: The value: a text from the environment, any value of TOML from the file.
        origin: Where it comes from, for messages.
    """

    key: str
    action: argparse.Action
    value: Any
    origin: str

    def store(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
        """Store the value as the option would on the command line.

        Args:
            parser: Parser of the subcommand.
            namespace: Receives the value.

        Raises:
            InputError: If the option does not accept the value.
        """
        try:
            _store(self.action, self.value, parser, namespace)
        except argparse.ArgumentError as error:
            raise InputError(f"{self.origin}: {self.key}: {error.message}") from None
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise InputError(f"{self.origin}: {self.key}: {error}") from None


def parse_command_line(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return a parsed command line in which settings replace the built-in defaults.

    The attribute `from_settings` of the result names the destinations that settings have filled in. A subcommand may
    declare, as the parser's default `supersedes`, options of the command line that replace the settings of others.

    Args:
        parser: Parser of the whole command line.
        argv: Arguments without the program name.

    Raises:
        InputError: If the settings file is damaged or has an unknown key, or if an option does not accept a setting.
    """
    path, leaf = selected_parser(parser, argv)
    if leaf is None or leaf.get_default(IGNORES_SETTINGS):
        return parser.parse_args(argv)
    settings = find_settings(parser, path)
    actions = list(options_of(leaf).values())
    defaults: dict[str, Any] = {}
    for action in actions:
        if action.default is argparse.SUPPRESS:  # the subcommand itself fills in what is missing
            continue
        defaults.setdefault(action.dest, _builtin_default(action))
        action.default = argparse.SUPPRESS  # then the namespace shows what the command line has
    for key in settings:
        settings[key].action.required = False
    namespace = parser.parse_args(argv)
    on_command_line = {action.dest for action in actions if hasattr(namespace, action.dest)}
    ignored = on_command_line | _superseded(leaf, on_command_line)
    applied = [setting for setting in settings.values() if setting.action.dest not in ignored]
    for setting in applied:
        setting.store(leaf, namespace)
    for name, default in defaults.items():
        if not hasattr(namespace, name):
            setattr(namespace, name, default)
    setattr(namespace, FROM_SETTINGS, frozenset(setting.action.dest for setting in applied))
    return namespace


def find_settings(parser: argparse.ArgumentParser, path: Sequence[str]) -> dict[str, Setting]:
    """Return the settings of a subcommand by key, from the environment and the settings file.

    Args:
        parser: Parser of the whole command line.
        path: Names of the subcommand, such as ("models", "pull").

    Raises:
        InputError: If the settings file is damaged or has an unknown key.
    """
    file = settings_path()
    content = read_settings(file)
    check_keys(parser, content, file)
    leaf = parser
    for name in path:
        leaf = subcommands_of(leaf)[name]
    settings = {}
    for key, action in options_of(leaf).items():
        for names in (leaf.get_default(SETTINGS_OF), path):
            setting = None if names is None else _setting(content, file, names, key, action)
            if setting is not None:
                settings[key] = setting
                break
    return settings


def check_keys(parser: argparse.ArgumentParser, content: Mapping[str, Any], file: Path) -> None:
    """Raise an error if the settings file has a key that no option has.

    Args:
        parser: Parser of the whole command line.
        content: Content of the file.
        file: Path of the file, for messages.

    Raises:
        InputError: If a key is unknown. The message names the nearest known one.
    """
    _check_table(parser, content, (), file)


def variables(path: Sequence[str], key: str) -> tuple[str, str]:
    """Return the environment variables of an option: of one subcommand, then of all that have the option.

    Args:
        path: Names of the subcommand.
        key: Name of the option without dashes at its beginning.
    """
    name = key.replace("-", "_").upper()
    return PREFIX + "_".join([*(part.replace("-", "_").upper() for part in path), name]), PREFIX + name


# The parser's tree


def subcommands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the parsers of a parser's subcommands by name; none for a subcommand without any.

    Args:
        parser: Parser of the command or of a subcommand.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def leaf_parsers(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield the names and the parser of each subcommand that runs something.

    Args:
        parser: Parser of the command or of a subcommand.
        path: Names of that subcommand.
    """
    subcommands = subcommands_of(parser)
    if not subcommands:
        yield path, parser
    for name, subparser in subcommands.items():
        yield from leaf_parsers(subparser, (*path, name))


def selected_parser(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[tuple[str, ...], argparse.ArgumentParser | None]:
    """Return the names and the parser of the subcommand that a command line selects; None if it names none.

    Args:
        parser: Parser of the whole command line.
        argv: Arguments without the program name.
    """
    path: list[str] = []
    for word in argv:
        if word not in subcommands_of(parser):
            break
        parser = subcommands_of(parser)[word]
        path.append(word)
    return tuple(path), None if subcommands_of(parser) else parser


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the options of a subcommand by key, except those that print something and exit.

    Args:
        parser: Parser of the subcommand.
    """
    options = {}
    for action in parser._actions:
        if action.option_strings and not isinstance(action, argparse._HelpAction | argparse._VersionAction):
            long_names = [name for name in action.option_strings if name.startswith("--")]
            options[(long_names or [action.dest.replace("_", "-")])[0].lstrip("-")] = action
    return options


def _builtin_default(action: argparse.Action) -> Any:
    """Return an option's default; texts are parsed, as argparse does where an option is not on the command line."""
    if isinstance(action.default, str) and callable(action.type):
        return action.type(action.default)
    return action.default


def _superseded(parser: argparse.ArgumentParser, on_command_line: set[str]) -> set[str]:
    """Return the destinations whose settings options of the command line replace."""
    declared: Mapping[str, Sequence[str]] = parser.get_default(SUPERSEDES) or {}
    names = {name for option in on_command_line for name in declared.get(option, ())}
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        if members & on_command_line:
            names |= members
    return names


# Values


def _setting(
    content: Mapping[str, Any], file: Path, path: Sequence[str], key: str, action: argparse.Action
) -> Setting | None:
    return _from_environment(path, key, action) or _from_file(content, file, path, key, action)


def _from_environment(path: Sequence[str], key: str, action: argparse.Action) -> Setting | None:
    for name in variables(path, key):
        # That variable names the settings file, thus an option of this name has only the subcommand's own variable.
        if name != PATH_VARIABLE and (value := os.environ.get(name)) is not None:
            return Setting(key, action, value, name)
    return None


def _from_file(
    content: Mapping[str, Any], file: Path, path: Sequence[str], key: str, action: argparse.Action
) -> Setting | None:
    """Return the value of the innermost table that has the key."""
    tables = [content]
    for name in path:
        inner = tables[-1].get(name)
        if not isinstance(inner, Mapping):
            break
        tables.append(inner)
    for depth in range(len(tables) - 1, -1, -1):
        for name, value in tables[depth].items():
            if name.replace("_", "-") == key and not isinstance(value, Mapping):
                section = f"[{'.'.join(path[:depth])}] in " if depth else ""
                return Setting(key, action, value, f"{section}{file}")
    return None


def _check_table(
    parser: argparse.ArgumentParser, content: Mapping[str, Any], path: tuple[str, ...], file: Path
) -> None:
    subcommands = subcommands_of(parser)
    keys = {
        key for _, leaf in leaf_parsers(parser) if not leaf.get_default(IGNORES_SETTINGS) for key in options_of(leaf)
    }
    for name, value in content.items():
        if isinstance(value, Mapping) and name in subcommands:
            _check_table(subcommands[name], value, (*path, name), file)
        elif isinstance(value, Mapping) or name.replace("_", "-") not in keys:
            known = subcommands if isinstance(value, Mapping) else keys
            nearest = difflib.get_close_matches(name.replace("_", "-"), sorted(known), 1, 0.5)
            kind = "section" if isinstance(value, Mapping) else "key"
            where = f" in [{'.'.join(path)}]" if path else ""
            advice = f"; did you mean {nearest[0]}?" if nearest else ""
            raise InputError(f"{file}: unknown {kind} {describe(name)}{where}{advice}")


def _store(action: argparse.Action, value: Any, parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Let an option act with the value of a setting, as argparse would with the words of a command line."""
    if action.nargs == 0:
        _store_flag(action, value, parser, namespace)
        return
    takes_several = isinstance(action.nargs, int) or action.nargs in ("+", "*")
    words = _words(value, split=takes_several)
    if isinstance(action.nargs, int) and len(words) != action.nargs:
        raise ValueError(f"{describe(value)} is invalid: expected {action.nargs} values")
    if not takes_several:
        words = [",".join(words)]
    values: Any = [action.type(word) if callable(action.type) else word for word in words]
    if action.choices is not None and (wrong := [word for word in values if word not in action.choices]):
        raise ValueError(f"{describe(wrong[0])} is invalid: expected one of {', '.join(map(str, action.choices))}")
    action(parser, namespace, values if takes_several else values[0], action.option_strings[0])


def _store_flag(
    action: argparse.Action, value: Any, parser: argparse.ArgumentParser, namespace: argparse.Namespace
) -> None:
    text = value.lower() if isinstance(value, str) else value
    if not (isinstance(value, bool) or text in (*TRUE, *FALSE)):
        raise ValueError(f"{describe(value)} is invalid: expected true or false")
    is_set = text is True or text in TRUE
    names = [name for name in action.option_strings if name.startswith("--no-") != is_set]
    if isinstance(action, argparse.BooleanOptionalAction):
        action(parser, namespace, [], names[0])
    elif is_set:  # a flag that is not set leaves the built-in default
        action(parser, namespace, [], action.option_strings[0])


def _words(value: Any, *, split: bool) -> list[str]:
    """Return the words that a command line would have."""
    if isinstance(value, str):
        try:
            return shlex.split(value) if split else [value]
        except ValueError:  # an open quotation mark
            return [value]
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
        raise ValueError(f"{describe(value)} is invalid: expected a text, a number, or a list of these")
    return [item if isinstance(item, str) else repr(item) for item in items]
