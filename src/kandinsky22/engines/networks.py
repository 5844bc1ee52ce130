"""The networks of pipelines, run by OpenVINO: what becomes a graph, and what PyTorch computes around it.

PyTorch computes once per call what depends on neither the sample nor the timestep, as for its own runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.adapters.merging import adapters_version
from kandinsky22.checkpoints.fingerprint import WeightFingerprint
from kandinsky22.engines.compression import compress_weights, quantize_graph
from kandinsky22.engines.openvino import INT8, EngineSettings, ExportedPart, Graph, changed_weights_error
from kandinsky22.errors import InputError
from kandinsky22.kernels import host_memory
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.models.attention import KeyValue
from kandinsky22.models.modifications import find_modification, modified_part
from kandinsky22.models.unet import UNetCondition
from kandinsky22.runtime.device_offload import offload_of
from kandinsky22.runtime.quantize import kind_of

EXAMPLE_TOKENS = 5  # text tokens of the example for tracing

Denoise = Callable[[Tensor, Any], Tensor]
CalibrationInputs = Callable[[], Sequence[tuple[Tensor, ...]]]


class NetworkEngine:
    """Base of the networks that OpenVINO runs.

    Args:
        network: The network, with the weights that are exported.
        settings: Where and how it runs.
    """

    def __init__(self, network: Any, settings: EngineSettings) -> None:
        self.settings = settings
        self._fingerprint = WeightFingerprint(network)
        self._adapters_version = adapters_version(network)

    def is_current(self, network: nn.Module) -> bool:
        """Return whether the network has the weights that were exported.

        Args:
            network: The network.
        """
        return adapters_version(network) == self._adapters_version and self._fingerprint.matches(network)

    def check(self, name: str, component: Any, network: nn.Module) -> None:
        """Check that the network is still the one that was exported.

        Args:
            name: Name of the component.
            component: The component as the pipeline has it.
            network: The network inside of wrappers.

        Raises:
            InputError: If its weights or adapters have changed, or something was attached to it.
        """
        if adapters_version(network) != self._adapters_version:
            raise changed_weights_error(name, "its adapters have changed since")
        if not self._fingerprint.matches(network):
            raise changed_weights_error(name, "its weights have changed since")
        check_exportable(name, component, network)

    def _release(self, network: nn.Module) -> None:
        """Drop the pages of weights that only the export has read."""
        host_memory.drop_large_mapped_pages(network.parameters())


def check_exportable(name: str, component: Any, network: Any) -> None:
    """Check that nothing was attached to a network that OpenVINO would leave out.

    Args:
        name: Name of the component.
        component: The component as the pipeline has it.
        network: The network inside of wrappers.

    Raises:
        InputError: If it is not on the CPU, or is offloaded, quantized, compiled or modified, or decodes in tiles.
    """
    reason = None
    if (offload := offload_of(network)) is not None:
        reason = f"is offloaded by {offload.method}(): call remove_all_hooks() first"
    elif (kind := kind_of(network)) is not None:
        reason = f"is quantized ({kind}) for PyTorch: load it again, and pass precision='int8' instead"
    elif any(module._compiled_call_impl is not None for module in network.modules()):
        reason = "is compiled by torch.compile: call uncompile() first"
    elif network.device.type != "cpu":
        reason = f"is on {network.device}: call to('cpu') first, and name the device of OpenVINO"
    elif getattr(network, "use_tiling", False):
        reason = "encodes and decodes in tiles: call disable_tiling() first"
    else:
        is_movq = isinstance(network, VQModel)
        modification = modified_part(network, component) if is_movq else find_modification(component)
        reason = None if modification is None else f"cannot be exported, because {modification}"
    if reason is not None:
        raise InputError(f"to_openvino(): {name} {reason}")


class UNetEngine(NetworkEngine):
    """The UNet's step.

    Args:
        unet: The UNet.
        settings: Where and how it runs.
        calibration: Returns inputs of some steps, from which the ranges of activations follow; only called for
            "int8" without a stored graph.
    """

    def __init__(self, unet: UNet2DConditionModel, settings: EngineSettings, calibration: CalibrationInputs) -> None:
        super().__init__(unet, settings)
        is_int8 = settings.precision == INT8

        def compress(model: Any) -> Any:
            return quantize_graph(model, calibration())

        self._graph = Graph(
            ExportedPart("unet", unet, _UNetStep(unet), _unet_example(unet)),
            settings,
            compress if is_int8 else None,
            "activations" if is_int8 else "",
        )
        self._release(unet)

    def bind(
        self,
        unet: UNet2DConditionModel,
        image_embeds: Tensor,
        hint: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> Denoise:
        """Return the step bound to its condition.

        Args:
            unet: The UNet that was exported.
            image_embeds: Image embeddings (batch, encoder_hid_dim).
            hint: Hint (batch, 3, 8 h, 8 w); None for UNets without.
            channels: Tensor (batch, n, h, w) to concatenate to the latents; None for nothing.
        """
        inputs = unet_inputs(unet, image_embeds, hint, channels)

        def denoise(sample: Tensor, timestep: Any) -> Tensor:
            (predicted,) = self._graph(*inputs(sample, timestep))
            return predicted.to(sample.dtype)

        return denoise


def unet_inputs(
    unet: UNet2DConditionModel, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
) -> Callable[[Tensor, Any], tuple[Tensor, ...]]:
    """Return the function from sample and timestep to the inputs of the UNet's graph.

    Args:
        unet: The UNet.
        image_embeds: Image embeddings (batch, encoder_hid_dim).
        hint: Hint (batch, 3, 8 h, 8 w); None for UNets without.
        channels: Tensor (batch, n, h, w) to concatenate to the latents; None for nothing.
    """
    condition, tokens = unet.encode_tokens(image_embeds, hint, channels)

    def inputs(sample: Tensor, timestep: Any) -> tuple[Tensor, ...]:
        if condition.channels is not None:
            sample = torch.cat([sample, condition.channels.to(sample.dtype)], dim=1)
        steps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        return sample, steps, condition.time, tokens

    return inputs


class _UNetStep(nn.Module):
    """The UNet's step as a function of float32 tensors."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Return the predicted noise and variance, (batch, out_channels, h, w)."""
        dtype = self.unet.dtype
        condition = UNetCondition(time.to(dtype), itertools.repeat(tokens.to(dtype)))
        return self.unet.denoise(sample.to(dtype), timestep, condition).float()


def _unet_example(unet: UNet2DConditionModel) -> tuple[Tensor, ...]:
    config, factor = unet.config, 2 ** (len(unet.config.block_out_channels) - 1)
    with torch.no_grad():
        tokens = unet.encoder_hid_proj(torch.zeros(2, config.encoder_hid_dim, dtype=unet.dtype)).float()
    return (
        torch.zeros(2, unet.conv_in.in_channels, 2 * factor, 3 * factor),
        torch.tensor([500.0]),
        torch.zeros(2, 4 * config.block_out_channels[0]),
        tokens,
    )


class PriorEngine(NetworkEngine):
    """The prior's transformer blocks: one graph for the text's tokens and for those of each step.

    With "int8", weights have 8 bits: a step of few tokens takes as long as reading the weights.

    Args:
        prior: The prior.
        settings: Where and how it runs.
    """

    def __init__(self, prior: PriorTransformer, settings: EngineSettings) -> None:
        super().__init__(prior, settings)
        is_int8 = settings.precision == INT8
        part = ExportedPart("prior", prior, _PriorBlocks(prior), _prior_example(prior))
        self._graph = Graph(part, settings, compress_weights if is_int8 else None, "weights" if is_int8 else "")
        self._release(prior)

    def bind(
        self,
        prior: PriorTransformer,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> Denoise:
        """Return the step bound to its text.

        Args:
            prior: The prior that was exported.
            proj_embedding: Text embedding (batch, embedding_dim).
            encoder_hidden_states: Last hidden state of the text encoder (batch, num_embeddings, embedding_dim).
            attention_mask: Which of its tokens are text (batch, num_embeddings).
        """
        tokens, padding = prior.text_tokens(proj_embedding, encoder_hidden_states, attention_mask)
        _, *text = self._graph(tokens, padding + prior.causal_mask(tokens.shape[1]), *_no_tokens(prior, len(tokens)))
        batch, _, _, length = padding.shape
        causal = F.pad(prior.causal_mask(3), (length, 0))
        mask = F.pad(padding, (0, 3)).expand(batch, 1, 3, length + 3) + causal

        def denoise(sample: Tensor, timestep: Any) -> Tensor:
            predicted, *_ = self._graph(prior.step_tokens(sample, timestep), mask, *text)
            return predicted.to(sample.dtype)

        return denoise


class _PriorBlocks(nn.Module):
    """All blocks and the output layers as a function of float32 tensors."""

    def __init__(self, prior: PriorTransformer) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, tokens: Tensor, mask: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prediction of the last token, and keys and values of these tokens.

        Keys and values, of earlier tokens or these, are (layers, batch, heads, tokens, head_dim).
        """
        dtype = self.prior.dtype
        tokens, mask, layers = tokens.to(dtype), mask.to(dtype), []
        for index, block in enumerate(self.prior.transformer_blocks):
            past = KeyValue(keys[index].to(dtype), values[index].to(dtype))
            tokens, kv = block(tokens, mask, past, return_kv=True)
            layers.append(kv)
        predicted = self.prior.predicted_embedding(tokens)
        new_keys, new_values = (torch.stack(part).float() for part in zip(*layers, strict=True))
        return predicted.float(), new_keys, new_values


def _no_tokens(prior: PriorTransformer, batch: int) -> tuple[Tensor, Tensor]:
    config = prior.config
    shape = (config.num_layers, batch, config.num_attention_heads, 0, config.attention_head_dim)
    return torch.zeros(shape), torch.zeros(shape)


def _prior_example(prior: PriorTransformer) -> tuple[Tensor, ...]:
    config = prior.config
    width = config.num_attention_heads * config.attention_head_dim
    past = torch.zeros(config.num_layers, 2, config.num_attention_heads, EXAMPLE_TOKENS, config.attention_head_dim)
    return torch.zeros(2, 3, width), torch.zeros(2, 1, 3, EXAMPLE_TOKENS + 3), past, past.clone()


class MoVQEngine(NetworkEngine):
    """MoVQ's decoder, and its encoder, which is exported at its first use.

    Neither is quantized: with "int8" they compute in the network's floating-point type.

    Args:
        movq: The autoencoder.
        settings: Where and how it runs.
    """

    def __init__(self, movq: VQModel, settings: EngineSettings) -> None:
        super().__init__(movq, settings)
        side = 8 * movq.downscale_factor
        latents = torch.zeros(2, movq.post_quant_conv.in_channels, 8, 12)
        self._decoder = Graph(ExportedPart("movq-decoder", movq, _MoVQDecoder(movq), (latents,)), settings)
        pixels = torch.zeros(2, movq.config.in_channels, side, side)
        self._encoder_part = ExportedPart("movq-encoder", movq, _MoVQEncoder(movq), (pixels,))
        self._encoder: Graph | None = None
        self._release(movq)

    def decode(self, movq: VQModel, latents: Tensor) -> Tensor:
        """Return images (batch, out_channels, f h, f w), about in [-1, 1].

        Args:
            movq: The autoencoder that was exported.
            latents: Latents (batch, vq_embed_dim, h, w), which are not quantized.
        """
        parts = latents.split(1) if movq.use_slicing else (latents,)
        return torch.cat([self._decoder(part)[0] for part in parts]).to(latents.dtype)

    def encode(self, movq: VQModel, images: Tensor) -> Tensor:
        """Return latents (batch, vq_embed_dim, H / f, W / f), not quantized.

        Args:
            movq: The autoencoder that was exported.
            images: Images (batch, in_channels, H, W) in [-1, 1].
        """
        if self._encoder is None:
            self._encoder = Graph(self._encoder_part, self.settings)
            self._release(movq)
        parts = images.split(1) if movq.use_slicing else (images,)
        return torch.cat([self._encoder(part)[0] for part in parts]).to(images.dtype)


class _MoVQDecoder(nn.Module):
    """Latents to images as a function of float32 tensors."""

    def __init__(self, movq: VQModel) -> None:
        super().__init__()
        self.movq = movq

    def forward(self, latents: Tensor) -> Tensor:
        """Return images."""
        latents = latents.to(self.movq.dtype)
        return self.movq.decoder(self.movq.post_quant_conv(latents), latents).float()


class _MoVQEncoder(nn.Module):
    """Images to latents as a function of float32 tensors."""

    def __init__(self, movq: VQModel) -> None:
        super().__init__()
        self.movq = movq

    def forward(self, images: Tensor) -> Tensor:
        """Return latents."""
        return self.movq.quant_conv(self.movq.encoder(images.to(self.movq.dtype))).float()
