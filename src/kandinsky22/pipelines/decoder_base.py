"""Base of the decoders: planning, condition, denoising and decoding of a call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import images, masks, validation
from kandinsky22.inputs.image_processor import VaeImageProcessor
from kandinsky22.inputs.images import ImageInputs
from kandinsky22.kernels import winograd
from kandinsky22.models import UNet2DConditionModel, VQModel
from kandinsky22.pipelines.denoising import (
    DenoisingPipeline,
    SamplingOptions,
    SamplingPlan,
)
from kandinsky22.pipelines.network_calls import bind_unet, encode_images
from kandinsky22.pipelines.outputs import ImagePipelineOutput, finite_result
from kandinsky22.runtime.calls import others_use
from kandinsky22.runtime.network_state import unwrapped
from kandinsky22.sampling.loop import Denoise, LoopState
from kandinsky22.sampling.scheduler_adapter import (
    TimestepSchedule,
    uses_learned_variance,
)

Embeddings: TypeAlias = Tensor | list[Tensor]
Images: TypeAlias = ImagePipelineOutput | tuple[Any, ...]
TensorNames: TypeAlias = list[str] | None

HINT_FACTOR = 8  # pixels of a hint per latent along each side: the UNet halves hints three times


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """The image embeddings of a call.

    Attributes:
        positive: Image embeddings, (batch, embedding_dim).
        negative: Negative embeddings of the same shape, or one row for all; None without guidance.
    """

    positive: Embeddings
    negative: Embeddings | None


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Size and form of the results.

    Attributes:
        height: Height in pixels, rounded up to a multiple of 64; None for the model's default size.
        width: Width in pixels, likewise.
        num_images_per_prompt: Images per embedding, or per prompt.
        output_type: "pil", "np", "pt" or "latent".
        return_dict: Whether the output class is returned instead of a tuple.
    """

    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    output_type: str = "pil"
    return_dict: bool = True


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """The images that a call starts from or is conditioned on. A mode reads those in `_image_inputs`.

    Attributes:
        image: Image to start from or to inpaint, or latents.
        mask_image: Inpainting mask, 1 where the image is repainted.
        hint: Hint of a ControlNet decoder.
        strength: Fraction of the steps that run, 0 to 1.
        keep_pixels: Whether inpainting copies the known pixels of the image into the result.
        padding_mask_crop: Pixels around the mask, if inpainting repaints only the part of the image there; None
            repaints the entire image.
    """

    image: ImageInputs | None = None
    mask_image: ImageInputs | None = None
    hint: ImageInputs | None = None
    strength: float = 1.0
    keep_pixels: bool = False
    padding_mask_crop: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderPlan:
    """A validated call of a decoder. No network has run yet.

    Attributes:
        sampling: Plan of the denoising loop.
        images: Input images as tensors, by argument name: one row, or one per embedding.
        output: Form of the results.
        keep_pixels: Whether inpainting copies the known pixels into the result.
        crops: Crops that the results are pasted back into, one or one per embedding; empty if images are not cropped.
    """

    sampling: SamplingPlan
    images: Mapping[str, Tensor]
    output: OutputOptions
    keep_pixels: bool = False
    crops: tuple[masks.MaskCrop, ...] = ()


class DecoderPipeline(DenoisingPipeline):
    """Base of all decoders: sizes, input images, embeddings, denoising, and decoding to pixels.

    A call plans (`_plan`: all arguments are validated and images are read, no network runs), then generates
    (`_generate`: initial latents and condition, the loop, pixels). A mode overrides the parts in which it differs.

    Args:
        unet: The UNet.
        scheduler: Any object with the scheduler protocol.
        movq: MoVQ, the autoencoder between pixels and latents.
    """

    unet: UNet2DConditionModel
    movq: VQModel
    model_cpu_offload_seq: ClassVar[str] = "unet->movq"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "image_embeds", "negative_image_embeds"]
    _image_inputs: ClassVar[tuple[str, ...]] = ()  # arguments that hold images: fields of ImageOptions
    _accepts_strength: ClassVar[bool] = False
    _extra_unet_channels: ClassVar[int] = 0  # input channels of the UNet besides the latents
    _addition_embed_type: ClassVar[str] = "image"
    _image_tensors_are_signed: ClassVar[bool] = False  # whether image tensors are always in [-1, 1]
    _pt_output_in_unit_range: ClassVar[bool] = False  # whether output_type "pt" is in [0, 1] instead of about [-1, 1]

    def __init__(self, unet: UNet2DConditionModel, scheduler: Any, movq: VQModel) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, movq=movq)

    @property
    def movq_scale_factor(self) -> int:
        """Pixels per latent along one side.

        Raises:
            InputError: If the pipeline was constructed without MoVQ.
        """
        self._require("movq")
        return int(2 ** (len(unwrapped(self.movq).config.block_out_channels) - 1))

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Processor that scripts use to convert images to tensors of MoVQ and back; the pipeline does not need it.

        Raises:
            InputError: If the pipeline was constructed without MoVQ.
        """
        self._require("movq")
        return VaeImageProcessor(
            vae_scale_factor=self.movq_scale_factor,
            vae_latent_channels=unwrapped(self.movq).config.latent_channels,
            resample="bicubic",
            reducing_gap=1,
        )

    @property
    def default_size(self) -> int:
        """Side in pixels of the images that the UNet was trained for.

        Raises:
            InputError: If the UNet's config has no `sample_size`, or if the UNet is missing.
        """
        self._require("unet")
        sample_size = unwrapped(self.unet).config.sample_size
        if sample_size is None:
            raise InputError("height and width are required: the config of the unet has no sample_size")
        return int(sample_size * self.movq_scale_factor)

    # Planning

    def _call(
        self, embeddings: EmbeddingOptions, sampling: SamplingOptions, output: OutputOptions, inputs: ImageOptions
    ) -> Images:
        """Run a whole call from image embeddings."""
        self._require("unet", "scheduler", "movq")
        copies = validation.copy_count(output.num_images_per_prompt)
        tensors = self._condition_tensors(embeddings, copies, guided=sampling.guidance.enabled)
        batch = len(tensors["image_embeds"]) // (2 if sampling.guidance.enabled else 1)
        return self._generate(self._plan(batch // copies, sampling, output, inputs), tensors)

    def _plan(
        self, embedding_count: int, sampling: SamplingOptions, output: OutputOptions, inputs: ImageOptions
    ) -> DecoderPlan:
        """Validate a call for this number of embeddings, and read its images."""
        keep_pixels = validation.strict_bool("keep_pixels", inputs.keep_pixels)
        # latents hold no pixels that could be copied into
        output_types = images.OUTPUT_TYPES[:3] if keep_pixels else images.OUTPUT_TYPES
        validation.output_format(output.output_type, output.return_dict, output_types)
        self._require("unet", "scheduler", "movq")
        self._check_unet()
        self._check_tiny_decoder()
        self._check_engines()
        if "image" in self._image_inputs:
            self._require_add_noise()
        batch = embedding_count * validation.copy_count(output.num_images_per_prompt)
        shape = self._latent_shape(batch, output)
        plan = self._plan_sampling(sampling, shape=shape, images=batch)
        if self._accepts_strength:
            plan = plan.with_strength(inputs.strength)
        # Images are read last: they may be large files or downloads.
        crops, inputs = self._crop(inputs, shape, output)
        tensors = {
            name: self._read_image(name, getattr(inputs, name), shape, embedding_count) for name in self._image_inputs
        }
        if keep_pixels and tensors["image"].shape[1] != 3:
            raise invalid("keep_pixels", True, "False if image holds latents, which have no pixels to keep")
        return DecoderPlan(plan, tensors, output, keep_pixels, crops)

    def _crop(
        self, inputs: ImageOptions, shape: tuple[int, ...], output: OutputOptions
    ) -> tuple[tuple[masks.MaskCrop, ...], ImageOptions]:
        """Return the crops that the call repaints, and the inputs with those instead of the images."""
        if inputs.padding_mask_crop is None:
            return (), inputs
        padding = masks.crop_padding(inputs.padding_mask_crop)
        if output.output_type != "pil":
            raise invalid(
                "output_type", output.output_type, "'pil' with padding_mask_crop", "images may differ in size"
            )
        size = shape[2] * self.movq_scale_factor, shape[3] * self.movq_scale_factor
        crops = tuple(masks.mask_crops(inputs.image, inputs.mask_image, size, padding))
        pictures, repainted = zip(*((crop.cropped_picture(), crop.cropped_mask()) for crop in crops), strict=True)
        return crops, dataclasses.replace(inputs, image=pictures, mask_image=repainted)

    def _read_image(self, name: str, value: ImageInputs, shape: tuple[int, ...], embedding_count: int) -> Tensor:
        """Return the image argument `name` as a tensor with one row, or one per embedding."""
        factor = HINT_FACTOR if name == "hint" else self.movq_scale_factor
        size = shape[2] * factor, shape[3] * factor
        if name == "hint":
            tensor = images.hints_to_tensor(name, value, size)
        elif name == "mask_image":
            tensor = masks.masks_to_tensor(name, value, size)
        else:
            signed = self._image_tensors_are_signed
            tensor = images.images_to_tensor(name, value, size, signed=signed, latent_shape=shape[1:])
        if len(tensor) not in (1, embedding_count):
            raise invalid(f"len({name})", len(tensor), f"1 or {embedding_count}, one per image embedding")
        return tensor

    def _latent_shape(self, batch: int, output: OutputOptions) -> tuple[int, int, int, int]:
        """Return the shape of the latents; sides in pixels are rounded up to a multiple of the squared factor (64)."""
        factor = self.movq_scale_factor
        sides = []
        for name, side in (("height", output.height), ("width", output.width)):
            pixels = self.default_size if side is None else validation.positive_int(name, side, validation.MAX_SIDE)
            sides.append(-(-pixels // factor**2) * factor)
        return batch, unwrapped(self.movq).config.latent_channels, sides[0], sides[1]

    def _check_unet(self) -> None:
        """Raise InputError unless the UNet fits this mode, and predicts a variance if the scheduler uses it."""
        config, latent_channels = unwrapped(self.unet).config, unwrapped(self.movq).config.latent_channels
        in_channels = latent_channels + self._extra_unet_channels
        if config.in_channels != in_channels or config.addition_embed_type != self._addition_embed_type:
            raise InputError(
                f"unet with in_channels={config.in_channels} and addition_embed_type={config.addition_embed_type!r} "
                f"belongs to another Kandinsky pipeline: {type(self).__name__} expects in_channels={in_channels} and "
                f"addition_embed_type={self._addition_embed_type!r}"
            )
        if uses_learned_variance(self.scheduler) and config.out_channels != 2 * latent_channels:
            raise InputError(
                f"unet with out_channels={config.out_channels} predicts no variance: the scheduler's variance_type "
                f"expects out_channels={2 * latent_channels}"
            )

    def _condition_tensors(self, embeddings: EmbeddingOptions, copies: int, *, guided: bool) -> dict[str, Tensor]:
        """Return the embeddings as callbacks see them, repeated; `image_embeds` holds both halves, negative first."""
        width = unwrapped(self.unet).config.encoder_hid_dim
        device_and_dtype: dict[str, Any] = {"device": self._execution_device, "dtype": unwrapped(self.unet).dtype}
        positive = validation.image_embeddings("image_embeds", embeddings.positive, width)
        tensors = {"image_embeds": positive.to(**device_and_dtype).repeat_interleave(copies, dim=0)}
        if embeddings.negative is not None:
            negative = validation.image_embeddings("negative_image_embeds", embeddings.negative, width)
            negative = validation.batch_of_size("negative_image_embeds", negative, len(positive), "image_embeds")
            tensors["negative_image_embeds"] = negative.to(**device_and_dtype).repeat_interleave(copies, dim=0)
        elif guided:
            raise invalid(
                "negative_image_embeds", None, "embeddings, since guidance_scale > 1", "the prior returns them"
            )
        if guided:
            tensors["image_embeds"] = torch.cat([tensors["negative_image_embeds"], tensors["image_embeds"]])
        return tensors

    # Generating

    def _generate(self, plan: DecoderPlan, tensors: dict[str, Tensor]) -> Images:
        """Denoise and decode a planned call."""
        if "hint" in plan.images:
            tensors = self._with_conditioning(plan, tensors, hint=self._expand_to_batch(plan, plan.images["hint"]))
        latents = self._denoise(plan.sampling, self._initial_latents(plan), tensors)
        return self._decode(plan, latents)

    def _initial_latents(self, plan: DecoderPlan) -> Tensor:
        """Return noise, or the encoded image with the noise that the first step expects."""
        image = self._encode_image(plan) if "image" in plan.images else None
        noise = self._standard_noise(plan.sampling, unwrapped(self.unet).dtype)
        if image is None:
            return noise * plan.sampling.schedule.scheduler.init_noise_sigma
        return self._add_noise(plan, image, noise, step=0)

    @staticmethod
    def _add_noise(plan: DecoderPlan, latents: Tensor, noise: Tensor, *, step: int) -> Tensor:
        """Add the noise of the timestep before a step; after the last step, return the latents as they are."""
        timestep = plan.sampling.schedule.timesteps[step : step + 1]
        if not len(timestep):
            return latents
        noisy: Tensor = plan.sampling.schedule.scheduler.add_noise(latents, noise, timestep)
        return noisy

    @staticmethod
    def _with_conditioning(plan: DecoderPlan, tensors: dict[str, Tensor], **conditioning: Tensor) -> dict[str, Tensor]:
        """Add tensors that are the same in both halves of a guided batch."""
        halves = 2 if plan.sampling.guidance.enabled else 1
        return tensors | {name: torch.cat([tensor] * halves) for name, tensor in conditioning.items()}

    def _expand_to_batch(self, plan: DecoderPlan, image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an input image with one row per result, on the execution device, in the UNet's type by default."""
        image = image.to(device=self._execution_device, dtype=unwrapped(self.unet).dtype if dtype is None else dtype)
        return image.repeat_interleave(plan.sampling.shape[0] // len(image), dim=0)

    def _encode_image(self, plan: DecoderPlan) -> Tensor:
        """Return latents (batch, 4, h, w) of the image. Each is encoded once, or not at all if it holds latents."""
        image = plan.images["image"]
        if image.shape[1] == 3:
            with self._movq_after_unet():
                pixels = image.to(device=self._execution_device, dtype=unwrapped(self.movq).dtype)
                image = encode_images(self.movq, pixels)
        return self._expand_to_batch(plan, image)

    def _bind_condition(self, tensors: Mapping[str, Tensor], schedule: TimestepSchedule) -> Denoise:
        return bind_unet(lambda: self.unet, tensors, self._new_feature_cache(), self._cuda_graphs)

    def _replace_tensors(self, state: LoopState, changes: Mapping[str, Tensor]) -> None:
        # The network reads negatives only as the first half of the guided batch: a new one must be put there.
        previous = state.tensors.get("negative_image_embeds")
        super()._replace_tensors(state, changes)
        negative, guided_embeds = state.tensors.get("negative_image_embeds"), state.tensors["image_embeds"]
        if negative is not None and negative is not previous and len(guided_embeds) == 2 * len(negative):
            state.tensors["image_embeds"] = torch.cat([negative, guided_embeds[len(negative) :]])

    def _movq_after_unet(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for runs of MoVQ that frees weights which nothing uses meanwhile and afterwards."""
        if others_use(self.unet) or others_use(self.movq):
            return contextlib.nullcontext()
        return winograd.weights_in_use_by(self.movq, after=self.unet)

    def _decode(self, plan: DecoderPlan, latents: Tensor) -> Images:
        """Return the result of a call from its final latents."""
        result: Any = latents
        if plan.output.output_type == "latent":
            with self._freed_on_error():
                finite_result("latents", latents)
        else:
            with self._freed_on_error(), self._movq_after_unet():
                pixels = self._decode_latents(latents)
                finite_result("images", pixels)
            if plan.keep_pixels:
                pixels = self._copy_known_pixels(plan, pixels)
            unit = self._pt_output_in_unit_range
            result = images.to_output_type(pixels, plan.output.output_type, unit_range=unit)
        if plan.crops:
            copies = len(result) // len(plan.crops)
            result = [plan.crops[index // copies].paste(image) for index, image in enumerate(result)]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(result) if plan.output.return_dict else (result,)

    def _copy_known_pixels(self, plan: DecoderPlan, pixels: Tensor) -> Tensor:
        """Return the pixels with those of the image where the mask keeps it.

        In float32: half precision cannot represent all 256 levels of brightness.
        """
        image, mask = (
            self._expand_to_batch(plan, plan.images[name], torch.float32) for name in ("image", "mask_image")
        )
        return torch.where(mask > 0.5, pixels.float(), image)
