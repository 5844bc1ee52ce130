"""Tiny random checkpoints of the published layout, made and saved by the reference, and loaded by both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tests.pipelines.tiny import MODES, oracle_decoder, oracle_prior

import kandinsky22
from kandinsky22 import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `prior/`, `decoder/` (whose card names the prior) and `combined/`, saved by the reference."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    prior, decoder = oracle_prior(folder), oracle_decoder()
    prior.save_pretrained(folder / "prior")
    decoder.save_pretrained(folder / "decoder")
    (folder / "decoder" / "README.md").write_text(f"---\nprior:\n- {folder / 'prior'}\n---\n# A decoder\n")
    diffusers.KandinskyV22CombinedPipeline(
        **decoder.components, **{f"prior_{name}": part for name, part in prior.components.items()}
    ).save_pretrained(folder / "combined")
    return folder


@pytest.fixture(scope="session")
def oracles(checkpoints: Path) -> dict[str, Any]:
    """The reference's pipelines, by name."""
    classes = {
        "prior": diffusers.KandinskyV22PriorPipeline,
        "decoder": diffusers.KandinskyV22Pipeline,
        "combined": diffusers.KandinskyV22CombinedPipeline,
    }
    pipes = {name: kind.from_pretrained(checkpoints / name) for name, kind in classes.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="session")
def mode_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint for each decoder that starts from pictures, saved by the reference."""
    folder = tmp_path_factory.mktemp("modes")
    torch.manual_seed(2)
    for mode in MODES:
        oracle_decoder(mode).save_pretrained(folder / mode)
    return folder


@pytest.fixture(scope="session")
def mode_oracles(mode_folder: Path) -> dict[str, Any]:
    """The reference's pipelines that start from pictures, by mode."""
    pipes = {
        mode: getattr(diffusers, f"KandinskyV22{mode}Pipeline").from_pretrained(mode_folder / mode) for mode in MODES
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture
def reference(oracles: dict[str, Any], mode_oracles: dict[str, Any]) -> Callable[[str], Any]:
    """The reference's pipeline of any of the ten classes, by the middle of its name."""

    def make(name: str) -> Any:
        weights = "prior" if name.startswith("Prior") else name.removesuffix("Combined") or "decoder"
        parts = dict((oracles | mode_oracles)[weights].components)
        if name.endswith("Combined"):
            parts |= {f"prior_{key}": part for key, part in oracles["prior"].components.items()}
        pipe = getattr(diffusers, f"KandinskyV22{name}Pipeline")(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def load(kind: Any, folder: Path) -> Any:
    """A pipeline of its own for each test, which may move, convert and take it apart."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prior(checkpoints: Path) -> KandinskyV22PriorPipeline:
    return load(KandinskyV22PriorPipeline, checkpoints / "prior")


@pytest.fixture
def emb2emb(checkpoints: Path) -> KandinskyV22PriorEmb2EmbPipeline:
    return load(KandinskyV22PriorEmb2EmbPipeline, checkpoints / "prior")


@pytest.fixture
def their_emb2emb(oracles: dict[str, Any]) -> Any:
    pipe = diffusers.KandinskyV22PriorEmb2EmbPipeline(**oracles["prior"].components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def decoder(checkpoints: Path) -> KandinskyV22Pipeline:
    return load(KandinskyV22Pipeline, checkpoints / "decoder")


@pytest.fixture
def combined(checkpoints: Path) -> KandinskyV22CombinedPipeline:
    return load(KandinskyV22CombinedPipeline, checkpoints / "combined")


@pytest.fixture
def modes(mode_folder: Path) -> Callable[[str], Any]:
    """Ours, by mode."""
    return lambda mode: load(getattr(kandinsky22, f"KandinskyV22{mode}Pipeline"), mode_folder / mode)


@pytest.fixture
def no_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are to be refused before any network runs."""

    def called(*_: Any, **__: Any) -> None:
        pytest.fail("a network ran before the arguments were checked")

    towers = (transformers.CLIPTextModelWithProjection, transformers.CLIPVisionModelWithProjection)
    for network in (PriorTransformer, UNet2DConditionModel, VQModel, *towers):
        for method in ("forward", "encode_condition", "denoise", "decode", "encode"):
            if hasattr(network, method):
                monkeypatch.setattr(network, method, called)
