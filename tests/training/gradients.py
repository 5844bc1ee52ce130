"""Gradients of one step in one or several processes: `python -m tests.training.gradients OPTIONS.json OUT KIND`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from kandinsky22.training.finetuning.data import read_examples
from kandinsky22.training.finetuning.distill import Distiller
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import DistillOptions, TrainingOptions
from kandinsky22.training.finetuning.run import TrainingRun
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.training_base import FULL


def main(options_file: str, out: str, kind: str) -> None:
    torch.set_num_threads(1)
    values = json.loads(Path(options_file).read_text())
    if kind == "distill":
        distilled = DistillOptions(**values, full=True)
        options: TrainingOptions = distilled
        training = Training(options, new_accelerator(options), None)
        stage = Distiller(training, distilled).stage("decoder")
    else:
        options = TrainingOptions(**values)
        training = Training(options, new_accelerator(options), None)
        stage = training.decoder_stage(read_examples(options), FULL)
    run = TrainingRun(stage, options, training.folder, training.accelerator, print, shows_progress=False)
    run.backward()
    if training.is_main:
        gradients = {name: value.grad for name, value in run.parameters.items() if value.grad is not None}
        save_file({**gradients, "processes": torch.tensor(training.accelerator.num_processes)}, out)
    training.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
