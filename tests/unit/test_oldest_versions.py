"""The oldest versions of other packages: declared once, checked when networks are imported, and enough for all of this.

`make test-oldest` runs this file with exactly these versions. It uses nothing but the package and its requirements.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kandinsky22 import AutoPipelineForText2Image, CheckpointError, DiffusionPipeline, PriorTransformer
from kandinsky22.errors import MissingDependencyError
from kandinsky22.requirements import OLDEST_VERSIONS, check_versions

ROOT = Path(__file__).parents[2]


def declared(text: str, separator: str) -> dict[str, str]:
    return dict(re.findall(rf'^ *"?([a-z_]+){separator}([0-9.]+)"?,?$', text, re.MULTILINE))


def test_declarations_agree() -> None:
    dependencies = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    oldest = declared(dependencies, ">=")
    assert {name: oldest[name] for name in OLDEST_VERSIONS} == OLDEST_VERSIONS
    pinned = declared((ROOT / "constraints-oldest.txt").read_text(), "==")
    assert pinned.keys() == oldest.keys()
    assert all(f"{pinned[name]}.".startswith(f"{version}.") for name, version in oldest.items())


@pytest.mark.parametrize(
    ("installed", "is_old"),
    [
        ("2.2.0", True),
        ("2.3.1+cpu", True),
        ("2.4.0", False),
        ("2.4.0a0+git1", False),
        ("2.13.0", False),
        ("3.0", False),
    ],
)
def test_older_versions_are_named(installed: str, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed if name == "torch" else version(name))
    if not is_old:
        check_versions()
        return
    with pytest.raises(MissingDependencyError, match=f"needs torch 2.4 or newer, and {re.escape(installed)} is"):
        check_versions()


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained("embedded")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> torch.Tensor:
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "prior_num_inference_steps": 2}
    return pipe("a red cat", generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def test_pictures_are_generated_and_saved(pipe: Any, tmp_path: Path) -> None:
    picture = generate(pipe)
    assert picture.shape == (1, 3, 64, 64)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(generate(again), picture, atol=1e-4)  # rounding depends on the alignment of weights
    half = AutoPipelineForText2Image.from_pretrained("embedded", torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert torch.isfinite(generate(half).float()).all()


@pytest.mark.skipif("KANDINSKY22_OLDEST" not in os.environ, reason="other versions: tests/pipelines/test_compile.py")
def test_compilation_block_by_block_and_of_a_network(pipe: Any) -> None:
    picture, unet = generate(pipe), pipe.unet
    pipe.compile(backend="eager")
    assert torch.allclose(generate(pipe), picture, atol=1e-3)
    pipe.uncompile()
    pipe.unet = torch.compile(unet, backend="eager")
    assert torch.allclose(generate(pipe), picture, atol=1e-3)
    pipe.unet = unet


def test_low_memory(pipe: Any) -> None:
    picture = generate(pipe)
    pipe.enable_low_memory()
    assert torch.allclose(generate(pipe), picture, atol=1e-3)
    pipe.remove_all_hooks()


def test_hub_names_are_looked_up() -> None:
    with pytest.raises(CheckpointError, match="the local Hub cache did not provide it"):
        DiffusionPipeline.from_pretrained("nobody/nothing-of-this-name", local_files_only=True)


def test_autocast_and_gradient_checkpointing() -> None:
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=2)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.1)
    prior.enable_gradient_checkpointing()
    inputs = torch.randn(2, 16), 5, torch.randn(2, 16), torch.randn(2, 77, 16), torch.ones(2, 77)
    prior(*inputs)[0].sum().backward()
    assert prior.proj_in.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(prior(*inputs)[0].float()).all()
