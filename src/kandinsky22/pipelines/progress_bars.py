"""Progress bars of pipelines: tqdm's, with options that were checked when they were set."""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from kandinsky22.errors import InputError, invalid
from kandinsky22.kernels.locks import ObjectLock
from kandinsky22.verbosity import is_progress_bar_enabled

if TYPE_CHECKING:
    from tqdm import tqdm


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of tqdm after trying them on a bar that is not shown.

    Args:
        options: Arguments of tqdm.

    Raises:
        InputError: If tqdm does not accept them, or if they are what each bar has of its own.
    """
    from tqdm.std import tqdm as plain_tqdm

    # Bars of notebooks have `display`, too. `gui` is for tqdm itself.
    accepted = {*inspect.signature(plain_tqdm.__init__).parameters, "display"} - {"self", "iterable", "total", "kwargs"}
    if unknown := sorted(set(options) - accepted):
        raise invalid("a progress bar's option", unknown[0], f"one of {', '.join(sorted(accepted - {'gui'}))}")
    if options.get("file") is not None and not hasattr(options["file"], "write"):
        raise invalid("file", options["file"], "a file that is open for writing, or None")
    tried = {name: value for name, value in options.items() if name not in ("disable", "display", "file", "gui")}
    try:
        bool(options.get("disable"))
        with _with_own_lock(plain_tqdm)(total=1, file=io.StringIO(), **tried) as bar:
            bar.update(1)
    except Exception as error:  # tqdm itself checks nothing
        reason = " ".join(str(error).split())
        raise invalid(
            "a progress bar's options", dict(options), "what tqdm accepts", f"it reports: {reason}"
        ) from error
    return dict(options)


def new_bar(iterable: Iterable[Any] | None, total: int | None, options: Mapping[str, Any]) -> tqdm[Any]:
    """Return a progress bar.

    Args:
        iterable: What the bar iterates over; None for a bar that is updated by hand.
        total: Number of steps of a bar without iterable; None with one.
        options: Arguments of tqdm.

    Raises:
        InputError: Unless exactly one of `iterable` and `total` is given, and valid.
    """
    from tqdm.auto import tqdm as auto_tqdm

    if (iterable is None) == (total is None):
        raise InputError("progress_bar: expected either an iterable or total=")
    steps: Any = total
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise invalid("total", total, "a number of steps, an integer from 0")
    shown = {"disable": None, **options}
    if not is_progress_bar_enabled():
        shown["disable"] = True
    try:
        if iterable is not None:
            iter(iterable)
        return _with_own_lock(auto_tqdm)(iterable, total=total, **shown)
    except Exception as error:
        raise invalid("iterable", iterable, "an iterable whose length, if it has one, can be read") from error


@functools.cache
def _with_own_lock(bars: type[tqdm[Any]]) -> type[tqdm[Any]]:
    """Return a class of tqdm's bars with a lock that only bars of this library share.

    tqdm's own lock is shared with forked processes. One that is killed while it holds the lock would block every bar,
    also hidden ones.
    """
    own: Any = type("Bar", (bars,), {})
    own.set_lock(ObjectLock())
    return cast("type[tqdm[Any]]", own)
