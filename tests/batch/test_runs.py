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
from kandinsky22.batch.items import ItemOptions
from kandinsky22.batch.manifest import MANIFEST, Manifest
from kandinsky22.batch.output_checks import check_input
from kandinsky22.batch.rows import RowFile
from kandinsky22.batch.run import BadRowsError, RunOptions, run_batch
from kandinsky22.batch.samples import Sample, StoredEmbedding
from kandinsky22.batch.shards import DrawnShard
from kandinsky22.batch.sources import RowSource
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
    kept = {"00001/extra.txt": contents(out)["00001/extra.txt"]} if shard.is_dir() else {}
    assert contents(out) == before | kept


def test_files_of_the_user_in_a_shard_are_kept(source: Path, out: Path) -> None:
    run(source, out)
    before = contents(out)
    for name in ("notes.txt", "000020001.png", ".DS_Store"):
        (out / "00000" / name).write_text("of the user")
    (out / "00000" / "folder").mkdir()
    (out / "00000" / "folder" / "000000001.png").write_text("of the user")
    kept = {name: digest for name, digest in contents(out).items() if name not in before}
    assert len(kept) == 4
    assert run(source, out)[0].drawn == 0  # they are no change of the shard
    assert contents(out) == before | kept
    (out / "00000" / "000000003.png").write_bytes(b"changed")
    assert run(source, out)[0].drawn == 10
    assert contents(out) == before | kept
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("is_written", [True, False])
def test_a_run_that_was_killed_while_it_replaced_a_shard_loses_no_file_of_the_user(
    source: Path, out: Path, is_written: bool
) -> None:
    run(source, out)
    before = contents(out)
    old = out / ".00001.replaced-0123456789ab"
    if is_written:
        old.mkdir()
        (old / "000010001.png").write_bytes(b"old")
        (out / "00001" / "notes.txt").write_text("newer")
    else:
        (out / "00001").rename(old)
    (old / "notes.txt").write_text("of the user")
    run(source, out)
    notes = sorted(path.read_text() for path in (out / "00001").glob("notes*"))
    assert notes == (["newer", "of the user"] if is_written else ["of the user"])
    assert {name: digest for name, digest in contents(out).items() if "notes" not in name} == before
    assert not old.exists()


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


@pytest.mark.parametrize("content", ['{"prompt": "a star"}\n', "one line\n", '[1]\n{"shard": 1}\n', "no end"])
def test_a_manifest_of_another_program_is_not_replaced(source: Path, out: Path, content: str) -> None:
    out.mkdir()
    (out / MANIFEST).write_text(content)
    (out / "00000.tar").write_text("precious")
    with pytest.raises(InputError, match=r"contains a manifest\.jsonl that is not the manifest of a batch"):
        run(source, out, format="webdataset")
    assert (out / MANIFEST).read_text() == content
    assert _names(out) == {MANIFEST, "00000.tar"}


def test_shards_next_to_an_empty_manifest_are_not_replaced(source: Path, out: Path) -> None:
    out.mkdir()
    (out / MANIFEST).write_text("")
    (out / "00000.tar").write_text("precious")
    with pytest.raises(InputError, match=r"contains 00000\.tar, but no manifest"):
        run(source, out, format="webdataset")
    assert (out / "00000.tar").read_text() == "precious"


def test_previews_of_another_program_are_not_replaced(source: Path, out: Path) -> None:
    (out / "previews").mkdir(parents=True)
    (out / "previews" / "00000.jpg").write_text("precious")
    with pytest.raises(InputError, match=r"contains previews/00000\.jpg, but no manifest"):
        run(source, out, previews=True)
    assert (out / "previews" / "00000.jpg").read_text() == "precious"
    assert run(source, out)[0].drawn == 35  # without previews, nothing would be replaced
    assert (out / "previews" / "00000.jpg").read_text() == "precious"


@pytest.mark.parametrize("name", [MANIFEST, "00000/metadata.jsonl", "previews/rows.jsonl", "link/manifest.jsonl"])
def test_the_input_is_not_replaced(
    source: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    path = tmp_path / name if name.startswith("link") else out / name
    path.parent.mkdir(exist_ok=True)
    content = source.read_bytes()
    path.write_bytes(content)
    monkeypatch.chdir(out)
    for output in (out, Path(), tmp_path / "link"):
        with pytest.raises(InputError, match="expected a file that the batch does not write into"):
            run(path, output)
    assert path.read_bytes() == content
    (out / "rows.jsonl").write_bytes(content)
    if name == "previews/rows.jsonl":
        assert run(Path("rows.jsonl"), Path())[0].drawn == 35  # the folder itself may hold the input


def test_addresses_are_checked_like_paths() -> None:
    for location in ("memory://run/manifest.jsonl", "memory://run/00000.parquet", "memory://run"):
        with pytest.raises(InputError, match="choose another --output"):
            check_input(location, "memory://run/")
    for location in ("memory://run/rows.jsonl", "memory://runs/manifest.jsonl", "run/manifest.jsonl"):
        check_input(location, "memory://run/")


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


def test_a_run_that_has_drawn_nothing_does_not_fix_the_settings(source: Path, out: Path) -> None:
    content = source.read_text()
    source.write_text('{"prompt": "fails"}\n' + content)
    with pytest.raises(InputError, match="fails"):
        run(source, out)
    source.write_text(content)
    assert run(source, out, shard_size=5)[0].pictures == 35
    with pytest.raises(InputError, match="shard_size was 5, is 10"):
        run(source, out)


def test_shards_without_an_entry_fix_the_settings(source: Path, out: Path) -> None:
    """A run that was killed between the two has left them: they would stay next to those of the new settings."""
    run(source, out)
    (out / MANIFEST).write_text((out / MANIFEST).read_text().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="format was 'files', is 'webdataset'"):
        run(source, out, format="webdataset")


@pytest.mark.parametrize("output", ["", "file://"])
def test_an_empty_output_is_not_the_current_folder(
    source: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected the path or the address of a folder"):
        run_batch(dataclasses.replace(options_for(source, Path("x")), output=output), lambda note: None, stub_draw)
    assert _names(tmp_path) == {"prompts.jsonl"}


def test_mapped_columns_that_no_row_has_are_refused(source: Path, out: Path) -> None:
    source.write_text('{"caption": "a star", "prompt": "a circle"}\n{"caption": "a cat"}\n')

    def mapped(column: str) -> RunOptions:
        rows = RowSource(RowFile(str(source), "jsonl", {column: "prompt"}), ItemOptions())
        return dataclasses.replace(options_for(source, out), source=rows)

    with pytest.raises(
        InputError, match="column='caption_eng' is invalid: expected the name of a column that a row has"
    ):
        run_batch(mapped("caption_eng"), lambda note: None, stub_draw)
    notes: list[str] = []
    assert run_batch(mapped("caption"), notes.append, stub_draw).drawn == 2
    assert "columns without effect, because --column reads the settings from others: prompt" in notes
    samples = list(read_shard(FORMATS["files"], out / "00000"))
    assert [sample.metadata["prompt"] for sample in samples] == ["a star", "a cat"]


def test_inputs_that_cannot_be_read_are_one_error(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl cannot be read"):
        run(tmp_path / "missing.jsonl", out)
    assert not out.exists()
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
    file_system.pipe("/run/manifest.jsonl", b'{"prompt": "a star"}\n')
    with pytest.raises(InputError, match="not the manifest of a batch"):
        run_batch(remote, lambda note: None, stub_draw)
    file_system.rm("/run/manifest.jsonl")
    with pytest.raises(InputError, match=r"contains 00000\.tar, but no manifest"):
        run_batch(remote, lambda note: None, stub_draw)


def test_files_of_the_user_in_remote_shards_are_kept(source: Path, out: Path) -> None:
    import fsspec

    remote = dataclasses.replace(options_for(source, out), output="memory://kept")
    run_batch(remote, lambda note: None, stub_draw)
    file_system = fsspec.filesystem("memory")
    file_system.pipe("/kept/00000/notes.txt", b"of the user")
    file_system.pipe("/kept/00000/folder/more.txt", b"of the user")
    assert run_batch(remote, lambda note: None, stub_draw).drawn == 0
    file_system.pipe("/kept/00000/000000003.png", b"changed")
    assert run_batch(remote, lambda note: None, stub_draw).drawn == 10
    assert file_system.cat("/kept/00000/notes.txt") == file_system.cat("/kept/00000/folder/more.txt") == b"of the user"
    assert file_system.cat("/kept/00000/000000003.png") != b"changed"


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
