"""The container: the Dockerfile passes a linter, and what it and the compose file refer to exists.

There is no daemon where tests run, so no image is built here.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kandinsky22.cli.main import build_parser

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def instructions(name: str) -> list[str]:
    """Return the arguments of all instructions with this name, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def test_the_linter_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_copied_files_exist_and_are_not_ignored() -> None:
    copied = [shlex.split(line)[:-1] for line in instructions("COPY") if "--from" not in line]
    names = [name.removeprefix("./") for line in copied for name in line]
    assert set(names) >= {"pyproject.toml", "src", "constraints.txt"}
    for name in names:
        assert (ROOT / name).exists() and f"!{name}" in IGNORED
    assert IGNORED[1] == "*"  # nothing else reaches the image: no state, no pictures, no history


def test_the_process_is_not_root_and_keeps_its_state_in_one_volume(compose: dict[str, Any]) -> None:
    assert instructions("USER") == ["10001:10001"] and instructions("VOLUME") == ["/state"]
    variables = dict(re.findall(r"(\w+)=(\S+)", instructions("ENV")[-1]))
    folders = {value for name, value in variables.items() if name not in ("PATH", "PYTHONUNBUFFERED")}
    assert {"HOME", "HF_HOME", "XDG_CONFIG_HOME", "KANDINSKY22_STATE"} <= variables.keys()
    assert all(folder == "/state" or folder.startswith("/state/") for folder in folders)
    for service in compose["services"].values():
        assert service["volumes"] == ["state:/state"] and service["read_only"] is True
    assert list(compose["volumes"]) == ["state"]


def test_the_command_is_one_that_the_program_has() -> None:
    (command,), (port,) = instructions("CMD")[-1:], instructions("EXPOSE")
    words = re.findall(r'"([^"]*)"', command)
    args = build_parser().parse_args(words)
    assert (args.host, str(args.port)) == ("0.0.0.0", port)


def test_profiles_ports_and_health(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {"cpu": ["cpu"], "cuda": ["cuda"]}
    (port,) = instructions("EXPOSE")
    for service in services.values():
        assert service["ports"] == [f"127.0.0.1:${{KANDINSKY22_PORT:-{port}}}:{port}"]
        assert service["environment"]["KANDINSKY22_TOKEN"].startswith("${KANDINSKY22_TOKEN:?")
        assert f"http://127.0.0.1:{port}/healthz" in service["healthcheck"]["test"][-1]
        assert service["build"]["context"] == "."
        arguments = {line.split("=")[0] for line in instructions("ARG")}
        assert set(service["build"].get("args", {})) <= arguments
        compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    assert services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
