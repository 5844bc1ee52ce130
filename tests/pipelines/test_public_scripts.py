"""Calls that public scripts make, in words of our own, with `kandinsky22` for the name of the reference.

Kinds of scripts: web servers and user interfaces, nodes of graph editors, notebooks with loops of their own, pipelines
derived from ours, training scripts, and editors that inpaint.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from kandinsky22.models.attention_processor import AttnAddedKVProcessor2_0
from kandinsky22.optimization import get_scheduler
from kandinsky22.pipelines.kandinsky import KandinskyPriorPipelineOutput
from kandinsky22.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import downscale_height_and_width
from kandinsky22.pipelines.pipeline_utils import ImagePipelineOutput
from kandinsky22.training_utils import EMAModel, compute_snr
from kandinsky22.utils import load_image, logging, make_image_grid, numpy_to_pil
from kandinsky22.utils.torch_utils import randn_tensor
from tests.pipelines.pictures import box_mask, photo
from tests.pipelines.tiny import DIM, PIXELS, seeded

import kandinsky22
from kandinsky22 import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDPMScheduler,
    DiffusionPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel

SIZE: dict[str, Any] = {"height": 32, "width": 32}


@pytest.fixture
def prior_folder(checkpoints: Path) -> Path:
    return checkpoints / "prior"


@pytest.fixture
def decoder_folder(checkpoints: Path) -> Path:
    return checkpoints / "decoder"


def test_a_server_that_shares_networks_between_tasks(prior_folder: Path, decoder_folder: Path, tmp_path: Path) -> None:
    cache = {"cache_dir": str(tmp_path), "resume_download": True}
    image_encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(prior_folder, subfolder="image_encoder")
    prior = KandinskyV22PriorPipeline.from_pretrained(
        prior_folder, image_encoder=image_encoder, torch_dtype=torch.float32, **cache
    )
    unet = UNet2DConditionModel.from_pretrained(decoder_folder, subfolder="unet", **cache)
    text_to_image = KandinskyV22Pipeline.from_pretrained(decoder_folder, unet=unet, torch_dtype="auto", **cache)
    image_to_image = KandinskyV22Img2ImgPipeline(**text_to_image.components)
    from_image = KandinskyV22PriorEmb2EmbPipeline(**prior.components)
    assert image_to_image.unet is unet
    assert from_image.image_encoder is image_encoder

    for pipe in (prior, image_to_image):
        pipe.disable_xformers_memory_efficient_attention()
        pipe.disable_attention_slicing()
        pipe.to("cpu")
        pipe.safety_checker = None
    image_to_image.enable_attention_slicing("max")
    image_to_image.unet.to(memory_format=torch.channels_last)

    image_embeds, zero_embeds = prior("a red cat", num_inference_steps=2, return_dict=False)
    images = image_to_image(
        image=[photo(1)],
        image_embeds=image_embeds,
        negative_image_embeds=zero_embeds,
        num_inference_steps=4,
        strength=0.5,
        num_images_per_prompt=2,
        generator=torch.Generator(device="cpu").manual_seed(1),
        **SIZE,
    ).images
    assert [image.size for image in images] == [(32, 32)] * 2
    del prior, text_to_image
    gc.collect()


def test_standard_attention_processors_are_accepted(decoder: KandinskyV22Pipeline) -> None:
    decoder.unet.set_attn_processor(AttnAddedKVProcessor2_0())


def test_a_notebook(prior_folder: Path, decoder_folder: Path, tmp_path: Path) -> None:
    pipe_prior = DiffusionPipeline.from_pretrained(prior_folder, torch_dtype=torch.float32)
    pipe = DiffusionPipeline.from_pretrained(decoder_folder, torch_dtype=torch.float32, use_safetensors=True)
    pipe_prior.to("cpu")
    pipe.enable_xformers_memory_efficient_attention()
    generator = torch.manual_seed(42)
    image_emb, negative_emb = pipe_prior("a red cat", guidance_scale=1.0, num_inference_steps=2).to_tuple()
    out = pipe_prior("a red cat", "on", num_inference_steps=2, generator=generator)
    assert isinstance(out, KandinskyPriorPipelineOutput)
    result = pipe(image_embeds=out.image_embeds, negative_image_embeds=negative_emb, num_inference_steps=2, **SIZE)
    assert isinstance(result, ImagePipelineOutput)
    result.images[0].save(tmp_path / "cat.png")
    grid = make_image_grid([load_image(str(tmp_path / "cat.png")), result.images[0]], rows=1, cols=2)
    assert grid.size == (64, 32)
    mixed = pipe_prior.interpolate(["a cat", photo(1), photo(2)], [0.3, 0.3, 0.4], generator=generator)
    assert mixed.image_embeds.shape == image_emb.shape
    image = pipe(**mixed, num_inference_steps=2, **SIZE).images[0]
    assert image.size == (32, 32)


def test_nodes_that_take_a_pipeline_apart(prior_folder: Path, decoder_folder: Path) -> None:
    """A node holds single networks, and writes both loops itself."""
    parts = KandinskyV22PriorPipeline.from_pretrained(prior_folder).components
    tokenizer, text_encoder, scheduler = parts["tokenizer"], parts["text_encoder"], parts["scheduler"]
    image_encoder, prior = parts["image_encoder"], parts["prior"]
    image_encoder.to("cpu")
    side = image_encoder.config.image_size
    zero_embeds = image_encoder(torch.zeros(1, 3, side, side).to(dtype=image_encoder.dtype))["image_embeds"]
    image = numpy_to_pil(np.random.default_rng(0).random((1, 40, 30, 3)))[0]
    pixels = parts["image_processor"](image, return_tensors="pt").pixel_values[0].unsqueeze(0)
    assert image_encoder(pixels)["image_embeds"].shape == (1, DIM)

    tokens = tokenizer(
        ["", "a red cat"],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    encoded = text_encoder(tokens.input_ids.to(text_encoder.device))
    scheduler.set_timesteps(3, device="cpu")
    latents = randn_tensor((1, prior.config.embedding_dim), generator=seeded(1), dtype=prior.dtype)
    latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        predicted = prior(
            torch.cat([latents] * 2),
            timestep=timestep,
            proj_embedding=encoded.text_embeds,
            encoder_hidden_states=encoded.last_hidden_state,
            attention_mask=tokens.attention_mask.bool(),
        ).predicted_image_embedding
        unconditional, conditional = predicted.chunk(2)
        latents = scheduler.step(
            unconditional + 4.0 * (conditional - unconditional),
            timestep=timestep,
            sample=latents,
            generator=seeded(index),
            prev_timestep=None if index + 1 == len(scheduler.timesteps) else scheduler.timesteps[index + 1],
        ).prev_sample
    embeds = prior.post_process_latents(latents)

    parts = KandinskyV22Pipeline.from_pretrained(decoder_folder).components
    scheduler, unet, movq = parts["scheduler"], parts["unet"], parts["movq"]
    factor = 2 ** (len(movq.config.block_out_channels) - 1)
    height, width = downscale_height_and_width(32, 32, factor)
    assert movq.encode(torch.zeros(1, 3, height * factor, width * factor))["latents"].shape[1:] == (4, height, width)
    scheduler.set_timesteps(3, device="cpu")
    latents = torch.randn(1, movq.config.latent_channels, height, width, generator=seeded(2))
    for timestep in scheduler.timesteps:
        noise = unet(
            sample=torch.cat([latents] * 2),
            timestep=timestep,
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": torch.cat([zero_embeds, embeds])},
            return_dict=False,
        )[0]
        noise, variance = noise.split(latents.shape[1], dim=1)
        unconditional, conditional = noise.chunk(2)
        guided = unconditional + 4.0 * (conditional - unconditional)
        if getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range"):
            guided = torch.cat([guided, variance.chunk(2)[1]], dim=1)
        latents = scheduler.step(guided, timestep, latents, generator=seeded(3))[0]
    decoded = movq.decode(latents, force_not_quantize=True)["sample"]
    assert torch.isfinite(decoded).all()
    assert decoded.shape == (1, 3, height * factor, width * factor)


class OwnPipeline(DiffusionPipeline):
    """A pipeline of a script, with some of the components and a loop of its own."""

    def __init__(self, prior: PriorTransformer, image_encoder: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(prior=prior, image_encoder=image_encoder, scheduler=scheduler)
        self.own_setting = 3

    @torch.no_grad()
    def __call__(self, steps: int = 2) -> KandinskyPriorPipelineOutput:
        """Denoise without any text."""
        logger = logging.get_logger(__name__)
        device = self._execution_device
        self._guidance_scale = 1.0
        self.scheduler.set_timesteps(steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        latents = randn_tensor((1, self.prior.config.embedding_dim), generator=seeded(1), device=device)
        text = torch.zeros(1, self.prior.config.num_embeddings, self.prior.config.embedding_dim)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            predicted = self.prior(
                latents, timestep, proj_embedding=torch.zeros_like(latents), encoder_hidden_states=text
            ).predicted_image_embedding
            latents = self.scheduler.step(predicted, timestep, latents).prev_sample
        self.maybe_free_model_hooks()
        logger.debug("done on %s", self.device)
        return KandinskyPriorPipelineOutput(image_embeds=latents, negative_image_embeds=latents)


def test_a_pipeline_of_a_script(prior: KandinskyV22PriorPipeline, tmp_path: Path) -> None:
    parts = {name: prior.components[name] for name in ("prior", "image_encoder", "scheduler")}
    pipe = OwnPipeline(**parts).to("cpu", silence_dtype_warnings=True)
    assert pipe().image_embeds.shape == (1, DIM)
    assert pipe._num_timesteps == 2
    assert set(pipe.components) == set(parts)
    pipe.save_pretrained(tmp_path)
    assert OwnPipeline.from_pretrained(tmp_path)().image_embeds.shape == (1, DIM)


class OwnPrior(KandinskyV22PriorEmb2EmbPipeline):
    """A prior of a script that mixes several prompts, from the parts of a call."""

    @torch.no_grad()
    def mix(self, texts: list[str], image: torch.Tensor) -> torch.Tensor:
        """Return latents that start from an image."""
        embeds, states, mask = self._encode_prompt(texts, self._execution_device, 1, True, [""] * len(texts))
        assert embeds.shape[0] == states.shape[0] == mask.shape[0] == 2 * len(texts)
        self.scheduler.set_timesteps(4, device=self.device)
        timesteps, count = self.get_timesteps(4, 0.5, self.device)
        start = self._encode_image(image, self.device, 1)
        latents = self.prepare_latents(
            start, timesteps[:1].repeat(len(texts)), len(texts), 1, embeds.dtype, self.device, seeded(1)
        )
        assert count == len(timesteps) == 2
        zero = self.get_zero_embed(latents.shape[0], device=latents.device)
        return torch.cat([latents, zero])


def test_a_prior_of_a_script(prior: KandinskyV22PriorPipeline) -> None:
    mixed = OwnPrior(**prior.components).mix(["a cat", "a dog"], torch.zeros(1, 3, PIXELS, PIXELS))
    assert mixed.shape == (4, DIM)


def test_training_the_decoder(prior_folder: Path, decoder_folder: Path, tmp_path: Path) -> None:
    noise_scheduler = DDPMScheduler.from_pretrained(decoder_folder, subfolder="scheduler")
    image_processor = transformers.CLIPImageProcessor.from_pretrained(prior_folder, subfolder="image_processor")
    image_encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(prior_folder, subfolder="image_encoder")
    vae = VQModel.from_pretrained(decoder_folder, subfolder="movq", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(decoder_folder, subfolder="unet")
    for frozen in (vae, image_encoder):
        frozen.requires_grad_(False)
    unet.train()
    ema_unet = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    ema_unet.to("cpu")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=2)
    before = next(unet.parameters()).detach().clone()

    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    clip_pixels = image_processor([photo(1), photo(2)], return_tensors="pt").pixel_values
    for _ in range(2):
        latents = vae.encode(pixels).latents
        image_embeds = image_encoder(clip_pixels).image_embeds
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (2,)).long()
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy_latents, timesteps, None, added_cond_kwargs={"image_embeds": image_embeds}).sample[:, :4]
        weights = torch.clamp(compute_snr(noise_scheduler, timesteps), max=5)
        loss = (F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3)) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema_unet.step(unet.parameters())
    assert not torch.equal(next(unet.parameters()), before)
    ema_unet.store(unet.parameters())
    ema_unet.copy_to(unet.parameters())
    ema_unet.restore(unet.parameters())

    pipeline = AutoPipelineForText2Image.from_pretrained(
        decoder_folder,
        vae=vae,
        prior_image_encoder=image_encoder,
        prior_image_processor=image_processor,
        unet=unet,
        torch_dtype=torch.float32,
    )
    pipeline = pipeline.to("cpu")
    pipeline.torch_dtype = torch.float32
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red cat", num_inference_steps=2, prior_num_inference_steps=2, **SIZE).images[0]
    assert image.size == (32, 32)
    pipeline.decoder_pipe.save_pretrained(tmp_path / "decoder")
    pipeline.prior_pipe.save_pretrained(tmp_path / "prior")
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "decoder", subfolder="unet")
    assert torch.equal(next(saved.parameters()), next(unet.parameters()))


def test_training_the_prior(prior_folder: Path) -> None:
    prior = PriorTransformer.from_pretrained(prior_folder, subfolder="prior")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(prior_folder, subfolder="tokenizer")
    text_encoder = transformers.CLIPTextModelWithProjection.from_pretrained(prior_folder, subfolder="text_encoder")
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    clip_mean, clip_std = prior.clip_mean.clone(), prior.clip_std.clone()
    prior.train()
    tokens = tokenizer(["a red cat"], max_length=77, padding="max_length", truncation=True, return_tensors="pt")
    encoded = text_encoder(tokens.input_ids)
    image_embeds = (torch.randn(1, DIM) - clip_mean) / clip_std
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (1,)).long()
    noisy = noise_scheduler.add_noise(image_embeds, torch.randn_like(image_embeds), timesteps)
    predicted = prior(
        noisy,
        timestep=timesteps,
        proj_embedding=encoded.text_embeds,
        encoder_hidden_states=encoded.last_hidden_state,
        attention_mask=tokens.attention_mask.bool(),
    ).predicted_image_embedding
    F.mse_loss(predicted.float(), image_embeds.float()).backward()
    assert prior.proj_in.weight.grad.abs().sum() > 0


def test_an_editor_that_inpaints(mode_folder: Path, prior_folder: Path) -> None:
    steps: list[int] = []

    def report(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    pipe = AutoPipelineForInpainting.from_pretrained(mode_folder / "Inpaint", prior=prior_folder)
    image = np.asarray(photo(3, 48, 40))
    result = pipe(
        prompt="a red cat",
        negative_prompt="on",
        image=PIL.Image.fromarray(image),
        mask_image=PIL.Image.fromarray((box_mask(48, 40) * 255).astype(np.uint8), mode="L"),
        num_inference_steps=3,
        prior_num_inference_steps=2,
        guidance_scale=4.0,
        output_type="np",
        callback_on_step_end=report,
        generator=torch.manual_seed(1),
        **SIZE,
    ).images[0]
    assert result.shape == (32, 32, 3)
    assert steps == [0, 1, 2]


def test_inpainting_with_a_prior_beside(mode_folder: Path, prior: KandinskyV22PriorPipeline) -> None:
    """A script for the two stages passes a mask as an array, and the same embeddings to several calls."""
    pipe = KandinskyV22InpaintPipeline.from_pretrained(mode_folder / "Inpaint", torch_dtype=torch.float32)
    image_embeds, negative_image_embeds = prior("a cat", num_inference_steps=2).to_tuple()
    mask = box_mask()
    out = pipe(
        image=photo(1),
        mask_image=mask,
        image_embeds=image_embeds,
        negative_image_embeds=negative_image_embeds,
        num_inference_steps=2,
        **SIZE,
    )
    assert out.images[0].size == (32, 32)
    assert np.array_equal(mask, box_mask())


def test_switching_tasks_without_loading_again(combined: Any) -> None:
    pipe = AutoPipelineForImage2Image.from_pipe(combined, torch_dtype=torch.float32)
    assert isinstance(pipe, KandinskyV22Img2ImgCombinedPipeline)
    pipe.enable_attention_slicing()
    calls: list[int] = []
    images = pipe(
        "a red cat",
        photo(1),
        strength=0.5,
        num_inference_steps=4,
        prior_num_inference_steps=2,
        callback=lambda step, timestep, latents: calls.append(step),
        callback_steps=1,
        **SIZE,
    ).images
    assert len(images) == 1
    assert calls == [0, 1]


def test_zero_embeddings(prior: KandinskyV22PriorPipeline) -> None:
    assert prior.get_zero_embed().shape == (1, DIM)
    assert prior.get_zero_embed(batch_size=3, device="cpu").to("cpu").shape == (3, DIM)


def test_messages_and_versions() -> None:
    from kandinsky22.utils import check_min_version, is_wandb_available
    from kandinsky22.utils.import_utils import is_xformers_available

    check_min_version("0.40.0.dev0")
    assert {is_wandb_available(), is_xformers_available()} <= {True, False}
    logger = kandinsky22.utils.logging.get_logger()
    level, handlers = logger.level, list(logger.handlers)
    try:
        kandinsky22.utils.logging.set_verbosity_error()
        assert not logger.isEnabledFor(kandinsky22.utils.logging.WARNING)
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers
