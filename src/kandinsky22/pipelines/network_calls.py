"""How pipelines run their networks: by fast methods where nothing was attached to them, by calls otherwise.

Both compute the same. `encode_condition` and `denoise` are `forward` with everything that depends on neither the sample
nor the timestep moved out of the steps; the UNet's operations are the very same, the prior's differ by rounding. But
only a call runs hooks, compiled forms, wrappers such as `nn.DataParallel` and whatever replaced `forward`. Networks
that were exported run by their engine, until something is attached to them during a call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kandinsky22.adapters.merging import adapters_version
from kandinsky22.engines.networks import MoVQEngine, PriorEngine, UNetEngine
from kandinsky22.kernels.modules import has_foreign_hooks
from kandinsky22.models.feature_cache import FeatureCache
from kandinsky22.models.modifications import find_modification
from kandinsky22.runtime.cuda_graphs import DenoisingGraphs
from kandinsky22.runtime.device_offload import has_offload_forward
from kandinsky22.runtime.network_state import state_of, unwrapped
from kandinsky22.sampling.loop import Denoise

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = ("masked_image", "mask_image")  # tensors that inpainting concatenates to the latents, in this order


def bind_unet(
    current: Callable[[], Any],
    tensors: Mapping[str, Tensor],
    cache: FeatureCache | None,
    graphs: DenoisingGraphs | None,
) -> Denoise:
    """Return the UNet bound to its condition.

    Args:
        current: Returns the UNet: a callback may replace it between steps.
        tensors: Tensors of the condition by name.
        cache: Features of the inner stages, for feature caching; None without it.
        graphs: Recorded CUDA graphs; None without them.
    """
    unet = current()
    channels = [tensors[name] for name in IMAGE_CHANNELS if name in tensors]
    embeds, hint = tensors["image_embeds"], tensors.get("hint")

    def call(sample: Tensor, timestep: Any) -> Tensor:
        added = {"image_embeds": embeds} if hint is None else {"image_embeds": embeds, "hint": hint}
        inputs = torch.cat([sample, *channels], dim=1) if channels else sample
        output = current()(inputs, timestep, encoder_hidden_states=None, added_cond_kwargs=added, return_dict=False)
        return _owned(output[0])

    # Feature caching leaves modules out, so that hooks inside run on the other steps only.
    if (modification := find_modification(unet, inside=cache is None)) is not None:
        for feature, enabled in (("feature caching", cache), ("recording of CUDA graphs", graphs)):
            if enabled is not None:
                logger.warning("unet: %s has no effect, because %s", feature, modification)
        return call
    inputs: dict[str, Any] = {
        "image_embeds": embeds,
        "hint": hint,
        "channels": torch.cat(channels, dim=1) if channels else None,
    }
    engine = state_of(unet).engine
    if isinstance(engine, UNetEngine):
        return _unless_modified(unet, current, engine.bind(unet, **inputs), call)
    condition = unet.encode_condition(**inputs)
    if graphs is not None and cache is None:
        step = graphs.bind(unet, condition)
    else:
        step = lambda sample, timestep: unet.denoise(sample, timestep, condition, cache)  # noqa: E731
    return _unless_modified(unet, current, step, call)


def bind_prior(current: Callable[[], Any], tensors: Mapping[str, Tensor], timesteps: list[float]) -> Denoise:
    """Return the prior bound to its condition.

    Args:
        current: Returns the prior: a callback may replace it between steps.
        tensors: Tensors of the condition by name.
        timesteps: All timesteps of the call.
    """
    prior = current()
    inputs = {
        "proj_embedding": tensors["prompt_embeds"],
        "encoder_hidden_states": tensors["text_encoder_hidden_states"],
        "attention_mask": tensors["text_mask"],
    }

    def call(sample: Tensor, timestep: Any) -> Tensor:
        output = current()(sample, timestep=timestep, **inputs)
        return _owned(output[0] if isinstance(output, tuple) else output.predicted_image_embedding)

    if find_modification(prior) is not None:
        return call
    engine = state_of(prior).engine
    if isinstance(engine, PriorEngine):
        return _unless_modified(prior, current, engine.bind(prior, **inputs), call)
    condition = prior.encode_condition(**inputs, schedule=timesteps)
    return _unless_modified(prior, current, lambda sample, timestep: prior.denoise(sample, timestep, condition), call)


def run_tower(tower: Any, inputs: Tensor) -> Any:
    """Return the result of a CLIP tower, with named entries.

    Towers whose config says `return_dict: false` return tuples otherwise. Other modules in place of a tower need not
    know the argument: they are called with the inputs alone.

    Args:
        tower: A tower, or a wrapper of it, or any module that returns the same.
        inputs: Token ids (batch, tokens), or normalised pixels (batch, 3, size, size).
    """
    returns_names = getattr(getattr(unwrapped(tower), "config", None), "return_dict", True)
    return tower(inputs) if returns_names else tower(inputs, return_dict=True)


def encode_images(movq: Any, images: Tensor) -> Tensor:
    """Return latents (batch, vq_embed_dim, H / f, W / f), not quantized.

    Args:
        movq: MoVQ, or a wrapper of it.
        images: Images (batch, 3, H, W) in [-1, 1].
    """
    network = unwrapped(movq)
    engine = state_of(network).engine
    latents: Tensor = engine.encode(network, images) if isinstance(engine, MoVQEngine) else network.encode(images)[0]
    return latents


def decode_latents(movq: Any, latents: Tensor) -> Tensor:
    """Return images (batch, 3, H, W), about in [-1, 1].

    Args:
        movq: MoVQ, or a wrapper of it.
        latents: Latents (batch, vq_embed_dim, h, w), which are decoded as they are.
    """
    network = unwrapped(movq)
    engine = state_of(network).engine
    if isinstance(engine, MoVQEngine):
        return engine.decode(network, latents)
    images: Tensor = network.decode(latents, force_not_quantize=True)[0]
    return images


def _unless_modified(network: Any, current: Callable[[], Any], step: Denoise, call: Denoise) -> Denoise:
    """Return `step`, except that `call` runs once a callback has replaced the network or attached something to it.

    Modules inside are not checked at each step: that takes a millisecond for a large network. Another selection of
    adapters counts too, because the condition was computed with the weights before.
    """
    version = adapters_version(network)

    def denoise(sample: Tensor, timestep: Any) -> Tensor:
        is_same = (
            current() is network
            and adapters_version(network) == version
            and network._compiled_call_impl is None
            and not has_foreign_hooks(network)
            and ("forward" not in network.__dict__ or has_offload_forward(network))
        )
        return step(sample, timestep) if is_same else call(sample, timestep)

    return denoise


def _owned(output: Tensor) -> Tensor:
    """Return a prediction that the next step does not overwrite, as the CUDA graphs of a compiled network would."""
    return output.clone() if output.is_cuda else output
