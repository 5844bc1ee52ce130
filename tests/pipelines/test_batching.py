"""Requests in one batch: each image equals the one that is generated alone, up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky22.cli.command_inputs import CommandInputs
from kandinsky22.cli.main import build_parser
from kandinsky22.cli.request import read_request
from kandinsky22.generation.batching import batch_key, decode_batch, encode_batch, generate_batch, job_key
from kandinsky22.generation.modes import MODES, Mode
from kandinsky22.generation.recipe import Recipe
from kandinsky22.generation.request import Request
from kandinsky22.generation.session import Job, Session, session_key

# Largest difference of a pixel between an image alone and in a batch, in 8-bit levels: the embedded model in float32.
ROUNDING = 1
SESSIONS: dict[object, Session] = {}
FAST = ["--steps", "3", "--prior-steps", "3", "--seed", "5"]
CASES = {
    "generate": [["generate", "a red circle"], ["generate", "a blue star"], ["generate", "a green square"]],
    "negative": [
        ["generate", "a red circle", "--negative-prompt", "blue"],
        ["generate", "a blue star", "--negative-prompt", "a red circle"],
    ],
    "threshold": [
        ["generate", prompt, "--guidance-threshold", "0.95", "--guidance-rescale", "0.5"]
        for prompt in ("a red circle", "a green square")
    ],
    "stochastic": [["generate", prompt, "--quality", "draft"] for prompt in ("a red circle", "a green square")],
    "brownian": [["generate", prompt, "--scheduler", "dpm-sde"] for prompt in ("a red circle", "a star")],
    "img2img": [["img2img", "a red star", "--image", name, "--strength", "0.7"] for name in ("a.png", "b.png")],
    "mix": [["mix", "--text", "a red star", "0.5", "--image", name, "0.5"] for name in ("a.png", "b.png")],
    "variations": [["variations", name, "--prompt", "a star"] for name in ("a.png", "b.png")],
    "inpaint": [["inpaint", "a star", "--image", name, "--mask", "m.png"] for name in ("a.png", "b.png")],
    "extend": [["inpaint", "a star", "--image", name, "--extend", "0,0,32,0"] for name in ("a.png", "b.png")],
}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save("a.png")
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save("b.png")
    Image.new("L", (128, 128), 0).save("m.png")
    Image.linear_gradient("L").resize((128, 128)).save("m.png")


@pytest.fixture(scope="module", autouse=True)
def _one_load_per_kind_of_decoder() -> Iterator[None]:
    yield
    SESSIONS.clear()


def _session(mode: Mode, request: Request) -> Session:
    key = session_key(mode, request)
    if key not in SESSIONS:
        SESSIONS[key] = Session(mode, request)
    return SESSIONS[key]


def _jobs(commands: list[list[str]]) -> list[Job]:
    jobs = []
    for arguments in commands:
        args = build_parser().parse_args([*arguments, *FAST])
        inputs = CommandInputs(None)
        request = read_request(args, None, inputs)
        mode = MODES[arguments[0]]
        jobs.append(_session(mode, request).prepare(mode, request, inputs.images))
        for pipe in (jobs[-1].networks.prior, jobs[-1].networks.decoder):
            pipe.set_progress_bar_config(disable=True)
    return jobs


@pytest.mark.parametrize("case", CASES)
def test_an_image_is_the_same_alone_and_in_a_batch(case: str, pictures: None) -> None:
    jobs = _jobs(CASES[case])
    assert len({job_key(job) for job in jobs}) == 1
    seeds = range(5, 5 + len(jobs))
    for job, seed, batched in zip(jobs, seeds, generate_batch(jobs, list(seeds)), strict=True):
        alone = job.generate(seed)
        difference = np.asarray(alone.image).astype(int) - np.asarray(batched.image).astype(int)
        assert abs(difference).max() <= ROUNDING, case
        assert batched.recipe == dataclasses.replace(alone.recipe, batch_size=len(jobs))


def test_a_batch_of_one_gives_the_same_bits() -> None:
    (job,) = _jobs(CASES["negative"][:1])
    alone, (batched,) = job.generate(3), generate_batch([job], [3])
    np.testing.assert_array_equal(np.asarray(alone.image), np.asarray(batched.image))
    assert alone.recipe == batched.recipe


def test_the_order_of_a_batch_does_not_matter() -> None:
    jobs, seeds = _jobs(CASES["generate"]), [1, 2, 3]
    forward = generate_batch(jobs, seeds)
    backward = generate_batch(jobs[::-1], seeds[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        difference = np.asarray(one.image).astype(int) - np.asarray(other.image).astype(int)
        assert abs(difference).max() <= ROUNDING


def test_a_job_like_another_one_equals_a_job_of_its_own() -> None:
    jobs = _jobs(CASES["generate"])
    session = _session(jobs[1].mode, jobs[1].request)
    first = session.prepare(jobs[0].mode, jobs[0].request, {})
    like = session.prepare(jobs[1].mode, jobs[1].request, {}, like=first)
    assert (like.request, like.recipe) == (jobs[1].request, jobs[1].recipe)
    assert like.networks is first.networks


def test_larger_batches_of_the_prior_feed_smaller_ones_of_the_decoder() -> None:
    jobs = _jobs(CASES["generate"])
    embeddings = encode_batch(jobs, [1, 2, 3])
    parts = [*decode_batch(jobs[:2], embeddings[:2]), *decode_batch(jobs[2:], embeddings[2:])]
    for image, whole in zip(parts, generate_batch(jobs, [1, 2, 3]), strict=True):
        assert abs(np.asarray(image).astype(int) - np.asarray(whole.image).astype(int)).max() <= ROUNDING


def test_requests_of_different_settings_do_not_share_a_batch() -> None:
    (job,) = _jobs(CASES["generate"][:1])
    key = batch_key(job.mode, job.request)
    assert batch_key(job.mode, dataclasses.replace(job.request, prompt="other", seeds=(9,))) == key
    for change in (
        {"steps": 9},
        {"width": 64, "height": 64},
        {"negative_prompt": "x"},
        {"scheduler_settings": {"a": 1}},
    ):
        assert batch_key(job.mode, dataclasses.replace(job.request, **change)) != key
        hash(batch_key(job.mode, dataclasses.replace(job.request, **change)))


def test_recipes_without_a_batch_size_are_read() -> None:
    (job,) = _jobs(CASES["generate"][:1])
    sized = dataclasses.replace(job.recipe, width=64, height=64, seeds=(1,))
    alone = Recipe.from_json(sized.to_json(), origin="x")
    batched = dataclasses.replace(alone, batch_size=8)
    assert "batch_size" not in alone.to_json()
    assert alone.batch_size is None
    assert Recipe.from_json(batched.to_json(), origin="x") == batched
    assert ("batch size", "8") in batched.summary()


def test_a_series_on_a_gpu_runs_in_batches_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is replaced by one that says that it is a GPU, and by one whose memory holds two images."""
    from kandinsky22.generation import batching

    sizes: list[int] = []

    def limited(jobs: Sequence[Job], seeds: Sequence[int], on_step: object) -> list[str]:
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [f"image {seed}" for seed in seeds]

    (job,) = _jobs(CASES["generate"][:1])
    networks = dataclasses.replace(job.networks, device=torch.device("cuda"))
    monkeypatch.setattr(batching, "generate_batch", limited)
    series = batching.generate_series(dataclasses.replace(job, networks=networks), range(10))
    assert list(series) == [f"image {seed}" for seed in range(10)]
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
