"""Loading for training: which networks a checkpoint has, the encoders alone, or the trained network alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

import kandinsky22
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.checkpoints.hub import EMBEDDED, CheckpointSource
from kandinsky22.errors import InputError
from kandinsky22.inputs import prompts
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.pipelines.network_calls import run_tower
from kandinsky22.runtime.lazy_component import loaded
from kandinsky22.schedulers import Scheduler
from kandinsky22.training.finetuning.options import TrainingOptions

DECODER_CLASSES = {
    "plain": "KandinskyV22Pipeline",
    "inpaint": "KandinskyV22InpaintPipeline",
    "hint": "KandinskyV22ControlnetPipeline",
}
INDEX = "model_index.json"
EMBEDDED_SUBFOLDERS = {"plain": "decoder", "inpaint": "inpaint", "hint": "control"}


def decoder_mode(options: TrainingOptions) -> str:
    """Return the kind of decoder: the requested one, or the one that the checkpoint's index names.

    Args:
        options: Options of the training.

    Raises:
        CheckpointError: The checkpoint does not exist, or has no index.
        InputError: An option has no effect for this kind of decoder.
    """
    mode = options.mode or _mode_of_checkpoint(options)
    options.check_mode(mode)
    return mode


def _mode_of_checkpoint(options: TrainingOptions) -> str:
    if options.model == EMBEDDED:
        return "plain"
    source = CheckpointSource(options.model, options.revision)
    folder = source.fetch(lambda names: {INDEX} & set(names))
    name = str(read_json(folder / INDEX).get("_class_name"))
    return "inpaint" if "Inpaint" in name else "hint" if "Controlnet" in name else "plain"


def _arguments(options: TrainingOptions, dtype: torch.dtype) -> dict[str, Any]:
    return {"torch_dtype": dtype, "variant": options.variant, "revision": options.revision}


def load_decoder(options: TrainingOptions, mode: str, dtype: torch.dtype, *, movq: bool) -> Any:
    """Return the decoder's pipeline with its scheduler and either MoVQ or the UNet, the other being None.

    Args:
        options: Options of the training.
        mode: Kind of decoder.
        dtype: Type of the weights.
        movq: Whether MoVQ is loaded instead of the UNet.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    kind = getattr(kandinsky22, DECODER_CLASSES[mode])
    return kind.from_pretrained(options.model, **{"unet" if movq else "movq": None}, **_arguments(options, dtype))


def load_prior(options: TrainingOptions, dtype: torch.dtype, *components: str) -> Any:
    """Return the prior's pipeline with some of its components, the others being None.

    Args:
        options: Options of the training.
        dtype: Type of the weights.
        *components: Names of the components that are loaded.

    Raises:
        CheckpointError: The prior is not found, or files are missing or damaged.
    """
    kind = kandinsky22.KandinskyV22CombinedPipeline
    absent = [name for name in kind.component_names() if not name.startswith("prior_") or name[6:] not in components]
    prior: dict[str, Any] = {} if options.prior is None else {"prior": options.prior}
    arguments: dict[str, Any] = {**prior, **dict.fromkeys(absent), **_arguments(options, dtype)}
    combined = kind.from_pretrained(options.model, **arguments)
    return combined.prior_pipe


def checked_unet(pipe: Any, mode: str, latent_channels: int) -> UNet2DConditionModel:
    """Return the UNet of a decoder after checking that it is one of this kind.

    Args:
        pipe: The decoder's pipeline.
        mode: Kind of decoder.
        latent_channels: Channels of the latents.

    Raises:
        InputError: It is of another kind, or its scheduler cannot be trained with.
    """
    unet: UNet2DConditionModel = pipe.unet
    config = unet.config
    channels = latent_channels + {"plain": 0, "inpaint": latent_channels + 1, "hint": latent_channels}[mode]
    hinted = config.addition_embed_type == "image_hint"
    if config.in_channels != channels or hinted != (mode == "hint"):
        raise InputError(
            f"the decoder has in_channels={config.in_channels} and addition_embed_type="
            f"{config.addition_embed_type!r}, which is not --mode {mode}: expected in_channels={channels}"
        )
    check_scheduler(pipe.scheduler)
    return unet


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler defines the noise of training.

    Args:
        scheduler: The scheduler of a checkpoint.

    Raises:
        InputError: It does not, or it learns variances in a form that Kandinsky 2.2 does not have.
    """
    if not isinstance(scheduler, Scheduler):
        raise InputError(f"the checkpoint's {type(scheduler).__name__} cannot be trained with: expected DDPMScheduler")
    if scheduler.config.get("variance_type") == "learned":
        raise InputError("variance_type='learned' of the scheduler is not supported: expected 'learned_range' or fixed")


class Encoders:
    """The frozen networks that turn pictures and texts into what prior and decoder are trained on.

    Args:
        image_encoder: CLIP vision tower.
        image_processor: CLIP image processor.
        movq: MoVQ; None for the prior's training.
        text_encoder: CLIP text tower; None if no text is encoded.
        tokenizer: CLIP tokenizer; None if no text is encoded.
        device: Device that they are moved to.

    Attributes:
        movq_digest: Fingerprint of MoVQ's weights; None without it.
        image_digest: Fingerprint of the vision tower's weights.
        text_digest: Fingerprint of the text tower's weights and the vocabulary; None without them.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        image_processor: Any,
        movq: VQModel | None,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        device: torch.device,
    ) -> None:
        self.image_encoder: Any = image_encoder.to(device)
        self.image_processor = image_processor
        self.movq = None if movq is None else movq.to(device)
        self.text_encoder: Any = None if text_encoder is None else text_encoder.to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.movq_digest = None if movq is None else weights_digest({"movq": movq})
        settings = json.dumps(_plain(image_processor), sort_keys=True, default=str)
        weights = weights_digest({"image_encoder": image_encoder})
        self.image_digest = hashlib.sha256(f"{weights} {settings}".encode()).hexdigest()
        self.text_digest = None
        if text_encoder is not None:
            self.text_digest = text_digest(text_encoder, tokenizer)

    @classmethod
    def load(
        cls,
        options: TrainingOptions,
        mode: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        latents: bool,
        texts: bool,
    ) -> Encoders:
        """Load the encoders of a checkpoint.

        Args:
            options: Options of the training.
            mode: Kind of decoder.
            device: Device that they are moved to.
            dtype: Type of the towers; MoVQ is float32.
            latents: Whether MoVQ is loaded.
            texts: Whether the text tower is loaded.

        Returns:
            The encoders.

        Raises:
            CheckpointError: Files are missing or damaged.
        """
        names = ["image_encoder", "image_processor", *(("text_encoder", "tokenizer") if texts else ())]
        towers = load_prior(options, dtype, *names)
        movq = load_decoder(options, mode, torch.float32, movq=True).movq if latents else None
        return cls(
            loaded(towers.components["image_encoder"]),
            towers.image_processor,
            movq,
            loaded(towers.components["text_encoder"]) if texts else None,
            towers.tokenizer if texts else None,
            device,
        )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Return latents (batch, 4, h, w), float32, on the CPU.

        Args:
            pixels: Pictures (batch, 3, H, W) in [-1, 1].
        """
        assert self.movq is not None
        return self.movq.encode(pixels.to(self.device))[0].float().cpu()

    @torch.no_grad()
    def image_embeds(self, pictures: Sequence[Image]) -> Tensor:
        """Return image embeddings (batch, D), float32, on the CPU.

        Args:
            pictures: RGB images.
        """
        pixels = torch.as_tensor(self.image_processor(list(pictures), return_tensors="pt").pixel_values)
        return self._embed(pixels)

    def zero_embed(self) -> Tensor:
        """Return the embedding (1, D) of the all-zero image, which stands for "no condition"."""
        side = self.image_encoder.config.image_size
        return self._embed(torch.zeros(1, 3, side, side))

    @torch.no_grad()
    def _embed(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, self.image_encoder.dtype)
        embeds: Tensor = run_tower(self.image_encoder, pixels).image_embeds
        return embeds.float().cpu()

    @torch.no_grad()
    def text(self, text: str) -> dict[str, Tensor]:
        """Return the encoding of a text, float32, on the CPU: "embeds" (D,) and "hidden" (tokens, width).

        Only tokens up to the last one of the text are returned: the prior attends to no padding.

        Args:
            text: The text. Tokens beyond the context length are cut off, with a warning.
        """
        tokens = prompts.tokenize(self.tokenizer, [text])
        encoded = run_tower(self.text_encoder, tokens.ids.to(self.device))
        used = int(tokens.mask[0].nonzero().max()) + 1
        hidden = encoded.last_hidden_state[0, :used]
        return {"embeds": encoded.text_embeds[0].float().cpu(), "hidden": hidden.float().cpu()}


def text_digest(text_encoder: nn.Module, tokenizer: Any) -> str:
    """Return a fingerprint of a text tower's weights and the vocabulary.

    Args:
        text_encoder: CLIP text tower.
        tokenizer: CLIP tokenizer.
    """
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    weights = weights_digest({"text_encoder": text_encoder})
    return hashlib.sha256(f"{weights} {vocabulary}".encode()).hexdigest()


def _plain(processor: Any) -> Any:
    settings = processor.to_dict() if hasattr(processor, "to_dict") else vars(processor)
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def freeze(network: nn.Module) -> None:
    """Exclude all parameters of a network from training.

    Args:
        network: The network.
    """
    network.requires_grad_(False)


def trainable_entirely(network: nn.Module) -> None:
    """Include all parameters of a network in training, except the normalisation of the prior's embeddings.

    Args:
        network: The network.
    """
    network.requires_grad_(True)
    if isinstance(network, PriorTransformer):
        network.clip_mean.requires_grad_(False)
        network.clip_std.requires_grad_(False)
