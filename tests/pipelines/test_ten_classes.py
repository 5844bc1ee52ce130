"""All ten classes: exchange of files with the reference, shared components, and the files that are downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines.calls import TEN, is_combined, is_prior

import kandinsky22
from kandinsky22 import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    CheckpointError,
    DiffusionPipeline,
    InputError,
)
from kandinsky22.checkpoints.hub import CheckpointSource

PRIOR_COMPONENTS = ["prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor"]
DECODER_COMPONENTS = ["unet", "scheduler", "movq"]


def weights_of(name: str) -> str:
    """Return the decoder class whose weights a decoder or combined class uses."""
    return name.replace("Combined", "")


def test_all_ten_classes_are_public() -> None:
    assert len(TEN) == 10
    assert set(TEN) == {name for name in kandinsky22.__all__ if name.startswith("KandinskyV22")}


# Files


def index_of(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "model_index.json").read_text())
    entries = {
        name: [part.removesuffix("Pil") for part in entry] if isinstance(entry, list) else entry
        for name, entry in index.items()
    }
    return {name: entry for name, entry in entries.items() if name not in ("_diffusers_version", "_name_or_path")}


def same_weights(one: Any, other: Any) -> None:
    networks = {name: part for name, part in one.components.items() if isinstance(part, torch.nn.Module)}
    assert networks
    for name, network in networks.items():
        tensors, others = network.state_dict(), getattr(other, name).state_dict()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", TEN)
def test_files_go_both_ways(
    name: str, ten_checkpoints: dict[str, Path], ten_pipelines: dict[str, Any], tmp_path: Path
) -> None:
    ours = ten_pipelines[name]
    original = getattr(diffusers, name).from_pretrained(ten_checkpoints[name])
    same_weights(ours, original)
    ours.save_pretrained(tmp_path)
    assert index_of(tmp_path) == index_of(ten_checkpoints[name])
    theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    same_weights(ours, theirs)
    assert set(theirs.components) == set(original.components) == set(ours.components)
    for part in ("scheduler", "prior_scheduler"):
        if part in ours.components:
            assert type(getattr(theirs, part)) is type(getattr(original, part))
            stored = getattr(original, part).config
            assert {key: getattr(theirs, part).config[key] for key in stored if key[0] != "_"} == {
                key: value for key, value in stored.items() if key[0] != "_"
            }
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is type(ours)


@pytest.mark.parametrize("name", TEN)
def test_constructors_are_the_references(name: str) -> None:
    import inspect

    ours, theirs = (list(inspect.signature(getattr(home, name)).parameters) for home in (kandinsky22, diffusers))
    assert ours == theirs


# Sharing


def possible(source: str, target: str) -> bool:
    """Return whether `source` has all components of `target`."""
    return is_combined(source) or (not is_combined(target) and is_prior(source) == is_prior(target))


@pytest.mark.parametrize("source", TEN)
def test_from_pipe_shares_with_every_class(source: str, ten_pipelines: dict[str, Any]) -> None:
    source_pipe = ten_pipelines[source]
    for target in TEN:
        kind = getattr(kandinsky22, target)
        if not possible(source, target):
            with pytest.raises(InputError, match=r"has no .*pass it"):
                kind.from_pipe(source_pipe)
            continue
        prefix = "prior_" if is_prior(target) and is_combined(source) else ""
        target_pipe = kind.from_pipe(source_pipe)
        assert target_pipe.components.keys() == set(kind.component_names())
        assert all(part is source_pipe.components[prefix + name] for name, part in target_pipe.components.items())


@pytest.mark.parametrize("name", TEN)
def test_components_make_another_of_the_same_objects(name: str, ten_pipelines: dict[str, Any]) -> None:
    pipe = ten_pipelines[name]
    again = type(pipe)(**pipe.components)
    assert all(part is pipe.components[key] for key, part in again.components.items())


def test_inner_pipelines_share_too(ten_pipelines: dict[str, Any]) -> None:
    for name in TEN:
        if is_combined(name):
            pipe = ten_pipelines[name]
            parts = pipe.components
            assert all(part is parts[key] for key, part in pipe.decoder_pipe.components.items())
            assert all(part is parts[f"prior_{key}"] for key, part in pipe.prior_pipe.components.items())


def test_components_of_several_pipelines_join(ten_pipelines: dict[str, Any]) -> None:
    prior, decoder = ten_pipelines["KandinskyV22PriorEmb2EmbPipeline"], ten_pipelines["KandinskyV22Img2ImgPipeline"]
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    target_pipe = kandinsky22.KandinskyV22Img2ImgCombinedPipeline.from_pipe(decoder, **parts)
    assert target_pipe.unet is decoder.unet and target_pipe.components["prior_prior"] is prior.prior


# Generation defaults of a checkpoint


def test_generation_defaults_are_passed_to_the_right_stage(ten_pipelines: dict[str, Any], tmp_path: Path) -> None:
    combined = kandinsky22.KandinskyV22Img2ImgCombinedPipeline.from_pipe(
        ten_pipelines["KandinskyV22Img2ImgCombinedPipeline"]
    )
    of_decoder = {"num_inference_steps": 9, "guidance_scale": 2.5, "strength": 0.6}
    of_prior = {"prior_num_inference_steps": 5, "prior_guidance_scale": 1.5}
    combined.generation_defaults = {**of_decoder, **of_prior}
    prior_defaults = {"num_inference_steps": 5, "guidance_scale": 1.5}
    for kind, expected in (
        ("Img2Img", of_decoder),
        ("", {"num_inference_steps": 9, "guidance_scale": 2.5}),
        ("Prior", prior_defaults),
        ("PriorEmb2Emb", prior_defaults),
        ("Combined", {**of_prior, "num_inference_steps": 9, "guidance_scale": 2.5}),
    ):
        target_pipe = getattr(kandinsky22, f"KandinskyV22{kind}Pipeline").from_pipe(combined)
        assert target_pipe.generation_defaults == expected
    combined.save_pretrained(tmp_path)
    assert type(combined).from_pretrained(tmp_path).generation_defaults == {**of_decoder, **of_prior}
    with pytest.raises(InputError, match="strength"):
        ten_pipelines["KandinskyV22PriorPipeline"].generation_defaults = {"strength": 1, "unknown": 2}


# Downloads


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, ten_checkpoints: dict[str, Path]) -> list[str]:
    """Serves the repositories someone/CLASS from the saved folders; lists the requested files as CLASS/FILE."""
    requested: list[str] = []
    local = CheckpointSource.fetch

    def fetch(source: CheckpointSource, select_files: Any) -> Path:
        owner, _, name = str(source.name).partition("/")
        if owner != "someone":
            return local(source, select_files)
        names = sorted(
            str(path.relative_to(ten_checkpoints[name])) for path in ten_checkpoints[name].rglob("*") if path.is_file()
        )
        requested.extend(
            f"{name}/{file}" for file in select_files([*names, "unet/diffusion_pytorch_model.bin", "prior/x.onnx"])
        )
        return ten_checkpoints[name]

    monkeypatch.setattr(CheckpointSource, "fetch", fetch)
    return requested


@pytest.mark.parametrize("name", TEN)
def test_only_the_files_needed_are_fetched(
    name: str, hub: list[str], ten_checkpoints: dict[str, Path], prior: Any
) -> None:
    kind = getattr(kandinsky22, name)
    kind.from_pretrained(f"someone/{name}")
    expected_parts = PRIOR_COMPONENTS if is_prior(name) else DECODER_COMPONENTS
    expected_parts = (
        [*expected_parts, *(f"prior_{part}" for part in PRIOR_COMPONENTS)] if is_combined(name) else expected_parts
    )
    folders = {file.split("/")[1] for file in hub if file.count("/") == 2}
    assert folders == set(expected_parts)
    assert {Path(file).suffix for file in hub} <= {".json", ".txt", ".safetensors", ".md"}
    hub.clear()
    left_out: dict[str, Any] = {part: None for part in expected_parts if part not in ("scheduler", "prior_scheduler")}
    kind.from_pretrained(f"someone/{name}", **left_out)
    assert not [file for file in hub if file.endswith(".safetensors")]


@pytest.mark.parametrize("name", [name for name in TEN if is_combined(name)])
def test_only_missing_components_of_another_prior_are_fetched(name: str, hub: list[str], prior: Any) -> None:
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

# For each task: the auto class, the class that it gives, and the middles of the names of classes that can do it.
TASKS = {
    "text": (AutoPipelineForText2Image, "CombinedPipeline", ["", "Img2Img"]),
    "picture": (AutoPipelineForImage2Image, "Img2ImgCombinedPipeline", ["", "Img2Img"]),
    "mask": (AutoPipelineForInpainting, "InpaintCombinedPipeline", ["Inpaint"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task: str, ten_checkpoints: dict[str, Path], ten_pipelines: dict[str, Any], prior: Any) -> None:
    auto, target, sources = TASKS[task]
    kind = getattr(kandinsky22, f"KandinskyV22{target}")
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    for name in TEN:
        if name in [f"KandinskyV22{mode}{stage}Pipeline" for mode in sources for stage in ("", "Combined")]:
            target_pipe = auto.from_pipe(ten_pipelines[name], **({} if is_combined(name) else parts))
            assert type(target_pipe) is kind and target_pipe.unet is ten_pipelines[name].unet
            if not is_combined(name):
                read = auto.from_pretrained(ten_checkpoints[name], prior=prior)
                assert type(read) is kind and read.components["prior_prior"] is prior.prior
            continue
        with pytest.raises(InputError, match=f"{name} cannot do {auto.task}"):
            auto.from_pipe(ten_pipelines[name])
        with pytest.raises(InputError, match=f"{name} cannot do {auto.task}"):
            auto.from_pretrained(ten_checkpoints[name])
    with pytest.raises(InputError, match="from_pretrained"):
        auto()


# The embedded model


@pytest.mark.parametrize("name", [f"KandinskyV22{kind}Pipeline" for kind in ("PriorEmb2Emb", "Img2Img")])
def test_embedded_stages(name: str) -> None:
    pipe = getattr(kandinsky22, name).from_pretrained("embedded")
    assert pipe.origin == "embedded"
    assert {"num_inference_steps", "guidance_scale"} <= pipe.generation_defaults.keys()


def test_the_stages_of_a_combined_pipeline_have_its_origin_and_defaults() -> None:
    pipe: Any = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained("embedded")
    apart = [
        getattr(kandinsky22, name).from_pretrained("embedded").generation_defaults
        for name in ("KandinskyV22PriorPipeline", "KandinskyV22Pipeline")
    ]
    assert [pipe.prior_pipe.generation_defaults, pipe.decoder_pipe.generation_defaults] == apart
    assert pipe.prior_pipe.origin == pipe.decoder_pipe.origin == "embedded"
    pipe.decoder_pipe.generation_defaults = {"num_inference_steps": 7}  # the stage's own
    assert pipe.decoder_pipe.generation_defaults == {"num_inference_steps": 7}
    pipe.decoder_pipe.enable_tiny_decoder()


@pytest.mark.parametrize("kind", [kandinsky22.KandinskyV22Img2ImgCombinedPipeline, AutoPipelineForImage2Image])
def test_embedded_combination(kind: Any) -> None:
    pipe = kind.from_pretrained("embedded", prior_image_encoder=None)
    assert type(pipe) is kandinsky22.KandinskyV22Img2ImgCombinedPipeline
    assert pipe.components["prior_image_encoder"] is None
    assert {"num_inference_steps", "prior_num_inference_steps"} <= pipe.generation_defaults.keys()


def test_missing_embedded_weights_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
