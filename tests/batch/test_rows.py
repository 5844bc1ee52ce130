"""Rows: formats of input files, faults of single rows, wildcards, and the requests that rows become."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from kandinsky22.batch import rows, wildcards
from kandinsky22.batch.checks import MAX_FAULTS, check_items
from kandinsky22.batch.items import Item, ItemOptions, read_items, row_seed
from kandinsky22.batch.requests import RequestOptions, build_request
from kandinsky22.batch.row_settings import parse_settings
from kandinsky22.batch.rows import Row, RowFile, find_row_format, guess_format
from kandinsky22.errors import InputError

ROWS = [{"prompt": "a red circle", "steps": 5, "seed": 7}, {"prompt": "a blue star", "guidance": 2.5}]


def _write(folder: Path, format: str) -> RowFile:
    path = folder / f"rows.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif format == "csv":
        path.write_text("prompt,steps,seed,guidance\r\na red circle,5,7,\r\na blue star,,,2.5\r\n")
    elif format == "parquet":
        names = {name for row in ROWS for name in row}
        columns = {name: [row.get(name) for row in ROWS] for name in names}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return RowFile(str(path), find_row_format(str(path)))


def _items(file: RowFile, **options: Any) -> list[Item]:
    return list(read_items(file.rows(), ItemOptions(**options)))


def test_presets_with_the_distilled_adapter_of_the_model() -> None:
    def request(**row: Any) -> Any:
        return build_request(Item(0, 1, "1", 5, {"prompt": "a", **row}, {}), RequestOptions()).request

    instant, draft = request(quality="instant"), request(quality="draft")
    assert [adapter.name for adapter in instant.lora] == list(instant.lora_locations) == ["embedded/distilled"]
    assert (instant.scheduler, instant.steps, instant.guidance) == ("LCMScheduler", 1, 1.0)
    assert draft.lora is None and draft.guidance is None
    assert request(quality="instant", guidance=2.0).guidance == 2.0


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_all_formats_give_the_same_requests(tmp_path: Path, format: str) -> None:
    first, second = [build_request(item, RequestOptions()).request for item in _items(_write(tmp_path, format))]
    assert (first.prompt, first.steps, first.guidance, first.seeds) == ("a red circle", 5, None, (7,))
    assert (second.prompt, second.steps, second.guidance) == ("a blue star", None, 2.5)
    assert second.seeds == (row_seed(0, "2"),)


def test_text_files_have_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa café\n\n  a star  \nlast".encode())
    items = _items(RowFile(str(path), "text"))
    assert [(item.row, item.settings["prompt"]) for item in items] == [(1, "a café"), (3, "a star"), (4, "last")]
    assert guess_format(path) == "text"


def test_the_format_of_standard_input_follows_from_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "stdin"
    for content, format in (("\ufeff\n \n{}", "jsonl"), ("\n\na star {x}", "text"), ("", "text")):
        path.write_text(content, encoding="utf-8")
        assert guess_format(path) == format


@pytest.mark.parametrize("format", ["jsonl", "text", "csv"])
def test_lines_without_end_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 50)
    path = tmp_path / "rows"
    path.write_text("prompt\n" + "a" * 200 + "\nb\n")
    if format == "csv":
        with pytest.raises(InputError, match="more than 50 characters"):
            _items(RowFile(str(path), format))
    else:
        assert "more than 50 bytes" in (_items(RowFile(str(path), format))[1].fault or "")


def test_texts_that_are_no_utf8_are_faults_of_their_rows(tmp_path: Path) -> None:
    path, offsets = tmp_path / "rows.parquet", pyarrow.array([0, 1, 4, 5], pyarrow.int32()).buffers()[1]
    prompts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"aa\xffbc"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), path)
    items = _items(RowFile(str(path), "parquet"))
    assert [item.settings.get("prompt") for item in items] == ["a", None, "c"]
    assert "row" not in (items[1].fault or "") and "utf-8" in (items[1].fault or "")
    table = tmp_path / "rows.csv"
    table.write_bytes(b"prompt,\xff\na,1\n")
    with pytest.raises(InputError, match="first line of the CSV file is not UTF-8"):
        _items(RowFile(str(table), "csv"))


@pytest.mark.parametrize("address", ["unknown://x/rows.jsonl", "memory://missing/rows.jsonl"])
def test_addresses_that_cannot_be_opened_are_input_errors(address: str) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be read"):
        _items(RowFile(address, "jsonl"))


def test_columns_that_cannot_be_repeated_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "tags": ["x"], "note": "\\ud800", "\\ud800": 1, "url": "u", "empty": null}\n')
    items = _items(RowFile(str(path), "jsonl"))
    report = check_items(items, RequestOptions())
    assert report.unused_columns == ("url",)
    assert report.dropped_columns == ("tags", "note", "\ud800")


def test_faults_of_rows_do_not_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{broken\n[1]\n\xff\xfe\n{"prompt": "b"}\n')
    items = _items(RowFile(str(path), "jsonl"))
    assert [item.row for item in items] == [1, 2, 3, 4, 5]
    assert [item.fault is None for item in items] == [True, False, False, False, True]
    table = tmp_path / "rows.csv"
    table.write_bytes(b"prompt,steps\na,1\nb\n\xff,2\nc,3\n")
    assert [item.fault is None for item in _items(RowFile(str(table), "csv"))] == [True, False, False, True]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "prompt is missing"),
        ({"prompt": 5}, "prompt=5 is invalid"),
        ({"prompt": "a", "steps": 0}, "steps=0"),
        ({"prompt": "a", "steps": "many"}, "steps='many'"),
        ({"prompt": "a", "guidance": -1}, "guidance=-1"),
        ({"prompt": "a", "size": "12"}, "size='12'"),
        ({"prompt": "a", "size": "99999x64"}, "sides of at most"),
        ({"prompt": "a", "width": 64}, "expected both"),
        ({"prompt": "a", "seed": -3}, "seed=-3"),
        ({"prompt": "a", "quality": "perfect"}, "quality='perfect'"),
        ({"prompt": "a", "scheduler": "fast"}, "scheduler='fast'"),
        ({"prompt": "a", "image": "missing.png"}, "missing.png"),
        ({"prompt": "a", "image": "https://x/y.png"}, "local file"),
        ({"prompt": "a", "image": "text.png"}, "text.png"),
        ({"prompt": "a", "mode": "paint"}, "mode='paint'"),
        ({"prompt": "a", "mode": "generate", "mask": "a.png"}, "mask would have no effect"),
        ({"mode": "img2img", "prompt": "a"}, "image is missing"),
        ({"image": "a.png", "strength": 0.5}, "strength requires prompt"),
        ({"parts": [{"text": "a", "image": "a.png"}]}, "exactly one"),
        ({"parts": [{"text": "a", "weight": 1}, {"text": "b"}]}, "only some of the parts"),
        ({"prompt": "a", "image": "a.png", "mask": "wide.png"}, "aspect ratio"),
        ({"prompt": "a", "n": 0}, "n=0"),
        ({"prompt": "a", "model": "missing-folder"}, "model='missing-folder' is invalid: expected 'embedded'"),
        ({"prompt": "a", "prior": "../missing"}, "prior='../missing'"),
        ({"prompt": "a", "lora": ["missing.safetensors"]}, "missing.safetensors"),
        ({"prompt": "a", "lora": []}, "lora=[]"),
        ({"prompt": "a", "subject": "a.png:2"}, "weight from 0 to 1"),
        ({"prompt": "a", "subject": "a.png"}, "a.png"),
        ({"parts": [{"text": "a"}, {"subject": "missing.safetensors"}]}, "missing.safetensors"),
        ({"prompt": "a", "guidance_interval": [0.5, 0.2]}, "guidance_interval"),
        ({"prompt": "a", "guidance_threshold": 0}, "guidance_threshold=0 is invalid: expected a number above 0"),
        ({"prompt": "a", "dtype": "zz"}, "dtype='zz' is invalid: expected one of auto, float32"),
        ({"prompt": "a", "quantize": "zz"}, "quantize='zz' is invalid: expected one of int8"),
        ({"prompt": "a", "scheduler": "lcm", "steps": 60}, "steps=60 is invalid: expected an integer from 1 to 50"),
        ({"prompt": "a", "steps": 5000}, "steps=5000 is invalid: expected an integer from 1 to 1000"),
        ({"prompt": "a", "prior_steps": 5000}, "prior_steps=5000 is invalid: expected an integer from 1 to"),
    ],
)
def test_faults_name_the_setting(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("L", (640, 64)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    report = check_items(_items(RowFile(str(path), "jsonl")), RequestOptions(folder=tmp_path))
    assert report.fault_count == 1
    assert words in report.faults[0].message
    assert report.faults[0].row == 1


def test_several_faults_of_a_row_are_all_reported() -> None:
    with pytest.raises(InputError, match=r"steps=0 .*; guidance=-1"):
        parse_settings({"steps": 0, "guidance": -1.0})


@pytest.mark.parametrize(
    ("row", "mode"),
    [
        ({"prompt": "a"}, "generate"),
        ({"prompt": "a", "image": "a.png"}, "img2img"),
        ({"prompt": "a", "image": "a.png", "mask": "a.png"}, "inpaint"),
        ({"prompt": "a", "image": "a.png", "extend": "0,0,64,0"}, "inpaint"),
        ({"prompt": "a", "hint": "a.png"}, "control"),
        ({"parts": '[{"text": "a"}, {"image": "a.png"}]'}, "mix"),
        ({"image": "a.png"}, "variations"),
        ({"image": "a.png", "prompt": "a", "mode": "variations"}, "variations"),
    ],
)
def test_inputs_imply_the_mode(tmp_path: Path, row: dict[str, Any], mode: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    item = Item(0, 1, "1", 5, row, {})
    built = build_request(item, RequestOptions(folder=tmp_path))
    assert built.mode.name == mode
    if mode == "mix":
        assert [part.weight for part in built.request.parts or ()] == [0.5, 0.5]


def test_rows_override_the_defaults_and_the_preset() -> None:
    options = RequestOptions({"quality": "draft", "steps": 9, "size": "64x64", "negative_prompt": "blue"})
    plain = build_request(Item(0, 1, "1", 5, {"prompt": "a"}, {}), options).request
    own = {"prompt": "a", "steps": 3, "width": 128, "height": 64, "scheduler": "ddim"}
    request = build_request(Item(0, 1, "1", 5, own, {}), options).request
    assert (plain.steps, plain.width, plain.negative_prompt) == (9, 64, "blue")
    assert plain.scheduler_settings is not None
    assert (request.steps, request.width, request.scheduler) == (3, 128, "DDIMScheduler")
    assert request.scheduler_settings is None
    assert request.prior_steps == plain.prior_steps is not None


def test_a_default_strength_concerns_only_rows_that_have_one(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = RequestOptions({"strength": 0.5}, tmp_path)
    rows = ({"prompt": "a"}, {"image": "a.png"}, {"prompt": "a", "image": "a.png"}, {"prompt": "a", "hint": "a.png"})
    built = [build_request(Item(0, 1, "1", 5, row, {}), options).request.strength for row in rows]
    assert built == [None, None, 0.5, None]


def test_columns_can_be_mapped_and_unknown_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"caption": "a star", "prompt": "unused", "url": "x"}\n')
    items = _items(RowFile(str(path), "jsonl", {"caption": "prompt"}))
    assert items[0].settings["prompt"] == "a star"
    swapped = RowFile(str(path), "jsonl", {"caption": "negative_prompt", "prompt": "prompt"})
    assert _items(swapped)[0].settings == {"negative_prompt": "a star", "prompt": "unused"}
    path.write_text('{"caption": "a star", "prompt": "unused", "url": "x"}\n{"prompt": "unused"}\n')
    assert "prompt" not in _items(RowFile(str(path), "jsonl", {"caption": "prompt"}))[1].settings
    assert check_items(items, RequestOptions()).unused_columns == ("url",)


def test_missing_values_of_tables_are_not_set() -> None:
    (item,) = read_items([Row(1, {"prompt": "a", "steps": float("nan"), "guidance": None})], ItemOptions())
    assert dict(item.settings) == {"prompt": "a"}
    assert parse_settings({"steps": 20.0}).steps == 20


def test_faults_are_counted_beyond_those_that_are_kept() -> None:
    items = (Item(index, index + 1, str(index), 0, {}, {}) for index in range(500))
    seen: list[int] = []
    report = check_items(items, RequestOptions(), lambda fault: seen.append(fault.row))
    assert (report.fault_count, len(report.faults), report.first) == (500, MAX_FAULTS, None)
    assert seen == list(range(1, 501))


def test_wildcards_expand_to_all_combinations() -> None:
    texts = list(wildcards.expand([r"a {red|blue} {circle|star} \{x|y} {1-2}", "no {1-1}"]))
    assert len(texts) == 8
    assert texts[0] == ["a red circle {x|y} 1", "no 1"]
    assert texts[-1] == ["a blue star {x|y} 2", "no 1"]
    assert list(wildcards.expand(["a {plain} {} text", None])) == [["a {plain} {} text", None]]
    with pytest.raises(InputError, match="at most"):
        list(wildcards.expand(["{1-1000} {1-1000}"]))
    with pytest.raises(InputError, match="smaller end first"):
        list(wildcards.expand(["{8-1}"]))


def test_sampled_wildcards_depend_on_the_key_alone() -> None:
    text = "{red|blue|green|white} {1-1000}"
    assert wildcards.sample([text, None], "a") == wildcards.sample([text, None], "a")
    drawn = {tuple(wildcards.sample([text], str(key))) for key in range(50)}
    assert len(drawn) > 40


def test_rows_with_wildcards_are_several_items(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"id": "x", "prompt": "a {red|blue} star"}\n{"prompt": "b", "seed": 3, "n": 2}\n{"prompt": "{2-1}|"}\n'
    )
    file = RowFile(str(path), "jsonl")
    expanded = _items(file, wildcards="expand")
    assert [item.id for item in expanded] == ["x-0", "x-1", "2-0", "2-1", "3"]
    assert [item.settings["prompt"] for item in expanded[:2]] == ["a red star", "a blue star"]
    assert [item.seed for item in expanded[2:4]] == [3, 4]
    assert expanded[4].fault is not None
    assert [item.index for item in expanded] == [0, 1, 2, 3, 4]
    assert len(_items(file, wildcards="sample")) == len(_items(file)) == 4
    assert _items(file)[0].settings["prompt"] == "a {red|blue} star"
    assert check_items(_items(file), RequestOptions()).wildcard_rows == 2
    assert len(_items(file, count=3)) == 3 + 2 + 3


def test_wildcards_of_mixtures_are_replaced_and_escapes_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    parts = [{"text": "a {red|blue} star", "weight": 0.25}, {"image": "a.png", "weight": 0.75}]
    path.write_text(json.dumps({"parts": parts}) + "\n" + json.dumps({"prompt": r"\{x|y\} {z}"}) + "\n")
    file = RowFile(str(path), "jsonl")
    items = _items(file, wildcards="expand")
    assert [item.settings["parts"][0]["text"] for item in items[:2]] == ["a red star", "a blue star"]
    assert items[0].settings["parts"][1] == parts[1]
    assert items[2].settings["prompt"] == "{x|y} {z}"
    assert _items(file, wildcards="sample")[0].settings["parts"][0]["text"] in ("a red star", "a blue star")
    assert _items(file)[1].settings["prompt"] == r"\{x|y\} {z}"


def test_seeds_follow_from_the_run_and_the_row() -> None:
    seeds = {row_seed(run, str(row)) for run in range(10) for row in range(1000)}
    assert len(seeds) == 10_000
    assert max(seeds) < 2**53
    assert row_seed(0, "1") == 1419406389890805  # seeds never change: finished runs are repeated from them


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_cannot_be_read_twice(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (RowFile(str(path), "jsonl").digest, lambda: list(RowFile(str(path), "text").rows())):
        with pytest.raises(InputError, match="it is a pipe or a device; redirect it to standard input"):
            read()
