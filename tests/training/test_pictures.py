"""Rendered pictures to distil the embedded model with."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from kandinsky22.training.finetuning.data import read_path
from kandinsky22.training.pictures import random_pictures, write_pictures


def test_pictures_are_those_of_their_seed_and_have_captions(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("other", 2)):
        write_pictures(tmp_path / name, random_pictures(count))
    examples = read_path(tmp_path / "one", "--train-data-dir")
    assert len(examples) == 3 and all(example.caption for example in examples)
    assert Image.open(tmp_path / "one" / "00000.png").size == (128, 128)
    assert (tmp_path / "one" / "00002.png").read_bytes() != (tmp_path / "one" / "00001.png").read_bytes()
    write_pictures(tmp_path / "again", random_pictures(3))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert len(read_path(tmp_path / "other", "--train-data-dir")) == 2
