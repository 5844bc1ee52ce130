"""Settings of the optimisations: nesting, threads, the environment variable, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import kandinsky22
from kandinsky22.kernels import settings
from kandinsky22.kernels.settings import NAMES, Optimisations, current, optimisations


def test_everything_is_on_by_default() -> None:
    assert current() == Optimisations()
    assert all(getattr(current(), name) is True for name in NAMES)


def test_changes_last_as_long_as_the_context_and_nest() -> None:
    with optimisations(winograd=False) as outer:
        assert outer is current()
        assert current() == dataclasses.replace(Optimisations(), winograd=False)
        with pytest.raises(ZeroDivisionError), optimisations(packed_conv=False, winograd=True):
            assert current() == dataclasses.replace(Optimisations(), packed_conv=False)
            raise ZeroDivisionError
        assert current() is outer
    assert current() == Optimisations()


def test_a_change_is_relative_to_the_settings_on_entry() -> None:
    later = optimisations(packed_conv=False)
    with optimisations(winograd=False), later:
        assert (current().winograd, current().packed_conv) == (False, False)


def test_other_threads_are_not_affected() -> None:
    with optimisations(winograd=False), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: current().winograd).result()
        assert not current().winograd


def test_unknown_names_and_other_values_are_refused() -> None:
    with pytest.raises(TypeError, match=r"optimisations\(\) has no field 'winogard': expected names among .*winograd"):
        optimisations(winogard=False)
    with pytest.raises(TypeError, match="winograd=0 is invalid: expected True or False"):
        optimisations(winograd=0)  # type: ignore[arg-type]
    assert current() == Optimisations()


def test_it_is_a_public_name() -> None:
    assert kandinsky22.optimisations is optimisations


PROGRAM = (
    "from kandinsky22.kernels.settings import NAMES, current; print(*(n for n in NAMES if not getattr(current(), n)))"
)


@pytest.mark.parametrize(
    ("value", "disabled", "warning"),
    [
        ("", "", None),
        ("winograd, packed_conv,", "packed_conv winograd", None),
        ("all", " ".join(NAMES), None),
        ("winogard,winograd", "winograd", "names unknown optimisations, which are ignored: winogard; expected"),
    ],
)
def test_the_environment_variable_sets_defaults(value: str, disabled: str, warning: str | None) -> None:
    environment = {"KANDINSKY22_DISABLE": value}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == disabled
    assert (warning or "") in result.stderr
    assert bool(result.stderr) == (warning is not None)


def test_every_field_is_documented() -> None:
    assert all(f"        {name}: " in str(Optimisations.__doc__) for name in NAMES)
    assert settings.ENVIRONMENT_VARIABLE == "KANDINSKY22_DISABLE"
