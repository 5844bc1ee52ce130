"""Fine-tuning from options to files."""

from __future__ import annotations

import gc
from pathlib import Path

from kandinsky22.adapters.files import write_adapter
from kandinsky22.adapters.updates import Adapter
from kandinsky22.training.finetuning import lora, preparation
from kandinsky22.training.finetuning.data import read_examples
from kandinsky22.training.finetuning.effects import OF_ADAPTERS
from kandinsky22.training.finetuning.networks import decoder_mode
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import TrainingOptions
from kandinsky22.training.finetuning.preparation import Report
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.training_base import FULL, LORA


def finetune(options: TrainingOptions, kind: str, report: Report | None = None) -> list[Path]:
    """Train adapters or whole networks on pictures.

    Args:
        options: Options of the training.
        kind: `LORA` or `FULL`.
        report: Receives lines of text for the person at the terminal; None shows nothing.

    Returns:
        The results: one file of adapters, or a folder per network. Empty in processes other than the first.

    Raises:
        InputError: An option, or the data set, is invalid.
        CheckpointError: A file is missing, damaged or cannot be written.
        MissingDependencyError: A package is not installed.
        KeyboardInterrupt: The person interrupted the training; a checkpoint has been written.
    """
    if kind == FULL:
        options.refuse("where all weights are trained", *OF_ADAPTERS)
    training = Training(options, new_accelerator(options), report)
    examples = read_examples(options)
    stages = ("prior", "decoder") if options.stage == "both" else (options.stage,)
    if "decoder" in stages:
        decoder_mode(options)  # checks the options before the prior is trained
    preparation.require_captions(examples, options)
    training.check_folders(*stages)
    adapters: dict[str, Adapter] = {}
    for name in stages:
        stage = training.prior_stage(examples, kind) if name == "prior" else training.decoder_stage(examples, kind)
        training.run(stage)
        if kind == LORA:
            adapters["unet" if name == "decoder" else "prior"] = lora.trained_adapter(stage.network)
        elif training.is_main:
            training.save_pipeline(name, stage.network)
        del stage
        gc.collect()
    if not training.is_main:
        return []
    if kind == FULL:
        return [training.folder / name for name in stages]
    return [write_adapter(training.folder, adapters)]
