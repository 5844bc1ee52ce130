"""Features of all pipelines: components, exchange of files with the reference, devices and progress bars."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.pipelines.tiny import seeded

import kandinsky22
from kandinsky22 import (
    AutoPipelineForText2Image,
    CheckpointError,
    DiffusionPipeline,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky22.checkpoints.hub import CheckpointSource

CLASSES: dict[str, type[DiffusionPipeline]] = {
    "prior": KandinskyV22PriorPipeline,
    "decoder": KandinskyV22Pipeline,
    "combined": KandinskyV22CombinedPipeline,
}


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints that may be damaged."""
    return Path(shutil.copytree(checkpoints, tmp_path / "copy"))


def picture(pipe: Any) -> Any:
    """Return a small picture from either library's combined pipeline."""
    return pipe(
        "a red cat",
        generator=seeded(3),
        num_inference_steps=2,
        prior_num_inference_steps=2,
        height=32,
        width=32,
        output_type="np",
    ).images


@pytest.mark.parametrize("name", CLASSES)
def test_save_and_load_both_ways(name: str, checkpoints: Path, tmp_path: Path) -> None:
    pipe = CLASSES[name].from_pretrained(checkpoints / name)
    pipe.save_pretrained(tmp_path)
    original = json.loads((checkpoints / name / "model_index.json").read_text())
    written = json.loads((tmp_path / "model_index.json").read_text())
    for index in (original, written):
        index.pop("_diffusers_version")
        index.pop("_name_or_path", None)
    expected = {
        key: [part.removesuffix("Pil") for part in value] if isinstance(value, list) else value
        for key, value in original.items()
    }
    assert written == expected
    theirs = getattr(diffusers, CLASSES[name].__name__).from_pretrained(tmp_path)
    again = CLASSES[name].from_pretrained(tmp_path)
    for component, value in pipe.components.items():
        if isinstance(value, torch.nn.Module):
            for other in (theirs, again):
                weights = getattr(other, component).state_dict()
                assert all(torch.equal(weights[key], tensor) for key, tensor in value.state_dict().items())


def test_a_saved_pipeline_draws_the_same_in_both(combined: Any, tmp_path: Path) -> None:
    combined.save_pretrained(tmp_path)
    theirs = diffusers.KandinskyV22CombinedPipeline.from_pretrained(tmp_path)
    assert np.abs(picture(theirs) - picture(combined)).max() < 1e-4
    assert np.array_equal(picture(KandinskyV22CombinedPipeline.from_pretrained(tmp_path)), picture(combined))


def test_the_base_class_dispatches(checkpoints: Path) -> None:
    for name, kind in CLASSES.items():
        assert type(DiffusionPipeline.from_pretrained(checkpoints / name)) is kind


def test_saving_over_the_files_in_use(copy: Path) -> None:
    pipe = KandinskyV22CombinedPipeline.from_pretrained(copy / "combined")
    before = picture(pipe)
    pipe.save_pretrained(copy / "combined")
    assert np.array_equal(picture(pipe), before)
    assert np.array_equal(picture(KandinskyV22CombinedPipeline.from_pretrained(copy / "combined")), before)
    assert not [path for path in (copy / "combined").rglob("*") if path.name.startswith(".")]


def test_dtypes(checkpoints: Path) -> None:
    pipe = KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "combined", torch_dtype=torch.bfloat16)
    networks = [part for name in pipe.components if isinstance(part := getattr(pipe, name), torch.nn.Module)]
    assert len(networks) == 5
    assert {network.dtype for network in networks} == {torch.bfloat16}
    assert not any(network.training for network in networks)
    with pytest.raises(InputError, match="torch_dtype"):
        KandinskyV22Pipeline.from_pretrained(checkpoints / "decoder", torch_dtype=torch.int64)


def test_fp16_files_are_float32_unless_asked(checkpoints: Path, tmp_path: Path) -> None:
    pipe = KandinskyV22PriorPipeline.from_pretrained(checkpoints / "prior", torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = KandinskyV22PriorPipeline.from_pretrained(tmp_path)
    assert loaded.prior.dtype == loaded.image_encoder.dtype == loaded.text_encoder.dtype == torch.float32
    stored = KandinskyV22PriorPipeline.from_pretrained(tmp_path, torch_dtype="auto")
    assert stored.prior.dtype == stored.image_encoder.dtype == stored.text_encoder.dtype == torch.float16


def test_variants(decoder: Any, copy: Path, tmp_path: Path) -> None:
    half = decoder.to(torch.float16)
    half.unet.save_pretrained(copy / "decoder/unet", variant="fp16")
    loaded = KandinskyV22Pipeline.from_pretrained(copy / "decoder", variant="fp16", torch_dtype="auto")
    assert loaded.unet.dtype == torch.float16
    assert loaded.movq.dtype == torch.float32
    with pytest.raises(CheckpointError, match="int8"):
        KandinskyV22Pipeline.from_pretrained(copy / "decoder", variant="int8")
    half.save_pretrained(tmp_path / "all", variant="fp16")
    assert diffusers.KandinskyV22Pipeline.from_pretrained(tmp_path / "all", variant="fp16").unet is not None
    with pytest.raises(CheckpointError, match="no weights"):
        KandinskyV22Pipeline.from_pretrained(tmp_path / "all")


def test_variants_of_the_towers(prior: Any, tmp_path: Path) -> None:
    prior.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = KandinskyV22PriorPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype="auto")
    assert loaded.text_encoder.dtype == torch.float16
    assert (tmp_path / "text_encoder/model.fp16.safetensors").is_file()


def test_components_by_keyword(decoder: Any, copy: Path) -> None:
    shutil.rmtree(copy / "decoder/unet")
    loaded = KandinskyV22Pipeline.from_pretrained(copy / "decoder", unet=decoder.unet)
    assert loaded.unet is decoder.unet
    shutil.rmtree(copy / "prior/image_encoder")
    without = KandinskyV22PriorPipeline.from_pretrained(copy / "prior", image_encoder=None)
    assert without.image_encoder is None
    without.save_pretrained(copy / "saved")
    assert KandinskyV22PriorPipeline.from_pretrained(copy / "saved").image_encoder is None


def test_wrong_components_are_named(prior: Any, decoder: Any, oracles: Any) -> None:
    wrong = [
        (decoder, "unet", decoder.movq, "kandinsky22.VQModel", "kandinsky22.UNet2DConditionModel"),
        (decoder, "unet", oracles["decoder"].unet, "diffusers.UNet2DConditionModel", "kandinsky22.UNet2DCond"),
        (decoder, "scheduler", "DDPM", "str", "a scheduler"),
        (decoder, "scheduler", kandinsky22.DDPMScheduler, "the class DDPMScheduler", "a scheduler"),
        (prior, "text_encoder", prior.image_encoder, "CLIPVisionModel", "transformers.CLIPTextModelWithProjection"),
        (prior, "tokenizer", prior.image_processor, "CLIPImageProcessor", "transformers.CLIPTokenizer"),
        (prior, "prior", 3, "int", "kandinsky22.PriorTransformer"),
    ]
    for pipe, name, component, found_type, accepted in wrong:
        with pytest.raises(InputError) as raised:
            setattr(pipe, name, component)
        assert all(part in str(raised.value) for part in (type(pipe).__name__, name, found_type, accepted))
        with pytest.raises(InputError, match=name):
            type(pipe)(**{**pipe.components, name: component})


def test_schedulers_of_the_reference_are_components(decoder: Any, tmp_path: Path) -> None:
    decoder.scheduler = diffusers.DDIMScheduler.from_config(decoder.scheduler.config)
    decoder.save_pretrained(tmp_path)
    loaded = KandinskyV22Pipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is kandinsky22.DDIMScheduler


def test_unknown_schedulers_can_be_replaced(copy: Path, decoder: Any) -> None:
    index = json.loads((copy / "decoder/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDPMWuerstchenScheduler"]
    (copy / "decoder/model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"DDPMWuerstchenScheduler.*DDPMScheduler.*pass scheduler="):
        KandinskyV22Pipeline.from_pretrained(copy / "decoder")
    assert KandinskyV22Pipeline.from_pretrained(copy / "decoder", scheduler=decoder.scheduler)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("decoder", "model_index.json", None),
        ("decoder", "model_index.json", b"{"),
        ("decoder", "unet/config.json", None),
        ("decoder", "unet/diffusion_pytorch_model.safetensors", None),
        ("decoder", "unet/diffusion_pytorch_model.safetensors", b""),
        ("decoder", "scheduler/scheduler_config.json", None),
        ("decoder", "scheduler/scheduler_config.json", b"nonsense"),
        ("prior", "text_encoder/model.safetensors", None),
        ("prior", "text_encoder/model.safetensors", b"12345678"),
        ("prior", "text_encoder/config.json", b"{"),
        ("prior", "image_encoder", None),
        ("prior", "tokenizer", None),
        ("prior", "image_processor/preprocessor_config.json", None),
    ],
)
def test_damaged_files_are_named(name: str, file: str, content: bytes | None, copy: Path) -> None:
    target = copy / name / file
    if content is not None:
        target.write_bytes(content)
    elif target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    for kind in (CLASSES[name], DiffusionPipeline):
        with pytest.raises(CheckpointError) as raised:
            kind.from_pretrained(copy / name)
        assert str(copy / name / file.split("/")[0]) in str(raised.value)


def test_towers_with_missing_tensors_do_not_load(prior: Any, copy: Path) -> None:
    from safetensors.torch import save_file

    tensors = prior.text_encoder.state_dict()
    dropped = "text_model.final_layer_norm.weight"
    tensors_left = {name: tensor for name, tensor in tensors.items() if not name.endswith("final_layer_norm.weight")}
    assert len(tensors_left) == len(tensors) - 1
    save_file(tensors_left, copy / "prior/text_encoder/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=dropped):
        KandinskyV22PriorPipeline.from_pretrained(copy / "prior")


def test_checkpoints_of_another_kind(checkpoints: Path, copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"KandinskyV22PriorPipeline without unet, movq"):
        KandinskyV22Pipeline.from_pretrained(checkpoints / "prior")
    index = json.loads((copy / "decoder/model_index.json").read_text())
    for name in ("StableDiffusionPipeline", "DDPMScheduler", "DiffusionPipeline", None, 3):
        (copy / "decoder/model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(CheckpointError, match="_class_name"):
            DiffusionPipeline.from_pretrained(copy / "decoder")


def test_a_prior_supplies_only_prior_components(checkpoints: Path, copy: Path, decoder: Any) -> None:
    file = copy / "decoder/model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({name: entry for name, entry in index.items() if name != "scheduler"}))
    with pytest.raises(CheckpointError, match="without scheduler"):
        KandinskyV22CombinedPipeline.from_pretrained(copy / "decoder", prior=checkpoints / "prior")
    for wrong in (decoder, checkpoints / "decoder"):
        with pytest.raises(InputError, match=r"^prior=.* is invalid: expected a prior pipeline"):
            KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "decoder", prior=wrong)


def test_unknown_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("/no/such/folder", "someone/no-such-model"):
        for kind in (DiffusionPipeline, KandinskyV22Pipeline, kandinsky22.AutoPipelineForText2Image):
            with pytest.raises(CheckpointError, match=f"no model '{name}'"):
                kind.from_pretrained(name)


def test_the_prior_is_found_by_card_folder_and_argument(checkpoints: Path, copy: Path, prior: Any) -> None:
    by_card = KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "decoder")
    (copy / "decoder/README.md").unlink()
    by_folder = KandinskyV22CombinedPipeline.from_pretrained(copy / "decoder")
    by_name = KandinskyV22CombinedPipeline.from_pretrained(copy / "decoder", prior=str(checkpoints / "prior"))
    by_pipe = KandinskyV22CombinedPipeline.from_pretrained(copy / "decoder", prior=prior)
    assert by_pipe.components["prior_prior"] is prior.prior
    pictures = [picture(pipe) for pipe in (by_card, by_folder, by_name, by_pipe)]
    differences = [float(np.abs(pictures[0] - other).max()) for other in pictures]
    assert max(differences) < 1e-5  # rounding depends on the memory alignment of weights
    part = KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "decoder", prior_image_encoder=None)
    assert part.components["prior_image_encoder"] is None
    (copy / "prior").rename(copy / "elsewhere")
    with pytest.raises(CheckpointError, match="prior="):
        KandinskyV22CombinedPipeline.from_pretrained(copy / "decoder")


def test_the_embedded_parts(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kandinsky22.checkpoints import hub

    for name in ("prior", "decoder"):
        shutil.copytree(checkpoints / name, tmp_path / "embedded/weights" / name)
    (tmp_path / "embedded/weights/decoder/README.md").unlink()
    for part, defaults in (("prior", {"num_inference_steps": 5}), ("decoder", {"num_inference_steps": 9})):
        (tmp_path / "embedded/weights" / part / "generation_defaults.json").write_text(json.dumps(defaults))
    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path)
    assert KandinskyV22PriorPipeline.from_pretrained("embedded").generation_defaults == {"num_inference_steps": 5}
    assert KandinskyV22Pipeline.from_pretrained("embedded").generation_defaults == {"num_inference_steps": 9}
    pipe = kandinsky22.AutoPipelineForText2Image.from_pretrained("embedded")
    assert pipe.origin == "embedded"
    assert pipe.generation_defaults == {"num_inference_steps": 9, "prior_num_inference_steps": 5}


def test_generation_defaults(decoder: Any, tmp_path: Path) -> None:
    assert decoder.generation_defaults == {}
    decoder.generation_defaults = {"guidance_scale": 2.0}
    with pytest.raises(InputError, match="warp"):
        decoder.generation_defaults = {"warp": 9}
    decoder.save_pretrained(tmp_path)
    loaded = KandinskyV22Pipeline.from_pretrained(tmp_path)
    assert loaded.generation_defaults == {"guidance_scale": 2.0}
    assert KandinskyV22Pipeline.from_pipe(loaded).generation_defaults == {"guidance_scale": 2.0}


def test_from_pipe_shares(prior: Any, decoder: Any, combined: Any) -> None:
    again = KandinskyV22Pipeline.from_pipe(decoder, scheduler=combined.scheduler)
    assert again.unet is decoder.unet
    assert again.scheduler is combined.scheduler
    assert KandinskyV22PriorPipeline.from_pipe(combined).components == {
        name: combined.components[f"prior_{name}"] for name in prior.components
    }
    assert KandinskyV22Pipeline.from_pipe(combined).unet is combined.unet
    combined_again = KandinskyV22CombinedPipeline.from_pipe(
        decoder, **{f"prior_{name}": part for name, part in prior.components.items()}
    )
    assert combined_again.components["prior_prior"] is prior.prior
    with pytest.raises(InputError, match="prior_prior"):
        KandinskyV22CombinedPipeline.from_pipe(decoder)
    with pytest.raises(InputError, match="unet, movq"):
        KandinskyV22Pipeline.from_pipe(prior)
    with pytest.raises(InputError, match="vae"):
        KandinskyV22Pipeline.from_pipe(decoder, vae=None)


@pytest.mark.parametrize("wrong", [None, 3, b"/tmp", ["a"]], ids=repr)
def test_invalid_model_names_are_refused(wrong: Any, decoder: Any, checkpoints: Path) -> None:
    expected = "is invalid: expected a folder, a Hub id such as 'owner/name', or 'embedded'"
    message = re.escape(f"pretrained_model_name_or_path={wrong!r} {expected}")
    for kind in (KandinskyV22Pipeline, DiffusionPipeline, AutoPipelineForText2Image):
        with pytest.raises(InputError, match=message):
            kind.from_pretrained(wrong)
    if wrong is not None:  # None looks for the prior
        with pytest.raises(InputError, match=re.escape(f"prior={wrong!r} {expected}, or a prior pipeline")):
            KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "decoder", prior=wrong)
    for pipeline in (wrong, KandinskyV22Pipeline):
        with pytest.raises(InputError, match=r"pipeline=.*is invalid: expected a pipeline of kandinsky22"):
            KandinskyV22Pipeline.from_pipe(pipeline)
    with pytest.raises(InputError, match="DiffusionPipeline is a base class"):
        DiffusionPipeline.from_pipe(decoder)


@pytest.mark.parametrize("entry", ["unet", ["diffusers"], {"a": 1}, ["diffusers", None], [1, 2]], ids=str)
def test_a_damaged_entry_of_the_index(entry: Any, copy: Path) -> None:
    index = copy / "decoder" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": entry}))
    with pytest.raises(CheckpointError, match=r"model_index.json: unet is .*: expected \[library, class\]"):
        KandinskyV22Pipeline.from_pretrained(copy / "decoder")
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": None}))
    assert KandinskyV22Pipeline.from_pretrained(copy / "decoder").components["unet"] is None


def test_pickled_files_are_written_on_request(decoder: Any, tmp_path: Path) -> None:
    """They replace safetensors, which would be read first."""
    decoder.save_pretrained(tmp_path, safe_serialization=True)
    with torch.no_grad():
        first = next(decoder.unet.parameters()).add_(1)
    decoder.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.bin"]
    loaded = KandinskyV22Pipeline.from_pretrained(tmp_path)
    assert torch.equal(next(loaded.unet.parameters()), first)
    with pytest.raises(InputError, match="safe_serialization=None"):
        decoder.save_pretrained(tmp_path, safe_serialization=None)


def test_moving(decoder: Any) -> None:
    assert decoder.to("cpu", torch.bfloat16) is decoder
    assert decoder.dtype == decoder.unet.dtype == decoder.movq.dtype == torch.bfloat16
    assert decoder.to(dtype=torch.float32, device=torch.device("cpu")).dtype == torch.float32
    assert decoder.device == torch.device("cpu")
    for wrong in ({"device": "nonsense"}, {"device": "cuda:99"}, {"dtype": torch.int8}, {"dtype": "float16"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            decoder.to(**wrong)
    decoder.to("meta")
    assert decoder.device.type == decoder.movq.device.type == "meta"


def test_progress_bars(decoder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder.set_progress_bar_config()
    assert list(decoder.progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    decoder.set_progress_bar_config(disable=False, desc="drawing")
    assert list(decoder.progress_bar(range(3))) == [0, 1, 2]
    assert "drawing: 100%" in capsys.readouterr().err
    decoder.set_progress_bar_config()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with decoder.progress_bar(total=2) as bar:
        bar.update(2)
    assert "2/2" in capsys.readouterr().err
    for wrong in ({}, {"iterable": [1], "total": 1}):
        with pytest.raises(InputError, match="progress_bar"):
            decoder.progress_bar(**wrong)
    for wrong in ({"iterable": 3}, {"total": -1}, {"total": 1.5}, {"total": True}, {"total": "3"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            decoder.progress_bar(**wrong)
    decoder.set_progress_bar_config(desc="drawing")
    for wrong in ({"unknown": 1}, {"total": 3}, {"file": 3}, {"ncols": "wide"}, {"disable": np.zeros(2)}):
        with pytest.raises(InputError, match=f"option|{next(iter(wrong))}"):
            decoder.set_progress_bar_config(**wrong)
    assert decoder.progress_bar(total=1).desc.startswith("drawing")


@pytest.mark.parametrize("value", [None, 3, "height", ["height"], {1: 2}, {"no_such": 1}, torch.ones(1, 3), iter("a")])
def test_defaults_are_arguments_by_name(decoder: Any, value: Any) -> None:
    before = decoder.generation_defaults
    with pytest.raises(InputError, match="generation_defaults"):
        decoder.generation_defaults = value
    assert decoder.generation_defaults == before


def test_repr_names_the_parts(decoder: Any, checkpoints: Path) -> None:
    text = repr(decoder)
    assert str(checkpoints / "decoder") in text
    assert "unet: UNet2DConditionModel" in text


def test_unwritable_folders_are_reported(decoder: Any, prior: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for pipe in (decoder, prior):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            pipe.save_pretrained(tmp_path / "file")


def test_only_needed_files_are_requested_from_the_hub(
    copy: Path, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[list[str]] = []
    root, local = copy / "decoder", CheckpointSource.fetch
    decoder.unet.save_pretrained(root / "unet", safe_serialization=False)

    def fetch(source: CheckpointSource, select_files: Any) -> Path:
        if source.name != "someone/decoder":
            return local(source, select_files)
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        requests.append(sorted(select_files(names)))
        return root

    monkeypatch.setattr(CheckpointSource, "fetch", fetch)
    KandinskyV22Pipeline.from_pretrained("someone/decoder", movq=decoder.movq)
    assert requests == [
        ["README.md", "model_index.json"],
        ["scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
    ]
