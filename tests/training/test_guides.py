"""The commands of the guide are valid, and the reference of options is up to date."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky22.cli.main import build_parser
from kandinsky22.cli.train import KINDS
from kandinsky22.training.finetuning.options import TinyDecoderOptions

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "count", "expected"),
    [("how-to/training.md", 15, {"lora", "subject", "distill"}), ("training-tutorial.md", 4, {"lora", "subject"})],
)
def test_the_commands_of_the_guides_are_valid(page: str, count: int, expected: set[str]) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    lines = [words for words in lines if words[0] != "python"]
    kinds = set()
    for words in lines:
        arguments = words[words.index("kandinsky22") + 1 :]
        args = vars(build_parser().parse_args(arguments))
        if arguments[0] == "train":
            (kind,) = [kind for kind in KINDS if kind.name == arguments[1]]
            names = {option.name for option in kind.options.options()}
            kind.options.from_mapping({name: value for name, value in args.items() if name in names})
            kinds.add(kind.name)
    assert kinds == expected
    assert len(lines) == count


def test_the_commands_of_the_guide_of_tiny_decoders_are_valid() -> None:
    text = (DOCS / "how-to" / "tiny-decoder.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        args = vars(build_parser().parse_args(shlex.split(line)[1:]))
        if line.startswith("kandinsky22 train"):
            names = {option.name for option in TinyDecoderOptions.options()}
            TinyDecoderOptions.from_mapping({name: value for name, value in args.items() if name in names})
    assert len(lines) == 4


def test_the_reference_of_options_is_up_to_date() -> None:
    program = [sys.executable, str(DOCS / "training_options.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tutorial_has_the_commands_of_its_benchmark() -> None:
    from benchmarks.finetuning_success import CASES

    text = (DOCS / "training-tutorial.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("kandinsky22 train")]
    assert len(lines) == len(CASES)
    for case, words in zip(CASES, lines, strict=True):
        parse = build_parser().parse_args
        shown, measured = (vars(parse(arguments)) for arguments in (words[1:], ["train", *case.command]))
        places = {name: shown.pop(name) for name in ("train_data_dir", "output_dir")}
        assert places["train_data_dir"] == f"finetuning/{case.name}/pictures"
        options = {name for name, value in shown.items() if not callable(value)}
        assert {name: shown[name] for name in options} == {name: measured.get(name) for name in options}


def test_the_judges_of_fine_tuning_tell_true_renders_from_plain_ones() -> None:
    from benchmarks.finetuning_success import CASES, SIDE, captioned_scenes, draw_prompts

    from kandinsky22.training.captions import matches
    from kandinsky22.training.scenes import render

    for case in CASES:
        trained, _ = captioned_scenes(case, 0)
        prompts = draw_prompts(case.judged_scene, 0, trained)
        assert not any(matches(prompt.description, scene) for prompt in prompts for scene in trained)
        scenes = [prompt.scene for prompt in prompts[:10]]
        assert all(case.is_shown(image) for image in case.pictures(scenes))
        assert not any(case.is_shown(image) for image in render(scenes, SIDE))
