"""Arguments of `from_pretrained` that scripts for the reference pass: types, devices, variants, and no-ops."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.tiny import load_quietly, oracle_prior, seeded

from kandinsky22 import (
    AutoPipelineForText2Image,
    CheckpointError,
    DDPMScheduler,
    DiffusionPipeline,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    UNet2DConditionModel,
)
from kandinsky22.checkpoints import pinned_files
from kandinsky22.checkpoints.hub import CheckpointSource
from kandinsky22.runtime.lazy_component import LazyComponent

# Arguments in public scripts that change nothing here.
WITHOUT_EFFECT: dict[str, Any] = {
    "low_cpu_mem_usage": True,
    "device_map": None,
    "resume_download": True,
    "load_connected_pipeline": True,
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
    "vae": None,
    "proxies": None,
    "mirror": None,
    "use_onnx": False,
    "output_loading_info": False,
    "quantization_config": None,
    "custom_pipeline": None,
    "trust_remote_code": False,
    "max_memory": None,
    "offload_state_dict": None,
    "local_files_only": None,
    "use_auth_token": None,
}
LOADERS: dict[str, Callable[..., Any]] = {
    "KandinskyV22Pipeline": KandinskyV22Pipeline.from_pretrained,
    "DiffusionPipeline": DiffusionPipeline.from_pretrained,
    "AutoPipelineForText2Image": AutoPipelineForText2Image.from_pretrained,
    "UNet2DConditionModel": lambda folder, **options: UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", **options
    ),
    "DDPMScheduler": lambda folder, **options: DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **options),
}


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints that may be changed."""
    return Path(shutil.copytree(checkpoints, tmp_path / "copy"))


@pytest.mark.parametrize("name", LOADERS)
def test_arguments_without_effect_are_accepted(name: str, checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "kandinsky22"):
        assert LOADERS[name](checkpoints / "decoder", **WITHOUT_EFFECT) is not None
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    lines = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert sum("low_cpu_mem_usage=True" in line for line in lines) == 1


@pytest.mark.parametrize("name", LOADERS)
def test_unknown_arguments_warn_as_in_the_reference(
    name: str, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert LOADERS[name](checkpoints / "decoder", warp_speed=9) is not None
    assert [record.levelname for record in caplog.records if "warp_speed" in record.getMessage()] == ["WARNING"]


def test_arguments_that_cannot_act_are_refused(checkpoints: Path) -> None:
    for load in LOADERS.values():
        for name in ("quantization_config", "custom_pipeline"):
            with pytest.raises(InputError, match=f"{name}='x' is invalid: expected None"):
                load(checkpoints / "decoder", **{name: "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("force_download", "yes"),
        ("variant", 3),
        ("variant", "../x"),
        ("use_safetensors", "yes"),
        ("revision", 3),
        ("cache_dir", 3),
        ("token", 3),
        ("local_files_only", "x"),
        ("device_map", "nowhere"),
        ("device_map", {"unet": "cpu", "movq": "meta"}),
        ("device_map", 1.5),
        ("torch_dtype", {"unet": torch.int8}),
        ("torch_dtype", {3: torch.float16}),
        ("dtype", "float"),
    ],
)
def test_invalid_arguments_are_named(name: str, value: Any, checkpoints: Path) -> None:
    with pytest.raises(InputError, match=name):
        KandinskyV22Pipeline.from_pretrained(checkpoints / "decoder", **{name: value})


# Types


def test_dtype_is_another_name_of_torch_dtype(checkpoints: Path) -> None:
    for load in (KandinskyV22Pipeline.from_pretrained, LOADERS["UNet2DConditionModel"]):
        assert load(checkpoints / "decoder", dtype=torch.float16).dtype == torch.float16
        assert load(checkpoints / "decoder", dtype=torch.float16, torch_dtype=torch.float16).dtype == torch.float16
        with pytest.raises(InputError, match=r"dtype=torch.float16 contradicts torch_dtype=torch.bfloat16"):
            load(checkpoints / "decoder", dtype=torch.float16, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"unet": torch.float16},
        {"unet": torch.float16, "default": torch.bfloat16},
        {"prior": torch.float16, "movq": torch.bfloat16},
        {"default": torch.float16, "nothing": torch.bfloat16},
    ],
    ids=str,
)
def test_one_dtype_per_component(dtypes: dict[str, torch.dtype], checkpoints: Path) -> None:
    """The dtypes are those that the reference gives, also to the pipeline of the prior, whose names have no prefix."""
    for name in ("decoder", "prior"):
        theirs = diffusers.DiffusionPipeline.from_pretrained(checkpoints / name, torch_dtype=dtypes)
        ours = DiffusionPipeline.from_pretrained(checkpoints / name, torch_dtype=dtypes)
        for part, network in theirs.components.items():
            if isinstance(network, torch.nn.Module):
                assert getattr(ours, part).dtype == network.dtype, part
    combined = KandinskyV22CombinedPipeline.from_pretrained(checkpoints / "decoder", torch_dtype=dtypes)
    default = dtypes.get("default", torch.float32)
    assert combined.unet.dtype == dtypes.get("unet", default)
    assert combined.prior_prior.dtype == dtypes.get("prior", default)
    assert combined.prior_text_encoder.dtype == default
    prefixed = {f"prior_{name}": dtype for name, dtype in dtypes.items() if name != "default"}
    for folder in ("decoder", "combined"):
        again = KandinskyV22CombinedPipeline.from_pretrained(checkpoints / folder, torch_dtype=prefixed)
        assert again.prior_prior.dtype == dtypes.get("prior", torch.float32)


# Networks and schedulers


def test_loading_info_is_returned(checkpoints: Path) -> None:
    theirs, their_info = diffusers.UNet2DConditionModel.from_pretrained(
        checkpoints / "decoder", subfolder="unet", output_loading_info=True
    )
    ours, info = LOADERS["UNet2DConditionModel"](checkpoints / "decoder", output_loading_info=True)
    assert type(ours) is UNet2DConditionModel and theirs is not None
    assert {name: list(values) for name, values in their_info.items() if name in info} == info


def test_settings_of_a_network_are_replaced(checkpoints: Path) -> None:
    """The usual beginning of a training script for inpainting."""
    load = LOADERS["UNet2DConditionModel"]
    plain = load(checkpoints / "decoder")
    with pytest.raises(CheckpointError, match=r"conv_in.weight \(32, 4, 3, 3\) instead of \(32, 9, 3, 3\)"):
        load(checkpoints / "decoder", in_channels=9)
    options: dict[str, Any] = {"in_channels": 9, "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    network, info = load(checkpoints / "decoder", **options, output_loading_info=True)
    assert network.config.in_channels == 9
    assert network.conv_in.weight.shape == (32, 9, 3, 3) and bool(network.conv_in.weight.isfinite().all())
    assert info["mismatched_keys"] == [("conv_in.weight", (32, 4, 3, 3), (32, 9, 3, 3))]
    assert torch.equal(network.conv_out.weight, plain.conv_out.weight)


def test_unused_arguments_of_a_scheduler_are_returned(checkpoints: Path) -> None:
    options: dict[str, Any] = {"beta_end": 0.1, "warp": 9, "return_unused_kwargs": True}
    theirs, their_unused = diffusers.DDPMScheduler.from_pretrained(
        checkpoints / "decoder", subfolder="scheduler", **options
    )
    ours, unused = LOADERS["DDPMScheduler"](checkpoints / "decoder", **options)
    assert unused == {name: value for name, value in their_unused.items() if name == "warp"}
    assert ours.config.beta_end == theirs.config.beta_end == 0.1


# Devices


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "balanced", "auto"], ids=str)
def test_device_maps_on_this_machine(device_map: Any, checkpoints: Path) -> None:
    pipe = KandinskyV22PriorPipeline.from_pretrained(checkpoints / "prior", device_map=device_map)
    expected = "cuda" if torch.cuda.is_available() and device_map in ("balanced", "auto") else "cpu"
    assert pipe.device.type == expected
    assert pipe.hf_device_map == dict.fromkeys(("prior", "image_encoder", "text_encoder"), expected)
    network = LOADERS["UNet2DConditionModel"](checkpoints / "decoder", device_map=device_map)
    assert network.device.type == expected and network.hf_device_map == {"": expected}


def test_device_maps_move_every_network(checkpoints: Path) -> None:
    with fake_accelerator() as device:
        pipe = KandinskyV22PriorPipeline.from_pretrained(checkpoints / "prior", device_map=str(device))
        assert {network.device for network in (pipe.prior, pipe.text_encoder, pipe.image_encoder)} == {device}
        auto = AutoPipelineForText2Image.from_pretrained(checkpoints / "decoder", device_map=device)
        assert auto.unet.device == auto.prior_prior.device == device


# Variants


def keep_variant(folder: Path, pipe: Any, networks: set[str]) -> None:
    """Save a pipeline so that these networks have fp16 files only, and the others plain ones only."""
    for variant in (None, "fp16"):
        pipe.save_pretrained(folder, variant=variant)
    for name in pipe.components:
        for file in (folder / name).glob("*.safetensors"):
            if ("fp16" in file.name) != (name in networks):
                file.unlink()


@pytest.mark.parametrize("networks", [{"unet"}, {"movq"}, {"unet", "movq"}], ids=lambda names: "-".join(sorted(names)))
def test_variants_may_be_mixed(networks: set[str], oracles: dict[str, Any], tmp_path: Path, checkpoints: Path) -> None:
    """Some networks have only fp16 files and the others only plain ones, as the reference loads."""
    keep_variant(tmp_path, oracles["decoder"], networks)
    theirs = diffusers.KandinskyV22Pipeline.from_pretrained(tmp_path, variant="fp16")
    for kind in (KandinskyV22Pipeline, DiffusionPipeline):
        ours: Any = kind.from_pretrained(tmp_path, variant="fp16")
        for name in ("unet", "movq"):
            weights = getattr(theirs, name).state_dict()
            assert all(torch.equal(weights[key], value) for key, value in getattr(ours, name).state_dict().items())
    with pytest.raises(CheckpointError, match="variant 'int8' for"):
        KandinskyV22Pipeline.from_pretrained(tmp_path, variant="int8")


def test_variants_of_the_prior_may_be_mixed(oracles: dict[str, Any], tmp_path: Path) -> None:
    keep_variant(tmp_path, oracles["prior"], {"image_encoder"})
    pipe = load_quietly(KandinskyV22PriorPipeline, tmp_path, variant="fp16")
    assert pipe("a cat", num_inference_steps=2).image_embeds.shape == (1, 32)
    keep_variant(tmp_path / "plain", oracles["prior"], set())
    with pytest.raises(CheckpointError, match="no weights of variant 'fp16' for prior, image_encoder, text_encoder"):
        KandinskyV22PriorPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


# Files that are read later


def overwrite(kind: str, folder: Path, other: Path) -> None:
    """Do something to a folder that a pipeline was loaded from."""
    if kind == "another working directory":
        os.chdir(folder.parent.parent)
    elif kind == "renamed":
        folder.rename(folder.with_name("elsewhere"))
        shutil.copytree(other, folder)
    elif kind == "deleted":
        shutil.rmtree(folder)
    elif kind == "saved over":
        KandinskyV22PriorPipeline.from_pretrained(other).save_pretrained(folder)
    else:
        shutil.copytree(other, folder, dirs_exist_ok=True)  # the same files, with other content


@pytest.mark.parametrize("mode", ["lazy", "low memory", "low memory after a call"])
@pytest.mark.parametrize("kind", ["another working directory", "renamed", "deleted", "saved over", "changed in place"])
def test_nothing_that_happens_to_the_folder_matters(
    kind: str, mode: str, checkpoints: Path, another_prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints / "prior", tmp_path / "prior")
    monkeypatch.chdir(tmp_path)

    def draw(pipe: Any) -> torch.Tensor:
        out = pipe("a red cat", num_inference_steps=2, generator=seeded(1))
        return torch.cat([out.image_embeds, out.negative_image_embeds])

    expected = draw(load_quietly(KandinskyV22PriorPipeline, "prior"))
    pipe = load_quietly(KandinskyV22PriorPipeline, "prior")
    if mode != "lazy":
        pipe.enable_low_memory()
    if mode == "low memory after a call":
        draw(pipe)
    overwrite(kind, tmp_path / "prior", another_prior)
    assert torch.equal(draw(pipe), expected)


def test_large_files_that_change_in_place_are_noticed(
    checkpoints: Path, another_prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are too large to be copied are only opened. Their earlier content is gone then."""
    monkeypatch.setattr(pinned_files, "COPIED_BYTES", 0)
    folder = Path(shutil.copytree(checkpoints / "prior", tmp_path / "prior"))
    pipe = KandinskyV22PriorPipeline.from_pretrained(folder)
    assert isinstance(pipe.components["image_encoder"], LazyComponent)
    name = "image_encoder/model.safetensors"
    (folder / name).write_bytes((another_prior / name).read_bytes())
    os.utime(folder / name, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"image_encoder/model.safetensors was changed after the pipeline was"):
        pipe.image_encoder.parameters()


@pytest.fixture(scope="session")
def another_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("another")
    torch.manual_seed(77)
    oracle_prior(folder).save_pretrained(folder / "prior")
    return folder / "prior"


# Downloading


def test_download_returns_the_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, list[str], bool]] = []
    local = CheckpointSource.fetch

    def fetch(source: CheckpointSource, select_files: Any) -> Path:
        if not str(source.name).startswith("someone/"):
            return local(source, select_files)
        root = copy / str(source.name).removeprefix("someone/")
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        requests.append((str(source.name), sorted(select_files(names)), source.force_download))
        return root

    monkeypatch.setattr(CheckpointSource, "fetch", fetch)
    (copy / "decoder/README.md").write_text("---\nprior: someone/prior\n---\n")
    assert KandinskyV22Pipeline.download(str(copy / "decoder")) == str(copy / "decoder")
    assert DiffusionPipeline.download("someone/decoder", force_download=True) == str(copy / "decoder")
    assert {name for name, _, _ in requests} == {"someone/decoder"}
    assert requests[-1][1] == sorted(
        str(path.relative_to(copy / "decoder")) for path in (copy / "decoder").rglob("*") if path.is_file()
    )
    assert all(force for _, _, force in requests)
    requests.clear()
    assert KandinskyV22CombinedPipeline.download("someone/decoder") == str(copy / "decoder")
    files = json.loads((copy / "prior/model_index.json").read_text()).keys()
    assert {name.split("/")[0] for name in requests[-1][1]} >= {name for name in files if not name.startswith("_")}
