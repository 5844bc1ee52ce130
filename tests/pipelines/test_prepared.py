"""Prepared checkpoints: packed weights from a file give the same bits, and are ignored wherever they do not fit."""

from __future__ import annotations

import errno
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.pipelines.tiny import HAS_AVX512

from kandinsky22 import CheckpointError, InputError, KandinskyV22Pipeline, UNet2DConditionModel
from kandinsky22.checkpoints import conversion
from kandinsky22.checkpoints.cache_folder import signing_key
from kandinsky22.checkpoints.hub import CheckpointSource
from kandinsky22.checkpoints.weights import read_tensors
from kandinsky22.kernels import half_precision, packed_memory
from kandinsky22.kernels.linear import packing_layers, stored_packed
from kandinsky22.pipelines.checkpoint_tools import convert
from kandinsky22.pipelines.preparation import pack_checkpoint
from kandinsky22.runtime import prepared
from kandinsky22.runtime.int8_layers import Int8Conv2d
from kandinsky22.runtime.prepared import PACKED_FILE

pytestmark = pytest.mark.skipif(packed_memory.fingerprint() is None, reason="needs Linux and an x86 CPU")
ALL_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPES = {name: dtype for name, dtype in ALL_DTYPES.items() if dtype not in half_precision.SLOW_TYPES}
FASTEST = next(iter(DTYPES.values()))


@pytest.fixture(scope="module", autouse=True)
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder, with the key that prepared files are signed with."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KANDINSKY22_CACHE", str(folder))
        yield folder / "signing.key"


@pytest.fixture(scope="module", params=DTYPES)
def checkpoint(request: pytest.FixtureRequest, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, prepared in both types; its layers are just large enough for packing."""
    folder = tmp_path_factory.mktemp("prepared") / request.param
    source = CheckpointSource("embedded", embedded_subfolder="decoder")
    convert(source, folder, dtype=request.param, prepare=True)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def load(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype="auto")


def packed_layers(network: torch.nn.Module) -> list[str]:
    """Return the paths of layers that hold packed weights."""
    layers = {id(layer) for layer in packing_layers(network)}
    return [path for path, m in network.named_modules() if id(m) in layers and stored_packed(m) is not None]


def result(network: Any) -> torch.Tensor:
    config, dtype = network.config, network.dtype
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, 64, 64, generator=generator).to(dtype)
    embeds = torch.randn(2, config.encoder_hid_dim, generator=generator).to(dtype)
    with torch.no_grad():
        out: torch.Tensor = network(
            latents, 3, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": embeds}
        ).sample
    return out


def test_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    network = load(checkpoint)
    assert packed_layers(network)
    plain = shutil.copytree(checkpoint / "unet", tmp_path / "unet", ignore=shutil.ignore_patterns(PACKED_FILE))
    other = load(Path(plain).parent)
    assert not packed_layers(other)
    assert torch.equal(result(network), result(other))


def test_changed_weights_are_packed_again(copy: Path) -> None:
    network = load(copy)
    before = result(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    changed = result(network)
    assert not torch.equal(before, changed)
    (copy / "unet" / PACKED_FILE).unlink()
    expected = load(copy)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.01)
    assert torch.equal(changed, result(expected))


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "written by another program"])
def test_one_replaced_weight_is_noticed(saved: bool, copy: Path) -> None:
    network = load(copy)
    name = packed_layers(network)[-1]
    layer: Any = network.get_submodule(name)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    if saved:
        network.save_pretrained(copy / "unet")
        assert not (copy / "unet" / PACKED_FILE).exists()
    else:
        save_file(network.state_dict(), copy / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        assert (copy / "unet" / PACKED_FILE).exists()
    again = load(copy)
    assert not packed_layers(again)
    assert torch.equal(again.get_submodule(name).weight, layer.weight)


def test_one_changed_element_is_noticed_and_a_copy_is_not(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))  # as a copy without its times
    assert packed_layers(load(copy))
    with open(weights, "r+b") as file:
        file.seek(weights.stat().st_size - 1)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert not packed_layers(load(copy))


def test_the_digest_of_large_files_is_computed_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Any] = []
    original = prepared._digest
    monkeypatch.setattr(prepared, "_digest", lambda files: computed.append(files) or original(files))
    assert packed_layers(load(copy))
    assert packed_layers(load(copy))
    assert len(computed) == 2  # small files
    monkeypatch.setattr(prepared, "RECORDED_BYTES", 0)
    assert packed_layers(load(copy))
    assert packed_layers(load(copy))
    assert len(computed) == 3
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    times = weights.stat()
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not packed_layers(load(copy))


def test_the_first_load_of_large_files_computes_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "RECORDED_BYTES", 0)
    folder = tmp_path / "prepared"
    convert(CheckpointSource("embedded", embedded_subfolder="decoder"), folder, dtype="float32", prepare=True)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_digest", lambda files: pytest.fail(f"the digest of {files} is computed"))
        assert packed_layers(load(folder))
    with open(folder / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert not packed_layers(load(folder))


def test_the_type_is_known_without_the_key(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared.prepared_dtype(copy / "unet") == copy.name
    monkeypatch.setenv("KANDINSKY22_CACHE", "")
    assert prepared.prepared_dtype(copy / "unet") == copy.name
    assert prepared.prepared_dtype(copy / "scheduler") is None
    (copy / "unet" / PACKED_FILE).write_bytes((2**62).to_bytes(8, "little") + b"{")
    assert prepared.prepared_dtype(copy / "unet") is None
    assert not packed_layers(load(copy))


def test_the_default_device_of_torch_changes_nothing(tmp_path: Path) -> None:
    pipe = KandinskyV22Pipeline.from_pretrained("embedded", torch_dtype=FASTEST)
    pipe.quantize("int8-static")
    with torch.device("meta"):
        pipe.save_prepared(tmp_path / "new")
        network = load(tmp_path / "new")
    assert packed_layers(network)
    # where rounding depends on the memory alignment of weights, it changes some 8-bit integers
    torch.testing.assert_close(result(network), result(pipe.unet), rtol=0, atol=0 if HAS_AVX512 else 0.05)


def test_files_of_another_user_are_ignored(copy: Path, key: Path) -> None:
    secret = key.read_bytes()
    try:
        for other in (bytes(32), b"short", None):
            key.unlink(missing_ok=True)
            if other is not None:
                key.write_bytes(other)
            assert not packed_layers(load(copy))
    finally:
        key.write_bytes(secret)
    assert packed_layers(load(copy))
    assert len(secret) == 32


def test_the_key_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path))

    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    secret = signing_key(create=True)
    assert secret is not None
    assert signing_key(create=True) == secret
    assert os.listdir(tmp_path) == ["signing.key"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "longer", "shorter"])
def test_keys_that_are_no_keys(kind: str, copy: Path, key: Path) -> None:
    content = key.read_bytes()
    key.unlink()
    if kind == "pipe":
        os.mkfifo(key)
    elif kind == "folder":
        key.mkdir()
    elif kind == "device":
        key.symlink_to("/dev/zero")
    else:
        key.write_bytes(content + b"0" if kind == "longer" else content[:-1])
    try:
        assert not packed_layers(load(copy))
    finally:
        if kind == "folder":
            key.rmdir()
        else:
            key.unlink()
        key.write_bytes(content)
    assert packed_layers(load(copy))


def test_a_folder_in_place_of_the_file_is_one_error(copy: Path) -> None:
    path = copy / "unet" / PACKED_FILE
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        pack_checkpoint(copy)


def test_newly_initialised_layers_have_no_packed_weights(copy: Path) -> None:
    network = UNet2DConditionModel.from_pretrained(
        copy / "unet", torch_dtype="auto", in_channels=9, ignore_mismatched_sizes=True
    )
    assert not packed_layers(network)


def test_another_machine_packs_itself(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_memory, "fingerprint", lambda: "that of another machine")
    assert not packed_layers(load(copy))
    other = torch.float32 if copy.name == "bfloat16" else torch.bfloat16
    monkeypatch.undo()
    assert not packed_layers(UNet2DConditionModel.from_pretrained(copy / "unet", torch_dtype=other))


DAMAGE: dict[str, Any] = {
    "truncated": lambda content: content[:-64],
    "no header": lambda content: b"\xff" * 64,
    "empty": lambda content: b"",
    "another layout": lambda content: re.sub(
        rb'(\\"layout\\": \\")(.)', lambda m: m[1] + (b"2" if m[2] == b"1" else b"1"), content, count=1
    ),
    "another type": lambda content: content.replace(b'"dtype": "U8"', b'"dtype": "I8"', 1),
    "deep": lambda content: (100_000).to_bytes(8, "little") + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_ignored(kind: str, copy: Path) -> None:
    path = copy / "unet" / PACKED_FILE
    content = path.read_bytes()
    damaged = DAMAGE[kind](content)
    assert damaged != content
    path.write_bytes(damaged)
    assert not packed_layers(load(copy))


def test_conversion_in_inference_mode(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float16).state_dict()
    monkeypatch.setattr(conversion, "LARGE", 0)  # all weights are converted in pieces, by several threads
    with torch.inference_mode():
        converted = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.state_dict().items())


def test_layouts_are_checked() -> None:
    about = packed_memory.to_bytes(torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 64), 64))
    for layout, memory in ((about.layout[:-1], about.memory), (about.layout, about.memory[:-64])):
        packed = packed_memory.PackedBytes(memory, layout, about.shape, about.dtype)
        with pytest.raises(RuntimeError, match="packed weight"):
            packed_memory.from_bytes(packed)


def test_a_copy_of_the_network_and_an_offload_keep_the_result(checkpoint: Path) -> None:
    import kandinsky22

    embeds = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    call: dict[str, Any] = {"image_embeds": embeds, "negative_image_embeds": -embeds, "num_inference_steps": 2}
    dtype = DTYPES[checkpoint.name]
    images = []
    for low_memory in (False, True):
        pipe: Any = kandinsky22.KandinskyV22Pipeline.from_pretrained(checkpoint, torch_dtype=dtype)
        assert packed_layers(pipe.unet)
        if low_memory:
            pipe.enable_low_memory(by_layer=False)
            assert not packed_layers(pipe.unet)
        generator = torch.Generator().manual_seed(2)
        images.append(pipe(**call, generator=generator, height=64, width=64, output_type="pt").images)
    assert torch.equal(*images)


def test_int8_gives_the_same_bits(tmp_path: Path) -> None:
    source = CheckpointSource("embedded", embedded_subfolder="decoder")
    folder = tmp_path / "int8"
    convert(source, folder, dtype="int8", prepare=True, calibration=["a red circle", "two squares"])
    network = load(folder)
    layouts = {stored[0] for m in packing_layers(network) if (stored := stored_packed(m)) is not None}
    assert layouts >= {"int8", "int8_upsample"}
    expected = result(network)
    (folder / "unet" / PACKED_FILE).unlink()
    other = load(folder)
    assert not packed_layers(other)
    assert torch.equal(result(other), expected)
    random = tmp_path / "random"
    convert(source, random, dtype="int8", prepare=True, with_prior=False)
    assert not torch.equal(result(load(random)), expected)  # ranges of other inputs


def test_int8_files_of_other_layers_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(
        CheckpointSource("embedded", embedded_subfolder="decoder"),
        tmp_path / "int8",
        dtype="int8",
        prepare=True,
        with_prior=False,
    )
    monkeypatch.setattr(prepared, "INT8_LAYOUTS", ("int8",))  # as in a release without the others
    assert not packed_layers(load(tmp_path / "int8"))


def test_small_features_are_packed_for_their_margin(tmp_path: Path) -> None:
    """The layout for features of at most 64 positions has sums of its own in the file."""
    layer = Int8Conv2d(torch.nn.Conv2d(64, 64, 3, padding=1))
    layer.set_input_range(-1.0, 2.0)
    features = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        expected = layer(features)
    network = torch.nn.Sequential(layer)
    weights = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), weights)
    assert prepared.write_packed(network, tmp_path, [weights]) == 1
    other = torch.nn.Sequential(Int8Conv2d(torch.nn.Conv2d(64, 64, 3, padding=1)))
    other.load_state_dict(network.state_dict())
    assert prepared.attach_packed(other, tmp_path, [weights]) == 1
    restored: Any = other[0]
    restored._pack = None  # nothing is packed again
    with torch.no_grad():
        assert torch.equal(other(features), expected)


def test_save_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KandinskyV22Pipeline.from_pretrained("embedded", torch_dtype=FASTEST)
    pipe.save_prepared(tmp_path / "new")
    assert packed_layers(load(tmp_path / "new"))
    tolerance = 0 if HAS_AVX512 else 1e-3
    torch.testing.assert_close(result(load(tmp_path / "new")), result(pipe.unet), rtol=0, atol=tolerance)
    monkeypatch.setenv("KANDINSKY22_CACHE", "")
    with pytest.raises(CheckpointError, match="need a key"):
        pipe.save_prepared(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is complete, but"):
        pipe.to(torch.float16).save_prepared(tmp_path / "half")


@pytest.mark.parametrize(
    ("arguments", "subfolder"),
    [
        ({"dtype": "float32", "prepare": True}, "decoder"),
        ({"dtype": "int8", "prepare": False}, "decoder"),
        ({"dtype": "int8", "prepare": True}, "inpaint"),
    ],
)
def test_calibration_is_for_int8_of_text_to_image(arguments: dict[str, Any], subfolder: str, tmp_path: Path) -> None:
    source = CheckpointSource("embedded", embedded_subfolder=subfolder)
    with pytest.raises(InputError, match="calibration"):
        convert(source, tmp_path / "new", calibration=["a red circle"], **arguments)
    assert not any(tmp_path.iterdir())


def test_networks_without_support_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packed_memory, "fingerprint", lambda: None)
    source = CheckpointSource("embedded", embedded_subfolder="decoder")
    with pytest.raises(CheckpointError, match="prepared checkpoints need"):
        convert(source, tmp_path / "new", dtype="float32", prepare=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="does not map"):
        prepared.write_packed(torch.nn.Linear(1, 1), tmp_path, [])
    with pytest.raises(InputError):
        convert(source, tmp_path / "new", dtype="int9", prepare=True)


def test_types_that_this_cpu_does_not_multiply_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(half_precision, "SLOW_TYPES", (torch.bfloat16, torch.float16))
    source = CheckpointSource("embedded", embedded_subfolder="decoder")
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(InputError, match="expected one of float32, int8; this CPU does not multiply"):
            convert(source, tmp_path / "new", dtype=dtype, prepare=True)
    assert not any(tmp_path.iterdir())


def test_memory_is_given_back() -> None:
    about = packed_memory.to_bytes(torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 64), 64))
    memory, tensor = weakref.ref(about.memory), packed_memory.from_bytes(about)
    del about
    assert memory() is not None  # the tensor keeps it
    del tensor
    assert memory() is None


def test_a_file_that_was_replaced_is_not_read_at_foreign_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "LARGE", 0)
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.full((40,), 1.0), "b": torch.full((50,), 2.0)}, path)
    tensors = dict(read_tensors(path))
    path.unlink()
    save_file({"a": torch.full((10,), 5.0), "b": torch.full((50,), 6.0, dtype=torch.float64)}, path)
    converted = conversion.convert_weights(tensors, dict.fromkeys(tensors, path), torch.float16)
    assert bool((converted["a"] == 1).all()) and bool((converted["b"] == 2).all())
