"""Weight files of others: whatever is wrong with them is a CheckpointError that names the file, and nothing blocks."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.tiny_models import TINY_PRIOR, assert_same_weights

from kandinsky22 import CheckpointError, KandinskyError, PriorTransformer
from kandinsky22.checkpoints import weights

SINGLE, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def model() -> PriorTransformer:
    return PriorTransformer(**TINY_PRIOR).eval()


@pytest.fixture
def folder(model: PriorTransformer, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pickled(model: PriorTransformer, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    return tmp_path / "pickled"


@pytest.fixture
def sharded(model: PriorTransformer, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        PriorTransformer.from_pretrained(folder)
    message = str(raised.value)
    assert all(part in message for part in (str(folder), *parts)), message
    assert message.isprintable()


# Tensors of the wrong kind

FIRST = "proj_to_clip_embeddings.weight"
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor > 0,
    "complex64": lambda tensor: tensor + 1j,
    "uint8": lambda tensor: tensor.to(torch.uint8),
}
OTHER_KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.to_sparse_csr(),
    "meta": lambda tensor: tensor.to("meta"),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "array": lambda tensor: tensor.numpy(),
    "list": lambda tensor: tensor.tolist(),
    "none": lambda tensor: None,
    "number": lambda tensor: 3,
    "expanded": lambda tensor: torch.zeros(1).expand(2**40),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_types(kind: str, folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, FIRST: KINDS[kind](tensors[FIRST])}, folder / SINGLE)
    refused(folder, SINGLE, FIRST)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [*KINDS, *OTHER_KINDS])
def test_pickled_tensors_of_other_kinds(kind: str, pickled: Path, model: PriorTransformer) -> None:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    torch.save({**state, FIRST: (KINDS | OTHER_KINDS)[kind](state[FIRST])}, pickled / PICKLED)
    refused(pickled, PICKLED)


@pytest.mark.parametrize(
    "content",
    [
        *([], None, 3, "text", torch.zeros(3), {}, {"state_dict": {}}, [("a", torch.zeros(1))]),
        *({3: torch.zeros(1)}, {None: torch.zeros(1)}, {("a", 1): torch.zeros(1)}, {b"a": torch.zeros(1)}),
    ],
    ids=str,
)
def test_pickles_of_other_objects(content: Any, pickled: Path) -> None:
    torch.save(content, pickled / PICKLED)
    refused(pickled, PICKLED)


def test_names_with_control_characters_are_escaped(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "\x1b[2J\nname": torch.zeros(1)}, folder / SINGLE)
    refused(folder, SINGLE, "1 unexpected: \\x1b[2J name")


def test_tensors_whose_elements_share_memory_are_copied(pickled: Path, model: PriorTransformer) -> None:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state[FIRST] = torch.full((1, 1), 0.5).expand_as(state[FIRST])
    torch.save(state, pickled / PICKLED)
    loaded = PriorTransformer.from_pretrained(pickled)
    with torch.no_grad():
        loaded.proj_to_clip_embeddings.weight[0, 0] = 1
    assert loaded.proj_to_clip_embeddings.weight.sum() == 0.5 * state[FIRST].numel() + 0.5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_converted_or_refused(dtype: torch.dtype, folder: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)
    loaded = PriorTransformer.from_pretrained(folder)
    assert torch.equal(loaded.proj_to_clip_embeddings.weight, tensors[FIRST].float())
    with pytest.raises(CheckpointError, match=r"of the wrong type: .*float8"):
        PriorTransformer.from_pretrained(folder, torch_dtype="auto")


# Damaged files


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def one_tensor(dtype: str, shape: Any, count: int) -> bytes:
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, count]}}
    return with_header(json.dumps(header).encode(), bytes(count))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"abc", struct.pack("<Q", 2**63) + b"{}", with_header(b"[]"), with_header(b"{}")),
        *(with_header(b"[" * 10_000), with_header(b'{"__metadata__":{"a":1}}'), with_header(b"\xff\xfe")),
        *(one_tensor("F32", shape, 0) for shape in ([-1], [2**63], [2**40, 2**40], [1.5], ["a"], None, [[2]])),
        *(one_tensor(dtype, [2], 2) for dtype in ("F4", "F6_E2M3", "F8_E8M0", "BOOL", "U8", "I8", "X")),
        *(one_tensor("C64", [1], 8), one_tensor("F4", [4], 2), one_tensor("F8_E8M0", [4], 4)),
    ],
)
def test_damaged_headers(content: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(content)
    refused(folder, SINGLE)


@pytest.mark.parametrize("name", [SINGLE, PICKLED])
def test_damaged_bytes(name: str, folder: Path, pickled: Path) -> None:
    """A damaged file is refused, or loads with other values: never another error."""
    path = (folder if name == SINGLE else pickled) / name
    content, source, results = path.read_bytes(), random.Random(0), set()
    for number in range(150):
        damaged = bytearray(content)
        if number % 5 == 0:
            del damaged[source.randrange(len(damaged)) :]
        for _ in range(source.randint(1, 8)):
            damaged[source.randrange(min(len(damaged), (2000, 10**9)[number % 2]))] = source.randrange(256)
        path.write_bytes(damaged)
        try:
            PriorTransformer.from_pretrained(path.parent)
            results.add("loaded")
        except KandinskyError as error:
            assert str(path) in str(error)
            results.add("refused")
    assert results == {"loaded", "refused"}


def test_compressed_pickles_are_refused(pickled: Path) -> None:
    with zipfile.ZipFile(pickled / PICKLED) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(pickled / PICKLED, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content + (bytes(10**7) if name.endswith("/data/0") else b""))
    refused(pickled, PICKLED, "compressed")


# Things that are no files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to("absent")


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX systems")
@pytest.mark.parametrize("make", [fifo, loop, endless, dangling, directory], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["config.json", SINGLE, PICKLED, INDEX, "shard"])
def test_pipes_devices_loops_and_folders(
    name: str, make: Callable[[Path], None], folder: Path, pickled: Path, sharded: Path
) -> None:
    where = {PICKLED: pickled, INDEX: sharded, "shard": sharded}.get(name, folder)
    name = sorted(path.name for path in where.iterdir())[1] if name == "shard" else name
    (where / name).unlink()
    make(where / name)
    refused(where)


def test_other_files_of_the_folder_do_not_matter(folder: Path, model: PriorTransformer) -> None:
    for make in (fifo, loop, endless, dangling, directory):
        make(folder / f"stray {make.__name__}")
    assert_same_weights(PriorTransformer.from_pretrained(folder), model)


def test_links_to_folders_that_loop(tmp_path: Path) -> None:
    loop(tmp_path / "model")
    with pytest.raises(CheckpointError, match="model"):
        PriorTransformer.from_pretrained(tmp_path / "model")
    (tmp_path / "pipeline").mkdir()
    loop(tmp_path / "pipeline" / "prior")
    with pytest.raises(CheckpointError, match="prior"):
        PriorTransformer.from_pretrained(tmp_path / "pipeline", subfolder="prior")


# Indices


@pytest.mark.parametrize(
    "shard",
    [
        *("../model/" + SINGLE, "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b.safetensors", "\ud800.safetensors"),
        *("x" * 300 + ".safetensors", "config.json", "model.bin", "absent.safetensors", 3, None, ["a"], {}),
    ],
    ids=lambda shard: repr(shard)[:30],
)
def test_indices_that_list_other_files(shard: Any, folder: Path, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][FIRST] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": 3}, [], "text", None])
def test_damaged_indices(content: Any, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps(content))
    refused(sharded, INDEX)


@pytest.mark.parametrize("metadata", [None, 3, [], {"digests": 3}, {"digests": {"absent": 3}}, {"digests": None}])
def test_odd_metadata_of_an_index_does_not_matter(metadata: Any, sharded: Path, model: PriorTransformer) -> None:
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    assert_same_weights(PriorTransformer.from_pretrained(sharded), model)


def test_tensors_that_are_stored_twice(sharded: Path) -> None:
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))[:2]
    tensors = load_file(sharded / second)
    extra = next(iter(load_file(sharded / first).items()))
    save_file({**tensors, extra[0]: extra[1]}, sharded / second)
    refused(sharded, second, extra[0], first)


# Weights that another library will read


def test_weights_are_checked_without_being_read(folder: Path, sharded: Path, tmp_path: Path) -> None:
    weights.check_weights([folder / SINGLE])
    weights.check_weights([sharded / INDEX])
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "embeddings.position_ids": torch.arange(3)}, tmp_path / "positions.safetensors")
    weights.check_weights([tmp_path / "positions.safetensors"])
    save_file({**tensors, FIRST: tensors[FIRST].int()}, tmp_path / "integers.safetensors")
    with pytest.raises(CheckpointError, match=r"integers\.safetensors: tensor 'proj_to_clip.*int32"):
        weights.check_weights([tmp_path / "integers.safetensors"])
    with pytest.raises(CheckpointError, match=r"missing file: .*absent|cannot read .*absent"):
        weights.check_weights([tmp_path / "absent.safetensors"])
