"""`kandinsky22 models`: list, download, describe, convert, prepare and remove checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kandinsky22._exports import MODULE_OF
from kandinsky22.checkpoints.hub import EMBEDDED, CheckpointSource, embedded_folder
from kandinsky22.cli.console import Console, print_path, silenced_libraries
from kandinsky22.cli.settings import FROM_SETTINGS
from kandinsky22.cli.standard_input import MAX_TEXT_BYTES
from kandinsky22.errors import InputError, invalid, printable

PURPOSES = {"generate": "decoder", "inpaint": "inpaint", "control": "control"}  # values of --for, and kinds of decoder
DTYPES = ("float16", "bfloat16", "float32", "int8")


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        name: Its Hub id.
        kind: "decoder", "inpaint", "control" or "prior".
        parameters: Number of parameters, counted from the published settings.
        bytes: About the size of its files: float32, image encoder in float16.
    """

    name: str
    kind: str
    parameters: int
    bytes: int


PUBLISHED = (
    Published("kandinsky-community/kandinsky-2-2-decoder", "decoder", 1_320_889_783, 5_283_559_132),
    Published("kandinsky-community/kandinsky-2-2-decoder-inpaint", "inpaint", 1_320_907_063, 5_283_628_252),
    Published("kandinsky-community/kandinsky-2-2-controlnet-depth", "control", 1_321_261_707, 5_285_046_828),
    Published("kandinsky-community/kandinsky-2-2-prior", "prior", 3_565_793_024, 10_573_357_568),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `models list`.

    Attributes:
        name: Name for `--model`.
        kind: "decoder", "inpaint", "control" or "prior".
        source: "embedded", "cache" or "published".
        bytes: Size of the files.
        folder: Folder of the files; None if they are not on this machine.
    """

    name: str
    kind: str
    source: str
    bytes: int
    folder: str | None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `models`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "models",
        help="list, download, describe, convert, prepare and remove checkpoints",
        description="List, download, describe, convert, prepare and remove checkpoints.",
        epilog="examples:\n  kandinsky22 models pull --for inpaint\n"
        "  kandinsky22 models convert embedded small --dtype float16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = functools.partial(_add_action, parser.add_subparsers(metavar="ACTION", required=True))
    listing = add("list", "print the models on this machine and the published ones", _list)
    pull = add("pull", "download a model and its prior from the Hub, or continue a download", _pull)
    pull.add_argument("model", nargs="?", metavar="MODEL", help="Hub id (default: the published model of --for)")
    pull.add_argument("--for", dest="purpose", choices=PURPOSES, help="what the model is for (default: generate)")
    pull.add_argument("--variant", metavar="NAME", help="variant of the weight files, such as fp16")
    info = add("info", "print files, parameters, types, digests and the licence of a model", _info)
    info.add_argument("model", metavar="MODEL", help="folder, Hub id of a downloaded model, or embedded")
    info.add_argument("--no-digest", dest="digest", action="store_false", help="do not read all files for digests")
    convert = add("convert", "write a model in another type, as safetensors", _convert)
    convert.add_argument("model", metavar="MODEL", help="folder, Hub id, or embedded")
    convert.add_argument("folder", metavar="FOLDER", type=Path, help="new folder to write to")
    convert.add_argument("--dtype", choices=DTYPES, default="float16", help="type to write (default: float16)")
    convert.add_argument("--no-prior", dest="prior", action="store_false", help="leave out the prior of a decoder")
    prepare = add("prepare", "write a model in the form in which this machine computes with it", _prepare)
    prepare.add_argument("model", metavar="MODEL", help="folder, Hub id, or embedded")
    prepare.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="new folder to write to")
    dtypes = ("auto", "bf16", "bfloat16", "float32", "int8")
    about = (
        "type to write; int8 rounds activations too; auto: bfloat16 if this CPU has instructions for it, else float32"
    )
    prepare.add_argument("--dtype", choices=dtypes, default="auto", help=about)
    about = "prompts, one per line, that int8 is calibrated with (default: random image embeddings)"
    prepare.add_argument("--calibration", type=Path, metavar="FILE", help=about)
    prepare.add_argument("--prior", metavar="MODEL", help="prior to write too (default: the one that belongs to MODEL)")
    for action in (info, convert, prepare):
        action.add_argument("--for", dest="purpose", choices=PURPOSES, help="part of the embedded model")
    remove = add("remove", "delete a downloaded model from the Hub cache", _remove)
    remove.add_argument("model", metavar="MODEL", help="Hub id")
    remove.add_argument("-y", "--yes", action="store_true", help="do not ask")
    for action in (pull, info, convert, prepare):
        action.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
        action.add_argument("--hub-token", metavar="TOKEN", help="access token of the Hub (default: the stored one)")
    for action in (pull, convert, prepare):
        action.add_argument("-q", "--quiet", action="store_true", help="print no progress, only errors and results")
    for action in (listing, pull, info, convert, prepare, remove):
        action.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="Hub cache (default: the Hub client's)")
        action.add_argument("--json", action="store_true", help="print JSON, one object per line")


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _list(args: argparse.Namespace) -> None:
    rows = [*_embedded_rows(), *_cached_rows(args.cache_dir)]
    present = {row.name for row in rows}
    rows += [Row(each.name, each.kind, "published", each.bytes, None) for each in PUBLISHED if each.name not in present]
    if args.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return
    width = max(len(printable(row.name)) for row in rows)
    for row in rows:
        about = "about " if row.source == "published" else ""
        where = "not downloaded" if row.folder is None else row.source
        print(f"{printable(row.name):<{width}}  {row.kind:<8}  {about + readable_size(row.bytes):>13}  {where}")


def _pull(args: argparse.Namespace) -> None:
    kind = PURPOSES[args.purpose] if args.purpose is not None else None
    name = args.model or next(each.name for each in PUBLISHED if each.kind == (kind or "decoder"))
    _check_hub_id(name)
    source = dataclasses.replace(_source(args, name), checks_digests=True)
    with _quiet(args):
        from kandinsky22.pipelines.checkpoint_tools import pull

        folders = pull(source, variant=args.variant, expected_kind=kind)
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if args.json:
            print(json.dumps({"model": name, "folder": str(folder), "files": len(files), "bytes": size}))
            continue
        Console(quiet=args.quiet).note(f"{len(files)} files, {readable_size(size)}, all digests are right:")
        print_path(folder)


def _info(args: argparse.Namespace) -> None:
    from kandinsky22.pipelines.checkpoint_tools import describe_checkpoint

    folder = dataclasses.replace(_described_source(args), local_files_only=True).fetch(lambda names: names)
    info = describe_checkpoint(folder, with_digests=args.digest)
    if args.json:
        totals = {"bytes": info.bytes, "parameters": info.parameters, "digest": info.digest}
        print(json.dumps({"model": args.model, **dataclasses.asdict(info), **totals}, default=str))
        return
    print(printable(f"{info.class_name}, {readable_size(info.bytes)}, {info.parameters:,} parameters"))
    print(printable(f"licence: {info.licence or 'the card names none'}"))
    print(printable(f"folder: {info.folder}"))
    if info.digest is not None:
        print(f"digest: {info.digest}")
    for name, component in info.components.items():
        if not component.files:
            continue
        counts = component.parameters
        types = "not counted" if counts is None else ", ".join(f"{n:,} of {kind}" for kind, n in sorted(counts.items()))
        print(printable(f"{name}: {component.class_name}, {types}"))
        for file in component.files:
            print(printable(f"  {file.name}  {readable_size(file.bytes)}  {file.sha256 or ''}".rstrip()))


def _convert(args: argparse.Namespace) -> None:
    with _quiet(args):
        from kandinsky22.pipelines.checkpoint_tools import convert

        convert(_described_source(args), args.folder, dtype=args.dtype, with_prior=args.prior)
    _report_written(args, args.folder, args.dtype)


def _prepare(args: argparse.Namespace) -> None:
    from kandinsky22.runtime.device import dtype_name, resolve_device, resolve_dtype

    dtype = args.dtype if args.dtype == "int8" else dtype_name(resolve_dtype(args.dtype, resolve_device("cpu")))
    prompts = None if args.calibration is None else _prompts(args.calibration)
    with _quiet(args):
        from kandinsky22.pipelines.checkpoint_tools import convert

        convert(_described_source(args), args.output, dtype=dtype, prior=args.prior, prepare=True, calibration=prompts)
    _report_written(args, args.output, dtype)


def _prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    from kandinsky22.inputs.sources import read_file

    try:
        text = read_file(str(path), MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise invalid("--calibration", str(path), "a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise invalid("--calibration", str(path), f"a text file ({reason})") from error
    lines = io.StringIO(text, newline=None)  # only these newlines: a prompt may contain other separators of lines
    return [line.strip() for line in lines if line.strip()]


def _report_written(args: argparse.Namespace, folder: Path, dtype: str) -> None:
    """Print the folder of a new checkpoint, or describe it as JSON."""
    from kandinsky22.pipelines.checkpoint_tools import describe_checkpoint

    if not args.json:
        print_path(folder)
        return
    folders = [folder, *([folder / "prior"] if (folder / "prior" / "model_index.json").exists() else [])]
    size = sum(describe_checkpoint(each, with_digests=False).bytes for each in folders)
    print(json.dumps({"model": args.model, "folder": str(folder), "dtype": dtype, "bytes": size}))


def _remove(args: argparse.Namespace) -> None:
    from kandinsky22.checkpoints.hub_files import cached_size, remove_cached

    _check_hub_id(args.model)
    size = readable_size(cached_size(args.model, args.cache_dir))
    if not args.yes:
        _confirm(f"Remove {args.model} ({size}) from the Hub cache?")
    freed = remove_cached(args.model, args.cache_dir)
    if args.json:
        print(json.dumps({"model": args.model, "bytes": freed}))
    else:
        Console(quiet=False).note(f"removed {args.model}, {readable_size(freed)}")


def kind_of_class(class_name: str) -> str | None:
    """Return the kind of weights of a pipeline class, or None if it is no pipeline of Kandinsky 2.2.

    Args:
        class_name: Name of the class in a checkpoint's index.
    """
    if not MODULE_OF.get(class_name, "").startswith("pipelines.") or "Kandinsky" not in class_name:
        return None
    for word, kind in (("Prior", "prior"), ("Inpaint", "inpaint"), ("Controlnet", "control")):
        if word in class_name:
            return kind
    return "decoder"


def readable_size(size: int) -> str:
    """Return a number of bytes for display.

    Args:
        size: The number.
    """
    if size < 1000:
        return f"{size} bytes"
    value = size / 1000
    for unit in ("kB", "MB"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _embedded_rows() -> list[Row]:
    rows = []
    for kind in ("decoder", "inpaint", "control", "prior"):
        folder = embedded_folder(kind)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        rows.append(Row(EMBEDDED, kind, "embedded", size, str(folder)))
    return rows


def _cached_rows(cache_dir: Path | None) -> list[Row]:
    from kandinsky22.checkpoints.hub_files import cached_models

    return [
        Row(model.name, kind, "cache", model.bytes, str(model.folder))
        for model in cached_models(cache_dir)
        if (kind := kind_of_class(model.class_name)) is not None
    ]


def _source(args: argparse.Namespace, name: str) -> CheckpointSource:
    options: dict[str, Any] = {"revision": args.revision, "cache_dir": args.cache_dir, "token": args.hub_token}
    return CheckpointSource(name, embedded_subfolder=PURPOSES[args.purpose or "generate"], **options)


def _described_source(args: argparse.Namespace) -> CheckpointSource:
    """Return the model of a command that takes a folder, the embedded model or a Hub id.

    Raises:
        InputError: If an option of the command line has no effect on it.
    """
    name, from_settings = args.model, getattr(args, FROM_SETTINGS, ())
    if args.purpose is not None and "purpose" not in from_settings and name != EMBEDDED:
        raise InputError(f"--for {args.purpose} would have no effect on {name}: it names a part of the embedded model")
    is_local = name == EMBEDDED or Path(name).is_dir()
    if args.revision is not None and "revision" not in from_settings and is_local:
        raise InputError(f"--revision {args.revision} would have no effect on {name}, which is not on the Hub")
    return _source(args, name)


def _check_hub_id(name: str) -> None:
    if name == EMBEDDED or Path(name).is_dir():
        raise InputError(f"{name} is {'part of the program' if name == EMBEDDED else 'a folder'}; name a Hub id")


def _confirm(question: str) -> None:
    """Ask a question, and raise an error unless it is answered with yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError(f"{question[:-1]}: nobody can be asked here; add --yes")
    print(printable(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError("nothing was removed")


@contextlib.contextmanager
def _quiet(args: argparse.Namespace) -> Iterator[None]:
    with silenced_libraries() if args.quiet else contextlib.nullcontext():
        yield
