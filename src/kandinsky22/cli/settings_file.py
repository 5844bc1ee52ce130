"""The settings file: its location, reading it, and changing one value without touching the rest."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky22.errors import InputError, printable

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

PATH_VARIABLE = "KANDINSKY22_CONFIG"
MAX_BYTES = 1 << 20  # no settings file is longer; a wrong path must not fill the memory
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


def settings_path() -> Path:
    """Return the path of the settings file, which may not exist.

    The variable `KANDINSKY22_CONFIG` names it; otherwise it is `kandinsky22/config.toml` in the user's folder for
    settings: `%APPDATA%` on Windows, else `XDG_CONFIG_HOME`, else `~/.config`.
    """
    if named := os.environ.get(PATH_VARIABLE):
        return Path(named)
    folder = os.environ.get("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME", "")
    # Relative folders are invalid (XDG Base Directory Specification).
    base = Path(folder) if os.path.isabs(folder) else Path("~/.config").expanduser()
    return base / "kandinsky22" / "config.toml"


def read_settings(path: Path) -> dict[str, Any]:
    """Return the content of a settings file; nothing if it does not exist.

    Args:
        path: Path of the file.

    Raises:
        InputError: If it cannot be read, or is not TOML.
    """
    return parse_settings(read_text(path), path)


def read_text(path: Path) -> str:
    """Return the text of a settings file; an empty one if it does not exist.

    Args:
        path: Path of the file.

    Raises:
        InputError: If it cannot be read, is too long, or is not UTF-8.
    """
    from kandinsky22.checkpoints.atomic_files import open_regular_file

    try:
        with open_regular_file(path) as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        raise InputError(f"the settings file {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"the settings file {path} cannot be read: it has more than {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"the settings file {path} cannot be read: it is not text in UTF-8") from None


def parse_settings(text: str, path: Path) -> dict[str, Any]:
    """Return the content of a settings file.

    Args:
        text: Text of the file.
        path: Path of the file, for error messages.

    Raises:
        InputError: If the text is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = str(error) or "it is nested too deeply"
        raise InputError(f"the settings file {path} is not TOML: {printable(reason)}") from None


def write_setting(path: Path, section: Sequence[str], key: str, value: Any) -> None:
    """Set or remove one value of a settings file. Comments, order and all other values are preserved.

    Args:
        path: The file, which is created if it is missing.
        section: Names of the value's table and of the tables around it; empty for the top of the file.
        key: Name of the value, with dashes.
        value: A string, number, boolean or list of these; None removes the value.

    Raises:
        InputError: If the file cannot be changed without losing something, for example because the value spans lines.
        OSError: If it cannot be written.
    """
    from kandinsky22.checkpoints.atomic_files import atomic_write

    text = read_text(path)
    expected = _changed(parse_settings(text, path), section, key, value)
    new_text = _edited(text, section, key, value)
    try:
        is_right = _without_empty_tables(tomllib.loads(new_text)) == _without_empty_tables(expected)
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise InputError(f"{path} has a layout that cannot be changed safely; edit it with a text editor")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(new_text, encoding="utf-8")


def toml_value(value: Any) -> str:
    """Return a value as TOML.

    Args:
        value: A string, number, boolean or list of these.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a basic string of TOML, except that TOML does not allow U+007F.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def _changed(content: Mapping[str, Any], section: Sequence[str], key: str, value: Any) -> dict[str, Any]:
    """Return the content with one value changed or removed."""
    result = dict(content)
    if section:
        inner = result.get(section[0], {})
        result[section[0]] = _changed(inner if isinstance(inner, Mapping) else {}, section[1:], key, value)
        return result
    for name in [name for name in result if name.replace("_", "-") == key]:
        del result[name]
    return result if value is None else {**result, key: value}


def _without_empty_tables(content: Mapping[str, Any]) -> dict[str, Any]:
    inner = {k: _without_empty_tables(v) if isinstance(v, Mapping) else v for k, v in content.items()}
    return {name: value for name, value in inner.items() if value != {}}


def _edited(text: str, section: Sequence[str], key: str, value: Any) -> str:
    """Return the text with the line of one value replaced, removed or added; simple layouts only."""
    lines = [line.rstrip("\n") for line in io.StringIO(text, newline=None)]  # values may have other separators of lines
    start, end = _section_lines(lines, section)
    assignment = re.compile(rf"\s*[\"']?{'[-_]'.join(map(re.escape, key.split('-')))}[\"']?\s*=")
    present = [index for index in range(start, end) if assignment.match(lines[index])]
    new = [] if value is None else [f"{key} = {toml_value(value)}"]
    if present:
        lines[present[0] : present[0] + 1] = new
    elif new and start <= len(lines):
        while end > start and not lines[end - 1].strip():
            end -= 1
        lines[end:end] = new
    elif new:
        lines += [*([""] if lines else []), f"[{'.'.join(section)}]", *new]
    return "\n".join(lines) + "\n" if lines else ""


def _section_lines(lines: Sequence[str], section: Sequence[str]) -> tuple[int, int]:
    """Return the first line of a table and the line after its last; numbers beyond all lines if it is missing."""
    headers = [index for index, line in enumerate(lines) if line.lstrip().startswith("[")]
    if not section:
        return 0, min(headers, default=len(lines))
    name = r"\s*\.\s*".join(map(re.escape, section))
    header = re.compile(rf"\s*\[\s*{name}\s*\]\s*(#.*)?")
    for position, index in enumerate(headers):
        if header.fullmatch(lines[index]):
            return index + 1, headers[position + 1] if position + 1 < len(headers) else len(lines)
    return len(lines) + 1, len(lines) + 1
