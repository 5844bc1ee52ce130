"""Distillation from options to files: prior and decoder that draw in a few steps without guidance."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from kandinsky22.adapters.files import write_adapter
from kandinsky22.adapters.updates import Adapter
from kandinsky22.training.finetuning import lora, preparation, samples
from kandinsky22.training.finetuning.consistency import ConsistencyObjective, Distillation, WithValues, lcm_scheduler
from kandinsky22.training.finetuning.data import Example, read_examples
from kandinsky22.training.finetuning.generated import Generation, guidance_scales, read_prompts
from kandinsky22.training.finetuning.networks import decoder_mode, freeze
from kandinsky22.training.finetuning.objectives import DenoisingObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import DistillOptions
from kandinsky22.training.finetuning.preparation import Report
from kandinsky22.training.finetuning.prior_samples import Sample
from kandinsky22.training.finetuning.run import Stage, Stream
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.training_base import FULL, LORA

UNGUIDED = 1.0  # guidance scale


def distill(options: DistillOptions, report: Report | None = None) -> list[Path]:
    """Distil the decoder, the prior or both, so that they draw in 2 to 4 unguided steps with `LCMScheduler`.

    Args:
        options: Options of the training.
        report: Receives lines of text for the person at the terminal; None shows nothing.

    Returns:
        The results: one file of adapters, or with `full` a folder per pipeline, whose scheduler is `LCMScheduler`.
        Empty in processes other than the first.

    Raises:
        InputError: An option, or the data set, is invalid.
        CheckpointError: A file is missing, damaged or cannot be written.
        MissingDependencyError: A package is not installed.
        KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
    """
    training = Distiller(Training(options, new_accelerator(options), report), options)
    stages = ("prior", "decoder") if options.stage == "both" else (options.stage,)
    if options.prompts is None:
        preparation.require_captions(training.examples, options)
    if "decoder" in stages:
        decoder_mode(options)  # checks the options before the prior is trained
    training.training.check_folders(*stages)
    adapters: dict[str, Adapter] = {}
    for name in stages:
        stage = training.stage(name)
        training.training.run(stage)
        if not options.full:
            adapters["unet" if name == "decoder" else "prior"] = lora.trained_adapter(stage.network)
        elif training.training.is_main:
            training.save_pipeline(name, stage)
        del stage
        gc.collect()
    folder = training.training.folder
    if not training.training.is_main:
        return []
    return (
        [folder / name for name in stages]
        if options.full
        else [write_adapter(folder, adapters, num_inference_steps=options.num_inference_steps)]
    )


class Distiller:
    """Stages of a distillation.

    Args:
        training: The training.
        options: Its options.

    Attributes:
        examples: Pictures to train on; none with prompts.
        prompted: Samples that the model draws itself; none with pictures.

    Raises:
        InputError: The data set, or the file of prompts, is invalid.
        MissingDependencyError: A package is not installed.
    """

    def __init__(self, training: Training, options: DistillOptions) -> None:
        self.training, self.options = training, options
        self.kind = FULL if options.full else LORA
        self.prompted: list[Sample] = [] if options.prompts is None else read_prompts(options)
        self.examples: list[Example] = read_examples(options) if options.prompts is None else []

    def stage(self, name: str) -> Stage:
        """Return the stage of a network.

        Args:
            name: "prior" or "decoder".

        Raises:
            InputError: An option does not fit the network, or no picture can be read.
            CheckpointError: Files are missing or damaged.
        """
        return self._prior() if name == "prior" else self._decoder()

    def _decoder(self) -> Stage:
        training, mode = self.training, decoder_mode(self.options)
        if self.prompted:
            data = Generation(training, self.options).latents(self.prompted, mode, self.kind)
        else:
            data = training.decoder_data(self.examples, mode, self.kind)

        def load(kind: str) -> Any:
            return training.load_unet(data, mode, kind)

        pipe = load(self.kind)
        task = training.decoder_objective(data, pipe.scheduler, mode)
        drawing = samples.DecoderSamples(
            self.options,
            mode,
            pipe.unet,
            training.device,
            scheduler=lcm_scheduler(pipe.scheduler, self.options.num_ddim_timesteps),
            arguments=self._defaults(),
        )
        sheet = training.decoder_sheet(data, task, pipe.unet, mode, drawing)
        return self._stage("decoder", pipe, "unet", task, lambda: load(LORA).unet, sheet, mode=mode)

    def _prior(self) -> Stage:
        training = self.training
        generate = functools.partial(Generation(training, self.options).embeddings, self.prompted)
        data = training.prior_data(self.examples, generate if self.prompted else None)
        pipe = training.load_prior(self.kind)
        sheet = training.prior_sheet(
            data,
            pipe,
            scheduler=lcm_scheduler(pipe.scheduler, self.options.num_ddim_timesteps),
            steps=self.options.num_inference_steps,
            guidance=UNGUIDED,
        )
        task = training.prior_objective(data, pipe)
        return self._stage("prior", pipe, "prior", task, lambda: training.load_prior(LORA).prior, sheet)

    def _stage(
        self,
        name: str,
        pipe: Any,
        role: str,
        task: DenoisingObjective,
        load_teacher: Callable[[], nn.Module],
        sheet: Callable[[], Any] | None,
        **further: Any,
    ) -> Stage:
        """Return the stage of a network, after making it trainable."""
        training, options = self.training, self.options
        network: nn.Module = getattr(pipe, role)
        settings = Distillation(guidance_scales(options, pipe), options.num_ddim_timesteps, options.huber_c)
        signature = training.signature(
            self.kind,
            network,
            task.entries,
            **{"guidance": list(settings.guidance), "--num-ddim-timesteps": settings.num_ddim_timesteps},
            **{"--huber-c": settings.huber_c},
            **further,
        )
        training.make_trainable(network, self.kind)
        if options.full:
            # as a frozen network it has the type that networks compute in
            teacher: Callable[..., Any] = load_teacher().to(training.device).eval()
            freeze(teacher)  # type: ignore[arg-type]
        else:
            teacher = WithValues(network, functools.partial(lora.values_without_adapters, network))
        objective = ConsistencyObjective(task, network, teacher, settings)
        return Stage(
            name=name,
            network=network,
            streams=[Stream(objective, training.plan(task.entries))],
            write_results=training.writer(network, self.kind, role),
            signature=signature,
            draw_samples=sheet,
        )

    def _defaults(self) -> dict[str, Any]:
        return {"num_inference_steps": self.options.num_inference_steps, "guidance_scale": UNGUIDED}

    def save_pipeline(self, name: str, stage: Stage) -> None:
        """Write the pipeline of a network that was trained entirely, with `LCMScheduler`.

        Args:
            name: "prior" or "decoder".
            stage: Its stage.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        (stream,) = stage.streams
        assert isinstance(stream.objective, ConsistencyObjective)
        scheduler = lcm_scheduler(stream.objective.task.scheduler, self.options.num_ddim_timesteps)
        self.training.save_pipeline(name, stage.network, scheduler=scheduler, defaults=self._defaults())
