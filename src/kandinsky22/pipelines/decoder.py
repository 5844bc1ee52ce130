"""From image embeddings to pictures: latent diffusion, then MoVQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import images, masks, validation
from kandinsky22.inputs.images import Pictures
from kandinsky22.kernels import winograd
from kandinsky22.models import UNet2DConditionModel, VQModel
from kandinsky22.noise import Generators
from kandinsky22.pipelines.denoising import LATENTS, Denoise, Plan, Run, SamplingPipeline
from kandinsky22.pipelines.outputs import ImagePipelineOutput
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.scheduler_adapter import Levels, Steps, Times, uses_learned_variance

Embeds: TypeAlias = Tensor | list[Tensor]
Names: TypeAlias = list[str] | None

HINT_FACTOR = 8  # pixels of a hint a latent, along each side: the UNet halves hints three times


class DecoderPipeline(SamplingPipeline):
    """What all decoders share: components, sizes, pictures, embeddings, and the way back to pixels.

    A call plans (`_plan`: arguments are checked and pictures read, no network runs) and generates (`_generate`: start
    latents and condition, the loop, pixels). A mode is what it adds to these.
    """

    unet: UNet2DConditionModel
    movq: VQModel
    model_cpu_offload_seq: ClassVar[str] = "unet->movq"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "image_embeds", "negative_image_embeds"]
    _unet_needs: ClassVar[tuple[int, str]] = (0, "image")  # input channels beside the latents, addition_embed_type
    _signed: ClassVar[bool] = False  # whether tensors of pixels are always in [-1, 1]
    _unit: ClassVar[bool] = False  # whether output_type "pt" is in [0, 1]

    def __init__(self, unet: UNet2DConditionModel, scheduler: Any, movq: VQModel) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, movq=movq)

    @property
    def movq_scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.movq.config.block_out_channels) - 1))

    @property
    def default_size(self) -> int:
        """Side in pixels of the pictures the UNet was trained on. Raises InputError if its config does not say."""
        if self.unet.config.sample_size is None:
            raise InputError("height and width are needed: the unet's config names no sample_size")
        return int(self.unet.config.sample_size * self.movq_scale_factor)

    def _plan(
        self, batch: int, size: tuple[Any, Any], *options: Any, copies: int = 1, strength: Any = 1.0,
        keep_pixels: Any = False, **pictures: Any,
    ) -> Plan:  # fmt: skip
        """Check the arguments of a call for `batch` pictures of `size` (height, width), `copies` of each embedding.

        `options` are the rest of `_schedule`'s; `pictures` are image, mask_image and hint as far as the mode has them.
        Raises InputError.
        """
        self._need("unet", "scheduler", "movq")
        self._check_unet(*self._unet_needs)
        if "image" in pictures:
            self._need_add_noise()
        shape = self._latent_shape(batch, *size)
        read = {name: self._read(name, value, shape, batch // copies) for name, value in pictures.items()}
        if validation.flag("keep_pixels", keep_pixels) and read["image"].shape[1] != 3:
            raise InputError("keep_pixels: the image is given as latents, so there are no pixels to keep")
        plan = self._tail(self._schedule(shape, batch, *options), strength)
        return replace(plan, pictures=read, keep_pixels=keep_pixels)

    def _read(self, name: str, value: Any, shape: tuple[int, ...], rows: int) -> Tensor:
        """The picture argument `name` as a tensor for latents of `shape`, with one row or `rows`."""
        factor, (height, width) = HINT_FACTOR if name == "hint" else self.movq_scale_factor, shape[2:]
        size = height * factor, width * factor
        if name == "hint":
            made = images.hints(name, value, size)
        elif name == "mask_image":
            made = masks.masks(name, value, size)
        else:
            made = images.pixels(name, value, size, signed=self._signed, latents=shape[1:])
        if len(made) not in (1, rows):
            raise InputError(
                f"{name}: {len(made)} pictures were given for {rows} embeddings; one, or one each is needed"
            )
        return made

    def _latent_shape(self, batch: int, height: Any, width: Any) -> tuple[int, int, int, int]:
        """Shape of the latents; sides given in pixels are rounded up to a multiple of the factor squared (64)."""
        factor = self.movq_scale_factor
        sides = []
        for name, side in (("height", height), ("width", width)):
            pixels = self.default_size if side is None else validation.whole(name, side)
            sides.append(-(-pixels // factor**2) * factor)
        return batch, self.movq.config.latent_channels, sides[0], sides[1]

    def _check_unet(self, extra_channels: int, condition: str) -> None:
        """Raise InputError unless the UNet belongs to this mode, and predicts a variance if the scheduler wants it."""
        config, latent = self.unet.config, self.movq.config.latent_channels
        if config.in_channels != latent + extra_channels or config.addition_embed_type != condition:
            raise InputError(
                f"unet: {type(self).__name__} needs one with in_channels={latent + extra_channels} and "
                f"addition_embed_type={condition!r}; this checkpoint's has in_channels={config.in_channels} and "
                f"addition_embed_type={config.addition_embed_type!r}, so it belongs to another Kandinsky pipeline"
            )
        if uses_learned_variance(self.scheduler) and config.out_channels != 2 * latent:
            raise InputError(f"scheduler: a learned variance_type needs a unet with out_channels={2 * latent}")

    def _embeddings(self, positive: Any, negative: Any, copies: int, guided: bool) -> dict[str, Tensor]:
        """The embeddings as callbacks see them: with guidance, `image_embeds` holds both halves, negative first."""
        width = self.unet.config.encoder_hid_dim
        target: dict[str, Any] = {"device": self._execution_device, "dtype": self.unet.dtype}
        embeds = validation.embeddings("image_embeds", positive, width)
        tensors = {"image_embeds": embeds.to(**target).repeat_interleave(copies, dim=0)}
        if negative is not None:
            opposite = validation.embeddings("negative_image_embeds", negative, width)
            opposite = validation.same_batch("negative_image_embeds", opposite, len(embeds), "image_embeds")
            tensors["negative_image_embeds"] = opposite.to(**target).repeat_interleave(copies, dim=0)
        elif guided:
            raise InputError("negative_image_embeds=None: guidance_scale > 1 needs them; the prior returns them")
        if guided:
            tensors["image_embeds"] = torch.cat([tensors["negative_image_embeds"], tensors["image_embeds"]])
        return tensors

    def _rows(self, plan: Plan, picture: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A picture's tensor with one row for each picture to make, where the networks run, in the UNet's type."""
        picture = picture.to(device=self._execution_device, dtype=self.unet.dtype if dtype is None else dtype)
        return picture.repeat_interleave(plan.shape[0] // len(picture), dim=0)

    def _encode(self, plan: Plan) -> Tensor:
        """Latents (batch, 4, h, w) of the image; each is encoded once, and not at all if it came as latents."""
        image = plan.pictures["image"]
        if image.shape[1] == 3:
            with winograd.turn(self.movq, after=self.unet):
                image = self.movq.encode(image.to(device=self._execution_device, dtype=self.movq.dtype))[0]
        return self._rows(plan, image)

    def _bind(self, tensors: Mapping[str, Tensor]) -> Denoise:
        masked = [tensors[name] for name in ("masked_image", "mask_image") if name in tensors]
        condition = self.unet.encode_condition(
            image_embeds=tensors["image_embeds"],
            hint=tensors.get("hint"),
            channels=torch.cat(masked, dim=1) if masked else None,
        )
        cache = self._feature_cache()
        return lambda noisy, timestep: self.unet.denoise(noisy, timestep, condition, cache)

    def _apply(self, run: Run, changes: Mapping[str, Tensor]) -> None:
        # the network sees negatives only as the first half of the guided batch, so a new one has to go there
        before = run.tensors.get("negative_image_embeds")
        super()._apply(run, changes)
        after, both = run.tensors.get("negative_image_embeds"), run.tensors["image_embeds"]
        if after is not None and after is not before and len(both) == 2 * len(after):
            run.tensors["image_embeds"] = torch.cat([after, both[len(after) :]])

    def _call(
        self, embeds: tuple[Any, Any], size: tuple[Any, Any], steps: tuple[Steps, Guidance, Any, Any],
        callbacks: tuple[Any, Any, Any, Any], output: tuple[Any, Any, Any], **given: Any,
    ) -> Any:  # fmt: skip
        """A whole call; `steps` are Steps, Guidance, generator and latents, `output` is number for each embedding,
        type and return_dict, `given` the keywords of `_plan`."""
        self._need("unet", "scheduler", "movq")
        copies = validation.whole("num_images_per_prompt", output[0])
        guided = steps[1].on
        latent = 0 if given.get("keep_pixels") else 1  # latents hold no pixels that could be kept
        validation.output(*output[1:], images.OUTPUT_TYPES[: 3 + latent])
        tensors = self._embeddings(*embeds, copies, guided)
        batch = len(tensors["image_embeds"]) // (2 if guided else 1)
        plan = self._plan(batch, size, *steps, self._check_callbacks(*callbacks), copies=copies, **given)
        return self._generate(plan, tensors, *output[1:])

    def _generate(self, plan: Plan, tensors: dict[str, Tensor], output_type: str, return_dict: bool) -> Any:
        """The result of a planned call, from the embeddings."""
        if "hint" in plan.pictures:
            tensors = self._beside(plan, tensors, hint=self._rows(plan, plan.pictures["hint"]))
        latents = self._denoise(plan, self._first(plan), tensors)
        return self._decode(latents, output_type, return_dict)

    def _first(self, plan: Plan) -> Tensor:
        """The latents that denoising starts from: noise, or the image with as much noise as the first step expects."""
        if "image" not in plan.pictures:
            return self._noise(plan, self.unet.dtype)
        return self._noised(plan, self._encode(plan), self._draw(plan, self.unet.dtype), 0)

    def _noised(self, plan: Plan, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Clean latents at the level of noise before `step`; as they are where no such step is left."""
        timestep = plan.timesteps[step : step + 1]
        return self.scheduler.add_noise(clean, noise, timestep) if len(timestep) else clean

    @staticmethod
    def _beside(plan: Plan, tensors: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
        """The embeddings with more for the network to see, the same in both halves of a guided batch."""
        halves = 2 if plan.guidance.on else 1
        return tensors | {name: torch.cat([tensor] * halves) for name, tensor in more.items()}

    def _decode(self, latents: Tensor, output_type: str, return_dict: bool, plan: Plan | None = None) -> Any:
        """The result of a call from the latents after the last step; `plan` is given if pixels are to be kept."""
        result: Any = latents
        if output_type != "latent":
            with self._freed_on_error(), winograd.turn(self.movq, after=self.unet):
                pictures = self.movq.decode(latents.to(self.movq.dtype), force_not_quantize=True)[0]
            if plan is not None:  # in float32, for others cannot tell all 256 levels of brightness apart
                rows = {name: self._rows(plan, picture, torch.float32) for name, picture in plan.pictures.items()}
                pictures = torch.where(rows["mask_image"] > 0.5, pictures.float(), rows["image"])
            result = images.from_decoder(pictures, output_type, unit=self._unit)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(result) if return_dict else (result,)


class KandinskyV22Pipeline(DecoderPipeline):
    """Pictures from image embeddings."""

    # Signatures are packed, so that what the five have in common does not fill the page five times.
    @torch.no_grad()
    def __call__(
        self, image_embeds: Embeds, negative_image_embeds: Embeds | None, height: int | None = None,
        width: int | None = None, num_inference_steps: int = 100, guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1, generator: Generators = None, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True, callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Names = LATENTS, callback: Any = None, callback_steps: int | None = None,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Pictures, num_images_per_prompt for each of the embeddings (batch, dim).

        One negative embedding serves all. `height` and `width` are pixels, rounded up to multiples of 64; the
        model's own size unless given. `latents` is start noise (pictures, 4, height / 8, width / 8). Guidance is off
        at 1 and below; only then may `negative_image_embeds` be None. Its options are those of `Guidance`; descending
        `timesteps` or `sigmas` take the place of a number of steps where the scheduler's `set_timesteps` has them.
        `output_type` is "pil", "np" (batch, H, W, 3) in [0, 1], "pt" (batch, 3, H, W) as the decoder leaves it,
        nominally in [-1, 1], or "latent". Raises InputError before any network runs.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents)
        callbacks = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        embeds, output = (image_embeds, negative_image_embeds), (num_images_per_prompt, output_type, return_dict)
        return self._call(embeds, (height, width), steps, callbacks, output)


class KandinskyV22Img2ImgPipeline(DecoderPipeline):
    """Pictures from image embeddings and a picture to start from."""

    _unit = True

    @torch.no_grad()
    def __call__(
        self, image_embeds: Embeds, image: Pictures, negative_image_embeds: Embeds | None, height: int | None = None,
        width: int | None = None, num_inference_steps: int = 100, guidance_scale: float = 4.0, strength: float = 0.3,
        num_images_per_prompt: int = 1, generator: Generators = None, output_type: str = "pil",
        return_dict: bool = True, callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Names = LATENTS, callback: Any = None, callback_steps: int | None = None,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Pictures that lead away from `image`, num_images_per_prompt for each of the embeddings (batch, dim).

        One image serves all embeddings, or each has its own: any kind that `inputs.images.pixels` reads, resized to
        height x width, or latents (batch, 4, height / 8, width / 8). `strength` from 0 to 1 is the part of the steps
        that run: 1 keeps next to nothing of the image, and where no step is left it comes back as MoVQ draws it.
        "pt" gives [0, 1]; the rest is as in KandinskyV22Pipeline.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, None)
        callbacks = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        embeds, output = (image_embeds, negative_image_embeds), (num_images_per_prompt, output_type, return_dict)
        return self._call(embeds, (height, width), steps, callbacks, output, image=image, strength=strength)


class KandinskyV22InpaintPipeline(DecoderPipeline):
    """Pictures repainted where a mask says so, from image embeddings."""

    _callback_tensor_inputs: ClassVar = [*DecoderPipeline._callback_tensor_inputs, "masked_image", "mask_image"]
    embedded_part = "inpaint"
    _unet_needs = (5, "image")
    _signed = True

    @torch.no_grad()
    def __call__(
        self, image_embeds: Embeds, image: Pictures, mask_image: Pictures, negative_image_embeds: Embeds | None,
        height: int | None = None, width: int | None = None, num_inference_steps: int = 100,
        guidance_scale: float = 4.0, num_images_per_prompt: int = 1, generator: Generators = None,
        latents: Tensor | None = None, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: Names = LATENTS, callback: Any = None,
        callback_steps: int | None = None, keep_pixels: bool = False,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """`image` repainted where `mask_image` is white, num_images_per_prompt for each of the embeddings (batch, dim).

        One image and one mask serve all embeddings, or each has its own: any kind that `inputs.images.pixels` (float
        tensors in [-1, 1]) and `inputs.masks.masks` read. Kept latents are the image's, so kept pixels are as MoVQ
        draws them; `keep_pixels` puts the resized image's own in their place. The rest is as in KandinskyV22Pipeline.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents)
        callbacks = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        embeds, output = (image_embeds, negative_image_embeds), (num_images_per_prompt, output_type, return_dict)
        given = {"image": image, "mask_image": mask_image, "keep_pixels": keep_pixels}
        return self._call(embeds, (height, width), steps, callbacks, output, **given)

    def _generate(self, plan: Plan, tensors: dict[str, Tensor], output_type: str, return_dict: bool) -> Any:
        original, noise = self._encode(plan), self._draw(plan, self.unet.dtype)
        height, width = plan.shape[2:]
        kept = self._rows(plan, masks.kept(plan.pictures["mask_image"], (height, width)))
        tensors = self._beside(plan, tensors, masked_image=original * kept, mask_image=kept)

        def restore(latents: Tensor, known: Tensor) -> Tensor:
            mask = tensors["mask_image"][-len(latents) :]  # a callback may have put another there
            return mask * known + (1 - mask) * latents

        def edit(latents: Tensor, run: Run) -> Tensor:
            return restore(latents, self._noised(plan, original, noise, run.index + 1))

        latents = self._denoise(plan, noise * self.scheduler.init_noise_sigma, tensors, edit)
        return self._decode(restore(latents, original), output_type, return_dict, plan if plan.keep_pixels else None)


class KandinskyV22ControlnetPipeline(DecoderPipeline):
    """Pictures from image embeddings and a hint at their composition, such as a depth map."""

    _callback_tensor_inputs: ClassVar = [*DecoderPipeline._callback_tensor_inputs, "hint"]
    embedded_part = "control"
    _unet_needs = (4, "image_hint")

    @torch.no_grad()
    def __call__(
        self, image_embeds: Embeds, negative_image_embeds: Embeds | None, hint: Pictures, height: int | None = None,
        width: int | None = None, num_inference_steps: int = 100, guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1, generator: Generators = None, latents: Tensor | None = None,
        output_type: str = "pil", callback: Any = None, callback_steps: int | None = 1, return_dict: bool = True,
        callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: Names = LATENTS,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Pictures, num_images_per_prompt for each of the embeddings (batch, dim), composed as `hint` shows.

        One hint serves all embeddings, or each has its own: any kind that `inputs.images.hints` reads, resized to
        height x width. The rest is as in KandinskyV22Pipeline.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, latents)
        callbacks = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        embeds, output = (image_embeds, negative_image_embeds), (num_images_per_prompt, output_type, return_dict)
        return self._call(embeds, (height, width), steps, callbacks, output, hint=hint)


class KandinskyV22ControlnetImg2ImgPipeline(DecoderPipeline):
    """Pictures from image embeddings, a picture to start from and a hint at the composition."""

    _callback_tensor_inputs: ClassVar = KandinskyV22ControlnetPipeline._callback_tensor_inputs
    embedded_part = "control"
    _unet_needs = (4, "image_hint")
    _unit = True

    @torch.no_grad()
    def __call__(
        self, image_embeds: Embeds, image: Pictures, negative_image_embeds: Embeds | None, hint: Pictures,
        height: int | None = None, width: int | None = None, num_inference_steps: int = 100,
        guidance_scale: float = 4.0, strength: float = 0.3, num_images_per_prompt: int = 1,
        generator: Generators = None, output_type: str = "pil", callback: Any = None, callback_steps: int | None = 1,
        return_dict: bool = True, callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Names = LATENTS,
        guidance_rescale: float = 0.0, guidance_interval: Interval = None, guidance_threshold: float | None = None,
        timesteps: Times = None, sigmas: Levels = None,
    ) -> Any:  # fmt: skip
        """Pictures that lead away from `image` as `hint` shows, num_images_per_prompt for each of the embeddings.

        Image, strength and "pt" are as in KandinskyV22Img2ImgPipeline, the hint as in KandinskyV22ControlnetPipeline.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, guidance_threshold)
        steps = (Steps(num_inference_steps, timesteps, sigmas), guidance, generator, None)
        callbacks = (callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps)
        embeds, output = (image_embeds, negative_image_embeds), (num_images_per_prompt, output_type, return_dict)
        return self._call(embeds, (height, width), steps, callbacks, output, image=image, hint=hint, strength=strength)
