"""What the stages of a training share: options, devices, folders, the choice of parameters, results."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kandinsky22
from kandinsky22.adapters.files import write_adapter
from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.models import Model
from kandinsky22.runtime.device import computes_bfloat16
from kandinsky22.training.finetuning import lora
from kandinsky22.training.finetuning.batches import BatchPlan, TensorStore
from kandinsky22.training.finetuning.cache import TensorCache
from kandinsky22.training.finetuning.checkpoints import resumed_checkpoint
from kandinsky22.training.finetuning.networks import (
    load_prior,
    trainable_entirely,
)
from kandinsky22.training.finetuning.options import FROM_PRIOR, TrainingOptions
from kandinsky22.training.finetuning.preparation import Entry, Report
from kandinsky22.training.finetuning.run import Stage, Summary, train_stage

LORA, FULL = "lora", "full"
COMPONENTS = kandinsky22.KandinskyV22PriorPipeline.component_names()


def lines_digest(lines: Iterable[str]) -> str:
    """Return a digest of lines of text, 16 hexadecimal digits.

    Args:
        lines: The lines.
    """
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()[:16]


class TrainingBase:
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
        if self.low_dtype == torch.bfloat16 and self.device.type == "cpu" and not computes_bfloat16():
            self.report("warning: this CPU has no instructions for bfloat16; --mixed-precision no is faster")

    def check_folders(self, *names: str) -> None:
        """Check that the stages can begin or continue in their folders, before any network is loaded.

        Args:
            *names: Names of the stages.

        Raises:
            InputError: A folder has checkpoints and --resume is missing, or it lacks the checkpoint to continue.
        """
        for name in names:
            resumed_checkpoint(self.folder / name, self.options.resume)

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
            self._add_adapters(network)
        else:
            trainable_entirely(network)
        if options.gradient_checkpointing and isinstance(network, Model):
            network.enable_gradient_checkpointing()

    def _add_adapters(self, network: nn.Module) -> None:
        options = self.options
        lora.add_adapters(
            network,
            options.rank,
            options.lora_alpha,
            options.target_modules,
            options.seed,
        )

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
        digest = lines_digest(f"{entry.path.name} {entry.caption}" for entry in entries)
        options, layers = self.options, dict[str, Any]()
        if kind == LORA:
            alpha = float(options.rank) if options.lora_alpha is None else options.lora_alpha
            layers = {"--rank": options.rank, "--lora-alpha": alpha, "--target-modules": list(options.target_modules)}
        weights = weights_digest({"network": network})[:16]
        result = {"kind": kind, "weights": weights, "pictures": digest, **layers, **further}
        if any(entry.sampled for entry in entries):
            names = lines_digest(path.name for entry in entries for path in entry.sampled)
            result |= {"--image-embeds": FROM_PRIOR, "samples of the prior": names}
        return result

    def prompt_embeddings(self) -> list[tuple[Tensor, Tensor]]:
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
        self.free()
        return embeddings

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

    def free(self) -> None:
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
