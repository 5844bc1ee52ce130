"""Generic methods of the reference's pipelines: they act, or say once that there is nothing to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline as Oracle
from tests.pipelines.calls import CLASSES, COMBINED, PRIORS, small_call
from tests.pipelines.tiny import DIM, PIXELS, seeded

import kandinsky22
from kandinsky22 import (
    AutoPipelineForImage2Image,
    CheckpointError,
    InputError,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    verbosity,
)

Pipelines = Callable[..., Any]

WITHOUT_EFFECT = {
    "enable_attention_slicing": ("auto",),
    "set_attention_slice": (2,),
    "enable_xformers_memory_efficient_attention": (),
    "set_use_memory_efficient_attention_xformers": (True,),
}
SILENT = ("disable_attention_slicing", "disable_xformers_memory_efficient_attention", "reset_device_map")


@pytest.fixture
def nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which warnings were shown."""
    monkeypatch.setattr(verbosity, "_shown", set())


@pytest.mark.usefixtures("nothing_shown")
@pytest.mark.parametrize("method", WITHOUT_EFFECT)
def test_methods_without_effect_say_so_once(
    method: str, decoder: KandinskyV22Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert getattr(decoder, method)(*WITHOUT_EFFECT[method]) is None
    assert len(caplog.records) == 1
    assert "has no effect" in caplog.text


@pytest.mark.usefixtures("nothing_shown")
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_them(name: str, make_pipeline: Pipelines, caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipeline(name)
    with caplog.at_level(logging.WARNING):
        for method in SILENT:
            getattr(pipe, method)()
        pipe.enable_attention_slicing(None)
    assert not caplog.records
    for method in WITHOUT_EFFECT:
        assert callable(getattr(pipe, method))
    theirs = {method for method in vars(Oracle) if not method.startswith("_") and callable(getattr(Oracle, method))}
    assert {method for method in theirs if not hasattr(pipe, method)} == {
        "enable_freeu",  # of Stable Diffusion's UNets
        "disable_freeu",
        "enable_group_offload",  # groups of layers: enable_sequential_cpu_offload, or enable_low_memory
        "fuse_qkv_projections",  # of Stable Diffusion's attention
        "unfuse_qkv_projections",
        "load_config",  # settings of a pipeline are in its components
        "save_config",
        "register_to_config",
        "get_config_dict",
        "extract_init_dict",
        "from_config",
        "to_json_file",
        "to_json_string",
        "dduf_file",
    } & theirs


@pytest.mark.parametrize("name", ["", "InpaintCombined"])
def test_slicing_and_tiling_of_the_autoencoder_act(name: str, make_pipeline: Pipelines) -> None:
    pipe = make_pipeline(name)
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    assert (pipe.movq.use_tiling, pipe.movq.use_slicing) == (True, True)
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert (pipe.movq.use_tiling, pipe.movq.use_slicing) == (False, False)


def test_a_prior_has_no_autoencoder(prior: KandinskyV22PriorPipeline) -> None:
    with pytest.raises(InputError, match="enable_vae_slicing: KandinskyV22PriorPipeline has no movq"):
        prior.enable_vae_slicing()


@pytest.mark.parametrize("name", CLASSES)
def test_config(name: str, make_pipeline: Pipelines) -> None:
    """`config` holds what `model_index.json` does, as in the reference."""
    pipe = make_pipeline(name)
    config = pipe.config
    assert config["_class_name"] == type(pipe).__name__
    assert config._name_or_path == pipe.name_or_path == pipe.origin
    assert {key for key in config if not key.startswith("_")} == set(pipe.components)
    scheduler = config["prior_scheduler" if name in COMBINED else "scheduler"]
    assert scheduler[0] == "diffusers"
    assert dict(config)["_class_name"] == config.get("_class_name") == config._class_name
    assert len(config) == len(list(config))
    with pytest.raises(AttributeError, match="unet2"):
        config.unet2  # noqa: B018


def test_config_of_a_pipeline_without_origin(decoder: KandinskyV22Pipeline) -> None:
    pipe = KandinskyV22Pipeline(**decoder.components)
    assert pipe.name_or_path is None
    assert "_name_or_path" not in pipe.config
    assert "UNet2DConditionModel" in repr(pipe.config)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        ((), {}),
        ((None,), {}),
        (("cpu",), {}),
        ((torch.device("cpu"), torch.float64), {}),
        ((torch.float64, "cpu"), {}),
        ((torch.float64,), {"device": "cpu"}),
        (("cpu",), {"dtype": torch.float64}),
        ((), {"device": "cpu", "dtype": torch.float64, "silence_dtype_warnings": True}),
        (("cpu",), {"silence_dtype_warnings": True}),
        (("cpu", None), {}),
    ],
)
def test_all_forms_of_to(targets: Any, options: Any, decoder: KandinskyV22Pipeline) -> None:
    assert decoder.to(*targets, **options) is decoder
    expected = torch.float64 if torch.float64 in (*targets, *options.values()) else torch.float32
    assert decoder.unet.dtype == decoder.movq.dtype == expected


@pytest.mark.parametrize(
    ("targets", "options"),
    [(("cpu", "cpu"), {}), (("cpu",), {"device": "cpu"}), ((torch.float64, torch.float32), {}), ((1, 2, 3), {})],
)
def test_to_takes_one_device_and_one_dtype(targets: Any, options: Any, decoder: KandinskyV22Pipeline) -> None:
    with pytest.raises(InputError, match=r"^to\(\.\.\.\)=.*: expected at most one device and one dtype"):
        decoder.to(*targets, **options)


@pytest.mark.parametrize("options", [{"torch_dtype": torch.float64}, {"dtype": torch.float64}])
def test_from_pipe_converts(options: dict[str, Any], combined: Any) -> None:
    pipe = KandinskyV22Img2ImgPipeline.from_pipe(combined, **options)
    assert pipe.unet.dtype == torch.float64
    assert pipe.unet is combined.unet
    assert AutoPipelineForImage2Image.from_pipe(combined, **options).prior_prior.dtype == torch.float64
    assert KandinskyV22Img2ImgPipeline.from_pipe(combined).unet.dtype == torch.float64


def test_numpy_to_pil(decoder: KandinskyV22Pipeline) -> None:
    array = np.random.default_rng(0).random((2, 4, 5, 3))
    for images in (array, array[0], array[..., :1]):
        ours, theirs = decoder.numpy_to_pil(images), Oracle.numpy_to_pil(images)
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


PICTURE = np.ones((4, 5, 3))


NO_PICTURES = [
    None,
    [PICTURE],
    torch.ones(4, 5, 3),
    PICTURE[0],
    PICTURE * np.nan,
    PICTURE * 1.1,
    -PICTURE,
    np.full((4, 5, 3), 9, np.uint8),
    np.ones((4, 5, 5)),
    np.ones((4, 0, 3)),
    PICTURE.astype(object),
    PICTURE.astype(complex),
    np.broadcast_to(0.5, (10**5, 10**5, 3)),
]


@pytest.mark.parametrize("images", NO_PICTURES)
def test_numpy_to_pil_refuses_what_is_no_image(decoder: KandinskyV22Pipeline, images: Any) -> None:
    with pytest.raises(InputError, match=r"^images"):
        decoder.numpy_to_pil(images)


def test_progress_bars_can_be_disabled_everywhere(decoder: KandinskyV22Pipeline) -> None:
    decoder.set_progress_bar_config(disable=False)
    try:
        verbosity.disable_progress_bar()
        assert decoder.progress_bar(total=2).disable
    finally:
        verbosity.enable_progress_bar()
    with decoder.progress_bar(total=2) as bar:
        assert not bar.disable


def test_loaded_components_are_logged(decoder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decoder.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="kandinsky22"):
        KandinskyV22Pipeline.from_pretrained(tmp_path)
    assert f"loaded unet as UNet2DConditionModel from {tmp_path / 'unet'}" in caplog.text


def test_a_missing_variant_is_a_value_error_too(decoder: Any, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path)
    for kind in (ValueError, CheckpointError):
        with pytest.raises(kind, match=r"no weights of variant 'fp16'"):
            KandinskyV22Pipeline.from_pretrained(tmp_path, variant="fp16")


# Parts of a call


def test_prepare_latents_from_noise(prior: KandinskyV22PriorPipeline, oracles: dict[str, Any]) -> None:
    for latents in (None, torch.randn(2, DIM)):
        ours, theirs = (
            pipe.prepare_latents((2, DIM), torch.float32, "cpu", seeded(1), latents, pipe.scheduler)
            for pipe in (prior, oracles["prior"])
        )
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match=r"^latents="):
        prior.prepare_latents((2, DIM), torch.float32, "cpu", None, torch.randn(3, DIM), prior.scheduler)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("negative", [None, "a dog"])
def test_encode_prompt(
    guided: bool, negative: str | None, prior: KandinskyV22PriorPipeline, oracles: dict[str, Any]
) -> None:
    ours, theirs = (pipe._encode_prompt("a cat", "cpu", 2, guided, negative) for pipe in (prior, oracles["prior"]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_parts_of_emb2emb(emb2emb: Any, their_emb2emb: Any) -> None:
    embedding, results = torch.randn(1, DIM), []
    for pipe in (emb2emb, their_emb2emb):
        pipe.scheduler.set_timesteps(10)
        timesteps, steps = pipe.get_timesteps(10, 0.3, "cpu")
        latents = pipe.prepare_latents(embedding, timesteps[:1].repeat(2), 1, 2, torch.float32, "cpu", seeded(1))
        pixels = torch.zeros(1, 3, PIXELS, PIXELS)
        results.append((timesteps, torch.tensor(steps), latents, pipe._encode_image(pixels, "cpu", 2)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_of_img2img(make_pipeline: Pipelines, mode_oracles: dict[str, Any]) -> None:
    results = []
    for pipe in (make_pipeline("Img2Img"), mode_oracles["Img2Img"]):
        pipe.scheduler.set_timesteps(10)
        timesteps, steps = pipe.get_timesteps(10, 0.5, "cpu")
        latents = torch.ones(2, 4, 4, 4)
        noisy = pipe.prepare_latents(latents, timesteps[:1].repeat(2), 2, 1, torch.float32, "cpu", seeded(1))
        results.append((timesteps, torch.tensor(steps), noisy))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    pipe = make_pipeline("Img2Img")
    pipe.scheduler.set_timesteps(10)
    size = 4 * pipe.movq_scale_factor
    pixels = torch.zeros(1, 3, size, size)
    assert pipe.prepare_latents(pixels, torch.tensor([5]), 1, 2, torch.float32, "cpu").shape == (2, 4, 4, 4)
    for image, message in ((torch.zeros(3, 4, 4, 4), r"len\(image\)=3"), ("a.png", "image='a.png'")):
        with pytest.raises(InputError, match=f"^{message}"):
            pipe.prepare_latents(image, torch.tensor([5]), 1, 2, torch.float32, "cpu")


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in (*PRIORS, *COMBINED)])
def test_image_processor_of_decoders(name: str, make_pipeline: Pipelines) -> None:
    pipe = make_pipeline(name)
    factor = pipe.movq_scale_factor
    assert pipe.image_processor.preprocess(torch.zeros(1, 3, 5 * factor + 1, factor)).shape[2:] == (5 * factor, factor)
    result = pipe(**small_call(name), generator=seeded(1)).images
    assert pipe.image_processor.postprocess(torch.from_numpy(result * 2 - 1).permute(0, 3, 1, 2))[0].mode == "RGB"


def test_stages_can_be_replaced(combined: Any) -> None:
    stage = KandinskyV22PriorPipeline.from_pipe(combined)
    combined.prior_pipe = stage
    combined.decoder_pipe = decoder = KandinskyV22Pipeline.from_pipe(combined)
    assert combined.prior_pipe is stage
    assert combined.decoder_pipe is decoder
    for name in ("prior_pipe", "decoder_pipe"):
        with pytest.raises(InputError, match=rf"^{name}="):
            setattr(combined, name, combined)


def test_older_names() -> None:
    assert kandinsky22.KandinskyPriorPipeline is KandinskyV22PriorPipeline
