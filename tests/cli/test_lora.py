"""`--lora`: adapters on the command line and in recipes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from tests.cli.helpers import SUBCOMMANDS, Command, assert_one_line, pixels, stored
from tests.unit.adapter_layers import attention_layers, peft_layout, random_pairs

import kandinsky22
from kandinsky22.generation.adapters import split_weight


@pytest.fixture
def lora(model: Path, tmp_path: Path) -> Path:
    """An adapter of prior and UNet."""
    return save_adapter(model, tmp_path / "style.safetensors", seed=1)


def save_adapter(model: Path, path: Path, seed: int) -> Path:
    pipe = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained(model)
    tensors = {}
    for role, network in (("unet", pipe.unet), ("prior", pipe.prior_prior)):
        tensors |= peft_layout(random_pairs(network, attention_layers(network), seed=seed), f"{role}.")
    save_file(tensors, path)
    return path


def draw(command: Command, model: Path, name: str, *options: object) -> Path:
    result = command("generate", "a cat", "--model", model, "--seed", 5, "-o", name, *options)
    assert result.code == 0, result.err
    return Path(name)


def test_an_adapter_changes_the_image_and_weight_0_does_not(command: Command, model: Path, lora: Path) -> None:
    plain = pixels(draw(command, model, "plain.png"))
    changed = draw(command, model, "changed.png", "--lora", lora)
    assert not np.array_equal(pixels(changed), plain)
    assert np.array_equal(pixels(draw(command, model, "zero.png", "--lora", f"{lora}:0")), plain)
    half = draw(command, model, "half.png", "--lora", f"{lora}:0.5")
    twice = draw(command, model, "twice.png", "--lora", f"{lora}:0.25", "--lora", f"{lora}:0.25")
    assert np.abs(pixels(half).astype(int) - pixels(twice)).max() <= 1
    assert not np.array_equal(pixels(half), pixels(changed))
    recipe = stored(half)
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert recipe["lora"] == [{"name": str(lora), "sha256": digest, "weight": 0.5}]
    assert recipe["model_digest"] == stored(Path("plain.png"))["model_digest"], "adapters have digests of their own"
    assert f"0.5 of {lora}, sha256 {digest}" in command("info", half).out


def test_a_recipe_finds_its_adapter_and_notices_changes(command: Command, model: Path, lora: Path) -> None:
    first = draw(command, model, "first.png", "--lora", f"{lora.name}:0.5")
    assert command("generate", "--from", first).code == 0
    assert Path("first-again.png").read_bytes() == first.read_bytes()

    folder = Path("elsewhere")
    folder.mkdir()
    first.rename(folder / "first.png")
    lora.rename(folder / lora.name)
    assert command("generate", "--from", folder / "first.png", "-o", "moved.png").code == 0
    assert np.array_equal(pixels(Path("moved.png")), pixels(folder / "first.png"))

    other = save_adapter(model, folder / lora.name, seed=2)
    result = command("generate", "--from", folder / "first.png", "-o", "changed.png")
    assert result.code == 0
    assert f"the adapter {other} has changed" in result.err
    without = command("generate", "--from", folder / "first.png", "--lora", "none", "-o", "without.png")
    assert without.code == 0 and "lora" not in stored(Path("without.png"))

    other.unlink()
    result = command("generate", "--from", folder / "first.png", "-o", "missing.png")
    assert_one_line(result, 1, "was generated with the adapter style.safetensors, which is missing")


@pytest.mark.parametrize("name", ["img2img", "variations", "mix"])
def test_every_subcommand_takes_adapters(command: Command, models: Path, model: Path, name: str) -> None:
    checkpoint, arguments = SUBCOMMANDS[name]
    draw(command, model, "photo.png")
    lora = save_adapter(models / "combined", Path("style.safetensors"), seed=1)
    options = ("--model", models / checkpoint, "--seed", 5)
    assert command(name, *arguments, *options, "-o", "plain.png").code == 0
    result = command(name, *arguments, *options, "--lora", lora, "-o", "changed.png")
    assert result.code == 0, result.err
    assert not np.array_equal(pixels(Path("plain.png")), pixels(Path("changed.png")))


def test_compare_applies_adapters(command: Command, model: Path, lora: Path) -> None:
    options = ("--scheduler", "ddim", "--steps", "2", "--seed", 5, "--lora", f"{lora}:0.5")
    assert command("compare", "a cat", "--model", model, *options, "--pictures").code == 0
    single = draw(command, model, "single.png", "--scheduler", "ddim", "--steps", "2", "--lora", f"{lora}:0.5")
    assert single.read_bytes() == Path("compare-1-1.png").read_bytes()


def test_adapters_with_low_memory_and_quantized_weights(command: Command, model: Path, lora: Path) -> None:
    changed = pixels(draw(command, model, "changed.png", "--lora", lora)).astype(int)
    low = pixels(draw(command, model, "low.png", "--lora", lora, "--low-memory")).astype(int)
    assert np.abs(low - changed).max() <= 1
    pytest.importorskip("torchao")
    small = draw(command, model, "small.png", "--lora", lora, "--quantize", "int8")
    plain = pixels(draw(command, model, "plain.png")).astype(int)
    assert np.abs(pixels(small) - changed).mean() < np.abs(plain - changed).mean() / 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere.safetensors", "no adapter 'nowhere.safetensors'"),
        ("nowhere.safetensors:0,5", "no adapter 'nowhere.safetensors:0,5'"),
        ("empty", "the folder has no files"),
        ("broken.safetensors:0.5", "truncated or not a safetensors file"),
        ("other.safetensors", "does not fit UNet2DConditionModel and PriorTransformer: tensors 1 that fit nothing: x"),
    ],
)
def test_mistakes_are_one_line(command: Command, model: Path, tmp_path: Path, value: str, words: str) -> None:
    import torch

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    result = command("generate", "a cat", "--model", model, "--lora", value)
    assert_one_line(result, 1, words)
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("value", ["", "  :1", "a.safetensors:1e999"])
def test_values_that_are_no_adapters(command: Command, value: str) -> None:
    assert_one_line(command("generate", "a cat", "--lora", value), 2, "--lora", "such as style.safetensors:0.8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("owner/name:-1", ("owner/name", -1.0)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:.8", (r"C:\loras\a.safetensors", 0.8)),
        ("C:1", ("C:1", 1.0)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
        ("a:nan", ("a:nan", 1.0)),
        (":0.5", (":0.5", 1.0)),
    ],
)
def test_the_weight_follows_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected


def test_a_file_whose_name_ends_like_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "style:2"
    path.write_bytes(b"")
    assert split_weight(str(path)) == (str(path), 1.0)
    assert split_weight(f"{path}:0.5") == (str(path), 0.5)


def test_a_batch_applies_adapters_of_the_command_and_of_rows(command: Command, model: Path, lora: Path) -> None:
    """Paths in rows start from the current folder, or from that of the input file."""
    folder = Path("rows")
    folder.mkdir()
    other = save_adapter(model, folder / "other.safetensors", seed=2)
    rows: list[dict[str, object]] = [
        {},
        {"lora": ["other.safetensors:0.5"]},
        {"lora": "none"},
        {"lora": "other.safetensors"},
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": "a cat", "seed": 5, **row}) + "\n" for row in rows)
    )
    result = command("batch", folder / "rows.jsonl", "-o", "out", "--model", model, "--lora", lora, "--batch-size", 1)
    assert result.code == 0, result.err
    for number, options in enumerate((["--lora", lora], ["--lora", f"{other}:0.5"], [], ["--lora", other])):
        alone = draw(command, model, f"alone{number}.png", *options)
        assert np.array_equal(pixels(Path(f"out/00000/00000000{number}.png")), pixels(alone))
    (folder / "rows.jsonl").write_text('{"prompt": "a cat", "lora": "missing.safetensors"}\n')
    result = command("batch", folder / "rows.jsonl", "-o", "missing", "--model", model)
    assert result.code == 1
    assert result.err.startswith("kandinsky22: row 1: ") and "missing.safetensors" in result.err
