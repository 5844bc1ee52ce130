"""Sources of checkpoints, tested against a small Hub server on this machine."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from tests.hub_server import COMMIT, Hub, serving
from tests.unit.tiny_models import TINY_MOVQ, assert_same_weights

import kandinsky22
from kandinsky22 import CheckpointError, KandinskyV22Pipeline, VQModel
from kandinsky22.adapters.files import read_adapter
from kandinsky22.checkpoints import hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    root = tmp_path / "hub"
    model = VQModel(**TINY_MOVQ)
    model.save_pretrained(root / "someone/picture/movq")
    model.save_pretrained(root / "someone/picture/movq", safe_serialization=False)
    model.to(torch.float16).save_pretrained(root / "someone/picture/movq", variant="fp16", max_shard_size="100KB")
    (root / "someone/picture/unet").mkdir()
    (root / "someone/picture/unet/config.json").write_text("{}")
    (root / "someone/picture/README.md").write_text("---\nlicense: x\nprior:\n- someone/prior\n---\ntext")
    with serving(root, monkeypatch) as server:
        yield server


def load(cache: Path, name: str = "someone/picture", **options: Any) -> VQModel:
    return VQModel.from_pretrained(name, subfolder="movq", cache_dir=cache, **options)


def test_only_the_files_needed_are_fetched(server: Hub, tmp_path: Path) -> None:
    loaded = load(tmp_path / "cache")
    assert sorted(server.fetched) == ["movq/config.json", "movq/diffusion_pytorch_model.safetensors"]
    assert_same_weights(loaded, VQModel.from_pretrained(server.root / "someone/picture/movq"))


def test_a_variant_in_shards(server: Hub, tmp_path: Path) -> None:
    loaded = load(tmp_path / "cache", variant="fp16", torch_dtype="auto")
    assert loaded.dtype == torch.float16
    weights = [name for name in server.fetched if name != "movq/config.json"]
    assert len(weights) > 2 and all("fp16" in name for name in weights)


def test_bin_files_on_request(server: Hub, tmp_path: Path) -> None:
    load(tmp_path / "cache", use_safetensors=False)
    assert sorted(server.fetched) == ["movq/config.json", "movq/diffusion_pytorch_model.bin"]


def test_cached_files_are_used_when_the_hub_is_down(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tmp_path / "cache")
    server.up = False
    server.fetched.clear()
    assert_same_weights(load(tmp_path / "cache", local_files_only=True), first)
    assert_same_weights(load(tmp_path / "cache"), first)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same_weights(load(tmp_path / "cache"), first)
    assert not server.fetched


def test_missing_hub_files_are_reported(server: Hub, tmp_path: Path) -> None:
    for name, options, named in (
        ("someone/nothing", {}, "someone/nothing"),
        ("someone/picture", {"revision": "v9"}, "v9"),
        ("someone/picture", {"local_files_only": True}, "local Hub cache"),
        ("someone/picture", {"variant": "int8"}, "int8"),
    ):
        with pytest.raises(CheckpointError, match=named):
            load(tmp_path / "cache", name, **options)
    with pytest.raises(CheckpointError, match="nowhere"):
        VQModel.from_pretrained("someone/picture", subfolder="nowhere", cache_dir=tmp_path / "cache")
    server.up = False
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "other")


def test_adapters_are_found_on_the_hub(server: Hub, tmp_path: Path) -> None:
    folder = server.root / "someone/style"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("text")
    for name in ("pytorch_lora_weights.safetensors", "other.safetensors", "more/one.safetensors"):
        save_file({name: torch.zeros(1)}, folder / name)
    options = {"cache_dir": tmp_path / "cache"}
    assert list(read_adapter("someone/style", options=options).tensors) == ["pytorch_lora_weights.safetensors"]
    other = read_adapter("someone/style", weight_name="other.safetensors", options=options)
    assert list(other.tensors) == ["other.safetensors"]
    assert list(read_adapter("someone/style", subfolder="more", options=options).tensors) == ["more/one.safetensors"]
    assert len(server.fetched) == 3 and "README.md" not in server.fetched
    server.up = False
    assert read_adapter("someone/style", options=options).paths
    server.up = True
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "third.safetensors")
    empty = {"cache_dir": tmp_path / "empty"}
    with pytest.raises(
        CheckpointError, match=r"expected pytorch_lora.*has README.*other.*third\.safetensors; pass weight"
    ):
        read_adapter("someone/style", options=empty)
    with pytest.raises(CheckpointError, match="nobody/style"):
        read_adapter("nobody/style", options={**empty, "local_files_only": True})


def test_revision_and_token_are_passed_on(server: Hub, tmp_path: Path) -> None:
    load(tmp_path / "cache", revision=COMMIT, token="hf_secret")
    assert "Bearer hf_secret" in server.tokens
    assert (tmp_path / "cache/models--someone--picture/snapshots" / COMMIT).is_dir()


def test_names_that_cannot_be_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "missing", tmp_path / "file", "a/b/c", "", "two words"):
        with pytest.raises(CheckpointError, match="folder"):
            VQModel.from_pretrained(name)


def test_the_embedded_model_is_never_looked_up(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    VQModel(**TINY_MOVQ).save_pretrained(tmp_path / "embedded/movq")
    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no embedded"):
        VQModel.from_pretrained("embedded", subfolder="movq")
    weights = tmp_path / "package/embedded/weights"
    model = VQModel(**TINY_MOVQ)
    model.save_pretrained(weights / "decoder/movq")
    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path / "package")
    assert_same_weights(VQModel.from_pretrained("embedded", subfolder="movq"), model)
    assert hub.CheckpointSource("embedded").matching_prior().embedded_subfolder == "prior"
    assert not server.fetched


@pytest.mark.parametrize(
    "card", ["prior:\n- someone/prior\n", "prior: someone/prior\n", "tags: [a]\nprior: ['someone/prior']\nlicense: b\n"]
)
def test_the_prior_named_in_a_card(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}---\n# text\nprior: other\n")
    assert hub.CheckpointSource(tmp_path).matching_prior().name == "someone/prior"


def test_the_prior_named_on_the_hub(server: Hub, tmp_path: Path) -> None:
    prior_source = hub.CheckpointSource(
        "someone/picture", cache_dir=tmp_path, token="hf_x", revision="main"
    ).matching_prior()
    assert prior_source == hub.CheckpointSource("someone/prior", cache_dir=tmp_path, token="hf_x")
    assert server.fetched == ["README.md"]


@pytest.mark.parametrize("folder_name", ["k-decoder/prior", "prior", "k-prior"])
def test_the_prior_in_a_folder_nearby(folder_name: str, tmp_path: Path) -> None:
    (tmp_path / "k-decoder").mkdir()
    with pytest.raises(CheckpointError, match="prior="):
        hub.CheckpointSource(tmp_path / "k-decoder").matching_prior()
    (tmp_path / folder_name).mkdir()
    (tmp_path / folder_name / "model_index.json").write_text("{}")
    assert hub.CheckpointSource(tmp_path / "k-decoder").matching_prior().name == (tmp_path / folder_name).resolve()


def test_further_files_of_a_checkpoint_are_found_with_its_options(server: Hub, tmp_path: Path) -> None:
    weights = Path(kandinsky22.__file__).parent / "embedded" / "weights" / "decoder"
    shutil.copytree(weights, server.root / "someone" / "shapes")
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "revision": COMMIT, "token": "secret"}
    pipe = KandinskyV22Pipeline.from_pretrained("someone/shapes", **options)
    assert b"secret" not in pickle.dumps(pipe)
    server.tokens.clear()
    server.fetched.clear()
    pipe.load_distilled_adapter()
    pipe.enable_tiny_decoder()
    assert {name.split("/")[0] for name in server.fetched} == {"distilled", "tiny_decoder"}
    assert server.tokens == {"Bearer secret"}
    server.up = False  # everything is in the cache that was named, and in no other
    again = KandinskyV22Pipeline.from_pretrained("someone/shapes", **options, local_files_only=True)
    copy = KandinskyV22Pipeline.from_pipe(again)
    assert copy.load_distilled_adapter() == pipe.load_distilled_adapter()
    copy.enable_tiny_decoder()
