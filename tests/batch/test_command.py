"""`kandinsky22 batch` with the embedded model: pictures of the other commands, stages apart, measured batch sizes."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.batch.kills import await_progress, command_line, contents, entries, workers_of

from kandinsky22.batch import batch_sizes
from kandinsky22.batch.drawing import DrawOptions, ShardDrawer
from kandinsky22.batch.formats import FORMATS, read_shard
from kandinsky22.batch.items import Item, ItemOptions
from kandinsky22.batch.manifest import Manifest
from kandinsky22.batch.ray_run import RayOptions
from kandinsky22.batch.requests import RequestOptions
from kandinsky22.batch.row_settings import FIELDS
from kandinsky22.batch.rows import RowFile
from kandinsky22.batch.run import RunOptions
from kandinsky22.batch.shards import ShardTask
from kandinsky22.batch.sources import RowSource
from kandinsky22.batch.storage import LocalFolder
from kandinsky22.cli import batch
from kandinsky22.cli.main import build_parser, main
from kandinsky22.errors import InputError, MissingDependencyError
from kandinsky22.generation.stages import NanError

FAST = ["--steps", "2", "--prior-steps", "2", "-q"]
PROMPTS = ["a red circle", "a blue star", "a green square"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save("photo.png")
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in PROMPTS]
    rows += [{"prompt": "a star", "image": "photo.png", "strength": 0.5}, {"prompt": "a star", "size": "64x64"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def _samples(folder: Path, format: str) -> list[Any]:
    manifest = Manifest(LocalFolder(folder))
    names = [manifest.entries[shard].name for shard in sorted(manifest.entries)]
    return [sample for name in names if name for sample in read_shard(FORMATS[format], folder / name)]


@pytest.mark.slow
def test_a_batch_of_one_gives_the_bits_of_the_other_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "rows.jsonl", "-o", "out", "--batch-size", "1", *FAST]) == 0
    assert capsys.readouterr().out == "out\n"
    metadata = [json.loads(line) for line in Path("out/00000/metadata.jsonl").read_text().splitlines()]
    assert [line["width"] for line in metadata] == [128, 128, 128, 128, 64]
    command = ["generate", PROMPTS[1], "--seed", str(metadata[1]["seed"]), "-o", "alone.png", *FAST]
    assert main(command) == 0
    np.testing.assert_array_equal(_pixels(Path("alone.png")), _pixels(Path("out/00000/000000001.png")))
    # The recipe in a picture repeats it.
    assert main(["img2img", "--from", "out/00000/000000003.png", "-o", "again.png", "-q"]) == 0
    np.testing.assert_array_equal(_pixels(Path("again.png")), _pixels(Path("out/00000/000000003.png")))


@pytest.mark.slow
def test_larger_batches_say_so_in_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "rows.jsonl", "-o", "one", "--batch-size", "1", *FAST]) == 0
    assert main(["batch", "rows.jsonl", "-o", "many", "--batch-size", "8", *FAST]) == 0
    for name in ("000000000.png", "000000002.png", "000000004.png"):
        difference = _pixels(Path("one/00000", name)).astype(int) - _pixels(Path("many/00000", name)).astype(int)
        assert abs(difference).max() <= 1
    capsys.readouterr()
    assert main(["generate", "--from", "many/00000/000000000.png", "-o", "again.png"]) == 0
    assert "generated in a batch of up to 8" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_can_be_drawn_again_without_the_prior(
    folder: Path, capsys: pytest.CaptureFixture[str], format: str = "webdataset"
) -> None:
    common = ["--format", format, "--batch-size", "4", *FAST]
    assert main(["batch", "rows.jsonl", "-o", "whole", "--keep-embeddings", *common]) == 0
    assert main(["batch", "rows.jsonl", "-o", "prior", "--stage", "prior", *common]) == 0
    assert main(["batch", "prior", "-o", "drawn", "--stage", "decoder", "--keep-embeddings", *common[:4], "-q"]) == 0
    whole, prior, drawn = (_samples(Path(name), format) for name in ("whole", "prior", "drawn"))
    assert len(whole) == len(prior) == len(drawn) == 5
    damaged = next(Path("prior").glob("*.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert main(["batch", "prior", "-o", "again", "--stage", "decoder", "-q"]) == 1
    assert "shard 00000.tar of prior is missing or has changed" in capsys.readouterr().err
    for one, stored, other in zip(whole, prior, drawn, strict=True):
        assert stored.image is None
        np.testing.assert_array_equal(one.embedding.vectors, stored.embedding.vectors)
        with Image.open(io.BytesIO(one.image)) as first, Image.open(io.BytesIO(other.image)) as second:
            np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
            assert first.info["kandinsky22"] == second.info["kandinsky22"]


def test_late_settings_of_the_prior_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prior").mkdir()
    assert main(["batch", "prior", "-o", "drawn", "--stage", "decoder", "-q"]) == 1
    assert "not the output folder of a batch" in capsys.readouterr().err
    assert main(["batch", "prior", "-o", "drawn", "--stage", "decoder", "--prior-steps", "3", "-q"]) == 1
    assert "prior_steps would have no effect" in capsys.readouterr().err
    assert main(["batch", "prior", "-o", "drawn", "--stage", "decoder", "--column", "prompt=x", "-q"]) == 1
    assert "--column would have no effect" in capsys.readouterr().err
    assert main(["batch", "prior", "-o", "drawn", "--stage", "decoder", "-n", "2", "-q"]) == 1
    assert "-n would have no effect" in capsys.readouterr().err


@pytest.mark.slow
def test_a_late_strength_of_the_prior_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe would name a strength with which no embedding was computed."""
    rows = [
        {"prompt": "a star", "image": "photo.png", "mode": "variations"},
        {"prompt": "a star", "image": "photo.png", "mode": "variations", "strength": 0.5},
        {"prompt": "a star", "image": "photo.png"},
        {"prompt": "a star"},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["batch", "rows.jsonl", "-o", "prior", "--stage", "prior", *FAST]) == 0
    capsys.readouterr()
    late = ["batch", "prior", "-o", "drawn", "--stage", "decoder", "--batch-size", "1", "-q", "--strength", "0.9"]
    assert main(late) == 1
    error = capsys.readouterr().err
    assert "row 1: strength=0.9 would have no effect: in this row it concerns the prior" in error
    assert "1 of 4 pictures cannot be drawn" in error
    assert main([*late, "--skip-bad"]) == 0
    strengths = [sample.metadata["recipe"].get("strength") for sample in _samples(Path("drawn"), "files")]
    assert strengths == [0.5, 0.9, None]


@pytest.mark.slow
def test_late_settings_of_both_stages_are_those_of_the_prior(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a star", "size": "64x64"}\n')
    adapter = "embedded/distilled"
    common = ["--batch-size", "1", *FAST[:2], "-q"]
    for output, options in (("plain", []), ("adapted", ["--lora", adapter])):
        assert main(["batch", "rows.jsonl", "-o", output, "--stage", "prior", *options, *FAST]) == 0
    for source, options, words in (
        (
            "plain",
            ["--lora", adapter],
            "lora=['embedded/distilled'] is invalid: expected ['none'], with which the prior",
        ),
        ("adapted", ["--lora", "none"], "lora=['none'] is invalid: expected ['embedded/distilled']"),
        ("plain", ["--quantize", "int8"], "quantize='int8' is invalid: expected 'none'"),
        ("plain", ["--engine", "openvino"], "engine='openvino' is invalid: expected 'torch'"),
    ):
        assert main(["batch", source, "-o", "drawn", "--stage", "decoder", *common, *options]) == 1
        assert words in capsys.readouterr().err
    assert not Path("drawn").exists()
    unchanged = ["--lora", "none", "--quantize", "none"]
    assert main(["batch", "plain", "-o", "one", "--stage", "decoder", *common, *unchanged]) == 0
    assert main(["batch", "adapted", "-o", "two", "--stage", "decoder", *common, "--lora", adapter]) == 0
    (sample,) = _samples(Path("two"), "files")
    assert [each["name"] for each in sample.metadata["recipe"]["lora"]] == [adapter]


def test_the_input_is_opened_before_the_folder_is_created(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "missing.jsonl", "-o", "out"]) == 1
    assert main(["batch", "photo.png", "-o", "out", "--stage", "decoder"]) == 1
    assert main(["batch", "rows.jsonl", "-o", ""]) == 1
    assert "folder='' is invalid" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["photo.png", "rows.jsonl"]


def test_the_help_states_what_the_options_do(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for name in ("batch", "compare", "generate"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        texts[name] = " ".join(capsys.readouterr().out.split())
    for name in ("batch", "compare"):
        assert "--from" not in texts[name] and "--seed N [" not in texts[name]
    assert "--from, none leaves out those of the recipe" in texts["generate"]
    assert "--seed N [N ...]" in texts["generate"] and "(default: random)" in texts["generate"]
    assert "hash of it and of the row's id, unless the row sets one (default: 0)" in texts["batch"]


def test_the_negative_prompt_may_be_in_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(*options: str) -> Any:
        args = build_parser().parse_args(["batch", "rows.jsonl", "-o", "out", *options])
        with batch._source(args) as source:
            return source.defaults.get("negative_prompt")

    Path("negative.txt").write_text("blue\n")
    assert stored("--negative-prompt", "@negative.txt") == "blue"
    assert stored("--negative-prompt", "@@negative.txt") == "@negative.txt"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"green")))
    assert stored("--negative-prompt", "-") == "green"
    assert main(["batch", "rows.jsonl", "-o", "out", "--negative-prompt", "@nofile.txt"]) == 1
    assert "negative_prompt='@nofile.txt' is invalid" in capsys.readouterr().err
    assert main(["batch", "-", "-o", "out", "--negative-prompt", "-"]) == 1
    assert "cannot both be read from standard input" in capsys.readouterr().err


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.csv").write_text("prompt,steps\na,none\n")
    assert main(["batch", "bad.csv", "-o", "out"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("kandinsky22: row 1: steps='none' is invalid")
    assert lines[-1].startswith("kandinsky22: error: 1 of 1 pictures cannot be drawn")
    Path("bad.csv").write_text("prompt,steps\n" + "a,none\n" * 150)
    assert main(["batch", "bad.csv", "-o", "out", "-q"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 151  # all faults, also of quiet runs
    for column, words in (("caption=prompt", "--column='caption' is invalid"), ("seed=sed", "column='sed' is invalid")):
        assert main(["batch", "rows.jsonl", "-o", "out", "-q", "--column", column]) == 1
        assert words in capsys.readouterr().err
    assert main(["batch", "rows.unknown", "-o", "out"]) == 1
    assert "input='rows.unknown' is invalid" in capsys.readouterr().err
    for arguments in (
        ["--seed", "1", "2"],
        ["--workers", "2", "--ray"],
        ["--column", "prompt"],
        ["--ray-decoder-actors", "2"],
        ["--stage", "prior", "--previews"],
        ["--ray-prior-actors", "1"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["batch", "rows.jsonl", "-o", "out", *arguments])
        assert stop.value.code == 2


@pytest.mark.slow
def test_rows_come_from_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.BytesIO):
        @property
        def buffer(self) -> io.BytesIO:
            return self

    content = b'{"caption": "a star", "image": "photo.png", "mode": "variations"}\n'
    monkeypatch.setattr(sys, "stdin", Pipe(content))
    assert main(["batch", "-", "-o", "out", "--column", "prompt=caption", "--batch-size", "2", *FAST]) == 0
    recipe = Image.open("out/00000/000000000.png").info["kandinsky22"]
    assert json.loads(recipe)["prompt"] == "a star"
    monkeypatch.setattr(sys, "stdin", Pipe(content))
    assert main(["batch", "-", "-o", "out", "--column", "prompt=caption", "--batch-size", "2", *FAST]) == 0


@pytest.mark.slow
def test_addresses_are_printed_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a star", "size": "64x64"}\n')
    assert main(["batch", "rows.jsonl", "-o", "memory://printed/run", "--batch-size", "1", *FAST]) == 0
    assert capsys.readouterr().out == "memory://printed/run\n"


def test_every_option_acts() -> None:
    """Options of shared groups that `batch` does not read would be accepted and ignored."""
    parser = build_parser()
    (subparsers,) = parser._subparsers._group_actions  # type: ignore[union-attr]
    options = {action.dest for action in subparsers.choices["batch"]._actions} - {"help"}  # type: ignore[call-overload, index]
    source = inspect.getsource(batch)
    unused = {name for name in options if name not in batch.DEFAULTS and f"args.{name}" not in source}
    assert unused == set()
    assert set(batch.DEFAULTS) <= FIELDS


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_a_fault_of_its_rows(folder: Path) -> None:
    (folder / "empty").mkdir()
    rows = [{"prompt": "a star", "size": "64x64"}, {"prompt": "a star", "model": "empty"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["batch", "rows.jsonl", "-o", "out", "--batch-size", "2", "--skip-bad", *FAST]) == 0
    (entry,) = Manifest(LocalFolder(folder / "out")).entries.values()
    assert entry.pictures == 1
    assert entry.failed["000000001"].startswith("row 2: ")


@pytest.mark.slow
def test_the_batch_size_is_measured_with_a_row_that_can_be_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty").mkdir()
    rows = [{"prompt": "a star", "model": "empty"}, {"prompt": "a star", "size": "64x64"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(batch_sizes, "measured_batch_size", lambda job: 2)
    assert main(["batch", "rows.jsonl", "-o", "strict", *FAST]) == 1
    assert "row 1: " in capsys.readouterr().err
    assert main(["batch", "rows.jsonl", "-o", "out", "--skip-bad", *FAST]) == 0
    manifest = Manifest(LocalFolder(folder / "out"))
    assert manifest.header is not None and manifest.header["batch_size"] == 2
    assert manifest.entries[0].failed["000000000"].startswith("row 1: ")
    assert manifest.entries[0].pictures == 1


# Drawing


def _task(prompts: list[str]) -> ShardTask:
    return ShardTask(0, tuple(Item(n, n + 1, str(n), n, {"prompt": p}, {}) for n, p in enumerate(prompts)))


def _options(**changes: Any) -> DrawOptions:
    requests = RequestOptions({"steps": 2, "prior_steps": 2, "size": "64x64"})
    return dataclasses.replace(DrawOptions(requests, batch_size=2), **changes)


@pytest.mark.slow
def test_the_prior_of_the_next_shard_runs_in_a_thread(tmp_path: Path) -> None:
    """What runs on GPUs, here on the CPU: the same pictures as one stage after the other."""
    drawer, tasks = ShardDrawer(_options()), [_task(PROMPTS[:2]), _task(PROMPTS[1:])]
    overlapping = [drawn for _, drawn in drawer.draw_overlapping(iter(tasks))]
    serial = [drawn for _, drawn in drawer.draw_all(iter(tasks))]
    assert [[sample.image for sample in drawn.samples] for drawn in overlapping] == [
        [sample.image for sample in drawn.samples] for drawn in serial
    ]


@pytest.mark.slow
def test_a_picture_with_nan_ends_the_run_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its batch are drawn alone."""
    from kandinsky22.batch import drawing

    original = drawing.decode_batch

    def fails_for_stars(jobs: Any, embeddings: Any) -> Any:
        if any(job.request.prompt == "a blue star" for job in jobs):
            raise NanError("NaN")
        return original(jobs, embeddings)

    monkeypatch.setattr(drawing, "decode_batch", fails_for_stars)
    with pytest.raises(NanError, match="row 2"):
        ShardDrawer(_options()).draw(_task(PROMPTS))
    drawn = ShardDrawer(_options(skip_bad=True)).draw(_task(PROMPTS))
    assert [sample.metadata["row"] for sample in drawn.samples] == [1, 3]
    assert drawn.failed == {"000000001": "row 2: NaN"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode_batch", "decode_batch"])
def test_a_picture_that_fails_while_it_is_drawn_ends_the_run_or_is_left_out(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Whatever the check of the rows could not know, such as the steps of a scheduler on the Hub."""
    from kandinsky22.batch import drawing

    original, errors = (
        getattr(drawing, stage),
        [InputError("steps=60 is invalid"), MissingDependencyError("no package")],
    )

    def fails_for_stars(jobs: Any, *arguments: Any) -> Any:
        if any(job.request.prompt == "a blue star" for job in jobs):
            raise errors[0]
        return original(jobs, *arguments)

    monkeypatch.setattr(drawing, stage, fails_for_stars)
    with pytest.raises(InputError, match="row 2: steps=60 is invalid"):
        ShardDrawer(_options()).draw(_task(PROMPTS))
    drawn = ShardDrawer(_options(skip_bad=True)).draw(_task(PROMPTS))
    assert [sample.metadata["row"] for sample in drawn.samples] == [1, 3]
    assert drawn.failed == {"000000001": "row 2: steps=60 is invalid"}
    del errors[0]
    with pytest.raises(MissingDependencyError, match="row 2: no package"):  # it is not the row's fault
        ShardDrawer(_options(skip_bad=True)).draw(_task(PROMPTS))


@pytest.mark.slow
def test_a_batch_beyond_the_memory_runs_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from kandinsky22.batch import drawing

    sizes: dict[str, list[int]] = {"encode_batch": [], "decode_batch": []}

    def limited(name: str, limit: int) -> Any:
        original = getattr(drawing, name)

        def run(jobs: Any, *arguments: Any) -> Any:
            sizes[name].append(len(jobs))
            if len(jobs) > limit:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return original(jobs, *arguments)

        return run

    whole = ShardDrawer(_options(batch_size=1)).draw(_task(PROMPTS))
    monkeypatch.setattr(drawing, "encode_batch", limited("encode_batch", 2))
    monkeypatch.setattr(drawing, "decode_batch", limited("decode_batch", 1))
    drawn = ShardDrawer(_options(batch_size=4)).draw(_task(PROMPTS))
    assert sizes == {"encode_batch": [3, 1, 1, 1], "decode_batch": [3, 1, 1, 1]}
    assert [sample.key for sample in drawn.samples] == [sample.key for sample in whole.samples]
    monkeypatch.setattr(drawing, "decode_batch", limited("decode_batch", 0))
    with pytest.raises(RuntimeError, match="out of memory"):
        ShardDrawer(_options(batch_size=2)).draw(_task(PROMPTS))


def test_larger_images_run_in_smaller_batches() -> None:
    drawer = ShardDrawer(_options(batch_size=8, batch_pixels=64 * 64))
    sizes = {64: 8, 128: 2, 320: 1}
    for side, expected in sizes.items():
        item = Item(0, 1, "1", 0, {"prompt": "a star", "size": f"{side}x{side}"}, {})
        (batch,) = drawer.plan(ShardTask(0, (item,))).batches
        assert batch.size == expected


@pytest.mark.slow
def test_the_batch_size_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path))
    drawer, item = ShardDrawer(_options()), _task(PROMPTS).items[0]
    found = batch_sizes.find_batch_size(drawer, item)
    assert found.size in batch_sizes.CANDIDATES
    assert found.pixels == 64 * 64
    (file,) = (tmp_path / "batch-size").iterdir()
    assert json.loads(file.read_text())["batch_size"] == found.size
    file.write_text('{"batch_size": 4}')
    assert batch_sizes.find_batch_size(drawer, item).size == 4
    file.write_text("damaged")
    monkeypatch.setattr(batch_sizes, "_rate", lambda job, size: None if size > 2 else float(size))
    assert batch_sizes.find_batch_size(drawer, item).size == 2


def test_the_model_is_checked_before_rows_are_drawn(folder: Path) -> None:
    item = Item(0, 1, "1", 0, {"prompt": "a star", "model": "missing-folder-of-a-model"}, {})
    with pytest.raises((InputError, OSError)):
        ShardDrawer(_options()).draw(ShardTask(0, (item,)))


# Ray


def test_other_machines_receive_absolute_paths(folder: Path) -> None:
    """Ray's processes on other machines have another current folder: results would be written there."""
    for name in ("model", "style.safetensors"):
        Path(name).mkdir()
    defaults = {"model": "model", "prior": "owner/name", "lora": ["style.safetensors:0.5", "owner/style"]}
    source = RowSource(RowFile("rows.jsonl", "jsonl"), ItemOptions(defaults))
    options = RunOptions(source, "out", ray=RayOptions("auto"))
    absolute = options.absolute()
    assert isinstance(absolute.source, RowSource)
    assert (absolute.output, absolute.source.file.path) == (str(folder / "out"), str(folder / "rows.jsonl"))
    assert absolute.source.folder == folder
    assert absolute.source.defaults == {
        **{"model": str(folder / "model"), "prior": "owner/name"},
        "lora": [f"{folder}/style.safetensors:0.5", "owner/style"],
    }
    assert dataclasses.replace(options, output="s3://bucket/run").absolute().output == "s3://bucket/run"


def test_standard_input_is_not_for_clusters(folder: Path) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "-", "-o", "out", "--ray", "auto"])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ray_draws_the_same_pictures_although_a_worker_is_killed(folder: Path) -> None:
    pytest.importorskip("ray")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    common = ["--batch-size", "2", "--shard-size", "2", "--format", "webdataset", *FAST]
    assert main(["batch", "rows.jsonl", "-o", "here", *common]) == 0
    command = [sys.executable, "-m", "kandinsky22", "batch", "rows.jsonl", "-o", "ray", "--ray"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # which Ray's processes inherit
    process = subprocess.Popen([*command, "--ray-decoder-actors", "1", *common], env=environment)
    try:
        await_progress(process, Path("ray/manifest.jsonl"))
        decoders = [worker for worker in workers_of(process.pid) if b"_DecoderStage" in command_line(worker)]
        assert process.poll() is None and len(decoders) == 1
        os.kill(decoders[0], signal.SIGKILL)
        assert process.wait(timeout=400) == 0
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in Path("ray/manifest.jsonl").read_text().splitlines()[1:]]
    assert len({line["worker"] for line in lines}) == 2, "the killed worker was replaced"
    assert contents(Path("ray")) == contents(Path("here"))
    assert entries(Path("ray")) == entries(Path("here"))
