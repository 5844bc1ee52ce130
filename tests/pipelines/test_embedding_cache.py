"""Image encoders are loaded on first use; embeddings of all-zero images and text encodings are cached."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import difference, load_quietly, seeded

from kandinsky22 import (
    CheckpointError,
    DiffusionPipeline,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky22.kernels import host_memory, settings
from kandinsky22.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from kandinsky22.pipelines import embedding_cache
from kandinsky22.runtime.lazy_component import LazyComponent


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedding_cache, "MIN_ENCODER_BYTES", 0)
    return tmp_path / "cache" / "zero-image"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the towers that ran, in order."""
    towers: list[str] = []
    for name, kind in (
        ("text", CLIPTextModelWithProjection),
        ("image", CLIPVisionModelWithProjection),
    ):
        original = kind.forward

        def forward(self: Any, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            towers.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    return towers


def load(folder: Path, kind: Any = KandinskyV22PriorPipeline, **options: Any) -> Any:
    return load_quietly(kind, folder, **options)


def draw(pipe: Any, prompt: str = "a cat", **options: Any) -> list[torch.Tensor]:
    out = pipe(prompt, num_inference_steps=2, generator=seeded(1), **options)
    return [out.image_embeds, out.negative_image_embeds]


def is_loaded(pipe: Any, name: str = "image_encoder") -> bool:
    component = pipe.components[name]
    return not isinstance(component, LazyComponent) or component.is_loaded


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Lazy loading


def test_text_to_image_never_reads_the_image_encoder_again(checkpoints: Path, cache: Path, runs: list[str]) -> None:
    first = load(checkpoints / "prior")
    assert not is_loaded(first)
    first_result = draw(first)
    assert is_loaded(first)
    assert runs == ["text", "image"]
    assert len(list(cache.iterdir())) == 1
    second = load(checkpoints / "prior")
    assert same(draw(second), first_result)
    assert not is_loaded(second)
    assert runs == ["text", "image", "text"]
    combined = load(checkpoints / "combined", KandinskyV22CombinedPipeline)
    combined("a cat", num_inference_steps=1, prior_num_inference_steps=1, height=32, width=32)
    assert is_loaded(combined, "prior_image_encoder"), "other files, which have no entry in the cache yet"
    again = load(checkpoints / "combined", KandinskyV22CombinedPipeline)
    again("a cat", num_inference_steps=1, prior_num_inference_steps=1, height=32, width=32)
    assert not is_loaded(again, "prior_image_encoder")
    assert not is_loaded(again.prior_pipe)


@torch.no_grad()
def test_cached_and_computed_zero_embeddings_equal_the_reference(checkpoints: Path, oracles: dict[str, Any]) -> None:
    expected = oracles["prior"].get_zero_embed(2)
    for _ in range(2):
        assert difference(load(checkpoints / "prior").get_zero_embed(2), expected) < 1e-6


USES: dict[str, Callable[[Any], Any]] = {
    "its weights": lambda network: list(network.parameters()),
    "its state": lambda network: network.state_dict(),
    "its parts": lambda network: network.visual_projection,
    "moving": lambda network: network.to("cpu"),
    "converting": lambda network: network.half(),
    "training": lambda network: network.train(),
    "calling": lambda network: network(torch.zeros(1, 3, 32, 32)),
    "pickling": lambda network: pickle.dumps(network),
    "copying": lambda network: copy.deepcopy(network),
    "hooks": lambda network: network.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("how", USES)
def test_it_is_loaded_on_first_use(how: str, checkpoints: Path) -> None:
    lazy = load(checkpoints / "prior").components["image_encoder"]
    kind = CLIPVisionModelWithProjection
    assert isinstance(lazy, LazyComponent)
    assert lazy.component_class is kind
    assert lazy.config.projection_dim > 0
    assert lazy.dtype == torch.float32
    assert not lazy.is_loaded
    state = torch.get_rng_state()
    USES[how](lazy)
    assert torch.equal(torch.get_rng_state(), state)
    assert lazy.is_loaded
    encoder = lazy.load()
    assert type(encoder) is kind
    assert encoder.training == (how == "training")
    stored = transformers.CLIPVisionModelWithProjection.from_pretrained(
        checkpoints / "prior" / "image_encoder"
    ).state_dict()
    assert all(torch.allclose(tensor.float(), stored[name], atol=1e-3) for name, tensor in encoder.state_dict().items())


def test_copies_and_pickles_are_networks(checkpoints: Path) -> None:
    lazy = load(checkpoints / "prior").components["image_encoder"]
    for network in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert type(network) is CLIPVisionModelWithProjection
        assert network is not lazy.load()
        assert same(list(network.parameters()), list(lazy.load().parameters()))


def test_the_pipeline_attribute_is_the_network(checkpoints: Path) -> None:
    pipe = load(checkpoints / "prior")
    assert not is_loaded(pipe)
    assert type(pipe.image_encoder) is CLIPVisionModelWithProjection
    assert is_loaded(pipe)
    pipe.image_encoder.note = 1
    assert pipe.image_encoder.note == 1
    assert pipe.components["image_encoder"].load() is pipe.image_encoder


def test_missing_attributes_raise_attribute_errors(checkpoints: Path) -> None:
    lazy = load(checkpoints / "prior").components["image_encoder"]
    assert not hasattr(lazy, "_orig_mod")
    assert not hasattr(lazy, "__array__")
    assert not lazy.is_loaded
    assert not hasattr(lazy, "nothing")


def test_pipelines_share_the_lazy_encoder(checkpoints: Path) -> None:
    pipe = load(checkpoints / "prior")
    other = KandinskyV22PriorEmb2EmbPipeline.from_pipe(pipe)
    assert other.components["image_encoder"] is pipe.components["image_encoder"]
    assert "image_encoder: CLIPVisionModelWithProjection" in repr(pipe)
    assert not is_loaded(pipe)
    encoder = other.image_encoder
    assert is_loaded(pipe)
    assert pipe.image_encoder is encoder


def test_saving_loads_the_encoder(checkpoints: Path, tmp_path: Path) -> None:
    load(checkpoints / "prior").save_pretrained(tmp_path / "saved")
    ours = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "saved" / "image_encoder")
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(checkpoints / "prior" / "image_encoder")
    assert same(list(ours.parameters()), list(theirs.parameters()))


def test_conversions_are_applied_after_loading(checkpoints: Path, runs: list[str]) -> None:
    pipe = load(checkpoints / "prior").to(torch.bfloat16)
    assert not is_loaded(pipe)
    assert pipe.dtype == torch.bfloat16
    first_result = draw(pipe)
    assert pipe.image_encoder.dtype == torch.bfloat16
    assert same(draw(load(checkpoints / "prior", torch_dtype=torch.bfloat16)), first_result)
    assert runs.count("image") == 1, "the same encoder in the same type"
    draw(load(checkpoints / "prior"))
    assert runs.count("image") == 2, "another type"


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_low_memory"])
def test_it_is_offloaded_like_the_others_after_loading(method: str, checkpoints: Path, runs: list[str]) -> None:
    baseline = draw(load(checkpoints / "prior"))
    os.environ["KANDINSKY22_CACHE"] = ""
    pipe = load(checkpoints / "prior")
    with fake_accelerator() if method == "enable_model_cpu_offload" else contextlib.nullcontext("cpu") as device:
        getattr(pipe, method)(**({} if method == "enable_low_memory" else {"device": device}))
        assert not is_loaded(pipe)
        offloaded = [part.cpu() for part in draw(pipe)]
        devices = {parameter.device.type for parameter in pipe.image_encoder.parameters()}
        assert devices == ({"cpu"} if method == "enable_model_cpu_offload" else {"meta"})
        pipe.remove_all_hooks()
    assert {parameter.device.type for parameter in pipe.image_encoder.parameters()} == {"cpu"}
    assert all(difference(a, b) < 1e-4 for a, b in zip(offloaded, baseline, strict=True))


def test_deferred_offloading_is_cancelled(checkpoints: Path) -> None:
    pipe = load(checkpoints / "prior")
    pipe.enable_low_memory()
    pipe.remove_all_hooks()
    assert {parameter.device.type for parameter in pipe.image_encoder.parameters()} == {"cpu"}


def test_damaged_files_are_reported_at_once(checkpoints: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoints / "prior", tmp_path / "copy"))
    weights = folder / "image_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="image_encoder"):
        load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="image_encoder"):
        load(folder)
    assert load(folder, image_encoder=None).image_encoder is None
    with pytest.raises(InputError, match="image_encoder"):
        draw(load(folder, image_encoder=None))


def test_it_can_be_switched_off(checkpoints: Path, cache: Path) -> None:
    with settings.optimisations(lazy_loading=False, zero_embed_cache=False):
        pipe = load(checkpoints / "prior")
        assert not isinstance(pipe.components["image_encoder"], LazyComponent)
        draw(pipe)
    assert not cache.exists()


# Embeddings of all-zero pictures


@torch.no_grad()
def test_changed_encoders_get_new_zero_embeddings(checkpoints: Path, tmp_path: Path, runs: list[str]) -> None:
    pipe = load(checkpoints / "prior")
    before = pipe.get_zero_embed()
    assert torch.equal(pipe.get_zero_embed(), before)
    assert runs == ["image"]
    pipe.image_encoder.visual_projection.weight.mul_(2)
    changed = pipe.get_zero_embed()
    assert difference(changed, 2 * before) < 1e-5
    pipe.save_pretrained(tmp_path / "changed")
    assert torch.equal(load(tmp_path / "changed").get_zero_embed(), changed)
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)
    other = load(checkpoints / "prior", image_encoder=copy.deepcopy(pipe.image_encoder))
    assert difference(other.get_zero_embed(), changed) < 1e-5  # rounding depends on the memory alignment of weights


@torch.no_grad()
def test_rewritten_files_are_those_of_new_pipelines(checkpoints: Path, tmp_path: Path) -> None:
    pipe = load(checkpoints / "prior")
    pipe.save_pretrained(tmp_path / "own")
    before = load(tmp_path / "own").get_zero_embed()
    lazy = load(tmp_path / "own")
    pipe.image_encoder.visual_projection.weight.mul_(2)
    pipe.save_pretrained(tmp_path / "own")
    assert difference(lazy.get_zero_embed(), before) < 1e-5, "the files are those of the time when it was made"
    assert difference(load(tmp_path / "own").get_zero_embed(), 2 * before) < 1e-5


def test_damaged_or_unwritable_caches_are_ignored(
    checkpoints: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(checkpoints / "prior").get_zero_embed()
    (file,) = cache.iterdir()
    file.write_bytes(b"nothing")
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)
    blocker = cache.parent / "file"
    blocker.write_text("in the way")
    monkeypatch.setenv("KANDINSKY22_CACHE", str(blocker))
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)


WRONG: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "no embedding": lambda embed: {"other": embed},
    "a wider embedding": lambda embed: {"embed": embed.repeat(1, 2)},
    "two embeddings": lambda embed: {"embed": embed.repeat(2, 1)},
    "no rows": lambda embed: {"embed": embed[0]},
    "no values": lambda embed: {"embed": embed[:0]},
    "NaN": lambda embed: {"embed": embed * float("nan")},
    "infinity": lambda embed: {"embed": embed / 0},
    "another type": lambda embed: {"embed": embed.double()},
    "integers": lambda embed: {"embed": embed.long()},
    "complex numbers": lambda embed: {"embed": embed.to(torch.complex64)},
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_embeddings_in_the_cache_are_never_used(what: str, checkpoints: Path, cache: Path) -> None:
    before = load(checkpoints / "prior").get_zero_embed()
    (file,) = cache.iterdir()
    save_file(WRONG[what](before), file)
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)
    assert torch.equal(load_file(file)["embed"], before), "the file is replaced"


OBSTACLES: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda file: file.mkdir(),
    "a pipe": lambda file: os.mkfifo(file),
    "a loop": lambda file: file.symlink_to(file.name),
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
    "an empty file": lambda file: file.touch(),
}


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX systems")
@pytest.mark.parametrize("what", OBSTACLES)
def test_obstacles_in_the_cache_are_ignored(what: str, checkpoints: Path, cache: Path) -> None:
    before = load(checkpoints / "prior").get_zero_embed()
    (file,) = cache.iterdir()
    file.unlink()
    OBSTACLES[what](file)
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)


@pytest.mark.parametrize("folder", ["x" * 300, "/dev/null/folder", "/proc/self/nothing", "loop/inside", "\udcff"])
def test_unusable_cache_folders_are_ignored(
    folder: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    before = load(checkpoints / "prior").get_zero_embed()
    monkeypatch.setenv("KANDINSKY22_CACHE", folder)
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)


def test_unreadable_cache_folders_are_ignored(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(checkpoints / "prior").get_zero_embed()

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(embedding_cache, "read_tensors", denied)
    monkeypatch.setattr(embedding_cache, "atomic_write", denied)
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)


def test_users_without_a_home_folder_have_no_cache(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(checkpoints / "prior").get_zero_embed()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("KANDINSKY22_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert torch.equal(load(checkpoints / "prior").get_zero_embed(), before)


def test_cached_embeddings_do_not_change_with_their_file(checkpoints: Path, cache: Path) -> None:
    load(checkpoints / "prior").get_zero_embed()
    (file,) = cache.iterdir()
    embed = load(checkpoints / "prior").get_zero_embed()
    expected = embed.clone()
    with open(file, "r+b") as opened:
        opened.seek(-embed.nbytes, os.SEEK_END)
        opened.write(bytes(embed.nbytes))
    assert torch.equal(embed, expected)


def test_zero_embeddings_of_small_encoders_are_not_stored(
    checkpoints: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "MIN_ENCODER_BYTES", 2**26)
    load(checkpoints / "prior").get_zero_embed()
    assert not cache.exists()


# Texts


def test_a_prompt_is_encoded_once(checkpoints: Path, runs: list[str]) -> None:
    pipe = load(checkpoints / "prior")
    first = draw(pipe)
    assert same(draw(pipe), first)
    assert runs.count("text") == 1
    draw(pipe, "a dog")
    assert runs.count("text") == 2
    assert same(draw(pipe), first)
    assert runs.count("text") == 2
    assert same(draw(load(checkpoints / "prior")), first)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weights": lambda pipe: pipe.text_encoder.text_projection.weight.mul_(1.5),
    "weights behind torch's back": lambda pipe: pipe.text_encoder.text_projection.weight.data.mul_(1.5),
    "type": lambda pipe: pipe.to(torch.bfloat16),
    "the prior's type": lambda pipe: pipe.prior.to(torch.bfloat16),
    "the network": lambda pipe: setattr(pipe, "text_encoder", copy.deepcopy(pipe.text_encoder)),
    "the tokenizer": lambda pipe: setattr(pipe, "tokenizer", copy.deepcopy(pipe.tokenizer)),
    "loading": lambda pipe: pipe.text_encoder.load_state_dict(pipe.text_encoder.state_dict()),
}


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_changed_encoders_are_encoded_again(what: str, checkpoints: Path, runs: list[str]) -> None:
    pipe = load(checkpoints / "prior")
    pipe.encode_text(["a cat"])
    CHANGES[what](pipe)
    first_result = pipe.encode_text(["a cat"])
    assert runs.count("text") == 2
    assert first_result.prompt_embeds.dtype == pipe.prior.dtype
    assert torch.equal(pipe.encode_text(["a cat"]).prompt_embeds, first_result.prompt_embeds)
    assert runs.count("text") == 2


def test_callbacks_cannot_change_cached_texts(checkpoints: Path) -> None:
    def spoil(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        for tensor in tensors.values():
            tensor.zero_()
        return {}

    pipe = load(checkpoints / "prior")
    first = draw(pipe)
    names = ["prompt_embeds", "text_encoder_hidden_states", "text_mask"]
    draw(pipe, callback_on_step_end=spoil, callback_on_step_end_tensor_inputs=names)
    assert same(draw(pipe), first)


def test_cached_texts_hold_no_graph(checkpoints: Path) -> None:
    pipe = load(checkpoints / "prior")
    assert next(pipe.text_encoder.parameters()).requires_grad
    first_result = pipe.encode_text(["a cat"])
    assert not first_result.prompt_embeds.requires_grad
    assert not first_result.text_encoder_hidden_states.requires_grad


def test_pages_of_the_text_encoder_are_dropped(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[torch.Tensor] = []
    monkeypatch.setattr(host_memory, "drop_large_mapped_pages", forgotten.extend)
    pipe = load(checkpoints / "prior")
    pipe.encode_text(["a cat"])
    assert {p.data_ptr() for p in forgotten} == {p.data_ptr() for p in pipe.text_encoder.parameters()}


def test_the_text_cache_holds_the_last_texts(
    checkpoints: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(checkpoints / "prior")
    monkeypatch.setattr(embedding_cache, "TEXT_CACHE_SIZE", 2)
    for text in ("one", "two", "one", "three", "one"):
        pipe.encode_text([text])
    assert runs.count("text") == 3, "the one that was used last stays"
    pipe.encode_text(["two"])
    assert runs.count("text") == 4
    with settings.optimisations(text_cache=False):
        pipe.encode_text(["five"])
        pipe.encode_text(["five"])
    assert runs.count("text") == 6


def test_text_embeddings_stay_cached_in_the_low_memory_mode(checkpoints: Path, runs: list[str]) -> None:
    pipe = load(checkpoints / "prior")
    baseline = draw(pipe)
    pipe.enable_low_memory()
    assert same(draw(pipe), baseline)
    assert same(draw(pipe), baseline)
    assert runs.count("text") == 2
    pipe.remove_all_hooks()
    assert same(draw(pipe), baseline)
    assert runs.count("text") == 3


def test_images_still_load_the_encoder(checkpoints: Path, oracles: dict[str, Any]) -> None:
    draw(load(checkpoints / "prior"))
    pipe = load(checkpoints / "prior")
    out = pipe.interpolate(["a cat", photo(1)], [0.5, 0.5], num_inference_steps=2, generator=seeded(1))
    theirs = oracles["prior"].interpolate(["a cat", photo(1)], [0.5, 0.5], num_inference_steps=2, generator=seeded(1))
    assert difference(out.image_embeds, theirs.image_embeds) < 1e-5
