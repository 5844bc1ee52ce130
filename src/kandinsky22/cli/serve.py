"""`kandinsky22 serve`: run the application; `kandinsky22 gallery rebuild`: rebuild its database from its pictures."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from kandinsky22.cli import options
from kandinsky22.errors import MissingDependencyError

TOKEN_VARIABLE = "KANDINSKY22_TOKEN"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommands `serve` and `gallery`.

    Args:
        subparsers: Subcommands of the command's parser.
    """
    parser = subparsers.add_parser(
        "serve",
        help="run the studio and its API",
        description="Run the studio in the browser, and the API that programs use.",
        epilog="example: kandinsky22 serve --port 7822",
        allow_abbrev=False,
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1); any other one requires a token")
    parser.add_argument("--port", type=options.integer(0, 65535), help="port (default: 7822; 0 takes a free one)")
    parser.add_argument("--token", help=f"secret that every request must carry (default: ${TOKEN_VARIABLE})")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="folder of pictures and jobs")
    parser.set_defaults(run=run)
    _add_gallery_parser(subparsers)


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
    rebuild.set_defaults(run=run_rebuild)


def run(args: argparse.Namespace) -> None:
    """Run the server until it is interrupted.

    Args:
        args: Parsed command line.

    Raises:
        MissingDependencyError: If the packages of the extra `serve` are not installed.
        KandinskyError: If a setting is invalid, or if the address or the state folder is in use.
    """
    require_packages()
    from kandinsky22.serve.run import serve

    serve(server_settings(args), on_start=lambda address: print(f"kandinsky22 serves at {address}", flush=True))


def server_settings(args: argparse.Namespace) -> Any:
    """Return the settings of a command line.

    Args:
        args: Parsed command line.
    """
    from kandinsky22.serve.settings import ServerSettings

    names = {field.name for field in dataclasses.fields(ServerSettings)}
    values = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if "token" not in values and (token := os.environ.get(TOKEN_VARIABLE)):
        values["token"] = token
    return ServerSettings(**values)


def run_rebuild(args: argparse.Namespace) -> None:
    """Rebuild the database of a state folder.

    Args:
        args: Parsed command line.

    Raises:
        InputError: If a server uses the folder.
    """
    require_packages()
    from kandinsky22.serve.files import Files, lock_folder
    from kandinsky22.serve.gallery import rebuild
    from kandinsky22.serve.settings import ServerSettings
    from kandinsky22.serve.store import Store

    settings = ServerSettings(state=args.state)
    lock_folder(settings.state_folder)
    files = Files(settings.state_folder)
    counts = rebuild(files, Store(files.database), settings.max_upload_pixels)
    print(", ".join(f"{number} {name}" for name, number in counts.items()))


def require_packages() -> None:
    """Raise an error unless the packages of the extra `serve` are installed.

    Raises:
        MissingDependencyError: If one is missing.
    """
    import importlib.util

    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(
            f"serve requires {', '.join(missing)}; install it with: pip install 'kandinsky22[serve]'"
        )
