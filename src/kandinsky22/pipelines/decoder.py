"""From image embeddings to pictures: latent diffusion, then MoVQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.inputs import checks, images
from kandinsky22.models import UNet2DConditionModel, VQModel
from kandinsky22.pipelines.outputs import ImagePipelineOutput
from kandinsky22.pipelines.sampling import LATENTS, Denoise, Plan, Run, SamplingPipeline, uses_learned_variance


class DecoderPipeline(SamplingPipeline):
    """Components, sizes, embeddings and the way back to pixels that all decoders share.

    A mode plans (`_plan`), prepares start latents and condition, and denoises.
    """

    unet: UNet2DConditionModel
    movq: VQModel
    model_cpu_offload_seq: ClassVar[str] = "unet->movq"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "image_embeds", "negative_image_embeds"]

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
        self, batch: int, size: tuple[Any, Any], *options: Any, extra_channels: int = 0, condition: str = "image"
    ) -> Plan:
        """Check the arguments of a call for `batch` pictures of `size` (height, width); `options` are the rest of
        `_schedule`'s. `extra_channels` and `condition` say what UNet the mode needs. Raises InputError."""
        self._need("unet", "scheduler", "movq")
        self._check_unet(extra_channels, condition)
        return self._schedule(self._latent_shape(batch, *size), batch, *options)

    def _latent_shape(self, batch: int, height: Any, width: Any) -> tuple[int, int, int, int]:
        """Shape of the latents; sides given in pixels are rounded up to a multiple of the factor squared (64)."""
        factor = self.movq_scale_factor
        sides = []
        for name, side in (("height", height), ("width", width)):
            pixels = self.default_size if side is None else checks.whole(name, side)
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
        embeds = checks.embeddings("image_embeds", positive, width)
        tensors = {"image_embeds": embeds.to(**target).repeat_interleave(copies, dim=0)}
        if negative is not None:
            opposite = checks.embeddings("negative_image_embeds", negative, width)
            opposite = checks.same_batch("negative_image_embeds", opposite, len(embeds), "image_embeds")
            tensors["negative_image_embeds"] = opposite.to(**target).repeat_interleave(copies, dim=0)
        elif guided:
            raise InputError("negative_image_embeds=None: guidance_scale > 1 needs them; the prior returns them")
        if guided:
            tensors["image_embeds"] = torch.cat([tensors["negative_image_embeds"], tensors["image_embeds"]])
        return tensors

    def _bind(self, tensors: Mapping[str, Tensor]) -> Denoise:
        condition = self.unet.encode_condition(image_embeds=tensors["image_embeds"])
        return lambda noisy, timestep: self.unet.denoise(noisy, timestep, condition)

    def _apply(self, run: Run, changes: Mapping[str, Tensor]) -> None:
        # the network sees negatives only as the first half of the guided batch, so a new one has to go there
        before = run.tensors.get("negative_image_embeds")
        super()._apply(run, changes)
        after, both = run.tensors.get("negative_image_embeds"), run.tensors["image_embeds"]
        if after is not None and after is not before and len(both) == 2 * len(after):
            run.tensors["image_embeds"] = torch.cat([after, both[len(after) :]])

    def _decode(self, latents: Tensor, output_type: str, return_dict: bool) -> Any:
        """The result of a call, from the latents after the last step."""
        result: Any = latents
        if output_type != "latent":
            pictures = self.movq.decode(latents.to(self.movq.dtype), force_not_quantize=True)[0]
            result = images.from_decoder(pictures, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(result) if return_dict else (result,)


class KandinskyV22Pipeline(DecoderPipeline):
    """Pictures from image embeddings."""

    @torch.no_grad()
    def __call__(
        self,
        image_embeds: Tensor | list[Tensor],
        negative_image_embeds: Tensor | list[Tensor],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] | None = LATENTS,
        callback: Any = None,
        callback_steps: int | None = None,
    ) -> Any:
        """Pictures, num_images_per_prompt for each of the embeddings (batch, dim).

        One negative embedding serves all. `height` and `width` are pixels, rounded up to multiples of 64; the
        model's own size unless given. `latents` is start noise (pictures, 4, height / 8, width / 8). Guidance is off
        at 1 and below; only then may `negative_image_embeds` be None. `output_type` is "pil", "np" (batch, H, W, 3)
        in [0, 1], "pt" (batch, 3, H, W) as the decoder leaves it, nominally in [-1, 1], or "latent". Raises
        InputError before any network runs.
        """
        copies = checks.whole("num_images_per_prompt", num_images_per_prompt)
        guided = checks.number("guidance_scale", guidance_scale) > 1
        checks.choice("output_type", output_type, images.OUTPUT_TYPES)
        callbacks = self._check_callbacks(
            callback_on_step_end, callback_on_step_end_tensor_inputs, callback, callback_steps
        )
        tensors = self._embeddings(image_embeds, negative_image_embeds, copies, guided)
        batch = len(tensors["image_embeds"]) // (2 if guided else 1)
        options = (num_inference_steps, guidance_scale, generator, latents, callbacks)
        plan = self._plan(batch, (height, width), *options)
        return self._generate(plan, tensors, output_type, return_dict)

    def _generate(self, plan: Plan, tensors: dict[str, Tensor], output_type: str, return_dict: bool) -> Any:
        latents = self._denoise(plan, self._noise(plan, self.unet.dtype), tensors)
        return self._decode(latents, output_type, return_dict)
