"""Parts of the server on their own: hosts and signatures, progress, events, previews, recipes."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import errno
import io
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from tests.serve.conftest import png

from kandinsky22 import VQModel
from kandinsky22.errors import ConfigError, InputError
from kandinsky22.generation.previews import PreviewMap
from kandinsky22.serve.app import build_app
from kandinsky22.serve.events import KEPT_EVENTS, QUEUE_SIZE, EventHub
from kandinsky22.serve.failures import ApiError, is_disk_full
from kandinsky22.serve.files import Files
from kandinsky22.serve.gallery import Gallery
from kandinsky22.serve.hints import _depth_process, make_hint
from kandinsky22.serve.messages import Alive, JobProgress
from kandinsky22.serve.model_facts import model_facts
from kandinsky22.serve.pictures import repainted_area
from kandinsky22.serve.progress import ProgressReporter, StageTimes
from kandinsky22.serve.requests import batch_key, check_job, generation_request
from kandinsky22.serve.schemas import HintRequest, JobRequest, Picture
from kandinsky22.serve.security import is_allowed_host
from kandinsky22.serve.settings import EMBEDDED_MODELS, ModelSettings, ServerSettings
from kandinsky22.serve.store import Store
from kandinsky22.serve.supervisor import Supervisor
from kandinsky22.serve.tokens import WINDOW_SECONDS, WRONG_TOKENS, TokenGuard, has_valid_signature, signature

TOKEN = "a token of tests"


def test_hosts() -> None:
    local = ServerSettings(allowed_hosts=("Studio.local",))
    for host in ("localhost", "localhost:1", "127.0.0.1:7822", "[::1]:7822", "STUDIO.local:443"):
        assert is_allowed_host(host, local), host
    for host in (
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "0.0.0.0",
        "192.168.1.5",
        "localhost:x",
        "a@localhost",
        "localhost/x",
    ):
        assert not is_allowed_host(host, local), host
    everywhere = ServerSettings(host="0.0.0.0", token=TOKEN)
    assert is_allowed_host("192.168.1.5:7822", everywhere)  # nobody can make an address point elsewhere
    assert not is_allowed_host("evil.example", everywhere)


def test_signatures_open_one_path_for_a_while() -> None:
    def opens(path: str, query: str, method: str = "GET") -> bool:
        return has_valid_signature({"method": method, "path": path, "query_string": query.encode()}, TOKEN)

    expires = int(time.time()) + 60
    query = f"expires={expires}&signature={signature('/a', expires, TOKEN)}"
    assert opens("/a", query)
    assert not opens("/b", query) and not opens("/a", query, "DELETE")
    assert not opens("/a", query.replace(str(expires), str(expires + 1)))
    assert not opens("/a", f"expires=1&signature={signature('/a', 1, TOKEN)}")
    assert not opens("/a", "") and not opens("/a", "expires=x&signature=y") and not opens("/a", f"{query}&{query}")


def test_wrong_tokens_are_limited_per_client() -> None:
    clock = [100.0]
    guard = TokenGuard(TOKEN, lambda: clock[0])

    def opens(token: str, client: str = "192.168.1.5") -> bool:
        return guard.opens({"client": (client, 1), "method": "GET"}, {"authorization": f"Bearer {token}"})

    for _ in range(5 * WRONG_TOKENS):
        assert not opens("an old cookie") and not guard.opens({"client": ("192.168.1.5", 1), "method": "GET"}, {})
    assert opens(TOKEN)  # the same wrong token is one guess
    for guess in range(WRONG_TOKENS):
        assert not opens(f"guess {guess}")
    assert not opens(TOKEN)  # otherwise the limit would not limit anything
    assert opens(TOKEN, "192.168.1.6")
    assert 0 < guard.seconds_to_wait({"client": ("192.168.1.5", 2)}) <= WINDOW_SECONDS
    clock[0] += WINDOW_SECONDS
    assert opens(TOKEN) and guard.seconds_to_wait({"client": ("192.168.1.5", 2)}) == 0
    for guess in range(WRONG_TOKENS):
        assert not opens(f"guess {guess}", f"2001:db8:0:1::{guess:x}")
    assert not opens(TOKEN, "2001:db8:0:1::ffff") and opens(TOKEN, "2001:db8:0:2::1")


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="unless a token"):
        ServerSettings(host="0.0.0.0")
    with pytest.raises(InputError, match="8 characters"):
        ServerSettings(token="short")
    with pytest.raises(ConfigError, match="different ids"):
        ServerSettings(models=(EMBEDDED_MODELS[0], EMBEDDED_MODELS[0]))
    with pytest.raises(ConfigError, match="kind"):
        ModelSettings("a", "b", "other")


def test_progress_is_monotonic_over_stages_and_images() -> None:
    sent: list[JobProgress] = []
    reporter = ProgressReporter(
        "job",
        images=2,
        prior_steps=3,
        decoder_steps=4,
        times=StageTimes(prior=0.01, decoder=0.1, decode=0.05),
        send=sent.append,
        is_cancelled=lambda: False,
    )
    for image in range(2):
        reporter.begin(image)
        for step in range(3):
            reporter.step("prior", step + 1)
        for step in range(4):
            reporter.step("decoder", step + 1)
        reporter.end()
    fractions = [message.fraction for message in sent]
    assert fractions == sorted(fractions) and fractions[0] == 0 and 0.5 < fractions[-1] <= 1
    assert [message.stage for message in sent if message.image == 1][-1] == "decode"
    assert all(message.seconds_left is not None and message.seconds_left >= 0 for message in sent)


def test_listeners_get_their_events_and_what_they_missed() -> None:
    async def run() -> list[Any]:
        hub = EventHub()
        hub.publish("state", {"n": 0}, "a")
        first = next(iter(hub._kept)).id
        hub.publish("state", {"n": 1}, "a")
        hub.publish("preview", {"n": 2}, "a")  # previews are not kept
        hub.publish("state", {"n": 3}, "b")
        listener = hub.listen("a", after=first)
        hub.publish("end", {"n": 4}, "a")
        hub.close()
        return [event.data["n"] async for event in listener.events() if event is not None]

    assert asyncio.run(run()) == [1, 4]
    hub = EventHub()
    for _ in range(KEPT_EVENTS + 10):
        hub.publish("state", {}, "a")
    assert len(hub._kept) == KEPT_EVENTS


def test_a_listener_that_reads_nothing_takes_bounded_memory() -> None:
    async def run() -> int:
        hub = EventHub()
        listener = hub.listen(None)
        for number in range(20 * QUEUE_SIZE):
            hub.publish("state", {"n": number}, "a")
        await asyncio.sleep(0.1)
        return listener._queue.qsize()

    assert asyncio.run(run()) <= 4 * QUEUE_SIZE + 1


def supervised(tmp_path: Path) -> tuple[Supervisor, Gallery]:
    """Return a supervisor of two workers without processes, the first one with two jobs."""
    settings, files = ServerSettings(state=tmp_path, devices=("cpu", "meta"), lease_seconds=60), Files(tmp_path)
    gallery = Gallery(settings, Store(files.database), files, EventHub())
    supervisor = Supervisor(settings, gallery)
    for seed in (1, 2):
        gallery.submit(JobRequest(prompt="a star", seed=seed))
        for job in gallery.claim("worker-cpu", 1):
            supervisor.workers[0]._running[job.id] = job
    return supervisor, gallery


def test_a_suspended_computer_loses_no_attempt(tmp_path: Path) -> None:
    """All leases have expired then, although the workers still have their jobs."""
    supervisor, gallery = supervised(tmp_path)
    jobs = gallery.store.expired()
    assert jobs == []
    lost, _ = gallery.submit(JobRequest(prompt="a star", seed=3))
    gallery.claim("worker-that-has-gone", 1)
    with gallery.store.transaction() as connection:
        connection.execute("UPDATE jobs SET lease_until = 1")
    supervisor.workers[1]._handle(Alive())
    states = {job.id: job.state for job in gallery.store.jobs(state=None, group=None, before=None, limit=9)}
    assert states.pop(lost.id) == "queued" and set(states.values()) == {"running"}


def test_a_crash_on_a_full_disk_is_overcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor, gallery = supervised(tmp_path)
    requeue, failures = gallery.try_again, [sqlite3.OperationalError("database or disk is full")]

    def try_again(job: str, **options: Any) -> None:
        if failures:
            raise failures.pop()
        requeue(job, **options)

    monkeypatch.setattr(gallery, "try_again", try_again)
    supervisor.workers[0]._after_crash()
    assert gallery.store.counts() == {"queued": 2} and not supervisor.held_jobs()


def test_a_full_disk_is_recognised() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(sqlite3.OperationalError("database or disk is full"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(sqlite3.OperationalError("database is locked"))


def test_a_full_disk_is_reported_as_such(tmp_path: Path) -> None:
    app = build_app(ServerSettings(state=tmp_path))
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.post("/api/jobs", json={"prompt": "a star"}).status_code == 201
    app.state.services.store.rows("PRAGMA max_page_count = 1")  # the database then takes no further page
    response = client.post("/api/jobs", json={"prompt": "a star " * 1400})
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "disk_full" and "free some space" in response.text
    assert client.get("/api/jobs").json()["items"][0]["request"]["prompt"] == "a star"


def test_a_repeated_request_needs_its_pictures_no_more(tmp_path: Path) -> None:
    _, gallery = supervised(tmp_path)
    id = gallery.add_upload(png(), (96, 96))
    request = JobRequest(mode="variations", image=Picture(upload=id))
    first, _ = gallery.submit(request, "a key")
    gallery.remove_upload(id, "9999")
    assert gallery.submit(request, "a key") == (first, False)


def test_one_depth_map_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process stands for one that loads a large model."""
    stand_in = tmp_path / "kandinsky22.py"
    stand_in.write_text("import sys, time, PIL.Image as i; time.sleep(1); i.new('L', (8, 8)).save(sys.argv[-3])")
    monkeypatch.syspath_prepend(str(tmp_path))
    hint = HintRequest(kind="depth", image=Picture(upload="0" * 64))
    settings, image = ServerSettings(depth_model="a model"), Image.new("RGB", (8, 8))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(make_hint, hint, image, settings)
        while not _depth_process.locked():
            time.sleep(0.01)
        with pytest.raises(ApiError, match="in use"):
            make_hint(hint, image, settings)
        assert first.result().size == (8, 8)
    assert make_hint(hint, image, settings).size == (8, 8)


def test_previews_have_the_colours_of_the_picture() -> None:
    movq = VQModel.from_pretrained("embedded", subfolder="movq")
    picture = torch.full((1, 3, 128, 128), -0.8)
    picture[:, 0, :, 64:] = 0.9  # dark on the left, red on the right
    with torch.inference_mode():
        latents = movq.encode(picture).latents[0]
    url = PreviewMap(movq, "cpu").data_url(latents)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    width = pixels.shape[1]
    left, right = pixels[:, : width // 3].mean((0, 1)), pixels[:, -width // 3 :].mean((0, 1))
    assert np.abs(left - 25.5).max() < 60 and np.abs(right - (242, 25.5, 25.5)).max() < 60


def test_masks_of_transparency() -> None:
    image = Image.new("RGBA", (2, 1), (1, 2, 3, 255))
    image.putpixel((0, 0), (1, 2, 3, 0))
    mask = repainted_area(image)
    assert mask is not None and [mask.getpixel((x, 0)) for x in range(2)] == [255, 0]
    assert repainted_area(image.convert("RGB")) is None


def test_presets_and_schedulers_of_jobs() -> None:
    settings, model = ServerSettings(), EMBEDDED_MODELS[0]
    job = JobRequest(prompt="a", seed=3, count=2, quality="draft", steps=7, prior_scheduler="ddpm")
    request = generation_request(job, model, settings, "cpu", {})
    assert (request.scheduler, request.steps) == ("DPMSolverMultistepScheduler", 7)
    assert (request.prior_scheduler, request.prior_scheduler_settings) == ("DDPMScheduler", None)
    assert request.seeds == (3, 4)
    assert batch_key(job, model) == batch_key(job.model_copy(update={"prompt": "b", "seed": 9}), model)
    assert batch_key(job, model) != batch_key(job.model_copy(update={"steps": 8}), model)
    useless = JobRequest(mode="variations", image=Picture(upload="0" * 64), prior_steps=3)
    with pytest.raises(InputError, match="the prior samples only for texts"):
        check_job(useless, settings, {"image": (8, 8)})


def test_a_preset_that_the_model_lacks(tmp_path: Path) -> None:
    without = ModelSettings("mine", str(tmp_path))
    job = JobRequest(prompt="a", quality="instant")
    with pytest.raises(InputError, match=r"expected 'draft' or .* mine has no distilled"):
        check_job(job, ServerSettings(models=(without,)), {})
    assert model_facts(without)["presets"] == ["draft", "balanced", "best"]
    for model in EMBEDDED_MODELS:
        assert model_facts(model)["presets"] == ["instant", "draft", "balanced", "best"]
    (tmp_path / "other" / "distilled").mkdir(parents=True)
    other = ModelSettings("other", str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"other has no distilled"):
        check_job(job, ServerSettings(models=(other,)), {})
    (tmp_path / "other" / "distilled" / "pytorch_lora_weights.safetensors").touch()
    check_job(job, ServerSettings(models=(other,)), {})


def test_facts_of_models(tmp_path: Path) -> None:
    facts = model_facts(EMBEDDED_MODELS[0])
    assert facts["default_width"] == 128 and facts["defaults"]["steps"] > 1
    assert model_facts(ModelSettings("other", str(tmp_path)))["default_width"] == 512
