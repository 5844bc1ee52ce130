"""Runs with a stand-in for the networks: shards, manifest, restarts and faults."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tests.batch.kills import contents, entries, write_prompts
from tests.batch.stub_run import options_for, picture, run, stub_draw

from kandinsky22.batch import storage
from kandinsky22.batch.formats import FORMATS, read_shard
from kandinsky22.batch.manifest import MANIFEST, Manifest
from kandinsky22.batch.run import BadRowsError, run_batch
from kandinsky22.batch.samples import Sample, StoredEmbedding
from kandinsky22.batch.shards import DrawnShard
from kandinsky22.batch.storage import LocalFolder, open_folder
from kandinsky22.errors import InputError

ALL = list(FORMATS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "prompts.jsonl", 35)
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("format", ALL)
def test_every_row_has_one_result(source: Path, out: Path, format: str) -> None:
    summary, _ = run(source, out, format=format)
    assert (summary.pictures, summary.drawn, summary.failed) == (35, 35, 0)
    names = [FORMATS[format].shard_name(number) for number in range(4)]
    assert _names(out) == {MANIFEST, *names}
    samples = [sample for name in names for sample in read_shard(FORMATS[format], out / name)]
    assert [sample.metadata["id"] for sample in samples] == [f"row{number}" for number in range(35)]
    assert [sample.key for sample in samples][9:11] == ["000000009", "000010000"]
    for sample in samples:
        assert sample.image == picture(sample.metadata["prompt"], sample.metadata["seed"])


@pytest.mark.parametrize("format", ALL)
def test_a_finished_run_draws_nothing_and_equal_runs_have_equal_bytes(source: Path, out: Path, format: str) -> None:
    run(source, out, format=format)
    before = contents(out)
    summary, notes = run(source, out, format=format)
    assert (summary.pictures, summary.drawn) == (35, 0)
    assert "4 shards are finished" in notes
    run(source, out.with_name("other"), format=format)
    assert contents(out) == contents(out.with_name("other")) == before


def test_workers_give_the_same_files(source: Path, out: Path) -> None:
    run(source, out, format="webdataset")
    run(source, out.with_name("two"), format="webdataset", workers=2)
    assert contents(out) == contents(out.with_name("two"))
    assert entries(out) == entries(out.with_name("two"))


def test_previews_show_each_shard(source: Path, out: Path) -> None:
    run(source, out, previews=True)
    assert len(list((out / "previews").glob("*.jpg"))) == 4


# Faults


def test_bad_rows_end_the_run_before_it_draws(source: Path, out: Path) -> None:
    with source.open("a") as file:
        file.write('{"prompt": 5}\n{"steps": 3}\nnonsense\n')
    notes: list[str] = []
    with pytest.raises(BadRowsError, match=r"3 of 38 pictures cannot be drawn") as caught:
        run_batch(options_for(source, out), notes.append, stub_draw)
    assert [fault.row for fault in caught.value.report.faults] == [36, 37, 38]
    assert [line.split(":")[0] for line in notes] == ["row 36", "row 37", "row 38"]
    assert _names(out) == set()


def test_bad_rows_can_be_skipped(source: Path, out: Path) -> None:
    good = source.read_text().splitlines()
    source.write_text("\n".join([good[0], "nonsense", *good[1:]]) + "\n")
    summary, _ = run(source, out, skip_bad=True)
    assert (summary.pictures, summary.failed) == (35, 1)
    first = next(iter(Manifest(LocalFolder(out)).entries.values()))
    assert list(first.failed) == ["000000001"]
    assert not (out / "00000" / "000000001.png").exists()
    assert run(source, out, skip_bad=True)[0].drawn == 0


def test_a_shard_without_any_good_row_has_no_file(source: Path, out: Path) -> None:
    source.write_text("x\n" * 10 + source.read_text())
    summary, _ = run(source, out, skip_bad=True)
    assert (summary.pictures, summary.failed) == (35, 10)
    assert not (out / "00000").exists()
    assert run(source, out, skip_bad=True)[0].drawn == 0


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_manifest_cut_anywhere_loses_no_result(source: Path, out: Path, cut: float) -> None:
    run(source, out)
    before, shards = contents(out), entries(out)
    content = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(content[: int(len(content) * cut)])
    summary, _ = run(source, out)
    assert summary.pictures == 35
    assert summary.drawn > 0
    assert contents(out) == before
    assert entries(out) == shards


def test_damaged_lines_of_the_manifest_are_drawn_again(source: Path, out: Path) -> None:
    run(source, out)
    before, lines = contents(out), (out / MANIFEST).read_bytes().splitlines(keepends=True)
    damaged = [b"\x00\xffgarbage\n", b'{"shard": 1}\n', b"[]\n"]
    (out / MANIFEST).write_bytes(b"".join([lines[0], *damaged, *lines[2:]]))
    summary, notes = run(source, out)
    assert summary.drawn == 10
    assert any("3 damaged lines" in note for note in notes)
    assert contents(out) == before


@pytest.mark.parametrize("format", ALL)
def test_a_shard_changed_by_hand_is_drawn_again(source: Path, out: Path, format: str) -> None:
    run(source, out, format=format)
    before = contents(out)
    shard = out / FORMATS[format].shard_name(1)
    if shard.is_dir():
        (shard / "000010003.png").write_bytes(b"changed")
        (shard / "extra.txt").write_text("extra")
    else:
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (out / FORMATS[format].shard_name(2)).rename(out.with_name("moved"))
    summary, notes = run(source, out, format=format)
    assert summary.drawn == 20
    assert any("has changed" in note for note in notes)
    assert any("is missing" in note for note in notes)
    assert contents(out) == before


def test_shards_of_another_program_are_not_replaced(source: Path, out: Path) -> None:
    """Archives of img2dataset have the same names."""
    out.mkdir()
    (out / "00000.tar").write_text("precious")
    with pytest.raises(InputError, match=r"contains 00000\.tar, but no manifest"):
        run(source, out)
    assert (out / "00000.tar").read_text() == "precious"
    assert _names(out) == {"00000.tar"}
    (out / MANIFEST).write_text("")  # cut to nothing, which is no reason to refuse
    assert run(source, out)[0].drawn == 35


@pytest.mark.parametrize("header", [{"kandinsky22_batch": 1}, {"kandinsky22_batch": 1, "settings": 5}, 5])
def test_a_damaged_header_is_drawn_again(source: Path, out: Path, header: object) -> None:
    run(source, out)
    before, lines = contents(out), (out / MANIFEST).read_text().splitlines(keepends=True)
    (out / MANIFEST).write_text("".join([json.dumps(header) + "\n", *lines[1:]]))
    assert run(source, out)[0].drawn == 35
    assert contents(out) == before
    (out / MANIFEST).write_text(json.dumps({"kandinsky22_batch": 2}) + "\n")
    with pytest.raises(InputError, match="another format"):
        run(source, out)


def test_leftovers_of_killed_runs_are_removed(source: Path, out: Path) -> None:
    run(source, out)
    before = contents(out)
    (out / ".00001.saving-0123456789ab").mkdir()
    (out / ".00001.saving-0123456789ab" / "x.png").write_bytes(b"x")
    (out / ".manifest.jsonl.saving-0123456789ab.jsonl").write_bytes(b"x")
    (out / "notes.txt").write_text("of the user")
    run(source, out)
    assert contents(out) == {**before, "notes.txt": contents(out)["notes.txt"]}


def test_a_full_disk_ends_the_run_and_leaves_it_to_go_on(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = storage._flush, []

    def full(path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_flush", full)
        with pytest.raises(InputError, match="00002 cannot be written: No space left on device"):
            run(source, out)
    assert _names(out) == {MANIFEST, "00000", "00001"}
    assert run(source, out)[0].drawn == 15


def test_nothing_is_left_of_the_workers_of_a_run_that_ended_with_an_error(source: Path, out: Path) -> None:
    with source.open("a") as file:
        file.write('{"prompt": "fails"}\n')
    with pytest.raises(InputError, match="fails"):
        run(source, out, workers=2)
    assert not list(out.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_manifest_that_cannot_be_appended_to_ends_the_run(source: Path, out: Path) -> None:
    run(source, out)
    (out / MANIFEST).unlink()
    (out / MANIFEST).symlink_to("/dev/full")
    with pytest.raises(InputError, match="manifest"):
        from kandinsky22.batch.manifest import _append

        _append(out / MANIFEST, b"x\n")


def test_an_unwritable_folder_is_refused_before_anything_runs(source: Path, out: Path) -> None:
    out.mkdir()
    out.chmod(0o555)
    with pytest.raises(InputError, match="write-protected"):
        run(source, out)
    out.chmod(0o755)
    file = out.with_name("file")
    file.write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        run(source, file)
    with pytest.raises(InputError, match="cannot be written"):
        run(source, file / "below")


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_two_runs_into_one_folder_are_refused(source: Path, out: Path) -> None:
    write_prompts(source, 500)
    command = [sys.executable, "-m", "tests.batch.stub_run", str(source), str(out), "files", "1", "10", "20"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        next(line for line in other.stdout if line.startswith("shard"))
        with pytest.raises(InputError, match=f"in use by another run, process {other.pid} on "):
            run(source, out)
    finally:
        other.kill()
        other.communicate()
    assert run(source, out)[0].pictures == 500
    assert not list(out.glob(".*"))


def test_a_folder_of_another_run_is_refused(source: Path, out: Path) -> None:
    run(source, out)
    with pytest.raises(InputError, match="shard_size was 10, is 5; choose another folder"):
        run(source, out, shard_size=5)
    write_prompts(source, 36)
    with pytest.raises(InputError, match="input was"):
        run(source, out)


def test_inputs_that_cannot_be_read_are_one_error(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl cannot be read"):
        run(tmp_path / "missing.jsonl", out)
    (tmp_path / "rows.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match="Parquet"):
        run(tmp_path / "rows.parquet", out)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="no row"):
        run(tmp_path / "empty.txt", out)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("with_image", [True, False])
def test_formats_return_what_they_were_given(tmp_path: Path, format: str, with_image: bool) -> None:
    generator = np.random.default_rng(0)
    embedding = StoredEmbedding(
        generator.standard_normal((2, 6)).astype(np.float32), generator.integers(0, 255, 50).astype(np.uint8)
    )
    metadata = {
        **{"key": "000000000", "id": "x", "row": 1, "prompt": "é", "negative_prompt": None, "seed": 2**53 - 1},
        **{"width": 8, "height": 8, "settings": {"prompt": "é", "n": 2}, "columns": {"url": "u"}, "recipe": {"a": [1]}},
    }
    sample = Sample("000000000", metadata, picture("é", 1) if with_image else None, embedding)
    path = tmp_path / FORMATS[format].shard_name(0)
    FORMATS[format].write([sample], path)
    (read,) = read_shard(FORMATS[format], path)
    assert (read.key, dict(read.metadata), read.image) == (sample.key, metadata, sample.image)
    assert read.embedding is not None
    np.testing.assert_array_equal(read.embedding.vectors, embedding.vectors)
    np.testing.assert_array_equal(read.embedding.generator_state, embedding.generator_state)
    with pytest.raises(InputError, match="missing or damaged"):
        list(read_shard(FORMATS[format], tmp_path / "missing"))


# Other file systems


def test_runs_write_to_file_systems_of_fsspec(source: Path, out: Path) -> None:
    import fsspec

    local, _ = run(source, out, format="webdataset")
    remote = dataclasses.replace(options_for(source, out), output="memory://run", format="webdataset")
    summary = run_batch(remote, lambda note: None, stub_draw)
    assert dataclasses.replace(summary, seconds=0) == dataclasses.replace(local, seconds=0)
    file_system = fsspec.filesystem("memory")
    for name in ("00000.tar", "00003.tar"):
        assert file_system.cat(f"/run/{name}") == (out / name).read_bytes()
    file_system.rm("/run/00002.tar")
    assert run_batch(remote, lambda note: None, stub_draw).drawn == 10
    assert set(Manifest(open_folder("memory://run")).entries) == {0, 1, 2, 3}
    file_system.rm("/run/manifest.jsonl")
    with pytest.raises(InputError, match=r"contains 00000\.tar, but no manifest"):
        run_batch(remote, lambda note: None, stub_draw)


def test_addresses_of_local_files_are_local_folders(source: Path, out: Path) -> None:
    """They have locks, temporary names and atomic renames."""
    folder = open_folder(f"file://{out}")
    assert isinstance(folder, LocalFolder)
    assert folder.path == out


def test_errors_of_other_file_systems_are_input_errors(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems have errors of their own, here those of a missing account."""
    import fsspec.implementations.memory

    class NoCredentialsError(Exception):
        pass

    def refuse(*arguments: object, **options: object) -> None:
        raise NoCredentialsError("no credentials")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "pipe_file", refuse)
    remote = dataclasses.replace(options_for(source, out), output="memory://refused")
    with pytest.raises(InputError, match="memory://refused cannot be used: no credentials"):
        run_batch(remote, lambda note: None, stub_draw)


# Programs that nobody here wrote


def test_webdataset_reads_the_archives(source: Path, out: Path) -> None:
    run(source, out, format="webdataset")
    program = (
        "import sys, webdataset; "
        "rows = list(webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode('pil')); "
        "print(len(rows), rows[3]['png'].size, rows[3]['json']['id'], rows[3]['__key__'])"
    )
    assert _python(program, str(out / "{00000..00003}.tar")) == "35 (8, 8) row3 000000003"


def test_pyarrow_reads_the_tables(source: Path, out: Path) -> None:
    run(source, out, format="parquet")
    program = (
        "import sys, pathlib, pyarrow.dataset; "
        "table = pyarrow.dataset.dataset(sorted(map(str, pathlib.Path(sys.argv[1]).glob('*.parquet')))).to_table(); "
        "print(table.num_rows, table['id'][3], table['image'][3]['bytes'].as_py()[1:4])"
    )
    assert _python(program, str(out)) == "35 row3 b'PNG'"


@pytest.mark.slow
@pytest.mark.parametrize("format", ALL)
def test_datasets_reads_every_format(source: Path, out: Path, format: str) -> None:
    run(source, out, format=format)
    kind, files = {
        "files": ("imagefolder", "*/*"),
        "webdataset": ("webdataset", "*.tar"),
        "parquet": ("parquet", "*.parquet"),
    }[format]
    program = (
        "import sys, datasets; "
        "rows = datasets.load_dataset(sys.argv[1], data_files={'train': sys.argv[2] + '/' + sys.argv[3]}, "
        "cache_dir=sys.argv[4], split='train'); "
        "row = next(row for row in rows if (row.get('id') or row['json']['id']) == 'row3'); "
        "image = row.get('image') or row.get('png'); "
        "print(len(rows), image.size, row['id'] if 'id' in row else row['json']['id'])"
    )
    assert _python(program, kind, str(out), files, str(out.with_name("cache"))) == "35 (8, 8) row3"


def _python(program: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# Memory


def _memory_by_shard(path: Path, out: Path, rows: int, shard_size: int) -> list[int]:
    """Return the bytes that Python objects and pyarrow's buffers take after each shard of a run without networks."""
    table = pyarrow.table({"prompt": [f"a red circle number {number}" for number in range(rows)]})
    pyarrow.parquet.write_table(table, path)  # one row group
    del table
    memory: list[int] = []

    def note(line: str) -> None:
        if line.startswith("shard"):
            memory.append(tracemalloc.get_traced_memory()[0] + pyarrow.total_allocated_bytes())

    options = options_for(path, out, format="webdataset", shard_size=shard_size)
    tracemalloc.start()
    try:
        run_batch(options, note, lambda draw: lambda task: DrawnShard((), {}))
    finally:
        tracemalloc.stop()
    return memory


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "shard_size"), [(1500, 1), (10_000, 100)])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, rows: int, shard_size: int) -> None:
    """Neither with the number of shards, nor with that of rows; `benchmarks.batch_memory` measures ten million."""
    memory = _memory_by_shard(tmp_path / "rows.parquet", tmp_path / "out", rows, shard_size)
    part = len(memory) // 5
    assert len(memory) == rows // shard_size
    # Rows are decoded 1024 at a time: what is left of them varies from shard to shard.
    assert max(memory[-part:]) < max(memory[part : 2 * part]) + 150_000


def test_the_manifest_has_a_line_per_shard(source: Path, out: Path) -> None:
    run(source, out)
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert [line["pictures"] for line in lines[1:]] == [10, 10, 10, 5]
    assert lines[0]["settings"]["shard_size"] == 10
