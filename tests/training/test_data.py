"""Data sets: what is read, what is named and left out, what is an error; parts of pictures and their cache."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.conftest import write_pictures
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.training.finetuning.batches import BatchPlan, split_held_out
from kandinsky22.training.finetuning.cache import TensorCache
from kandinsky22.training.finetuning.data import Example, read_path
from kandinsky22.training.finetuning.frames import Frame, buckets, edges, frames, nearest_bucket
from kandinsky22.training.finetuning.options import TrainingOptions, read_config
from kandinsky22.training.finetuning.preparation import Entry, prepare, require_captions


class OneProcess:
    process_index, num_processes = 0, 1

    def wait_for_everyone(self) -> None:
        pass


class CountingJob:
    """Encodes the mean colour of pictures, and counts how often it does."""

    def __init__(self, weights: str = "a", size: tuple[int, int] = (32, 32)) -> None:
        self.weights, self.size, self.count = weights, size, 0

    def plan(self, example: Example, digest: str, size: tuple[int, int]) -> tuple[dict[str, Any], list[Frame]]:
        return {"file": digest, "weights": self.weights, "size": self.size}, [Frame(self.size)]

    def encode(self, example: Example, parts: Sequence[Frame]) -> dict[str, Tensor]:
        self.count += 1
        return {"colour": torch.tensor(np.asarray(example.picture.open()).mean((0, 1)))[None]}


# Sources


def test_folders_with_texts_hints_and_masks(pictures: Path) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "p1.hint.png")
    Image.new("L", (8, 8)).save(pictures / "p2.mask.png")
    (pictures / "p3.txt").unlink()
    examples = read_path(pictures, "--train-data-dir")
    assert [Path(example.picture.name).name for example in examples] == [f"p{index}.png" for index in range(6)]
    assert [example.caption for example in examples][2:4] == ["a cat on a red thing 2", None]
    assert [bool(example.hint) for example in examples] == [False, True, False, False, False, False]
    assert [bool(example.mask) for example in examples] == [False, False, True, False, False, False]


def test_pictures_of_one_name_are_all_read(pictures: Path) -> None:
    Image.new("RGB", (8, 8), "blue").save(pictures / "p2.jpg")
    (pictures / "p2.txt").unlink()
    examples = read_path(pictures, "x")
    assert [Path(example.picture.name).name for example in examples][2:4] == ["p2.jpg", "p2.png"]
    assert len(examples) == 7 and examples[0].caption == "a cat on a red thing 0"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("p2.jpg",), r"p2\.txt belongs to p2\.jpg and p2\.png: expected one such file and one picture"),
        (("p2.jpg", "p2.hint.png"), r"p2\.txt belongs to p2\.jpg and p2\.png"),
        (("q.png", "q.jpg", "q.hint.png"), r"q\.hint\.png belongs to q\.jpg and q\.png"),
        (("q.png", "q.jpg", "q.mask.png"), r"q\.mask\.png belongs to q\.jpg and q\.png"),
        (("p1.mask.png", "p1.mask.jpg"), r"p1\.mask\.jpg and p1\.mask\.png belong to p1\.png"),
        (("q.hint.png",), r"1 hints without pictures: q\.hint\.png"),
        (("gas.mask.png", "p1.mask.png"), r"1 masks without pictures: gas\.mask\.png"),
    ],
)
def test_files_of_several_pictures_or_of_none_are_an_error(
    files: tuple[str, ...], message: str, pictures: Path
) -> None:
    for name in files:
        Image.new("RGB", (8, 8)).save(pictures / name)
    with pytest.raises(InputError, match=f"pictures.*{message}"):
        read_path(pictures, "x")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_lines_of_json_end_with_newlines_alone(separator: str, pictures: Path) -> None:
    rows = [{"file_name": f"p{index}.png", "text": f"red{separator if index else ' '}cat"} for index in range(2)]
    escaped = separator in "\x0b\x1e"  # JSON has no control characters in strings
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    (pictures / "metadata.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    assert [example.caption for example in read_path(pictures, "x")] == ["red cat", f"red{separator}cat"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_name": "p0.png", "hint": 3}', "hint in .*=3 is invalid"),
        ('{"file_name": "p0.png", "mask": ["p0.png"]}', "mask in .*p0.png"),
        ('{"file_name": "p0.png", "mask": "nowhere.png"}', "mask in .*nowhere.png"),
        ('{"file_name": "p0.png", "mask": "pipe.png"}', "mask in .*pipe.png"),
        ('{"file_name": "pipe.png", "text": "a"}', "without pictures: pipe.png"),
        ('{"file_name": "a\\u0000b"}', "without pictures"),
        ('{"file_name": "' + "n" * 5000 + '"}', "without pictures"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("9" * 5000, "line 1 is not JSON"),
    ],
    ids=lambda value: value[:40],
)
def test_damaged_rows_of_tables(row: str, words: str, pictures: Path) -> None:
    os.mkfifo(pictures / "pipe.png")
    (pictures / "metadata.jsonl").write_text(row + "\n")
    with pytest.raises(InputError, match=words):
        read_path(pictures, "x")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"a: 2001-99-99", b"- 1", None])
def test_damaged_configs(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"--config .*config\.yaml"):
        read_config(path)


def test_tables(pictures: Path) -> None:
    rows = [{"file_name": f"p{index}.png", "text": f"number {index}"} for index in range(3)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example.caption for example in read_path(pictures, "x")] == ["number 0", "number 1", "number 2"]
    table = pictures / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["picture_file", "words"])
        writer.writeheader()
        writer.writerows({"picture_file": row["file_name"], "words": row["text"]} for row in rows)
    with pytest.raises(
        InputError, match=r"has no column file_name or image but picture_file, words: name it with --im"
    ):
        read_path(table, "x")
    assert [example.caption for example in read_path(table, "x", "picture_file", "words")] == [
        "number 0",
        "number 1",
        "number 2",
    ]


def test_shards(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index in range(2):
                archive.add(pictures / f"p{index}.png", f"{shard}{index}.png")
                text = json.dumps({"caption": f"shard {shard} sample {index}"}).encode()
                member = tarfile.TarInfo(f"{shard}{index}.json")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
    examples = read_path(folder, "x")
    assert [example.caption for example in examples][-1] == "shard 1 sample 1"
    assert len(examples) == 4
    assert examples[0].picture.digest() == read_path(pictures, "x")[0].picture.digest()
    assert examples[1].picture.open().size == (72, 80)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.png", "a.jpg"), r"0\.tar:a\.png has several pictures, png, jpg: name one with --image-column"),
        (("a.png", "a.PNG"), r"0\.tar:a\.png and a\.PNG are the same member"),
        (("a.png", "a.hint.png", "a.hint.jpg"), r"a\.hint\.png and .*a\.hint\.jpg: expected one hint"),
        (("a.png", "a.mask.png", "a.mask.jpg"), r"a\.mask\.png and .*a\.mask\.jpg: expected one mask"),
    ],
)
def test_members_that_would_be_lost_are_an_error(
    names: tuple[str, ...], message: str, pictures: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for index, name in enumerate(names):
            archive.add(pictures / f"p{index}.png", name)
    with pytest.raises(InputError, match=message):
        read_path(tmp_path / "0.tar", "x")


def test_a_column_chooses_among_the_pictures_of_a_sample(pictures: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for index, name in ((0, "a.png"), (1, "a.jpg"), (2, "a.jpg")):  # a later member replaces an earlier one
            archive.add(pictures / f"p{index}.png", name)
    (example,) = read_path(tmp_path / "0.tar", "x", "jpg")
    assert example.picture.read() == (pictures / "p2.png").read_bytes()


@pytest.mark.parametrize("layout", ["texts", "table", "shard"])
def test_captions_without_pictures_are_an_error(layout: str, pictures: Path) -> None:
    if layout == "texts":
        (pictures / "p1.png").unlink()
    elif layout == "table":
        (pictures / "metadata.jsonl").write_text('{"file_name": "nowhere.png", "text": "a cat"}\n')
    else:
        with tarfile.open(pictures / "0.tar", "w") as archive:
            archive.add(pictures / "p1.txt", "p1.txt")
    with pytest.raises(InputError, match=r"1 captions without pictures: (p1|nowhere)"):
        read_path(pictures, "x")


def test_missing_captions_are_named(pictures: Path) -> None:
    (pictures / "p3.txt").unlink()
    (pictures / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 of 7 pictures have no caption, .*p3\.png$"):
        require_captions(read_path(pictures, "x"), TrainingOptions(train_data_dir=str(pictures), stage="prior"))


@pytest.mark.slow
def test_data_sets_of_the_hub(pictures: Path, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    from kandinsky22.training.finetuning.data import read_examples

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paths = [str(pictures / f"p{index}.png") for index in range(2)]
    table = datasets.Dataset.from_dict({"image": paths, "caption": ["one", "two"]})
    table = table.cast_column("image", datasets.Image())
    folder = tmp_path / "hub"
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    examples = read_examples(options(train_data_dir=None, dataset_name=str(folder)))
    assert [example.caption for example in examples] == ["one", "two"]
    assert examples[1].picture.open().size == (72, 80)


# The cache


def test_pictures_are_encoded_once(pictures: Path, tmp_path: Path) -> None:
    cache, examples = TensorCache(tmp_path / "cache"), read_path(pictures, "x")
    counts = []
    for job in (CountingJob(), CountingJob(), CountingJob("b"), CountingJob(size=(16, 32))):
        prepare(examples, job, cache, OneProcess(), print)
        counts.append(job.count)
    assert counts == [6, 0, 6, 6]
    Image.new("RGB", (30, 30), "red").save(pictures / "p2.png")
    job = CountingJob()
    entries = prepare(examples, job, cache, OneProcess(), print)
    assert job.count == 1
    tensors = cache.read(entries[2].path)
    assert tensors is not None
    assert tensors["colour"].tolist() == [[255, 0, 0]]


def test_damaged_cache_files_are_computed_again(pictures: Path, tmp_path: Path) -> None:
    cache, examples = TensorCache(tmp_path / "cache"), read_path(pictures, "x")
    entries = prepare(examples, CountingJob(), cache, OneProcess(), print)
    entries[0].path.write_bytes(b"damaged")
    job = CountingJob()
    prepare(examples, job, cache, OneProcess(), print)
    assert job.count == 1


def test_broken_pictures_are_named_and_left_out(pictures: Path, tmp_path: Path) -> None:
    (pictures / "p0.png").write_bytes(b"no picture")
    (pictures / "p4.png").write_bytes((pictures / "p4.png").read_bytes()[:300])  # header only
    lines: list[str] = []
    cache = TensorCache(tmp_path / "cache")
    entries = prepare(read_path(pictures, "x"), CountingJob(), cache, OneProcess(), lines.append)
    assert len(entries) == 4
    assert lines[-1] == "2 of 6 pictures are broken and left out"
    assert [
        f"p{number}.png" in line and line.startswith("warning: ") for number, line in zip((0, 4), lines, strict=False)
    ]
    assert len(lines) == 3
    for path in pictures.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 6 pictures can be read"):
        prepare(read_path(pictures, "x"), CountingJob(), cache, OneProcess(), lines.append)


# Parts


def test_buckets_keep_area_and_proportions() -> None:
    sizes = buckets(512, 64, aspects=True)
    assert (512, 512) in sizes
    assert (640, 384) in sizes
    assert all(width % 64 == height % 64 == 0 and width * height <= 512**2 for width, height in sizes)
    assert all(0.5 <= width / height <= 2 for width, height in sizes)
    assert nearest_bucket((3000, 2000), sizes) == (640, 384)
    assert nearest_bucket((100, 3000), sizes)[0] < 400
    assert buckets(512, 64, aspects=False) == [(512, 512)]


def test_parts_are_cut_at_their_position_and_mirrored() -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 10, 20))
    left, right, mirrored = Frame((20, 20), 0.0), Frame((20, 20), 1.0), Frame((20, 20), 0.0, True)
    assert left.cut(image).getpixel((2, 10)) == (255, 0, 0)
    assert right.cut(image).getpixel((2, 10)) == (0, 0, 255)
    assert mirrored.cut(image).getpixel((17, 10)) == (255, 0, 0)
    assert Frame((10, 30)).cut(image, scale=2).size == (20, 60)


def test_random_parts_depend_on_the_file_alone() -> None:
    parts = frames("digest", (32, 32), crops=3, flips=True)
    assert parts == frames("digest", (32, 32), crops=3, flips=True)
    assert parts != frames("another", (32, 32), crops=3, flips=True)
    assert [part.flip for part in parts] == [False, True] * 3
    assert len({part.position for part in parts}) == 3


def test_edges_are_white_where_brightness_changes() -> None:
    image = Image.new("RGB", (20, 20), "black")
    image.paste("white", (10, 0, 20, 20))
    lines = np.asarray(edges(image))
    assert lines[:, 9:11].min() == 255
    assert lines[:, :8].max() == lines[:, 12:].max() == 0


# Order


def test_plans_use_all_pictures_equally_in_one_size_per_step() -> None:
    sizes = [(32, 32)] * 5 + [(64, 16)] * 3
    plan = BatchPlan(sizes, 4, seed=1)
    counts: Counter[int] = Counter()
    for step in range(400):
        indices = [draw.index for draw in plan.draws(step)]
        assert len({sizes[index] for index in indices}) == 1
        counts.update(indices)
    assert all(0.8 < counts[index] / 200 < 1.2 for index in range(8))
    assert BatchPlan(sizes, 4, seed=1).draws(123) == plan.draws(123)
    assert BatchPlan(sizes, 4, seed=2).draws(123) != plan.draws(123)


def test_random_numbers_depend_on_seed_step_and_position() -> None:
    plan = BatchPlan([(1, 1)] * 2, 2, seed=0)
    draws = [draw for step in range(3) for draw in plan.draws(step)]
    noise = {float(torch.randn((), generator=draw.generators()[1])) for draw in draws}
    assert len(noise) == 6
    assert noise == {float(torch.randn((), generator=draw.generators()[1])) for draw in draws}


def test_held_out_pictures_are_none_of_those_trained_on(tmp_path: Path) -> None:
    entries = [Entry(str(index), tmp_path, (1, 1), 1) for index in range(30)]
    training, held_out = split_held_out(entries, None, 0)
    assert (len(training), len(held_out)) == (27, 3)
    assert set(training) | set(held_out) == set(entries)
    assert [len(part) for part in split_held_out(entries[:3], 9, 0)] == [1, 2]


def test_pictures_of_tests_have_two_shapes(tmp_path: Path) -> None:
    sizes = {Image.open(path).size for path in write_pictures(tmp_path).glob("*.png")}
    assert len(sizes) == 2
