"""Parts of a call under the names of the reference, for subclasses and scripts that write the loop themselves.

The pipelines do not call them. They work on `pipe.scheduler` itself, whose timesteps the script has set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs import prompts, validation
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.pipelines.network_calls import encode_images
from kandinsky22.sampling.scheduler_adapter import step_starts


class NoiseStart:
    """Mixin for pipelines that start from noise."""

    def prepare_latents(
        self,
        shape: Sequence[int],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        generator: Generators,
        latents: Tensor | None,
        scheduler: Any,
    ) -> Tensor:
        """Return initial latents.

        Args:
            shape: Their shape.
            dtype: Type of drawn noise.
            device: Their device.
            generator: One generator, a list with one per batch item, or None for torch's global generator.
            latents: Noise to use; None draws it.
            scheduler: Scheduler whose `init_noise_sigma` scales the noise.

        Raises:
            InputError: If `latents` has another shape.
        """
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            noise = validation.initial_latents(latents, tuple(shape)).to(device)
        scaled: Tensor = noise * scheduler.init_noise_sigma
        return scaled


class ImageStart:
    """Mixin for pipelines that start from an image or an embedding."""

    scheduler: Any

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, int]:
        """Return the last timesteps of the scheduler, and their number.

        Args:
            num_inference_steps: Number of steps that the scheduler has.
            strength: Fraction of the steps that run, 0 to 1.
            device: Ignored: the timesteps stay where the scheduler has them.
        """
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        left_out, starts = max(num_inference_steps - steps, 0), step_starts(self.scheduler)
        timesteps: Tensor = self.scheduler.timesteps
        first = starts[left_out] if left_out < len(starts) else len(timesteps)
        return timesteps[first:], max(steps, 0)

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: Generators = None,
    ) -> Tensor:
        """Return the latents of images, or embeddings, with the noise of a timestep.

        Args:
            image: Pixels (N, 3, H, W) in [-1, 1], latents (N, 4, h, w), or embeddings (N, embedding_dim).
            timestep: Timestep per batch item.
            batch_size: Number of prompts or embeddings.
            num_images_per_prompt: Results of each.
            dtype: Type of the result.
            device: Device of the result.
            generator: One generator, a list with one per batch item, or None for torch's global generator.

        Raises:
            InputError: If the number of images is not 1, the number of prompts or the number of results.
        """
        if not isinstance(image, Tensor):
            raise invalid("image", image, "a tensor of pixels, latents or embeddings")
        start, rows = image.to(device=device, dtype=dtype), batch_size * num_images_per_prompt
        if start.ndim == 4 and start.shape[1] == 3:
            start = self._encoded(start)
        if rows % len(start):
            raise invalid("len(image)", len(start), f"a divisor of {rows}, the number of results")
        start = start.repeat_interleave(rows // len(start), dim=0)
        noise = randn_tensor(start.shape, generator=generator, device=device, dtype=dtype)
        noisy: Tensor = self.scheduler.add_noise(start, noise, timestep)
        return noisy

    def _encoded(self, pixels: Tensor) -> Tensor:
        return encode_images(self.movq, pixels)  # type: ignore[attr-defined]  # of the decoders


class PromptEncoding:
    """Mixin for the priors."""

    def _encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | str | None,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled embeddings, hidden states and mask of prompts, with guidance after those of the negatives."""
        pairs = prompts.prompt_pairs(prompt, "" if negative_prompt is None else negative_prompt)
        encoding: dict[str, Tensor] = self.encode_prompts(  # type: ignore[attr-defined]  # of the priors
            pairs.prompts, pairs.negative_prompts or [], num_images_per_prompt, guided=do_classifier_free_guidance
        )
        embeds, states, mask = (tensor.to(device) for tensor in encoding.values())
        return embeds, states, mask
