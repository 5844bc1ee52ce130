"""Tiny random checkpoints of the published layout, saved by the reference and loaded by both libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines.calls import CLASSES, COMBINED, PRIORS
from tests.pipelines.tiny import MODES, load_quietly, oracle_decoder, oracle_prior

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
from kandinsky22.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection


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
    """The reference's pipelines, by the folder of their checkpoint."""
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
    """A folder with one checkpoint per decoder that starts from pictures, saved by the reference."""
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


@pytest.fixture(scope="session")
def reference(oracles: dict[str, Any], mode_oracles: dict[str, Any]) -> Callable[[str], Any]:
    """Builds the reference's pipeline of any of the ten classes, by the middle of its name."""

    def build(name: str) -> Any:
        checkpoint = "prior" if name in PRIORS else name.removesuffix("Combined") or "decoder"
        components = dict((oracles | mode_oracles)[checkpoint].components)
        if name in COMBINED:
            components |= {f"prior_{key}": part for key, part in oracles["prior"].components.items()}
        pipe = getattr(diffusers, f"KandinskyV22{name}Pipeline")(**components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


# Each test gets pipelines of its own, which it may move, convert and take apart.


@pytest.fixture
def prior(checkpoints: Path) -> KandinskyV22PriorPipeline:
    return load_quietly(KandinskyV22PriorPipeline, checkpoints / "prior")


@pytest.fixture
def emb2emb(checkpoints: Path) -> KandinskyV22PriorEmb2EmbPipeline:
    return load_quietly(KandinskyV22PriorEmb2EmbPipeline, checkpoints / "prior")


@pytest.fixture
def their_emb2emb(oracles: dict[str, Any]) -> Any:
    pipe = diffusers.KandinskyV22PriorEmb2EmbPipeline(**oracles["prior"].components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def decoder(checkpoints: Path) -> KandinskyV22Pipeline:
    return load_quietly(KandinskyV22Pipeline, checkpoints / "decoder")


@pytest.fixture
def combined(checkpoints: Path) -> KandinskyV22CombinedPipeline:
    return load_quietly(KandinskyV22CombinedPipeline, checkpoints / "combined")


@pytest.fixture
def make_pipeline(checkpoints: Path, mode_folder: Path) -> Callable[..., Any]:
    """Loads our pipeline of any of the ten classes, by the middle of its name; options go to `from_pretrained`."""

    def make(name: str, **options: Any) -> Any:
        checkpoint = CLASSES[name].checkpoint
        folder = mode_folder / checkpoint if checkpoint in MODES else checkpoints / checkpoint
        if name in COMBINED and checkpoint in MODES:
            options = {"prior": checkpoints / "prior", **options}
        return load_quietly(getattr(kandinsky22, f"KandinskyV22{name}Pipeline"), folder, **options)

    return make


@pytest.fixture(scope="session")
def ten_checkpoints(tmp_path_factory: pytest.TempPathFactory, reference: Callable[[str], Any]) -> dict[str, Path]:
    """Checkpoints of all ten classes, saved by the reference, by the class's name."""
    folder = tmp_path_factory.mktemp("ten")
    for middle in CLASSES:
        reference(middle).save_pretrained(folder / f"KandinskyV22{middle}Pipeline")
    return {name: folder / name for name in (f"KandinskyV22{middle}Pipeline" for middle in CLASSES)}


@pytest.fixture(scope="session")
def ten_pipelines(ten_checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Our pipelines of all ten classes, by the class's name. Tests must not change them."""
    return {name: getattr(kandinsky22, name).from_pretrained(folder) for name, folder in ten_checkpoints.items()}


@pytest.fixture
def no_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a network runs: arguments must be checked before."""

    def called(*_: Any, **__: Any) -> None:
        pytest.fail("a network ran before the arguments were checked")

    towers = (CLIPTextModelWithProjection, CLIPVisionModelWithProjection)
    for network in (PriorTransformer, UNet2DConditionModel, VQModel, *towers):
        for method in ("forward", "encode_condition", "denoise", "decode", "encode"):
            if hasattr(network, method):
                monkeypatch.setattr(network, method, called)
