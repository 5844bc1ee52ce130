"""Stages of a training: pictures are prepared, encoders unloaded, and a network gets its objective and its samples."""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

import kandinsky22
from kandinsky22.adapters.files import write_adapter
from kandinsky22.checkpoints.atomic_files import read_json
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.checkpoints.hub import CheckpointSource, model_folder
from kandinsky22.errors import InputError, invalid
from kandinsky22.models import Model, UNet2DConditionModel
from kandinsky22.training.finetuning import lora, preparation, samples
from kandinsky22.training.finetuning.batches import BatchPlan, TensorStore, split_held_out
from kandinsky22.training.finetuning.cache import TensorCache
from kandinsky22.training.finetuning.data import Example
from kandinsky22.training.finetuning.frames import buckets
from kandinsky22.training.finetuning.losses import LossWeights
from kandinsky22.training.finetuning.networks import (
    DECODER_CLASSES,
    EMBEDDED_SUBFOLDERS,
    Encoders,
    check_scheduler,
    checked_unet,
    decoder_mode,
    load_decoder,
    load_prior,
    trainable_entirely,
)
from kandinsky22.training.finetuning.objectives import EMPTY_TEXT, DecoderObjective, PriorObjective
from kandinsky22.training.finetuning.options import TrainingOptions
from kandinsky22.training.finetuning.preparation import Entry, Report
from kandinsky22.training.finetuning.run import Stage, Stream, Summary, train_stage

LORA, FULL = "lora", "full"
COMPONENTS = kandinsky22.KandinskyV22PriorPipeline.component_names()


@dataclass(frozen=True)
class DecoderData:
    """What a decoder is trained on.

    Attributes:
        entries: Pictures to train on.
        held_out: Pictures to validate with.
        zero_embed: Embedding (1, D) of the all-zero image.
        side: Side of the square bucket in pixels.
        latent_channels: Channels of the latents.
        prompts: Image embedding and negative embedding per validation prompt.
        image_digest: Fingerprint of the image encoder.
        preserved: Pictures that keep the decoder as it is otherwise.
    """

    entries: list[Entry]
    held_out: list[Entry]
    zero_embed: Tensor
    side: int
    latent_channels: int
    prompts: list[tuple[Tensor, Tensor]]
    image_digest: str
    preserved: list[Entry] = field(default_factory=list)


class Training:
    """One call of the command: options, devices, the folder of results and the cache.

    Args:
        options: Options of the training.
        accelerator: Result of `new_accelerator`.
        report: Receives lines of text for the person at the terminal, from the first process only; None shows nothing.

    Attributes:
        folder: Folder of results and checkpoints.
        cache: The cache of embeddings and latents.
        store: Reader of the cache.
    """

    def __init__(self, options: TrainingOptions, accelerator: Any, report: Report | None) -> None:
        self.options, self.accelerator = options, accelerator
        self._shows_progress = report is not None
        self.is_main = bool(accelerator.is_main_process)
        self.report: Report = report if report is not None and self.is_main else lambda line: None
        self.folder = Path(options.output_dir)
        self.cache = TensorCache(Path(options.cache_dir) if options.cache_dir else self.folder / "cache")
        self.store = TensorStore(self.cache)
        self.device: torch.device = accelerator.device
        self.low_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]

    def run(self, stage: Stage) -> Summary:
        """Train a stage in the folder of its name.

        Args:
            stage: The stage.

        Returns:
            The summary.
        """
        return train_stage(
            stage,
            self.options,
            self.folder / stage.name,
            self.accelerator,
            self.report,
            shows_progress=self._shows_progress,
        )

    def _dtype(self, kind: str) -> torch.dtype:
        """Return the type of the weights: frozen ones have the type that networks compute in."""
        return self.low_dtype if kind == LORA else torch.float32

    def make_trainable(self, network: nn.Module, kind: str) -> None:
        """Choose the parameters that are trained.

        Args:
            network: The network.
            kind: `LORA` or `FULL`.
        """
        options = self.options
        if kind == LORA:
            lora.add_adapters(network, options.rank, options.lora_alpha, options.target_modules, options.seed)
        else:
            trainable_entirely(network)
        if options.gradient_checkpointing and isinstance(network, Model):
            network.enable_gradient_checkpointing()

    def plan(self, entries: Sequence[Entry], stream: int = 0) -> BatchPlan:
        """Return which pictures each step trains on.

        Args:
            entries: The pictures.
            stream: Number that tells apart several plans of one training.
        """
        options = self.options
        count = options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        return BatchPlan([entry.size for entry in entries], count, options.seed, stream)

    def signature(self, kind: str, network: nn.Module, entries: Sequence[Entry], **further: Any) -> dict[str, Any]:
        """Return what a checkpoint must agree with to be continued.

        Args:
            network: The network as it was loaded.
            kind: `LORA`, `FULL` or the method of a subject.
            entries: Pictures to train on.
            **further: Further entries.
        """
        text = "\n".join(f"{entry.path.name} {entry.caption}" for entry in entries)
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
        rank = {"--rank": self.options.rank, "--target-modules": list(self.options.target_modules)}
        weights = weights_digest({"network": network})[:16]
        return {"kind": kind, "weights": weights, "pictures": digest, **(rank if kind == LORA else {}), **further}

    # Decoders

    def decoder_data(
        self, examples: Sequence[Example], mode: str, kind: str, preserved: Sequence[Example] = ()
    ) -> DecoderData:
        """Encode pictures for a decoder, and unload the encoders.

        Args:
            examples: The pictures.
            mode: Kind of decoder.
            kind: `LORA`, `FULL` or the method of a subject.
            preserved: Pictures that keep the decoder as it is otherwise.

        Returns:
            What the decoder is trained on.

        Raises:
            InputError: A size does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        options = self.options
        embeddings = self._prompt_embeddings() if options.validation_prompt and mode == "plain" else []
        encoders = Encoders.load(options, mode, self.device, self.low_dtype, latents=True, texts=False)
        assert encoders.movq is not None
        side, sizes = self.sizes(mode, encoders.movq.downscale_factor, kind)
        job = preparation.DecoderJob(encoders, options, mode, sizes)
        entries = preparation.prepare(examples, job, self.cache, self.accelerator, self.report)
        others = preparation.prepare(preserved, job, self.cache, self.accelerator, self.report) if preserved else []
        channels, digest, zero_embed = (
            encoders.movq.config.latent_channels,
            encoders.image_digest,
            encoders.zero_embed(),
        )
        del encoders, job
        self._free()
        training, held_out = split_held_out(entries, options.validation_images, options.seed)
        self.report(f"{len(training)} pictures to train on, {len(held_out)} held out, {_listed_sizes(entries)}")
        return DecoderData(training, held_out, zero_embed, side, channels, embeddings, digest, others)

    def sizes(self, mode: str, factor: int, kind: str) -> tuple[int, list[tuple[int, int]]]:
        """Return the side of the square bucket, and all buckets.

        Args:
            mode: Kind of decoder.
            factor: Pixels per latent.
            kind: `LORA`, `FULL` or the method of a subject.

        Raises:
            InputError: The size or an option of adapters does not fit the network.
        """
        options = self.options
        source = CheckpointSource(options.model, options.revision, embedded_subfolder=EMBEDDED_SUBFOLDERS[mode])
        config = read_json(model_folder(source, "unet", lambda names: ["config.json"]) / "config.json")
        if kind == LORA:  # without weights, so that a mistake is reported before pictures are encoded
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(config)
            lora.add_adapters(unet, options.rank, options.lora_alpha, options.target_modules, options.seed)
        multiple = factor * 2 ** (len(config["block_out_channels"]) - 1)
        sample_size = config.get("sample_size")
        if options.resolution is None and sample_size is None:
            raise InputError("--resolution is required: the config of the unet has no sample_size")
        side = options.resolution or int(sample_size or 0) * factor
        if side % multiple:
            raise invalid("--resolution", side, f"a multiple of {multiple} for this model")
        return side, buckets(side, multiple, aspects=options.aspect_buckets)

    def _prompt_embeddings(self) -> list[tuple[Tensor, Tensor]]:
        """Return image embedding and negative embedding of each validation prompt."""
        options = self.options
        pipe = load_prior(options, self.low_dtype, *COMPONENTS).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        embeddings = []
        for prompt in options.validation_prompt:
            generator = torch.Generator().manual_seed(options.seed)
            result = pipe(prompt, generator=generator, **pipe.generation_defaults)
            embeddings.append((result.image_embeds.float().cpu(), result.negative_image_embeds.float().cpu()))
        del pipe
        self._free()
        return embeddings

    def decoder_objective(self, data: DecoderData, scheduler: Any, mode: str) -> DecoderObjective:
        """Return the objective of a decoder.

        Args:
            data: What it is trained on.
            scheduler: Its scheduler.
            mode: Kind of decoder.
        """
        options = self.options
        return DecoderObjective(
            data.entries,
            data.held_out,
            self.store,
            scheduler,
            data.zero_embed,
            mode=mode,
            weights=LossWeights(options.snr_gamma, options.vlb_weight),
            condition_dropout=options.condition_dropout,
            seed=options.seed,
            device=self.device,
        )

    def load_unet(self, data: DecoderData, mode: str, kind: str) -> Any:
        """Return the decoder's pipeline without MoVQ, after checking that its UNet fits the pictures.

        Args:
            data: What it is trained on.
            mode: Kind of decoder.
            kind: `LORA` for a frozen UNet, or `FULL`.

        Raises:
            InputError: The UNet is of another kind, or for other embeddings.
        """
        pipe = load_decoder(self.options, mode, self._dtype(kind), movq=False)
        unet = checked_unet(pipe, mode, data.latent_channels)
        width = data.zero_embed.shape[1]
        if unet.config.encoder_hid_dim != width:
            raise InputError(
                f"--prior has image embeddings of {width} elements, and the decoder reads "
                f"{unet.config.encoder_hid_dim}: expected the prior that belongs to --model"
            )
        return pipe

    def decoder_stage(self, examples: Sequence[Example], kind: str) -> Stage:
        """Return the stage that trains a decoder.

        Args:
            examples: The pictures.
            kind: `LORA` or `FULL`.

        Raises:
            InputError: An option does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        mode = decoder_mode(self.options)
        data = self.decoder_data(examples, mode, kind)
        pipe = self.load_unet(data, mode, kind)
        unet = pipe.unet
        signature = self.signature(kind, unet, data.entries, mode=mode)
        self.make_trainable(unet, kind)
        objective = self.decoder_objective(data, pipe.scheduler, mode)
        return Stage(
            name="decoder",
            network=unet,
            streams=[Stream(objective, self.plan(data.entries))],
            write_results=self.writer(unet, kind, "unet"),
            signature=signature,
            draw_samples=self.decoder_sheet(data, objective, unet, mode),
        )

    def decoder_sheet(
        self, data: DecoderData, objective: DecoderObjective, unet: Any, mode: str
    ) -> Callable[[], Image]:
        """Return the function that draws a sheet of samples: of prompts if there are any, else of pictures.

        Args:
            data: What the decoder is trained on.
            objective: Its objective.
            unet: The UNet in training.
            mode: Kind of decoder.
        """
        drawing = samples.DecoderSamples(self.options, mode, unet, self.device)
        if data.prompts:
            return functools.partial(samples.prompts_sheet, drawing, data.prompts, (data.side, data.side))
        return functools.partial(samples.pictures_sheet, drawing, objective, data.held_out or data.entries, self.store)

    # Prior

    def prior_stage(self, examples: Sequence[Example], kind: str) -> Stage:
        """Return the stage that trains a prior.

        Args:
            examples: The pictures, all with captions.
            kind: `LORA` or `FULL`.

        Raises:
            InputError: An option does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        options = self.options
        encoders = Encoders.load(options, "plain", self.device, self.low_dtype, latents=False, texts=True)
        job = preparation.PriorJob(encoders, options)
        entries = preparation.prepare(examples, job, self.cache, self.accelerator, self.report)
        captions = [entry.caption or EMPTY_TEXT for entry in entries]
        wanted = [EMPTY_TEXT, *captions, *options.validation_prompt]
        texts = preparation.prepare_texts(wanted, encoders, self.cache, self.accelerator)
        zero_embed = encoders.zero_embed()
        del encoders, job
        self._free()
        training, held_out = split_held_out(entries, options.validation_images, options.seed)
        self.report(f"{len(training)} pictures to train on, {len(held_out)} held out")
        pipe = load_prior(options, self._dtype(kind), "prior", "scheduler")
        prior = pipe.prior
        check_scheduler(pipe.scheduler)
        signature = self.signature(kind, prior, training)
        self.make_trainable(prior, kind)
        objective = PriorObjective(
            training,
            held_out,
            self.store,
            texts,
            pipe.scheduler,
            (prior.clip_mean, prior.clip_std),
            weights=LossWeights(options.snr_gamma),
            caption_dropout=options.caption_dropout,
            seed=options.seed,
            device=self.device,
        )
        return Stage(
            name="prior",
            network=prior,
            streams=[Stream(objective, self.plan(training))],
            write_results=self.writer(prior, kind, "prior"),
            signature=signature,
            draw_samples=self._prior_sheet(pipe, texts, zero_embed) if options.validation_prompt else None,
        )

    def _prior_sheet(self, pipe: Any, texts: Mapping[str, Path], zero_embed: Tensor) -> Callable[[], Image]:
        """Return the function that draws a sheet of validation prompts with the prior in training."""
        options, defaults = self.options, pipe.generation_defaults
        drawing = samples.DecoderSamples(options, "plain", None, self.device)

        def draw() -> Image:
            embeds = samples.sample_prior(
                pipe.prior,
                pipe.scheduler,
                [self.store[texts[prompt]] for prompt in options.validation_prompt],
                self.store[texts[EMPTY_TEXT]],
                steps=int(defaults.get("num_inference_steps", 25)),
                guidance=float(defaults.get("guidance_scale", 4.0)),
                seed=options.seed,
            )
            side = options.resolution or drawing.pipe().default_size
            return samples.prompts_sheet(drawing, [(row[None], zero_embed) for row in embeds], (side, side))

        return draw

    # Results

    def writer(self, network: nn.Module, kind: str, role: str) -> Callable[[Path, Mapping[str, Tensor]], None]:
        """Return the function that writes the weights of a checkpoint: adapters, or the network.

        Args:
            network: The network.
            kind: `LORA` or `FULL`.
            role: "unet" or "prior".
        """

        def write(folder: Path, values: Mapping[str, Tensor]) -> None:
            if kind == LORA:
                write_adapter(folder, {role: lora.trained_adapter(network, values)})
            else:
                with _values(network, values):
                    network.save_pretrained(folder / role)  # type: ignore[operator]  # a Model

        return write

    def save_pipeline(self, name: str, network: nn.Module) -> None:
        """Write a pipeline with a network that was trained entirely.

        Args:
            name: "prior" or "decoder".
            network: The network.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        if name == "prior":
            others = load_prior(self.options, torch.float32, *(each for each in COMPONENTS if each != "prior"))
            pipe: Any = kandinsky22.KandinskyV22PriorPipeline.from_pipe(others, prior=network)
        else:
            mode = decoder_mode(self.options)
            movq = load_decoder(self.options, mode, torch.float32, movq=True)
            pipe = getattr(kandinsky22, DECODER_CLASSES[mode]).from_pipe(movq, unet=network)
        pipe.to("cpu")
        pipe.save_pretrained(self.folder / name)

    def _free(self) -> None:
        """Return the memory of unloaded networks to the device."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _values:
    """Context in which a network's parameters have other values."""

    def __init__(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._parameters, self._values = dict(network.named_parameters()), values
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, value in self._values.items():
            parameter = self._parameters[name]
            if parameter.data_ptr() != value.data_ptr():
                self._kept[name] = parameter.detach().clone()
                parameter.copy_(value)

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for name, value in self._kept.items():
            self._parameters[name].copy_(value)


def _listed_sizes(entries: Sequence[Entry]) -> str:
    sizes = sorted({entry.size for entry in entries})
    return ", ".join(f"{width}x{height}" for width, height in sizes)
