"""Offloading: networks are on the device only while they run, and results stay the same.

Model offloading is tested on a fake accelerator (`fake_accelerator`), which refuses CPU tensors. In the other modes,
weights that are not in memory are on the meta device.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines.calls import CLASSES, two_step_call
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import DECODER_SCHEDULER, DIM, HAS_AVX512, difference, seeded

import kandinsky22
from kandinsky22.errors import InputError, MissingDependencyError
from kandinsky22.kernels import conv, linear
from kandinsky22.models import Model
from kandinsky22.runtime import cpu_storage, device_offload, disk_offload

DECODER_CALL = {**two_step_call(""), "height": 32, "width": 32}
ROUNDING = 1e-5 if HAS_AVX512 else 5e-5  # largest difference by rounding
MODES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_low_memory")


def run(pipe: Any, name: str) -> list[torch.Tensor]:
    """Return all results of a call of this class, on the CPU."""
    out = pipe(**two_step_call(name), generator=seeded(1))
    return [getattr(out, field).cpu() for field in vars(out)]


def interpolate(pipe: Any) -> list[torch.Tensor]:
    """Return all results of `interpolate` for all kinds of items, on the CPU."""
    out = pipe.interpolate(
        ["a cat", photo(1), torch.ones(1, DIM)], [0.3, 0.3, 0.4], num_inference_steps=2, generator=seeded(1)
    )
    return [out.image_embeds.cpu(), out.negative_image_embeds.cpu()]


def enable(pipe: Any, mode: str, device: Any = "cpu") -> None:
    getattr(pipe, mode)(**({} if mode == "enable_low_memory" else {"device": device}))


@contextmanager
def packing_of(mode: str) -> Iterator[None]:
    """Pack weights as this mode does: sequential offloading packs none."""
    with pytest.MonkeyPatch.context() as patch:
        if mode == "enable_sequential_cpu_offload":
            for module in (linear, conv):
                patch.setattr(module, "may_pack", lambda layer: False)
        yield


def devices_of(pipe: Any) -> dict[str, set[str]]:
    """Return the devices of each network's weights."""
    return {name: {p.device.type for p in network.parameters()} for name, network in pipe._networks().items()}


@pytest.fixture
def onloads(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The networks in the order in which they are onloaded."""
    onloaded: list[torch.nn.Module] = []
    for storage in (cpu_storage.CpuStorage, disk_offload.DiskStorage):
        original = storage.onload

        def onload(self: Any, network: Any, original: Any = original) -> None:
            original(self, network)
            onloaded.append(network)

        monkeypatch.setattr(storage, "onload", onload)
    return onloaded


def names_of(pipe: Any, networks: list[torch.nn.Module]) -> str:
    return " ".join(next(name for name, part in pipe._networks().items() if part is network) for network in networks)


@pytest.mark.parametrize("name", CLASSES)
def test_model_offload(name: str, make_pipeline: Callable[..., Any], onloads: list[torch.nn.Module]) -> None:
    pipe = make_pipeline(name)
    baseline = run(pipe, name)
    onloaded: set[tuple[str, ...]] = set()

    def record(*_: Any) -> dict[str, Any]:
        onloaded.add(tuple(part for part, devices in devices_of(pipe).items() if devices == {"meta"}))
        return {}

    with fake_accelerator() as device:
        pipe.enable_model_cpu_offload(device=device)
        assert all(devices == {"cpu"} for devices in devices_of(pipe).values())
        assert pipe._execution_device == device
        offloaded = run(pipe, name)  # a tensor on the other device would raise
        assert names_of(pipe, onloads) == CLASSES[name].networks
        assert all(devices == {"cpu"} for devices in devices_of(pipe).values())
        pipe(**two_step_call(name), generator=seeded(1), callback_on_step_end=record)
        assert onloaded == {("prior",) if name.startswith("Prior") else ("unet",)}
        pipe.remove_all_hooks()
    for ours, theirs in zip(offloaded, baseline, strict=True):
        assert difference(ours, theirs) < 1e-4  # another attention kernel
    for ours, theirs in zip(run(pipe, name), baseline, strict=True):
        assert difference(ours, theirs) < ROUNDING  # which depends on the memory alignment of weights


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("mode", MODES[1:])
def test_weights_are_in_memory_only_during_use(name: str, mode: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    baseline = run(pipe, name)
    with packing_of(mode):
        expected = run(pipe, name)
    enable(pipe, mode)
    assert all(devices == {"meta"} for devices in devices_of(pipe).values())
    assert pipe._execution_device == torch.device("cpu")
    assert all(torch.equal(a, b) for a, b in zip(run(pipe, name), expected, strict=True))
    assert all(difference(a, b) < ROUNDING for a, b in zip(expected, baseline, strict=True))
    assert all(devices == {"meta"} for devices in devices_of(pipe).values())
    pipe.remove_all_hooks()
    assert all(devices == {"cpu"} for devices in devices_of(pipe).values())
    assert all(torch.equal(a, b) for a, b in zip(run(pipe, name), baseline, strict=True))


@pytest.mark.parametrize("name", ["Prior", "PriorEmb2Emb"])
@pytest.mark.parametrize("mode", MODES)
def test_interpolate(name: str, mode: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    baseline = interpolate(pipe)
    if mode == "enable_model_cpu_offload":
        with fake_accelerator() as device:
            enable(pipe, mode, device)
            for ours, theirs in zip(interpolate(pipe), baseline, strict=True):
                assert difference(ours, theirs) < 1e-4
            assert all(devices == {"cpu"} for devices in devices_of(pipe).values())
        return
    enable(pipe, mode)
    assert all(torch.equal(a, b) for a, b in zip(interpolate(pipe), baseline, strict=True))
    assert all(devices == {"meta"} for devices in devices_of(pipe).values())


@pytest.mark.parametrize("name", CLASSES)
def test_low_memory_holds_one_network_at_a_time(
    name: str, make_pipeline: Callable[..., Any], onloads: list[torch.nn.Module]
) -> None:
    pipe = make_pipeline(name)
    pipe.enable_low_memory()
    onloaded_counts: set[int] = set()
    pipe(
        **two_step_call(name),
        callback_on_step_end=lambda *_: (
            onloaded_counts.add(sum(at == {"cpu"} for at in devices_of(pipe).values())) or {}
        ),
    )
    assert names_of(pipe, onloads) == CLASSES[name].networks
    assert onloaded_counts == {1}


def test_every_public_method_of_networks_is_watched() -> None:
    harmless = {"reset_buffers", "enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing"}
    harmless |= {"has_own_structure", "defined_forward"}
    # parts of `denoise`, which are called alone only for export, and offloaded networks are not exported
    harmless |= {"text_tokens", "step_tokens", "predicted_embedding", "causal_mask", "encode_tokens"}
    for kind in (kandinsky22.PriorTransformer, kandinsky22.UNet2DConditionModel, kandinsky22.VQModel):
        methods = {name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")}
        assert issubclass(kind, Model)
        assert methods - {"config_class", "forward"} - harmless <= set(device_offload.ENTRY_POINTS)


# Other operations on offloaded networks


@pytest.mark.parametrize("mode", MODES)
def test_replaced_components_are_offloaded_too(mode: str, combined: Any) -> None:
    baseline = run(combined, "Combined")
    replaced = copy.deepcopy(combined.unet)
    enable(combined, mode)
    combined.unet = replaced
    combined.scheduler = diffusers.DDPMScheduler(**DECODER_SCHEDULER, variance_type="learned_range")
    assert device_offload.offload_of(replaced) is not None
    assert difference(run(combined, "Combined")[0], baseline[0]) < 1e-5
    assert combined.decoder_pipe.unet is replaced
    combined.remove_all_hooks()
    assert device_offload.offload_of(replaced) is None
    assert devices_of(combined)["unet"] == {"cpu"}


def test_a_copy_of_an_offloaded_network_is_offloaded_by_itself(decoder: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in decoder.unet.state_dict().items()}
    decoder.enable_low_memory()
    twin = copy.deepcopy(decoder.unet)
    assert device_offload.offload_of(twin) is not device_offload.offload_of(decoder.unet)
    device_offload.remove_offload(twin)
    assert device_offload.offload_of(twin) is None
    assert all(parameter.is_meta for parameter in decoder.unet.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in twin.state_dict().items())


def test_pipelines_that_share_networks_share_their_offloading(combined: Any) -> None:
    with fake_accelerator() as device:
        combined.enable_model_cpu_offload(device=device)
        decoder = kandinsky22.KandinskyV22Pipeline.from_pipe(combined)
        for pipe in (decoder, combined.decoder_pipe, combined.prior_pipe):
            assert pipe._execution_device == device
        combined.movq.decode(torch.zeros(1, 4, 8, 8))  # direct calls onload too, and move arguments
        assert devices_of(combined)["movq"] == {"meta"}
        decoder(**DECODER_CALL)
        assert all(devices == {"cpu"} for devices in devices_of(combined).values())


def test_networks_outside_the_sequence_stay_on_the_device(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(decoder), "model_cpu_offload_seq", "unet")
    with fake_accelerator() as device:
        decoder.enable_model_cpu_offload(device=device)
        decoder.movq.decode(torch.zeros(1, 4, 8, 8))
        decoder.unet.encode_condition(torch.zeros(1, DIM))
        assert devices_of(decoder) == {
            "unet": {"meta"},
            "movq": {"meta"},
        }  # outside the sequence: stays until the call ends
        decoder.maybe_free_model_hooks()
        assert devices_of(decoder) == {"unet": {"cpu"}, "movq": {"cpu"}}
    monkeypatch.setattr(type(decoder), "_exclude_from_cpu_offload", ["movq"])
    with fake_accelerator() as device:
        decoder.enable_model_cpu_offload(device=device)
        decoder.maybe_free_model_hooks()
        assert devices_of(decoder) == {"unet": {"cpu"}, "movq": {"meta"}}  # excluded: always stays
        decoder.remove_all_hooks()
        assert devices_of(decoder) == {"unet": {"cpu"}, "movq": {"cpu"}}
    decoder.enable_sequential_cpu_offload(device="cpu")
    assert devices_of(decoder) == {"unet": {"meta"}, "movq": {"cpu"}}
    assert device_offload.offload_of(decoder.movq) is None


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_call_changes_no_later_result(mode: str, decoder: Any) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("enough")

    with packing_of(mode):
        baseline = decoder(**DECODER_CALL, generator=seeded(1)).images
    enable(decoder, mode)
    with pytest.raises(KeyError, match="enough"):
        decoder(**DECODER_CALL, callback_on_step_end=fail)
    assert torch.equal(decoder(**DECODER_CALL, generator=seeded(1)).images, baseline)


@pytest.mark.parametrize("mode", MODES)
def test_switching_modes(mode: str, decoder: Any) -> None:
    with packing_of(mode):
        baseline = decoder(**DECODER_CALL, generator=seeded(1)).images
    for first in MODES:
        enable(decoder, first)
        enable(decoder, mode)
        assert torch.equal(decoder(**DECODER_CALL, generator=seeded(1)).images, baseline)
    decoder.remove_all_hooks()
    decoder.remove_all_hooks()
    hook_attributes = {
        "forward",
        "_hf_hook",
        "_old_forward",
        "pack_weights",
        "state_dict",
        *device_offload.ENTRY_POINTS,
        *device_offload.LAYER_ENTRY_POINTS,
    }
    assert not [name for module in decoder.unet.modules() for name in vars(module) if name in hook_attributes]


@pytest.mark.parametrize("mode", MODES)
def test_saving(mode: str, combined: Any, tmp_path: Path) -> None:
    before = {name: dict(network.state_dict()) for name, network in combined._networks().items()}
    enable(combined, mode)
    combined.save_pretrained(tmp_path)
    again = kandinsky22.KandinskyV22CombinedPipeline.from_pretrained(tmp_path)
    for name, network in again._networks().items():
        assert all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items()), name


@pytest.mark.parametrize("mode", MODES)
def test_to(mode: str, decoder: Any) -> None:
    enable(decoder, mode)
    with pytest.raises(InputError, match=rf"meta.*{mode}.*remove_all_hooks"):
        decoder.to("meta")
    if mode == "enable_model_cpu_offload":
        assert decoder.to("cpu", torch.float64).dtype == torch.float64
    else:
        with pytest.raises(InputError, match=rf"float64.*{mode}.*remove_all_hooks"):
            decoder.to(torch.float64)
    decoder.remove_all_hooks()
    assert decoder.to(torch.float64).dtype == torch.float64


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("mode", MODES[:2])
def test_without_an_accelerator(mode: str, decoder: Any) -> None:
    for options in ({}, {"gpu_id": 0}):
        with pytest.raises(InputError, match=rf"{mode}.*enable_low_memory\(\)"):
            getattr(decoder, mode)(**options)
    for options in ({"device": "cuda"}, {"device": "nothing"}, {"gpu_id": -1}, {"gpu_id": "0"}, {"gpu_id": True}):
        with pytest.raises(InputError, match=next(iter(options))):
            getattr(decoder, mode)(**options)
    with pytest.raises(InputError, match="gpu_id=1"):
        getattr(decoder, mode)(gpu_id=1, device="cpu")
    assert device_offload.offload_of(decoder.unet) is None


@pytest.mark.parametrize("mode", MODES[:2])
def test_without_accelerate(mode: str, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = device_offload.importlib.util.find_spec
    monkeypatch.setattr(
        device_offload.importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(MissingDependencyError, match=r"kandinsky22\[offload\]"):
        getattr(decoder, mode)(device="cpu")
    decoder.enable_low_memory()
    assert decoder(**DECODER_CALL).images.isfinite().all()


# The low-memory mode


def test_low_memory_needs_networks_on_the_cpu_and_a_folder(
    decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="folder="):
        decoder.enable_low_memory(tmp_path / "nowhere")
    monkeypatch.setattr(type(decoder), "device", torch.device("cuda"))
    with pytest.raises(InputError, match="enable_model_cpu_offload"):
        decoder.enable_low_memory()


@pytest.mark.parametrize("change", ["none", "in place", "converted", "channels last"])
def test_changed_networks_are_written_first(change: str, decoder: Any, tmp_path: Path) -> None:
    if change == "in place":
        with torch.no_grad():
            decoder.unet.conv_in.weight.mul_(2)
            decoder.movq.decoder.conv_in.weight.mul_(2)
    elif change == "converted":
        decoder.to(torch.bfloat16).to(torch.float32)
    elif change == "channels last":
        for network in (decoder.unet, decoder.movq):
            network.to(memory_format=torch.channels_last)
    partly = change in ("in place", "channels last")  # the other weights were mapped and moved in memory
    baseline = decoder(**DECODER_CALL, generator=seeded(1)).images
    decoder.enable_low_memory(tmp_path)
    written = [file for _, _, files in os.walk(tmp_path) for file in files]
    assert len(written) == (0 if change == "none" else 2)
    result = decoder(**DECODER_CALL, generator=seeded(1)).images
    assert difference(result, baseline) < (1e-5 if partly else 1e-30)
    decoder.remove_all_hooks()
    assert os.listdir(tmp_path) == []
    result = decoder(**DECODER_CALL, generator=seeded(1)).images
    assert difference(result, baseline) < (1e-5 if partly else 1e-30)


@pytest.mark.parametrize("through", ["the network", "a parent"])
@pytest.mark.parametrize("mode", ["model", "sequential", "low memory", "low memory, in use"])
def test_weights_can_be_loaded_into_offloaded_networks(mode: str, through: str, decoder: Any) -> None:
    original = {name: tensor.clone() for name, tensor in decoder.unet.state_dict().items()}
    weights = {**original, "conv_in.weight": 2 * original["conv_in.weight"]}
    decoder.unet.load_state_dict(weights)
    expected = decoder(**DECODER_CALL, generator=seeded(1)).images
    decoder.unet.load_state_dict(original)
    if mode == "model":
        decoder.enable_model_cpu_offload(device="cpu")
    elif mode == "sequential":
        decoder.enable_sequential_cpu_offload(device="cpu")
    else:
        decoder.enable_low_memory()
        if "in use" in mode:
            decoder.unet(torch.zeros(1, 4, 8, 8), 1, None, added_cond_kwargs={"image_embeds": torch.zeros(1, DIM)})
    offload = device_offload.offload_of(decoder.unet)
    if through == "the network":
        decoder.unet.load_state_dict(weights)
    else:
        parent = torch.nn.Module()
        parent.unet = decoder.unet
        parent.load_state_dict({f"unet.{name}": tensor for name, tensor in weights.items()})
    after = device_offload.offload_of(decoder.unet)
    assert offload is not None and after is not None and after.method == offload.method
    assert difference(decoder(**DECODER_CALL, generator=seeded(1)).images, expected) < 1e-5
    decoder.movq.decode(torch.zeros(1, 4, 8, 8))  # another network takes the place of the UNet
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.unet.state_dict().items())
    decoder.remove_all_hooks()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.unet.state_dict().items())


@pytest.mark.parametrize("how", ["data", "numpy", "one value at an end", "inference mode"])
def test_untracked_weight_changes_survive_offloading(how: str, decoder: Any, checkpoints: Path) -> None:
    weight = decoder.unet.conv_in.weight
    version = weight._version
    if how == "data":
        weight.data.mul_(2)
    elif how == "numpy":
        weight.detach().numpy()[...] *= 2
    elif how == "one value at an end":
        weight.data[-1, -1, -1, -1] += 1
    else:
        with torch.inference_mode():
            decoder = kandinsky22.KandinskyV22Pipeline.from_pretrained(checkpoints / "decoder")
            decoder.set_progress_bar_config(disable=True)
            decoder.unet.conv_in.weight.mul_(2)
    assert weight._version == version
    expected = {name: tensor.clone() for name, tensor in decoder.unet.state_dict().items()}
    decoder.enable_low_memory()
    decoder(**DECODER_CALL)
    decoder.remove_all_hooks()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in decoder.unet.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_packed_weights_are_dropped_when_offloaded(mode: str, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandinsky22.kernels.linear.MIN_MULTIPLICATIONS", 1)
    packs = lambda: [m for part in (decoder.unet, decoder.movq) for m in part.modules() if "_packed_weight" in vars(m)]  # noqa: E731
    baseline = decoder(**DECODER_CALL, generator=seeded(1)).images
    assert packs() or not linear.ONEDNN_DTYPES
    enable(decoder, mode)
    assert packs() == []
    again = decoder(**DECODER_CALL, generator=seeded(1)).images
    assert difference(again, baseline) < 1e-5
    decoder.maybe_free_model_hooks()
    assert packs() == []


# On an accelerator


def peak_memory(pipe: Any, mode: str, call: dict[str, Any]) -> int:
    """Return the peak of allocated bytes of a call on the accelerator."""
    getattr(pipe, mode)()
    pipe(**call)  # warm-up: loads kernels and fills caches of libraries
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipe(**call)
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("name", ["prior", "decoder", "combined"])
def test_less_memory_than_the_reference(
    mode: str, name: str, checkpoints: Path, request: Any, record_property: Callable[[str, object], None]
) -> None:
    classes = {"prior": "Prior", "decoder": "", "combined": "Combined"}
    ours = request.getfixturevalue(name)
    theirs = getattr(diffusers, f"KandinskyV22{classes[name]}Pipeline").from_pretrained(checkpoints / name)
    theirs.set_progress_bar_config(disable=True)
    call = two_step_call(classes[name])
    marks = {"ours": peak_memory(ours, mode, call), "reference": peak_memory(theirs, mode, call)}
    for who, mark in marks.items():
        record_property(who, mark)
    assert marks["ours"] <= marks["reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("mode", MODES[:2])
def test_on_a_real_accelerator(name: str, mode: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    baseline = run(pipe, name)
    getattr(pipe, mode)()
    for ours, theirs in zip(run(pipe, name), baseline, strict=True):
        assert difference(ours, theirs) < 1e-3
    # Workspaces of cuBLAS and tensors in reference cycles count as allocated, but do not belong to the networks.
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() < 2**20
