"""Networks that come and go: each is where it works while it works, and nowhere else, and results stay the same.

Model offloading is seen on a pretended accelerator (`pretend`), which refuses tensors that are on the CPU. For the
others the meta device tells: it is where weights are that are not in memory.
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
from tests.pipelines.calls import CLASSES, inputs, two_step_call
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import DECODER_SCHEDULER, DIM, difference, seeded

import kandinsky22
from kandinsky22.errors import InputError, MissingDependencyError
from kandinsky22.kernels import linear
from kandinsky22.models import Model
from kandinsky22.runtime import device_offload, disk_offload

DECODER: dict[str, Any] = {**inputs(""), "num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32}
MODES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_low_memory")


def run(pipe: Any, name: str) -> list[torch.Tensor]:
    """All tensors that a call of this class gives, on the CPU."""
    out = pipe(**two_step_call(name), generator=seeded(1))
    return [getattr(out, field).cpu() for field in vars(out)]


def mix(pipe: Any) -> list[torch.Tensor]:
    """The same of `interpolate`, with all kinds of items."""
    out = pipe.interpolate(
        ["a cat", photo(1), torch.ones(1, DIM)], [0.3, 0.3, 0.4], num_inference_steps=2, generator=seeded(1)
    )
    return [out.image_embeds.cpu(), out.negative_image_embeds.cpu()]


def enable(pipe: Any, mode: str, device: Any = "cpu") -> None:
    getattr(pipe, mode)(**({} if mode == "enable_low_memory" else {"device": device}))


@contextmanager
def as_in(mode: str) -> Iterator[None]:
    """Weights are rearranged within as they are in this mode: for layers that come one at a time, not at all."""
    with pytest.MonkeyPatch.context() as patch:
        if mode == "enable_sequential_cpu_offload":
            patch.setattr(linear.Packs, "packing", False)
        yield


def homes(pipe: Any) -> dict[str, set[str]]:
    """On which devices each network's weights are."""
    return {name: {p.device.type for p in network.parameters()} for name, network in pipe._networks().items()}


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The networks in the order in which they are onloaded."""
    onloaded: list[torch.nn.Module] = []
    for storage in (device_offload.CpuStorage, disk_offload.DiskStorage):
        original = storage.onload

        def onload(self: Any, network: Any, original: Any = original) -> None:
            original(self, network)
            onloaded.append(network)

        monkeypatch.setattr(storage, "onload", onload)
    return onloaded


def names_of(pipe: Any, networks: list[torch.nn.Module]) -> str:
    return " ".join(next(name for name, part in pipe._networks().items() if part is network) for network in networks)


@pytest.mark.parametrize("name", CLASSES)
def test_model_offload(name: str, make_pipeline: Callable[..., Any], worked: list[torch.nn.Module]) -> None:
    pipe = make_pipeline(name)
    plain = run(pipe, name)
    seen: set[tuple[str, ...]] = set()

    def look(*_: Any) -> dict[str, Any]:
        seen.add(tuple(part for part, places in homes(pipe).items() if places == {"meta"}))
        return {}

    with fake_accelerator() as device:
        pipe.enable_model_cpu_offload(device=device)
        assert all(places == {"cpu"} for places in homes(pipe).values())
        assert pipe._execution_device == device
        offloaded = run(pipe, name)  # any tensor left behind would have raised
        assert names_of(pipe, worked) == CLASSES[name].networks
        assert all(places == {"cpu"} for places in homes(pipe).values())
        pipe(**two_step_call(name), generator=seeded(1), callback_on_step_end=look)
        assert seen == {("prior",) if name.startswith("Prior") else ("unet",)}
        pipe.remove_all_hooks()
    for ours, theirs in zip(offloaded, plain, strict=True):
        assert difference(ours, theirs) < 1e-4  # other kernels of attention
    for ours, theirs in zip(run(pipe, name), plain, strict=True):
        assert difference(ours, theirs) < 1e-5  # where weights lie in memory moves rounding


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("mode", MODES[1:])
def test_weights_are_there_only_while_they_are_used(name: str, mode: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    plain = run(pipe, name)
    with as_in(mode):
        expected = run(pipe, name)
    enable(pipe, mode)
    assert all(places == {"meta"} for places in homes(pipe).values())
    assert pipe._execution_device == torch.device("cpu")
    assert all(torch.equal(a, b) for a, b in zip(run(pipe, name), expected, strict=True))
    assert all(difference(a, b) < 1e-5 for a, b in zip(expected, plain, strict=True))
    assert all(places == {"meta"} for places in homes(pipe).values())
    pipe.remove_all_hooks()
    assert all(places == {"cpu"} for places in homes(pipe).values())
    assert all(torch.equal(a, b) for a, b in zip(run(pipe, name), plain, strict=True))


@pytest.mark.parametrize("name", ["Prior", "PriorEmb2Emb"])
@pytest.mark.parametrize("mode", MODES)
def test_interpolate(name: str, mode: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    plain = mix(pipe)
    if mode == "enable_model_cpu_offload":
        with fake_accelerator() as device:
            enable(pipe, mode, device)
            for ours, theirs in zip(mix(pipe), plain, strict=True):
                assert difference(ours, theirs) < 1e-4
            assert all(places == {"cpu"} for places in homes(pipe).values())
        return
    enable(pipe, mode)
    assert all(torch.equal(a, b) for a, b in zip(mix(pipe), plain, strict=True))
    assert all(places == {"meta"} for places in homes(pipe).values())


@pytest.mark.parametrize("name", CLASSES)
def test_low_memory_takes_turns(name: str, make_pipeline: Callable[..., Any], worked: list[torch.nn.Module]) -> None:
    pipe = make_pipeline(name)
    pipe.enable_low_memory()
    together: set[int] = set()
    pipe(
        **two_step_call(name),
        callback_on_step_end=lambda *_: together.add(sum(at == {"cpu"} for at in homes(pipe).values())) or {},
    )
    assert names_of(pipe, worked) == CLASSES[name].networks
    assert together == {1}


def test_every_public_method_of_networks_is_watched() -> None:
    harmless = {"reset_buffers", "enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing"}
    for kind in (kandinsky22.PriorTransformer, kandinsky22.UNet2DConditionModel, kandinsky22.VQModel):
        methods = {name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")}
        assert issubclass(kind, Model)
        assert methods - {"config_class", "forward"} - harmless <= set(device_offload.ENTRY_POINTS)


# What else may happen while networks are offloaded


@pytest.mark.parametrize("mode", MODES)
def test_replaced_components_are_treated_alike(mode: str, combined: Any) -> None:
    plain = run(combined, "Combined")
    replaced = copy.deepcopy(combined.unet)
    enable(combined, mode)
    combined.unet = replaced
    combined.scheduler = diffusers.DDPMScheduler(**DECODER_SCHEDULER, variance_type="learned_range")
    assert device_offload.offload_of(replaced) is not None
    assert difference(run(combined, "Combined")[0], plain[0]) < 1e-5
    assert combined.decoder_pipe.unet is replaced
    combined.remove_all_hooks()
    assert device_offload.offload_of(replaced) is None
    assert homes(combined)["unet"] == {"cpu"}


def test_pipelines_that_share_networks_share_their_turns(combined: Any) -> None:
    with fake_accelerator() as device:
        combined.enable_model_cpu_offload(device=device)
        decoder = kandinsky22.KandinskyV22Pipeline.from_pipe(combined)
        for pipe in (decoder, combined.decoder_pipe, combined.prior_pipe):
            assert pipe._execution_device == device
        combined.movq.decode(torch.zeros(1, 4, 8, 8))  # a network alone is fetched too, and its arguments follow it
        assert homes(combined)["movq"] == {"meta"}
        decoder(**DECODER)
        assert all(places == {"cpu"} for places in homes(combined).values())


def test_what_stays(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(decoder), "model_cpu_offload_seq", "unet")
    with fake_accelerator() as device:
        decoder.enable_model_cpu_offload(device=device)
        decoder.movq.decode(torch.zeros(1, 4, 8, 8))
        decoder.unet.encode_condition(torch.zeros(1, DIM))
        assert homes(decoder) == {"unet": {"meta"}, "movq": {"meta"}}  # outside the sequence: until the call ends
        decoder.maybe_free_model_hooks()
        assert homes(decoder) == {"unet": {"cpu"}, "movq": {"cpu"}}
    monkeypatch.setattr(type(decoder), "_exclude_from_cpu_offload", ["movq"])
    with fake_accelerator() as device:
        decoder.enable_model_cpu_offload(device=device)
        decoder.maybe_free_model_hooks()
        assert homes(decoder) == {"unet": {"cpu"}, "movq": {"meta"}}  # excluded: always
        decoder.remove_all_hooks()
        assert homes(decoder) == {"unet": {"cpu"}, "movq": {"cpu"}}
    decoder.enable_sequential_cpu_offload(device="cpu")
    assert homes(decoder) == {"unet": {"meta"}, "movq": {"cpu"}}
    assert device_offload.offload_of(decoder.movq) is None


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_fails_is_no_harm(mode: str, decoder: Any) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("enough")

    with as_in(mode):
        plain = decoder(**DECODER, generator=seeded(1)).images
    enable(decoder, mode)
    with pytest.raises(KeyError, match="enough"):
        decoder(**DECODER, callback_on_step_end=fail)
    assert torch.equal(decoder(**DECODER, generator=seeded(1)).images, plain)


@pytest.mark.parametrize("mode", MODES)
def test_switching_modes(mode: str, decoder: Any) -> None:
    with as_in(mode):
        plain = decoder(**DECODER, generator=seeded(1)).images
    for first in MODES:
        enable(decoder, first)
        enable(decoder, mode)
        assert torch.equal(decoder(**DECODER, generator=seeded(1)).images, plain)
    decoder.remove_all_hooks()
    decoder.remove_all_hooks()
    left = {"forward", "_hf_hook", "_old_forward", "packing", "state_dict", *device_offload.ENTRY_POINTS}
    assert not [name for module in decoder.unet.modules() for name in vars(module) if name in left]


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
    assert decoder(**DECODER).images.isfinite().all()


# The low-memory mode


def test_low_memory_needs_networks_on_the_cpu_and_a_folder(
    decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="folder="):
        decoder.enable_low_memory(tmp_path / "nowhere")
    monkeypatch.setattr(type(decoder), "device", torch.device("cuda"))
    with pytest.raises(InputError, match="enable_model_cpu_offload"):
        decoder.enable_low_memory()


@pytest.mark.parametrize("change", ["none", "in place", "converted", "laid out"])
def test_changed_networks_are_written_first(change: str, decoder: Any, tmp_path: Path) -> None:
    if change == "in place":
        with torch.no_grad():
            decoder.unet.conv_in.weight.mul_(2)
            decoder.movq.decoder.conv_in.weight.mul_(2)
    elif change == "converted":
        decoder.to(torch.bfloat16).to(torch.float32)
    elif change == "laid out":
        for network in (decoder.unet, decoder.movq):
            network.to(memory_format=torch.channels_last)
    partly = change in ("in place", "laid out")  # the other weights were mapped, and now lie elsewhere in memory
    plain = decoder(**DECODER, generator=seeded(1)).images
    decoder.enable_low_memory(tmp_path)
    written = [file for _, _, files in os.walk(tmp_path) for file in files]
    assert len(written) == (0 if change == "none" else 2)
    result = decoder(**DECODER, generator=seeded(1)).images
    assert difference(result, plain) < (1e-5 if partly else 1e-30)
    decoder.remove_all_hooks()
    assert os.listdir(tmp_path) == []
    result = decoder(**DECODER, generator=seeded(1)).images
    assert difference(result, plain) < (1e-5 if partly else 1e-30)


@pytest.mark.parametrize("how", ["data", "numpy", "one number at an end", "inference mode"])
def test_changes_that_torch_does_not_count(how: str, decoder: Any, checkpoints: Path) -> None:
    weight = decoder.unet.conv_in.weight
    version = weight._version
    if how == "data":
        weight.data.mul_(2)
    elif how == "numpy":
        weight.detach().numpy()[...] *= 2
    elif how == "one number at an end":
        weight.data[-1, -1, -1, -1] += 1
    else:
        with torch.inference_mode():
            decoder = kandinsky22.KandinskyV22Pipeline.from_pretrained(checkpoints / "decoder")
            decoder.set_progress_bar_config(disable=True)
            decoder.unet.conv_in.weight.mul_(2)
    assert weight._version == version
    expected = {name: tensor.clone() for name, tensor in decoder.unet.state_dict().items()}
    decoder.enable_low_memory()
    decoder(**DECODER)
    decoder.remove_all_hooks()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in decoder.unet.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_packed_weights_go_too(mode: str, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kandinsky22.kernels.linear.WORTHWHILE", 1)
    packs = lambda: [m for part in (decoder.unet, decoder.movq) for m in part.modules() if "_pack" in vars(m)]  # noqa: E731
    plain = decoder(**DECODER, generator=seeded(1)).images
    assert packs() or not linear.DTYPES
    enable(decoder, mode)
    assert packs() == []
    again = decoder(**DECODER, generator=seeded(1)).images
    assert difference(again, plain) < 1e-5
    decoder.maybe_free_model_hooks()
    assert packs() == []


# On an accelerator


def low_water(pipe: Any, mode: str, call: dict[str, Any]) -> int:
    """The most bytes that a call takes on the accelerator."""
    getattr(pipe, mode)()
    pipe(**call)  # kernels and caches of libraries
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
    kinds = {"prior": "Prior", "decoder": "", "combined": "Combined"}
    ours = request.getfixturevalue(name)
    theirs = getattr(diffusers, f"KandinskyV22{kinds[name]}Pipeline").from_pretrained(checkpoints / name)
    theirs.set_progress_bar_config(disable=True)
    call = two_step_call(kinds[name])
    marks = {"ours": low_water(ours, mode, call), "reference": low_water(theirs, mode, call)}
    for who, mark in marks.items():
        record_property(who, mark)
    assert marks["ours"] <= marks["reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("mode", MODES[:2])
def test_on_a_real_accelerator(name: str, mode: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    plain = run(pipe, name)
    getattr(pipe, mode)()
    for ours, theirs in zip(run(pipe, name), plain, strict=True):
        assert difference(ours, theirs) < 1e-3
    assert torch.cuda.memory_allocated() < 2**20
