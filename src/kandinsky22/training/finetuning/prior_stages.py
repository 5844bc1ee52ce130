"""Stages that train a prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from kandinsky22.schedulers import Scheduler
from kandinsky22.training.finetuning import preparation, samples
from kandinsky22.training.finetuning.batches import split_held_out
from kandinsky22.training.finetuning.data import Example
from kandinsky22.training.finetuning.losses import LossWeights
from kandinsky22.training.finetuning.networks import (
    Encoders,
    check_scheduler,
    load_prior,
)
from kandinsky22.training.finetuning.objectives import EMPTY_TEXT, PriorObjective
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.run import Stage, Stream
from kandinsky22.training.finetuning.training_base import TrainingBase


@dataclass(frozen=True)
class PriorData:
    """What a prior is trained on.

    Attributes:
        entries: Image embeddings to train on.
        held_out: Image embeddings to validate with.
        texts: Cache files of the captions, the empty text and the validation prompts.
        zero_embed: Embedding (1, D) of the all-zero image.
    """

    entries: list[Entry]
    held_out: list[Entry]
    texts: Mapping[str, Path]
    zero_embed: Tensor


class PriorStages(TrainingBase):
    """Stages of a prior; `TrainingBase` describes arguments and attributes."""

    def prior_stage(self, examples: Sequence[Example], kind: str) -> Stage:
        """Return the stage that trains a prior.

        Args:
            examples: The pictures, all with captions.
            kind: `LORA` or `FULL`.

        Raises:
            InputError: An option does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        data = self.prior_data(examples)
        pipe = self.load_prior(kind)
        signature = self.signature(kind, pipe.prior, data.entries)
        self.make_trainable(pipe.prior, kind)
        return Stage(
            name="prior",
            network=pipe.prior,
            streams=[Stream(self.prior_objective(data, pipe), self.plan(data.entries))],
            write_results=self.writer(pipe.prior, kind, "prior"),
            signature=signature,
            draw_samples=self.prior_sheet(data, pipe),
        )

    def prior_data(self, examples: Sequence[Example], generate: Callable[[], list[Entry]] | None = None) -> PriorData:
        """Encode pictures and texts for the prior, and unload the encoders.

        Args:
            examples: The pictures, all with captions.
            generate: Function that returns entries of generated embeddings, instead of pictures; None for pictures.

        Returns:
            What the prior is trained on.

        Raises:
            InputError: No picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        options = self.options
        generated = None if generate is None else generate()
        encoders = Encoders.load(options, "plain", self.device, self.low_dtype, latents=False, texts=True)
        job = preparation.PriorJob(encoders, options)
        entries = generated or preparation.prepare(examples, job, self.cache, self.accelerator, self.report)
        captions = [entry.caption or EMPTY_TEXT for entry in entries]
        wanted = [EMPTY_TEXT, *captions, *options.validation_prompt]
        texts = preparation.prepare_texts(wanted, encoders, self.cache, self.accelerator)
        zero_embed = encoders.zero_embed()
        del encoders, job
        self.free()
        training, held_out = split_held_out(entries, options.validation_images, options.seed)
        self.report(f"{len(training)} pictures to train on, {len(held_out)} held out")
        return PriorData(training, held_out, texts, zero_embed)

    def load_prior(self, kind: str) -> Any:
        """Return the prior's pipeline with the prior and its scheduler alone.

        Args:
            kind: `LORA` for a frozen prior, or `FULL`.

        Raises:
            InputError: Its scheduler cannot be trained with.
            CheckpointError: Files are missing or damaged.
        """
        pipe = load_prior(self.options, self._dtype(kind), "prior", "scheduler")
        check_scheduler(pipe.scheduler)
        return pipe

    def prior_objective(self, data: PriorData, pipe: Any) -> PriorObjective:
        """Return the objective of a prior.

        Args:
            data: What it is trained on.
            pipe: Result of `load_prior`.
        """
        options = self.options
        return PriorObjective(
            data.entries,
            data.held_out,
            self.store,
            data.texts,
            pipe.scheduler,
            (pipe.prior.clip_mean, pipe.prior.clip_std),
            weights=LossWeights(options.snr_gamma),
            caption_dropout=options.caption_dropout,
            seed=options.seed,
            device=self.device,
        )

    def prior_sheet(
        self,
        data: PriorData,
        pipe: Any,
        *,
        scheduler: Scheduler | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Callable[[], Image] | None:
        """Return the function that draws a sheet of validation prompts with the prior in training; None without them.

        Args:
            data: What the prior is trained on.
            pipe: Result of `load_prior`.
            scheduler: Scheduler of the prior; None uses that of the checkpoint.
            steps: Number of steps of the prior; None uses the checkpoint's default.
            guidance: Guidance scale of the prior; None uses the checkpoint's default.
        """
        options, defaults = self.options, pipe.generation_defaults
        if not options.validation_prompt:
            return None
        drawing = samples.DecoderSamples(options, "plain", None, self.device)

        def draw() -> Image:
            embeds = samples.sample_prior(
                pipe.prior,
                pipe.scheduler if scheduler is None else scheduler,
                [self.store[data.texts[prompt]] for prompt in options.validation_prompt],
                self.store[data.texts[EMPTY_TEXT]],
                steps=int(defaults.get("num_inference_steps", 25)) if steps is None else steps,
                guidance=float(defaults.get("guidance_scale", 4.0)) if guidance is None else guidance,
                seed=options.seed,
            )
            side = options.resolution or drawing.pipe().default_size
            return samples.prompts_sheet(drawing, [(row[None], data.zero_embed) for row in embeds], (side, side))

        return draw
