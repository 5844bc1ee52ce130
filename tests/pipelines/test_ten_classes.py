"""All ten classes: files both ways with the reference, components that are shared and not copied, what is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines.tiny import MODES

import kandinsky22
from kandinsky22 import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    CheckpointError,
    DiffusionPipeline,
    InputError,
)
from kandinsky22.checkpoints.hub import Source

PRIORS = ["PriorPipeline", "PriorEmb2EmbPipeline"]
DECODERS = ["Pipeline", *(f"{mode}Pipeline" for mode in MODES)]
COMBINED = ["CombinedPipeline", "Img2ImgCombinedPipeline", "InpaintCombinedPipeline"]
TEN = [f"KandinskyV22{name}" for name in PRIORS + DECODERS + COMBINED]
OF_PRIOR = ["prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor"]
OF_DECODER = ["unet", "scheduler", "movq"]


def is_prior(name: str) -> bool:
    return "KandinskyV22Prior" in name


def is_combined(name: str) -> bool:
    return name.endswith("CombinedPipeline")


def weights_of(name: str) -> str:
    """The decoder class whose weights a decoder or combined class uses."""
    return name.replace("Combined", "")


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory, oracles: dict[str, Any], mode_oracles: dict[str, Any]
) -> dict[str, Path]:
    """Checkpoints of all ten classes, saved by the reference, by class."""
    folder = tmp_path_factory.mktemp("ten")
    prior = oracles["prior"].components
    decoders = {"KandinskyV22Pipeline": oracles["decoder"].components} | {
        f"KandinskyV22{mode}Pipeline": pipe.components for mode, pipe in mode_oracles.items()
    }
    for name in TEN:
        parts = prior if is_prior(name) else dict(decoders[weights_of(name)])
        if is_combined(name):
            parts |= {f"prior_{part}": value for part, value in prior.items()}
        getattr(diffusers, name)(**parts).save_pretrained(folder / name)
    return {name: folder / name for name in TEN}


@pytest.fixture(scope="session")
def loaded(saved: dict[str, Path]) -> dict[str, Any]:
    """All ten, loaded by us. Nobody changes them."""
    return {name: getattr(kandinsky22, name).from_pretrained(folder) for name, folder in saved.items()}


def test_there_are_ten() -> None:
    assert len(TEN) == 10
    assert set(TEN) == {name for name in kandinsky22.__all__ if name.startswith("KandinskyV22")}


# Files


def index_of(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "model_index.json").read_text())
    plain = {name: [part.removesuffix("Pil") for part in entry] if isinstance(entry, list) else entry
             for name, entry in index.items()}  # fmt: skip
    return {name: entry for name, entry in plain.items() if name not in ("_diffusers_version", "_name_or_path")}


def same_weights(one: Any, other: Any) -> None:
    networks = {name: part for name, part in one.components.items() if isinstance(part, torch.nn.Module)}
    assert networks
    for name, network in networks.items():
        tensors, others = network.state_dict(), getattr(other, name).state_dict()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", TEN)
def test_files_go_both_ways(name: str, saved: dict[str, Path], loaded: dict[str, Any], tmp_path: Path) -> None:
    ours = loaded[name]
    original = getattr(diffusers, name).from_pretrained(saved[name])
    same_weights(ours, original)
    ours.save_pretrained(tmp_path)
    assert index_of(tmp_path) == index_of(saved[name])
    theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    same_weights(ours, theirs)
    assert set(theirs.components) == set(original.components) == set(ours.components)
    for part in ("scheduler", "prior_scheduler"):
        if part in ours.components:
            assert type(getattr(theirs, part)) is type(getattr(original, part))
            kept = getattr(original, part).config
            assert {key: getattr(theirs, part).config[key] for key in kept if key[0] != "_"} == {
                key: value for key, value in kept.items() if key[0] != "_"
            }
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is type(ours)


@pytest.mark.parametrize("name", TEN)
def test_constructors_are_the_references(name: str) -> None:
    import inspect

    ours, theirs = (list(inspect.signature(getattr(home, name)).parameters) for home in (kandinsky22, diffusers))
    assert ours == theirs


# Sharing


def possible(source: str, target: str) -> bool:
    """Whether `source` holds all that `target` is made of."""
    return is_combined(source) or (not is_combined(target) and is_prior(source) == is_prior(target))


@pytest.mark.parametrize("source", TEN)
def test_from_pipe_shares_with_every_class(source: str, loaded: dict[str, Any]) -> None:
    giver = loaded[source]
    for target in TEN:
        kind = getattr(kandinsky22, target)
        if not possible(source, target):
            with pytest.raises(InputError, match=r"has no .*pass it"):
                kind.from_pipe(giver)
            continue
        prefix = "prior_" if is_prior(target) and is_combined(source) else ""
        made = kind.from_pipe(giver)
        assert made.components.keys() == set(kind.component_names())
        assert all(part is giver.components[prefix + name] for name, part in made.components.items())


@pytest.mark.parametrize("name", TEN)
def test_components_make_another_of_the_same_objects(name: str, loaded: dict[str, Any]) -> None:
    pipe = loaded[name]
    again = type(pipe)(**pipe.components)
    assert all(part is pipe.components[key] for key, part in again.components.items())


def test_inner_pipelines_share_too(loaded: dict[str, Any]) -> None:
    for name in TEN:
        if is_combined(name):
            pipe = loaded[name]
            assert all(part is getattr(pipe, key) for key, part in pipe.decoder_pipe.components.items())
            assert all(part is getattr(pipe, f"prior_{key}") for key, part in pipe.prior_pipe.components.items())


def test_components_of_several_pipelines_join(loaded: dict[str, Any]) -> None:
    prior, decoder = loaded["KandinskyV22PriorEmb2EmbPipeline"], loaded["KandinskyV22Img2ImgPipeline"]
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    made = kandinsky22.KandinskyV22Img2ImgCombinedPipeline.from_pipe(decoder, **parts)
    assert made.unet is decoder.unet and made.components["prior_prior"] is prior.prior


# Defaults that a checkpoint brings


def test_generation_defaults_go_where_they_belong(loaded: dict[str, Any], tmp_path: Path) -> None:
    combined = kandinsky22.KandinskyV22Img2ImgCombinedPipeline.from_pipe(loaded["KandinskyV22Img2ImgCombinedPipeline"])
    of_decoder = {"num_inference_steps": 9, "guidance_scale": 2.5, "strength": 0.6}
    of_prior = {"prior_num_inference_steps": 5, "prior_guidance_scale": 1.5}
    combined.generation_defaults = {**of_decoder, **of_prior}
    given = {"num_inference_steps": 5, "guidance_scale": 1.5}
    for kind, expected in (
        ("Img2Img", of_decoder),
        ("", {"num_inference_steps": 9, "guidance_scale": 2.5}),
        ("Prior", given),
        ("PriorEmb2Emb", given),
        ("Combined", {**of_prior, "num_inference_steps": 9, "guidance_scale": 2.5}),
    ):
        made = getattr(kandinsky22, f"KandinskyV22{kind}Pipeline").from_pipe(combined)
        assert made.generation_defaults == expected
    combined.save_pretrained(tmp_path)
    assert type(combined).from_pretrained(tmp_path).generation_defaults == {**of_decoder, **of_prior}
    with pytest.raises(InputError, match="strength"):
        loaded["KandinskyV22PriorPipeline"].generation_defaults = {"strength": 1, "unknown": 2}


# What is fetched


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path]) -> list[str]:
    """Answers for repositories someone/CLASS with the saved folders; holds what was asked for, as NAME/FILE."""
    asked: list[str] = []
    local = Source.fetch

    def fetch(source: Source, choose: Any) -> Path:
        owner, _, name = str(source.name).partition("/")
        if owner != "someone":
            return local(source, choose)
        names = sorted(str(path.relative_to(saved[name])) for path in saved[name].rglob("*") if path.is_file())
        asked.extend(f"{name}/{file}" for file in choose([*names, "unet/diffusion_pytorch_model.bin", "prior/x.onnx"]))
        return saved[name]

    monkeypatch.setattr(Source, "fetch", fetch)
    return asked


@pytest.mark.parametrize("name", TEN)
def test_only_the_files_needed_are_fetched(name: str, hub: list[str], saved: dict[str, Path], prior: Any) -> None:
    kind = getattr(kandinsky22, name)
    kind.from_pretrained(f"someone/{name}")
    wanted = OF_PRIOR if is_prior(name) else OF_DECODER
    wanted = [*wanted, *(f"prior_{part}" for part in OF_PRIOR)] if is_combined(name) else wanted
    folders = {file.split("/")[1] for file in hub if file.count("/") == 2}
    assert folders == set(wanted)
    assert {Path(file).suffix for file in hub} <= {".json", ".txt", ".safetensors", ".md"}
    hub.clear()
    left_out: dict[str, Any] = {part: None for part in wanted if part not in ("scheduler", "prior_scheduler")}
    kind.from_pretrained(f"someone/{name}", **left_out)
    assert not [file for file in hub if file.endswith(".safetensors")]


@pytest.mark.parametrize("name", [name for name in TEN if is_combined(name)])
def test_a_prior_elsewhere_is_fetched_only_for_what_is_missing(name: str, hub: list[str], prior: Any) -> None:
    kind, decoder = getattr(kandinsky22, name), weights_of(name)
    kind.from_pretrained(f"someone/{decoder}", prior=prior)
    assert {file.split("/")[0] for file in hub} == {decoder}
    hub.clear()
    pipe = kind.from_pretrained(
        f"someone/{decoder}", prior="someone/KandinskyV22PriorPipeline", prior_image_encoder=None
    )
    assert pipe.components["prior_image_encoder"] is None
    assert "KandinskyV22PriorPipeline/text_encoder/model.safetensors" in hub
    assert not [file for file in hub if "image_encoder" in file]


# Tasks

TASKS = {
    "text": (AutoPipelineForText2Image, "CombinedPipeline", ["", "Img2Img"]),
    "picture": (AutoPipelineForImage2Image, "Img2ImgCombinedPipeline", ["", "Img2Img"]),
    "mask": (AutoPipelineForInpainting, "InpaintCombinedPipeline", ["Inpaint"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task: str, saved: dict[str, Path], loaded: dict[str, Any], prior: Any) -> None:
    auto, wanted, able = TASKS[task]
    kind = getattr(kandinsky22, f"KandinskyV22{wanted}")
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    for name in TEN:
        if name in [f"KandinskyV22{mode}{stage}Pipeline" for mode in able for stage in ("", "Combined")]:
            made = auto.from_pipe(loaded[name], **({} if is_combined(name) else parts))
            assert type(made) is kind and made.unet is loaded[name].unet
            if not is_combined(name):
                read = auto.from_pretrained(saved[name], prior=prior)
                assert type(read) is kind and read.components["prior_prior"] is prior.prior
            continue
        with pytest.raises(InputError, match=f"{name} cannot do {auto.task}"):
            auto.from_pipe(loaded[name])
        with pytest.raises(InputError, match=f"{name} cannot do {auto.task}"):
            auto.from_pretrained(saved[name])
    with pytest.raises(InputError, match="from_pretrained"):
        auto()


# The embedded model


@pytest.mark.parametrize("name", [f"KandinskyV22{kind}Pipeline" for kind in ("PriorEmb2Emb", "Img2Img")])
def test_embedded_stages(name: str) -> None:
    pipe = getattr(kandinsky22, name).from_pretrained("embedded")
    assert pipe.origin == "embedded"
    assert {"num_inference_steps", "guidance_scale"} <= pipe.generation_defaults.keys()


@pytest.mark.parametrize("kind", [kandinsky22.KandinskyV22Img2ImgCombinedPipeline, AutoPipelineForImage2Image])
def test_embedded_combination(kind: Any) -> None:
    pipe = kind.from_pretrained("embedded", prior_image_encoder=None)
    assert type(pipe) is kandinsky22.KandinskyV22Img2ImgCombinedPipeline
    assert pipe.components["prior_image_encoder"] is None
    assert {"num_inference_steps", "prior_num_inference_steps"} <= pipe.generation_defaults.keys()


def test_embedded_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kandinsky22.checkpoints import hub

    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path)
    for name in TEN:
        with pytest.raises(CheckpointError, match="no embedded"):
            getattr(kandinsky22, name).from_pretrained("embedded")


@pytest.mark.parametrize("name", TEN)
def test_the_package_brings_weights_for_every_class(name: str) -> None:
    pipe = getattr(kandinsky22, name).from_pretrained("embedded")
    assert all(component is not None for component in pipe.components.values())
    assert pipe.generation_defaults["num_inference_steps"] > 0
