"""`kandinsky22 models`: listing, downloads from a small Hub server, description, conversion and removal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import file_download
from safetensors.torch import load_file
from tests.cli.helpers import Command, assert_one_line, pixels
from tests.hub_server import Hub, etag, serving

from kandinsky22 import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.checkpoints import hub_files
from kandinsky22.checkpoints.hub import embedded_folder
from kandinsky22.cli.models import PUBLISHED, _prompts, kind_of_class, readable_size
from kandinsky22.generation.recipe import read_recipe
from kandinsky22.kernels import half_precision, packed_memory
from kandinsky22.runtime.prepared import PACKED_FILE

DECODER, PRIOR = PUBLISHED[0].name, PUBLISHED[3].name
UNET = "unet/diffusion_pytorch_model.safetensors"
CARD = "---\nlicense: apache-2.0 # as published\nprior:\n- {prior}\n---\n"


EMBEDDED = embedded_folder("decoder")
EXTRAS = {
    "distilled": "pytorch_lora_weights.safetensors",
    "tiny_decoder": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with the published names, tiny weights, and files that nobody needs."""
    root = tmp_path / "hub"
    shutil.copytree(models / "a" / "decoder", root / DECODER)
    shutil.copytree(models / "control" / "decoder", root / PUBLISHED[2].name)
    shutil.copytree(models / "b" / "prior", root / PRIOR)
    for name in (DECODER, PUBLISHED[2].name):
        (root / name / "README.md").write_text(CARD.format(prior=PRIOR), encoding="utf-8")
        (root / name / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
        (root / name / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not needed")
        (root / name / "example.png").write_bytes(b"not needed")
    with serving(root, monkeypatch) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KANDINSKY22_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def blob(cache: Path, name: str, file: str, hub: Hub) -> Path:
    digest = etag(file, (hub.root / name / file).read_bytes())
    return cache / f"models--{name.replace('/', '--')}" / "blobs" / digest


def test_pull_fetches_what_loading_reads(command: Command, hub: Hub, cache: Path) -> None:
    result = command("models", "pull", "-q")
    assert result.code == 0, result.err
    assert len(result.paths) == 2 and all((path / "model_index.json").is_file() for path in result.paths)
    assert UNET in hub.fetched and "prior/diffusion_pytorch_model.safetensors" in hub.fetched
    assert not [name for name in hub.fetched if name.endswith((".bin", ".png")) or "fp16" in name]
    assert all("kandinsky22.part" not in path.name for path in cache.rglob("*"))
    picture = command("generate", "a cat", "--model", result.paths[0], "--prior", result.paths[1], "--steps", 1)
    assert picture.code == 0, picture.err
    hub.fetched.clear()
    assert command("models", "pull", DECODER, "-q").code == 0
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_pull_for_another_purpose(command: Command, hub: Hub, cache: Path) -> None:
    result = command("models", "pull", "--for", "control", "--json", "-q")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line["model"] for line in lines] == [PUBLISHED[2].name] * 2 and lines[0]["bytes"] > 1000
    assert_one_line(command("models", "pull", DECODER, "--for", "control"), 1, DECODER, "control", "decoder")
    assert_one_line(command("models", "pull", "embedded"), 1, "part of the program")
    assert_one_line(command("models", "pull", "someone/nothing"), 1, "someone/nothing")


def test_an_interrupted_pull_continues(
    command: Command, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends within the UNet's file, and the client does not try again: as if the process were killed."""
    partial = blob(cache, DECODER, UNET, hub)
    download = file_download.http_get

    def once(url: str, file: object, **options: object) -> None:
        if url.endswith(UNET) and not options["resume_size"]:
            hub.cut_after = 20_000
        download(url, file, _nb_retries=0, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(file_download, "http_get", once)
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost at most
    result = command("models", "pull", "-q")
    assert result.code == 1 and not partial.exists()
    part = partial.with_name(partial.name + hub_files.PART)
    assert part.stat().st_size == 20_000
    result = command("models", "pull", "-q")
    assert result.code == 0, result.err
    assert hub.ranges == [f"{UNET} 20000"]
    assert partial.read_bytes() == (hub.root / DECODER / UNET).read_bytes() and not part.exists()


def test_a_part_of_another_content_is_noticed(command: Command, hub: Hub, cache: Path) -> None:
    partial = blob(cache, DECODER, UNET, hub)
    partial.parent.mkdir(parents=True)
    part = partial.with_name(partial.name + hub_files.PART)
    for content in (b"x" * 100, b"x" * 10**7):
        part.write_bytes(content)
        assert command("models", "pull", "-q").code == 0
        assert partial.read_bytes() == (hub.root / DECODER / UNET).read_bytes()
        shutil.rmtree(cache)
        partial.parent.mkdir(parents=True)


def test_damaged_files_are_fetched_again(command: Command, hub: Hub, cache: Path) -> None:
    assert command("models", "pull", "-q").code == 0
    damaged = blob(cache, DECODER, UNET, hub)
    damaged.write_bytes(b"damaged" + damaged.read_bytes()[7:])
    hub.fetched.clear()
    assert command("models", "pull", "-q").code == 0
    assert hub.fetched.count(UNET) == 1
    assert damaged.read_bytes() == (hub.root / DECODER / UNET).read_bytes()


def test_a_wrong_content_of_the_hub_is_refused(command: Command, hub: Hub, cache: Path) -> None:
    hub.corrupt.add(UNET)
    assert_one_line(command("models", "pull", "-q"), 1, UNET, "another digest", "twice")
    assert not blob(cache, DECODER, UNET, hub).exists()
    hub.up = False
    assert command("models", "pull", "-q").code == 1


def test_list_and_remove(command: Command, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed() -> dict[str, str]:
        lines = [json.loads(line) for line in command("models", "list", "--json").out.splitlines()]
        return {f"{line['name']} {line['kind']}": line["source"] for line in lines}

    before = listed()
    assert before["embedded inpaint"] == "embedded" and before[f"{DECODER} decoder"] == "published"
    command("models", "pull", "-q")
    (cache / "models--someone--other" / "snapshots" / ("0" * 40)).mkdir(parents=True)
    after = listed()
    assert after[f"{DECODER} decoder"] == after[f"{PRIOR} prior"] == "cache" and len(after) == len(before)
    assert DECODER in command("models", "list").out
    assert_one_line(command("models", "remove", DECODER), 1, "--yes")
    assert_one_line(command("models", "remove", "someone/nothing", "--yes"), 1, "someone/nothing", "models list")
    assert_one_line(command("models", "remove", str(cache), "--yes"), 1, "folder")
    result = command("models", "remove", DECODER, "--yes", "--json")
    assert json.loads(result.out)["bytes"] > 10_000, result.err
    assert listed()[f"{DECODER} decoder"] == "published" and listed()[f"{PRIOR} prior"] == "cache"


def test_info(command: Command, hub: Hub, cache: Path, model: Path) -> None:
    assert_one_line(command("models", "info", DECODER), 1, DECODER, "cache")
    command("models", "pull", "-q")
    info = json.loads(command("models", "info", DECODER, "--json").out)
    unet = load_file(hub.root / DECODER / UNET)
    assert info["components"]["unet"]["parameters"] == {"F32": sum(tensor.numel() for tensor in unet.values())}
    (file,) = info["components"]["unet"]["files"]
    assert file["sha256"] == etag(UNET, (hub.root / DECODER / UNET).read_bytes())
    assert (info["licence"], info["class_name"]) == ("apache-2.0", "KandinskyV22Pipeline") and len(info["digest"]) == 64
    text = command("models", "info", "embedded").out
    extras = [EMBEDDED / name / file for name, file in EXTRAS.items()]
    assert all(f"  {file.parent.name}/{file.name}" in text for file in extras)
    info = json.loads(command("models", "info", "embedded", "--no-digest", "--json").out)
    assert info["bytes"] == sum(file.stat().st_size for file in EMBEDDED.rglob("*.safetensors"))
    text = command("models", "info", model, "--no-digest").out
    assert "the card names none" in text and "digest" not in text
    assert "KandinskyV22InpaintPipeline" in command("models", "info", "embedded", "--for", "inpaint").out
    assert_one_line(command("models", "info", "."), 1, "model_index.json")


def test_options_without_effect_on_a_folder_are_refused(command: Command, model: Path) -> None:
    for action in (("info", model), ("convert", model, "new"), ("prepare", model, "-o", "new")):
        assert_one_line(
            command("models", *action, "--for", "inpaint"), 1, "--for inpaint would have no effect", "combined"
        )
        assert_one_line(command("models", *action, "--revision", "main"), 1, "--revision main would have no effect")
    result = command("models", "info", "embedded", "--revision", "main")
    assert_one_line(result, 1, "--revision main would have no effect on embedded")
    assert_one_line(
        command("models", "info", "owner/name", "--for", "inpaint"), 1, "--for inpaint would have no effect"
    )
    assert not Path("new").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_converted_models_draw_almost_the_same(command: Command, models: Path, dtype: str) -> None:
    if dtype == "int8":
        pytest.importorskip("torchao")
    source = models / "control" / "decoder"
    result = command("models", "convert", source, "small", "--dtype", dtype, "--json", "-q")
    assert result.code == 0, result.err
    assert json.loads(result.out)["bytes"] == sum(file.stat().st_size for file in Path("small").rglob("*.safetensors"))
    stored = {tensor.dtype for tensor in load_file(Path("small", UNET)).values()}
    assert (torch.int8 if dtype == "int8" else getattr(torch, dtype)) in stored and not list(Path().glob(".small*"))
    assert "prior:\n- prior" in Path("small", "README.md").read_text("utf-8")
    photo = np.zeros((64, 64), np.uint8)
    photo[20:40] = 255
    import PIL.Image

    PIL.Image.fromarray(photo).save("hint.png")
    common = ("a cat", "--hint", "hint.png", "--seed", 3, "--prior-steps", 2)
    for name, model in (("before.png", source), ("after.png", "small")):
        result = command("control", *common, "--model", model, "-o", name)
        assert result.code == 0, result.err
    difference = np.abs(pixels(Path("before.png")).astype(int) - pixels(Path("after.png")).astype(int))
    assert difference.mean() < (8 if dtype == "int8" else 2)


def test_conversion_is_all_or_nothing(command: Command, models: Path, broken_model: Path) -> None:
    Path("full").mkdir()
    Path("full", "file").touch()
    assert_one_line(command("models", "convert", models / "combined", "full"), 1, "full", "not empty")
    assert_one_line(command("models", "convert", broken_model, "new"), 1, "unet")
    assert not Path("new").exists() and not list(Path().glob(".new*"))
    assert command("models", "convert", models / "combined", "new", "-q").code == 0
    assert command("generate", "a cat", "--model", "new", "--steps", 1).code == 0


def test_the_published_sizes_are_those_of_the_networks() -> None:
    with torch.device("meta"):
        networks = {
            "decoder": [UNet2DConditionModel(), VQModel()],
            "inpaint": [UNet2DConditionModel(in_channels=9), VQModel()],
            "control": [UNet2DConditionModel(in_channels=8, addition_embed_type="image_hint"), VQModel()],
            "prior": [PriorTransformer()],
        }
    for model in PUBLISHED:
        count = sum(tensor.numel() for network in networks[model.kind] for tensor in network.state_dict().values())
        text, image = (694_659_840, 1_844_907_264) if model.kind == "prior" else (0, 0)
        assert model.parameters == count + text + image
        assert model.bytes == 4 * (count + text) + 2 * image


def test_kinds_and_sizes() -> None:
    names = ("KandinskyV22Pipeline", "KandinskyV22ControlnetImg2ImgPipeline", "KandinskyV22PriorPipeline")
    assert [kind_of_class(name) for name in names] == ["decoder", "control", "prior"]
    assert kind_of_class("StableDiffusionPipeline") is None and kind_of_class("InputError") is None
    assert [readable_size(size) for size in (9, 1500, 999_999, 5_283_559_132)] == [
        "9 bytes",
        "1.5 kB",
        "1000.0 kB",
        "5.3 GB",
    ]


def test_prompts_of_a_calibration_end_at_newlines_only(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\u2028on a mat\r\n\r\na dog\x0b\x85 \n".encode())
    assert _prompts(file) == ["a cat\u2028on a mat", "a dog"]


@pytest.mark.skipif(packed_memory.fingerprint() is None, reason="needs Linux and an x86 CPU")
def test_prepare_in_int8_with_prompts(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANDINSKY22_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n two blue squares\n", encoding="utf-8")
    words = ("models", "prepare", "embedded", "-o", tmp_path / "new", "--dtype", "int8")
    assert_one_line(command(*words, "--calibration", tmp_path / "none.txt"), 1, "calibration", "none.txt")
    assert_one_line(command(*words, "--for", "inpaint", "--calibration", prompts), 1, "calibration", "text to image")
    assert not (tmp_path / "new").exists()
    assert command(*words, "--calibration", prompts).code == 0
    assert (tmp_path / "new" / "unet" / PACKED_FILE).exists()
    result = command("generate", "a red circle", "--model", tmp_path / "new", "--seed", 7, "-o", tmp_path / "a.png")
    assert result.code == 0
    fast = "float32" if torch.bfloat16 in half_precision.SLOW_TYPES else "bfloat16"
    assert read_recipe(tmp_path / "a.png").dtype == fast  # that of the checkpoint, without --dtype
