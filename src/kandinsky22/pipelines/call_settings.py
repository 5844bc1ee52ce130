"""Settings of the calls of a pipeline: default arguments that suit its checkpoint, and options of progress bars."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kandinsky22.errors import InputError, invalid
from kandinsky22.pipelines.progress_bars import checked_options, new_bar

if TYPE_CHECKING:
    from tqdm import tqdm


class CallSettingsMixin:
    """Mixin for pipelines: default arguments and progress bars of their calls."""

    def __init__(self) -> None:
        self._generation_defaults: dict[str, Any] = {}
        self._progress_bar_config: dict[str, Any] = {}

    # Defaults

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Call arguments that suit this checkpoint best, to be passed to the pipeline; empty if it has none.

        Raises:
            InputError: If it is set to arguments that the pipeline does not accept.
        """
        return dict(self._generation_defaults)

    @generation_defaults.setter
    def generation_defaults(self, arguments: Mapping[str, Any]) -> None:
        if not isinstance(arguments, Mapping):
            raise invalid("generation_defaults", arguments, "a mapping of call arguments by name")
        names: list[Any] = list(arguments)
        if unnamed := [name for name in names if not isinstance(name, str)]:
            raise invalid("a key of generation_defaults", unnamed[0], "the name of an argument")
        if unknown := sorted(set(names) - self._call_arguments()):
            raise InputError(f"generation_defaults: {type(self).__name__} does not accept {', '.join(unknown)}")
        self._set_defaults(arguments)

    def _set_defaults(self, arguments: Mapping[str, Any]) -> None:
        """Set the defaults that this class accepts: one checkpoint serves several classes."""
        accepted = self._call_arguments()
        self._generation_defaults = {name: value for name, value in arguments.items() if name in accepted}

    def _copy_defaults(self, other: CallSettingsMixin, prefix: str) -> None:
        """Set those defaults of a pipeline whose names have this prefix, without the prefix."""
        defaults = other._generation_defaults
        self._set_defaults(
            {name.removeprefix(prefix): value for name, value in defaults.items() if name.startswith(prefix)}
        )

    def _call_arguments(self) -> set[str]:
        # not getattr: a class without __call__ would give that of its metaclass
        call = next((vars(base)["__call__"] for base in type(self).__mro__ if "__call__" in vars(base)), None)
        return set() if call is None else set(inspect.signature(call).parameters) - {"self"}

    # Progress bars

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of tqdm for all progress bars.

        Args:
            **options: Arguments of tqdm. Without `disable`, bars show if standard error is a terminal.

        Raises:
            InputError: If tqdm does not accept them. The options have not changed then.
        """
        self._progress_bar_config = checked_options(options)

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """Return a tqdm progress bar.

        Args:
            iterable: What the bar iterates over; None for a bar that is updated by hand.
            total: Number of steps of a bar without iterable; None with one.

        Raises:
            InputError: Unless exactly one of the arguments is given, and valid.
        """
        return new_bar(iterable, total, self._progress_bar_config)
