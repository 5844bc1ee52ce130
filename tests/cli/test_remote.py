"""`--server`: a running server generates the images of the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo
from tests.cli.helpers import Command, Result, assert_one_line, pixels, stored
from tests.pipelines.pictures import photo

from kandinsky22.cli.api_client import ApiClient, ServerError

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
TOKEN = "a-secret-of-tests"
PROMPT = "a red circle on a yellow background"
FAST = ("--steps", "2", "--prior-steps", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the embedded model, in a process of its own."""
    state = tmp_path_factory.mktemp("state")
    program = [sys.executable, "-m", "kandinsky22", "serve", "--port", "0", "--state", str(state), "--token", TOKEN]
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1"}
    with open(state / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, (state / "log").read_text("utf-8")
        yield line.split()[-1]
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def remote(server: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command with the server's address and token in the environment."""
    monkeypatch.setenv("KANDINSKY22_SERVER", server)
    monkeypatch.setenv("KANDINSKY22_TOKEN", TOKEN)
    return command


def local(command: Command, *arguments: object) -> Result:
    return command(*arguments, "--server", "none")


@pytest.mark.slow
def test_images_equal_those_generated_here(remote: Command) -> None:
    result = remote("generate", PROMPT, "--seed", 5, *FAST, "-o", "there.png")
    assert result.code == 0, result.err
    assert result.paths == [Path("there.png")]
    assert local(remote, "generate", PROMPT, "--seed", 5, *FAST, "-o", "here.png").code == 0
    np.testing.assert_array_equal(pixels(Path("there.png")), pixels(Path("here.png")))
    assert stored(Path("there.png")) == stored(Path("here.png"))
    again = local(remote, "generate", "--from", "there.png", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("there.png").read_bytes(), again.err
    assert remote("generate", "--from", "here.png", "-o", "repeated.png").code == 0
    assert stored(Path("repeated.png")) == stored(Path("here.png"))


@pytest.mark.slow
def test_series_names_and_json(remote: Command) -> None:
    result = remote("generate", PROMPT, "--seed", 5, 6, 9, "--json", *FAST, "-o", "cat.webp", "-q")
    lines = [json.loads(line) for line in result.out.splitlines()]
    names = ["cat-seed5.webp", "cat-seed6.webp", "cat-seed9.webp", "cat-sheet.webp"]
    assert [line["path"] for line in lines] == names, result.err
    assert [line["seed"] for line in lines] == [5, 6, 9, None] and lines[3]["recipe"]["seeds"] == [5, 6, 9]
    assert remote("generate", PROMPT, "--seed", 5, *FAST, "-o", "cat.webp").paths == [Path("cat.webp")]
    assert remote("generate", PROMPT, "--seed", 5, *FAST, "-o", "cat.webp").paths == [Path("cat-2.webp")]


@pytest.mark.slow
def test_every_subcommand_with_uploads(remote: Command) -> None:
    photo(1, 128, 128).save("photo.png")
    photo(2, 128, 128).save("photo.bmp")
    PIL.Image.new("L", (128, 128), 0).save("mask.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[30:90, 30:90] = 255
    PIL.Image.fromarray(mask).save("mask.png")
    lines: dict[str, list[str]] = {
        "img2img": [PROMPT, "--image", "photo.bmp", "--strength", "0.5", "--quality", "draft"],
        "inpaint": [PROMPT, "--image", "photo.png", "--mask", "mask.png", "--keep-pixels", *FAST],
        "control": [PROMPT, "--hint", "mask.png", *FAST],
        "mix": ["--text", PROMPT, "0.5", "--image", "photo.png", "0.5", *FAST],
        "variations": ["photo.png", "--quality", "draft"],
    }
    for name, arguments in lines.items():
        there = remote(name, *arguments, "--seed", "4", "-o", f"{name}.png")
        assert there.code == 0, (name, there.err)
        here = local(remote, name, *arguments, "--seed", "4", "-o", f"{name}-here.png")
        assert here.code == 0, (name, here.err)
        assert stored(Path(f"{name}.png")) == stored(Path(f"{name}-here.png")), name
        np.testing.assert_array_equal(pixels(Path(f"{name}.png")), pixels(Path(f"{name}-here.png")))


@pytest.mark.slow
def test_settings_of_schedulers_and_intervals(remote: Command) -> None:
    """A recipe may have settings that no preset has, and integers must stay integers."""
    options = ["--quality", "balanced", "--scheduler", "dpm-single", "--prior-guidance-interval", "0.2", "0.6", *FAST]
    there = remote("generate", PROMPT, "--seed", 5, *options, "-o", "there.png")
    assert there.code == 0, there.err
    assert local(remote, "generate", PROMPT, "--seed", 5, *options, "-o", "here.png").code == 0
    assert stored(Path("there.png")) == stored(Path("here.png"))
    assert stored(Path("there.png"))["prior_guidance_interval"] == [0.2, 0.6]
    recipe = stored(Path("here.png"))
    recipe["scheduler"] = "DPMSolverMultistepScheduler"
    recipe["scheduler_settings"] = {"timestep_spacing": "trailing", "solver_order": 3}
    info = PngInfo()
    info.add_text("kandinsky22", json.dumps(recipe))
    PIL.Image.new("RGB", (128, 128)).save("recipe.png", pnginfo=info)
    repeated = remote("generate", "--from", "recipe.png", "-o", "repeated.png")
    assert repeated.code == 0, repeated.err
    assert stored(Path("repeated.png"))["scheduler_settings"] == recipe["scheduler_settings"]


@pytest.mark.slow
def test_the_server_applies_the_distilled_adapter(remote: Command) -> None:
    options = [PROMPT, "--seed", 5, "--prior-steps", 2, "--quality", "instant"]
    there = remote("generate", *options, "-o", "there.png")
    assert there.code == 0, there.err
    assert local(remote, "generate", *options, "-o", "here.png").code == 0
    assert stored(Path("there.png")) == stored(Path("here.png"))
    assert [adapter["name"] for adapter in stored(Path("there.png"))["lora"]] == ["embedded/distilled"]
    np.testing.assert_array_equal(pixels(Path("there.png")), pixels(Path("here.png")))
    again = remote("generate", "--from", "here.png", "-o", "again.png")
    assert again.code == 0, again.err
    assert stored(Path("again.png")) == stored(Path("here.png"))
    draft = remote("generate", "--from", "here.png", "--quality", "draft", "-o", "draft.png")
    assert draft.code == 0 and "lora" not in stored(Path("draft.png")), draft.err


def test_what_the_api_cannot_express_is_refused(command: Command) -> None:
    for option in ("--lora", "--subject"):
        result = command("generate", PROMPT, option, "style.safetensors", "--server", "http://127.0.0.1:9")
        assert_one_line(result, 2, option, "no effect")


@pytest.mark.slow
def test_errors_of_the_server(remote: Command, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_line(remote("generate", PROMPT, "--device", "cpu"), 2, "--device", "no effect")
    assert_one_line(remote("generate", PROMPT, "--model", "nothing", "-q"), 1, server, "nothing", "embedded")
    assert_one_line(remote("generate", PROMPT, "--steps", 9999, "-q"), 1, server, "steps=9999")
    monkeypatch.setenv("KANDINSKY22_TOKEN", "wrong-secret")
    assert_one_line(remote("generate", PROMPT), 1, "token")
    assert not list(Path().glob("*.png"))


@pytest.mark.slow
def test_an_interrupt_cancels_the_job(server: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "kandinsky22", "generate", PROMPT, "--steps", "1000", "--server", server]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "KANDINSKY22_TOKEN": TOKEN}
    process = subprocess.Popen(
        [*program, "--seed", "77"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Background processes of shells ignore SIGINT, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    client = ApiClient(server, TOKEN)

    def job() -> dict[str, object]:
        jobs = client._json("GET", "/api/jobs?limit=20")["items"]
        return next((job for job in jobs if job["request"]["seed"] == 77), {})

    deadline = time.monotonic() + 60
    while job().get("state") != "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130 and messages.splitlines()[-1] == "kandinsky22: error: interrupted"
    while job()["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert job()["state"] == "cancelled"
    assert not list(tmp_path.glob("*.png"))


def test_an_address_where_nobody_answers(command: Command) -> None:
    assert_one_line(command("generate", PROMPT, "--server", "http://127.0.0.1:9"), 1, "127.0.0.1:9", "reached")
    assert_one_line(command("generate", PROMPT, "--server", "127.0.0.1"), 2, "--server", "http://127.0.0.1:7822")
    assert_one_line(command("generate", PROMPT, "--server", "http://a:99999"), 2, "--server")


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b""])
def test_an_answer_that_is_no_api(command: Command, answer: bytes) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            connection.recv(10_000)
            connection.sendall(answer)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        port = listening.getsockname()[1]
        assert command("generate", PROMPT, "--server", f"http://127.0.0.1:{port}").code == 1
        with pytest.raises(ServerError):
            ApiClient(f"http://127.0.0.1:{port + 1 if port < 65535 else 9}").job("x")
