"""Tiny decoders in pipelines: they replace MoVQ's decoder, and follow the networks without being a component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipelines.calls import CLASSES, two_step_call
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.tiny import pair, seeded

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Img2ImgPipeline, KandinskyV22Pipeline, TinyDecoder
from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.generation.previews import DecodedPreviews, PreviewMap, new_previews
from kandinsky22.kernels import conv, linear
from kandinsky22.models import VQModel
from kandinsky22.models.tiny_decoder import TinyDecoderConfig

DECODERS = [name for name in CLASSES if "Prior" not in name]
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}


def tiny_for(pipe: Any, seed: int = 5) -> TinyDecoder:
    torch.manual_seed(seed)
    return TinyDecoder(**TinyDecoderConfig.for_movq(pipe.movq, (8, 8))).eval()


def draw(pipe: Any, output_type: str = "pt", **arguments: Any) -> Any:
    return pipe(**{**pair(), **CALL, **arguments}, generator=seeded(3), output_type=output_type).images


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_decodes_its_latents_with_it(name: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    call = {**two_step_call(name), "output_type": "pt"}
    plain = pipe(**call, generator=seeded(1)).images
    latents = pipe(**{**call, "output_type": "latent"}, generator=seeded(1)).images
    network = tiny_for(pipe)
    pipe.enable_tiny_decoder(network)
    images = pipe(**call, generator=seeded(1)).images
    assert images.shape == plain.shape and not torch.equal(images, plain)
    with torch.no_grad():
        expected = network(latents)
    # some classes return tensors in [0, 1]
    assert min((images - expected).abs().max(), (images - (expected / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-5
    pipe.disable_tiny_decoder()
    assert torch.equal(pipe(**call, generator=seeded(1)).images, plain)


def test_output_types_batches_and_dtypes(decoder: KandinskyV22Pipeline) -> None:
    decoder.enable_tiny_decoder(tiny_for(decoder))
    two = {**pair(2), "num_images_per_prompt": 2}
    tensor = draw(decoder, **two)
    assert tensor.shape == (4, 3, 32, 32)
    array = draw(decoder, "np", **two)
    assert np.abs(array - (tensor / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-5
    assert [image.size for image in draw(decoder, "pil", **two)] == [(32, 32)] * 4
    assert torch.equal(draw(decoder, "latent"), draw(decoder, "latent"))
    decoder.to(torch.bfloat16)
    assert decoder.tiny_decoder is not None and decoder.tiny_decoder.dtype == torch.bfloat16
    assert draw(decoder).dtype == torch.bfloat16
    decoder.disable_tiny_decoder()
    decoder.enable_tiny_decoder(tiny_for(decoder))
    assert decoder.tiny_decoder.dtype == torch.bfloat16, "it is converted like MoVQ"


def test_pipelines_share_it_and_do_not_save_it(combined: KandinskyV22CombinedPipeline, tmp_path: Path) -> None:
    network = tiny_for(combined)
    combined.enable_tiny_decoder(network)
    assert combined.decoder_pipe.tiny_decoder is network
    other = KandinskyV22Img2ImgPipeline.from_pipe(combined)
    assert other.tiny_decoder is network
    assert combined.prior_pipe.tiny_decoder is None
    assert "tiny_decoder" not in combined.components
    combined.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*tiny*"))
    assert "tiny" not in (tmp_path / "saved" / "model_index.json").read_text()
    combined.disable_tiny_decoder()
    assert combined.decoder_pipe.tiny_decoder is None
    assert other.tiny_decoder is network


def test_it_is_loaded_from_files_folders_and_the_checkpoint(decoder: KandinskyV22Pipeline, tmp_path: Path) -> None:
    network = tiny_for(decoder)
    decoder.save_pretrained(tmp_path / "model")
    network.save_pretrained(tmp_path / "model" / "tiny_decoder")
    weights = tmp_path / "model" / "tiny_decoder" / "diffusion_pytorch_model.safetensors"
    decoder.enable_tiny_decoder(network)
    expected = draw(decoder)
    pipe = KandinskyV22Pipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    for source in (None, tmp_path / "model", str(weights.parent), weights):
        pipe.enable_tiny_decoder(source)
        assert torch.equal(draw(pipe), expected)
        pipe.disable_tiny_decoder()
    pipe.save_pretrained(tmp_path / "model")
    assert weights.is_file(), "saving a pipeline leaves other files alone"


@pytest.mark.usefixtures("no_network_runs")
def test_what_does_not_fit_is_refused(
    decoder: KandinskyV22Pipeline, checkpoints: Path, prior: Any, tmp_path: Path
) -> None:
    for source in (None, checkpoints / "decoder"):
        with pytest.raises(CheckpointError, match=r"has no tiny decoder.*kandinsky22 train tiny-decoder"):
            decoder.enable_tiny_decoder(source)
    with pytest.raises(CheckpointError, match="no such file or folder exists"):
        decoder.enable_tiny_decoder(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="pixels per latent is 8"):
        decoder.enable_tiny_decoder(TinyDecoder(block_out_channels=(8,) * 4, layers_per_block=(0,) * 4))
    with pytest.raises(InputError, match="latent_channels is 3"):
        decoder.enable_tiny_decoder(TinyDecoder(3, 3, (8, 8), (0, 0)))
    for value in (decoder.movq, 3, ""):
        with pytest.raises(InputError, match="tiny_decoder="):
            decoder.enable_tiny_decoder(value)  # type: ignore[arg-type]
    other = VQModel(**decoder.movq.config)
    with pytest.raises(InputError, match="trained against another MoVQ"):
        decoder.enable_tiny_decoder(TinyDecoder(**TinyDecoderConfig.for_movq(other, (8, 8))))
    with pytest.raises(InputError, match="has no movq"):
        prior.enable_tiny_decoder(tiny_for(decoder))
    unnamed = KandinskyV22Pipeline(**decoder.components)
    with pytest.raises(InputError, match="tiny_decoder is required"):
        unnamed.enable_tiny_decoder()
    assert decoder.tiny_decoder is None
    decoder.enable_tiny_decoder(tiny_for(decoder))
    decoder.movq = other
    with pytest.raises(InputError, match="another MoVQ"):
        draw(decoder)


@pytest.mark.parametrize("mode", ["enable_sequential_cpu_offload", "enable_low_memory"])
@pytest.mark.parametrize("first", [True, False])
def test_it_is_offloaded_with_the_others(
    mode: str, first: bool, decoder: KandinskyV22Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "enable_sequential_cpu_offload":
        pytest.importorskip("accelerate")
        for module in (linear, conv):
            monkeypatch.setattr(module, "may_pack", lambda layer: False)
    network = tiny_for(decoder)
    decoder.enable_tiny_decoder(network)
    expected = draw(decoder)
    if not first:
        decoder.disable_tiny_decoder()
    getattr(decoder, mode)(**({} if mode == "enable_low_memory" else {"device": "cpu"}))
    if not first:
        decoder.enable_tiny_decoder(network)
    assert torch.equal(draw(decoder), expected)
    assert {p.device.type for p in network.parameters()} == {"meta"}, "its weights leave memory after the call"
    assert isinstance(new_previews(decoder), PreviewMap), "previews move no weights"
    decoder.remove_all_hooks()
    assert torch.equal(draw(decoder), expected)
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_it_runs_on_an_accelerator(decoder: KandinskyV22Pipeline) -> None:
    pytest.importorskip("accelerate")
    decoder.enable_tiny_decoder(tiny_for(decoder))
    expected = draw(decoder)
    with fake_accelerator() as device:
        decoder.enable_model_cpu_offload(device=device)
        assert (draw(decoder).cpu() - expected).abs().max() < 1e-4
        assert {p.device.type for p in decoder.tiny_decoder.parameters()} == {"cpu"}  # type: ignore[union-attr]
        decoder.disable_tiny_decoder()
        decoder.remove_all_hooks()


def test_previews_are_what_it_decodes(decoder: KandinskyV22Pipeline) -> None:
    assert isinstance(new_previews(decoder), PreviewMap)
    network = tiny_for(decoder)
    decoder.enable_tiny_decoder(network)
    previews = new_previews(decoder)
    assert isinstance(previews, DecodedPreviews)
    latents = draw(decoder, "latent")
    shown = np.asarray(previews.image(latents[0]), dtype=np.float32)
    drawn = np.asarray(draw(decoder, "pil")[0], dtype=np.float32)
    assert np.abs(shown - drawn).max() <= 1
    assert previews.data_url(latents[0]).startswith("data:image/webp;base64,")
