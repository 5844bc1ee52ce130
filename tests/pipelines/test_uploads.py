"""Uploads to the Hub: `push_to_hub`, and `save_pretrained(push_to_hub=True)`, of pipelines and their components."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky22 import CheckpointError, DDIMScheduler, InputError, KandinskyV22Pipeline
from kandinsky22.pipelines.clip_image_processor import CLIPImageProcessor


class Hub(ThreadingHTTPServer):
    """Accepts repositories and commits, and keeps what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.created: list[dict[str, Any]] = []
        self.commits: list[tuple[str, list[dict[str, Any]]]] = []
        self.tokens: set[str | None] = set()
        self.refuse = False


class HubAnswer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(200, {"siblings": [], "id": "someone/picture", "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        host = f"http://{self.headers['Host']}"
        if self.server.refuse:
            self.answer(403, {"error": "not allowed"})
        elif self.path.startswith("/api/repos/create"):
            self.server.created.append(json.loads(body))
            self.answer(200, {"url": f"{host}/someone/picture"})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            self.server.commits.append((self.path, [json.loads(line) for line in body.splitlines()]))
            commit = f"{host}/someone/picture/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": commit, "commitOid": "0" * 40, "success": True})
        else:
            self.answer(200, {})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, which the client talks to."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    yield server
    server.shutdown()
    server.server_close()


def test_push_to_hub(decoder: KandinskyV22Pipeline, hub: Hub) -> None:
    address = decoder.push_to_hub("someone/picture", private=True, token="secret", commit_message="First")
    assert address.endswith("/someone/picture/commit/" + "0" * 40)
    assert hub.created[0]["name"] == "picture"
    assert "private" in json.dumps(hub.created[0])
    assert hub.tokens == {"Bearer secret"}
    (path, lines), *rest = hub.commits
    assert not rest
    assert "/commit/main" in path
    assert lines[0]["value"]["summary"] == "First"
    names = {line["value"]["path"] for line in lines[1:]}
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= names


def test_failed_uploads_are_one_line(decoder: KandinskyV22Pipeline, hub: Hub) -> None:
    hub.refuse = True
    with pytest.raises(CheckpointError, match=r"^cannot upload to someone/picture on the Hub: ") as caught:
        decoder.push_to_hub("someone/picture", token="secret")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    hub.refuse = False
    for repo_id in ("a/b/c", "", 5):
        with pytest.raises(InputError, match=r"^repo_id="):
            decoder.push_to_hub(repo_id, token="secret")  # type: ignore[arg-type]
    assert not hub.commits
    with pytest.raises(InputError, match=r"^variant="):
        decoder.push_to_hub("someone/picture", variant="a/b", token="secret")


def names_of(commit: tuple[str, list[dict[str, Any]]]) -> set[str]:
    """Return the names of the files in a commit."""
    return {line["value"]["path"] for line in commit[1][1:]}


def test_saving_uploads_the_folder_on_request(decoder: KandinskyV22Pipeline, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "own-name"
    decoder.save_pretrained(folder)
    decoder.save_pretrained(folder, push_to_hub=False)
    assert not hub.created and not hub.commits
    (folder / "README.md").write_text("of the user")
    decoder.save_pretrained(folder, push_to_hub=True, token="secret")
    assert hub.created[0]["name"] == "own-name"
    (commit,) = hub.commits
    assert commit[1][0]["value"]["summary"] == "Upload KandinskyV22Pipeline"
    stored = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names_of(commit) == stored >= {"README.md", "model_index.json"}
    decoder.save_pretrained(folder, push_to_hub=True, repo_id="someone/picture", subfolder="inside", private=True)
    assert hub.created[1]["name"] == "picture"
    assert names_of(hub.commits[1]) == {f"inside/{name}" for name in stored}


def test_arguments_of_saving_have_the_references_order(decoder: KandinskyV22Pipeline, hub: Hub, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path / "pickled", False)
    assert (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin").is_file()
    decoder.save_pretrained(tmp_path / "variant", True, "fp16", None, False)
    assert (tmp_path / "variant" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = KandinskyV22Pipeline.from_pretrained(tmp_path / "variant", variant="fp16")
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), decoder.unet.parameters(), strict=True))
    decoder.push_to_hub("someone/picture", "First", True, "secret", False, False, "fp16", "inside")
    (commit,) = hub.commits
    assert commit[1][0]["value"]["summary"] == "First"
    assert "inside/unet/diffusion_pytorch_model.fp16.bin" in names_of(commit)


def components(decoder: KandinskyV22Pipeline) -> list[tuple[Any, str]]:
    """Return components that can be uploaded by themselves, with the names of their files."""
    processor = CLIPImageProcessor(size={"shortest_edge": 32})
    return [(decoder.scheduler, "scheduler_config.json"), (processor, "preprocessor_config.json")]


def test_components_are_uploaded(decoder: KandinskyV22Pipeline, hub: Hub, tmp_path: Path) -> None:
    for component, name in components(decoder):
        hub.commits.clear()
        component.save_pretrained(tmp_path / type(component).__name__, True, repo_id="someone/picture", token="secret")
        assert [names_of(commit) for commit in hub.commits] == [{name}]
    hub.commits.clear()
    decoder.unet.save_pretrained(tmp_path / "unet", push_to_hub=True, repo_id="someone/picture", token="secret")
    decoder.unet.push_to_hub("someone/picture", None, None, "secret", False, False, "fp16", "unet")
    assert [names_of(commit) for commit in hub.commits] == [
        {"config.json", "diffusion_pytorch_model.safetensors"},
        {"unet/config.json", "unet/diffusion_pytorch_model.fp16.bin"},
    ]
    hub.commits.clear()
    decoder.scheduler.save_config(tmp_path / "again", push_to_hub=True, create_pr=False)
    address = decoder.scheduler.push_to_hub("someone/picture", None, None, "secret", False, True, None, "scheduler")
    assert address.endswith("/someone/picture/commit/" + "0" * 40)
    assert [names_of(commit) for commit in hub.commits] == [
        {"scheduler_config.json"},
        {"scheduler/scheduler_config.json"},
    ]


def test_failed_uploads_of_saving_and_of_schedulers_are_one_line(
    decoder: KandinskyV22Pipeline, hub: Hub, tmp_path: Path
) -> None:
    hub.refuse = True
    scheduler, options = DDIMScheduler(), {"repo_id": "someone/picture", "token": "secret"}
    for call in (
        lambda: decoder.save_pretrained(tmp_path, push_to_hub=True, **options),
        lambda: scheduler.save_pretrained(tmp_path, push_to_hub=True, **options),
        lambda: scheduler.push_to_hub(**options),
        lambda: decoder.movq.save_pretrained(tmp_path, push_to_hub=True, **options),
        lambda: decoder.movq.push_to_hub(**options),
    ):
        with pytest.raises(CheckpointError, match=r"^cannot upload to someone/picture on the Hub: ") as caught:
            call()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
    assert (tmp_path / "model_index.json").is_file(), "the save itself is complete"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "a/b/c"}, "repo_id='a/b/c'"),
        ({"push_to_hub": 1}, "push_to_hub=1"),
        ({"create_pr": "yes"}, "create_pr='yes'"),
        ({"private": "yes"}, "private='yes'"),
        ({"subfolder": True}, "subfolder=True"),
        ({"token": 5}, "token=the class int"),
        ({"use_flashpack": True}, r"\w+: arguments=\['use_flashpack'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_invalid_options_of_uploads(
    decoder: KandinskyV22Pipeline, hub: Hub, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for saved in (decoder, decoder.unet, DDIMScheduler(), CLIPImageProcessor()):
        with pytest.raises(InputError, match=f"^{message} is invalid"):
            saved.save_pretrained(tmp_path, **{"push_to_hub": True, **options})
    assert not hub.commits
    if next(iter(options)) in ("push_to_hub", "use_flashpack"):
        return
    for uploaded in (decoder, decoder.unet, DDIMScheduler()):
        with pytest.raises(InputError, match=f"^{message} is invalid"):
            uploaded.push_to_hub(**{"repo_id": "someone/picture", **options})


def test_options_without_an_upload_are_reported(
    decoder: KandinskyV22Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        decoder.save_pretrained(tmp_path, repo_id="someone/picture", private=True)
    assert "private, repo_id has no effect without push_to_hub=True" in caplog.text
