"""`kandinsky22 serve`: run the application; `kandinsky22 gallery rebuild`: rebuild its database from its pictures."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky22.checkpoints.hub import EMBEDDED, HUB_ID
from kandinsky22.cli import option_values, options
from kandinsky22.cli.settings import SETTINGS_OF
from kandinsky22.errors import MissingDependencyError, invalid
from kandinsky22.requirements import require

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
MODEL_OPTIONS = {"decoder": "model", "inpaint": "inpaint_model", "control": "control_model"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommands `serve` and `gallery`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "serve",
        help="run the studio and its API",
        description="Run the studio in the browser, and the API that programs use.",
        epilog="example: kandinsky22 serve --open",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_address_options(parser.add_argument_group("address"))
    _add_model_options(parser.add_argument_group("models"))
    _add_limit_options(parser.add_argument_group("queue and limits"))
    parser.set_defaults(run=run, needs_no_torch=True)
    _add_gallery_parser(subparsers)


def _add_address_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", help="address to listen on (default: 127.0.0.1); any other one requires a token")
    group.add_argument("--port", type=option_values.integer(0, 65535), help="port (default: 7822; 0 takes a free one)")
    group.add_argument("--token", help="secret that every request must carry; better set in KANDINSKY22_SERVE_TOKEN")
    group.add_argument("--open", action="store_true", help="open the studio in the browser")
    group.add_argument("--state", type=Path, metavar="FOLDER", help="folder of pictures and jobs")
    group.add_argument("--allow-host", nargs="+", metavar="NAME", help="further names in the Host header to accept")
    group.add_argument("--allow-origin", nargs="+", metavar="ORIGIN", help="sites whose scripts may use the API")
    group.add_argument("--allow-urls-from", nargs="+", metavar="HOST", help="hosts to download input images from")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    for kind, name in MODEL_OPTIONS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            metavar="[ID=]MODEL",
            help=f"folders or Hub ids of {kind} weights (default: the embedded model)",
        )
    group.add_argument("--prior", metavar="MODEL", help="folder or Hub id of a prior (default: each model's own)")
    group.add_argument(
        "--tiny-decoder",
        type=option_values.tiny_decoder,
        metavar="FILE_OR_FOLDER",
        help=(
            "tiny decoder for pictures and previews of the models that the other options name, or of the embedded model"
        ),
    )
    group.add_argument("--device", nargs="+", help="auto, cpu, cuda, cuda:N or mps, one worker each (default: auto)")
    group.add_argument("--dtype", help="float32, float16, bfloat16 or auto")
    group.add_argument("--quantize", choices=(*options.QUANTIZATION_KINDS, "none"), help="8-bit or 4-bit weights")
    group.add_argument("--low-memory", action="store_true", default=None, help="hold networks only while they run")
    group.add_argument("--compile", action="store_true", default=None, help="compile the networks on first use")
    group.add_argument("--depth-model", metavar="MODEL", help="depth estimation model of transformers, for hints")
    group.add_argument(
        "--keep-models", type=option_values.integer(1, 100), metavar="N", help="models in memory (default: 3)"
    )


def _add_limit_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--body-seconds",
        type=option_values.integer(1),
        metavar="N",
        help="longest time of a request's body (default: 60)",
    )
    group.add_argument(
        "--batch", type=option_values.integer(1, 256), metavar="N", help="most equal jobs drawn together"
    )
    group.add_argument(
        "--max-waiting", type=option_values.integer(1), metavar="N", help="longest queue (default: 10000)"
    )
    group.add_argument("--max-count", type=option_values.integer(1, 10_000), metavar="N", help="most images of a job")
    group.add_argument(
        "--max-steps", type=option_values.integer(1, 10_000), metavar="N", help="most steps (default: 1000)"
    )
    group.add_argument(
        "--max-side", type=option_values.integer(64, 8192), metavar="N", help="longest side (default: 2048)"
    )
    group.add_argument(
        "--max-attempts",
        type=option_values.integer(1, 100),
        metavar="N",
        help="attempts of a job whose worker crashes (default: 3)",
    )
    group.add_argument(
        "--max-upload-mb", type=option_values.integer(1, 1024), metavar="N", help="largest image file (default: 32)"
    )
    group.add_argument(
        "--trash-days",
        type=option_values.integer(0),
        metavar="N",
        help="days until deleted images are removed (default: 30)",
    )
    group.add_argument(
        "--upload-days",
        type=option_values.integer(1),
        metavar="N",
        help="days until uploads are removed that no waiting job and no image refers to (default: 30)",
    )


def _add_gallery_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gallery = subparsers.add_parser("gallery", help="maintain the studio's gallery", allow_abbrev=False)
    actions = gallery.add_subparsers(metavar="ACTION", required=True)
    rebuild = actions.add_parser(
        "rebuild",
        help="enter pictures that are on the disk but not in the database",
        description="Enter all pictures and uploads of the state folder that its database lacks.",
        allow_abbrev=False,
    )
    rebuild.add_argument("--state", type=Path, metavar="FOLDER", help="folder of pictures and jobs")
    rebuild.set_defaults(run=run_rebuild, needs_no_torch=True, **{SETTINGS_OF: ("serve",)})


def run(args: argparse.Namespace) -> None:
    """Run the server until it is interrupted.

    Args:
        args: Parsed command line.

    Raises:
        MissingDependencyError: If the packages of the extra `serve`, or those of `depth` for hints of depth, are not
            installed.
        KandinskyError: If a setting is invalid, or if the address or the state folder is in use.
    """
    require_packages()
    if args.depth_model is not None:
        require("transformers", "--depth-model", install="kandinsky22[depth]")
    from kandinsky22.serve.run import serve

    def report(address: str) -> None:
        print(f"kandinsky22 serves at {address}", flush=True)
        if args.open:
            webbrowser.open(address)

    serve(server_settings(args), on_start=report)


def server_settings(args: argparse.Namespace) -> Any:
    """Return the settings of a command line.

    Args:
        args: Parsed command line.

    Raises:
        KandinskyError: If a setting is invalid.
    """
    from kandinsky22.serve.settings import ServerSettings

    names = {field.name for field in dataclasses.fields(ServerSettings)}
    values = {name: value for name, value in vars(args).items() if name in names and value is not None}
    lists = {"allow_host": "allowed_hosts", "allow_origin": "allowed_origins", "allow_urls_from": "url_hosts"}
    values |= {field: tuple(value) for name, field in lists.items() if (value := getattr(args, name)) is not None}
    values["models"] = _models(args)
    if args.device is not None:
        values["devices"] = tuple(args.device)
    if args.keep_models is not None:
        values["sessions"] = args.keep_models
    if args.quantize == "none":
        values["quantize"] = None
    if args.max_side is not None:
        values["max_pixels"] = args.max_side**2
    if args.max_upload_mb is not None:
        size = args.max_upload_mb * 2**20
        values |= {"max_upload_bytes": size, "max_body_bytes": max(2 * size, ServerSettings.max_body_bytes)}
    return ServerSettings(**values)


def _models(args: argparse.Namespace) -> tuple[Any, ...]:
    """Return the models of a command line; the embedded model stands for the kinds that it does not name."""
    from kandinsky22.serve.settings import EMBEDDED_MODELS, ModelSettings

    tiny_decoder = _tiny_decoder(args)
    named = [name for option in MODEL_OPTIONS.values() for name in getattr(args, option) or ()]
    names_others = any((name.partition("=")[2] or name) != EMBEDDED for name in named)
    models = []
    for kind, option in MODEL_OPTIONS.items():
        names: Sequence[str] | None = getattr(args, option)
        if names is None:
            own_decoder = None if names_others else tiny_decoder
            embedded = [model for model in EMBEDDED_MODELS if model.kind == kind]
            models += [dataclasses.replace(model, tiny_decoder=own_decoder) for model in embedded]
            continue
        for name in names:
            id, separator, location = name.partition("=")
            location = location if separator else name
            if not location:
                raise invalid(f"--{option.replace('_', '-')}", name, "a folder or a Hub id, or ID=MODEL")
            suffix = "" if kind == "decoder" else f"-{kind}"
            own = id if separator else (Path(location).name or location) + (suffix if location == EMBEDDED else "")
            prior = args.prior if location != EMBEDDED else None
            own_decoder = tiny_decoder if (location != EMBEDDED) == names_others else None
            models.append(ModelSettings(own, location, kind, prior, own_decoder))
    return tuple(models)


def _tiny_decoder(args: argparse.Namespace) -> str | None:
    """Return the path of the tiny decoder that does not depend on the current folder, or its Hub id."""
    if args.tiny_decoder is None or args.tiny_decoder == "none":
        return None
    path = Path(args.tiny_decoder)
    if path.exists():
        return str(path.absolute())
    if HUB_ID.fullmatch(args.tiny_decoder):
        return str(args.tiny_decoder)
    raise invalid("--tiny-decoder", args.tiny_decoder, "a file or a folder that exists, or a Hub id")


def run_rebuild(args: argparse.Namespace) -> None:
    """Rebuild the database of a state folder.

    Args:
        args: Parsed command line.

    Raises:
        MissingDependencyError: If the packages of the extra `serve` are not installed.
        InputError: If a server uses the folder, or if the folder does not exist.
    """
    require_packages()
    from kandinsky22.serve.database import UnreadableDatabaseError, set_aside
    from kandinsky22.serve.files import Files, lock_folder
    from kandinsky22.serve.gallery import rebuild
    from kandinsky22.serve.settings import ServerSettings
    from kandinsky22.serve.store import Store

    settings = ServerSettings(state=args.state)
    folder = settings.state_folder
    if not folder.is_dir():
        raise invalid("--state", str(folder), "a folder that a server has used")
    lock_folder(folder)
    files = Files(folder)
    try:
        store = Store(files.database)
    except UnreadableDatabaseError:
        print(f"the database is damaged; it is kept as {set_aside(files.database)}", file=sys.stderr)
        store = Store(files.database)
    counts: Mapping[str, int] = rebuild(files, store, settings.max_upload_pixels)
    print(f"{folder}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))


def require_packages() -> None:
    """Raise an error unless the packages of the extra `serve` are installed.

    Raises:
        MissingDependencyError: If one is missing.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"serve requires {', '.join(missing)}; install it with: pip install 'kandinsky22[serve]'"
        )
