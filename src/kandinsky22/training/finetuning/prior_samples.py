"""Image embeddings that the prior samples for texts, cached."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky22.checkpoints.fingerprint import weights_digest
from kandinsky22.runtime.lazy_component import loaded
from kandinsky22.training.finetuning.networks import load_prior, text_digest
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.training_base import COMPONENTS, TrainingBase

EMBEDS_PER_CAPTION = 4  # samples per caption; with 16, benchmarks.finetuning_success gives the same style


@dataclass(frozen=True)
class Sample:
    """One sample that the model draws.

    Attributes:
        prompt: Its prompt.
        number: Number of the sample among those of the prompt.
    """

    prompt: str
    number: int

    def generator(self, seed: int) -> torch.Generator:
        """Return a new generator of the sample's noise.

        Args:
            seed: Seed of the training.
        """
        digest = hashlib.sha256(f"{seed} {self.number} {self.prompt}".encode(errors="surrogatepass")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class PriorSampling:
    """Image embeddings that the prior samples, cached, shared among the processes.

    Args:
        training: The training.
    """

    def __init__(self, training: TrainingBase) -> None:
        self.training = training

    def _prior(self) -> tuple[Any, dict[str, Any]]:
        """Return the prior's pipeline, and what its embeddings depend on."""
        pipe = load_prior(self.training.options, self.training.low_dtype, *COMPONENTS).to(self.training.device)
        pipe.set_progress_bar_config(disable=True)
        digest = weights_digest({"prior": loaded(pipe.components["prior"])})
        text = text_digest(loaded(pipe.components["text_encoder"]), pipe.tokenizer)
        defaults = {name: repr(value) for name, value in pipe.generation_defaults.items()}
        scheduler = {name: repr(value) for name, value in pipe.scheduler.config.items()}
        key = {
            "prior": digest,
            "text_encoder": text,
            "defaults": defaults,
            "scheduler": scheduler,
            "seed": self.training.options.seed,
        }
        return pipe, {**key, "dtype": str(self.training.low_dtype)}

    def _missing(
        self, samples: Sequence[Sample], paths: Mapping[Sample, Path], kind: str, batch_size: int
    ) -> Iterator[list[Sample]]:
        """Yield this process's batches of samples that are not cached."""
        processes, cache = self.training.accelerator, self.training.cache
        own = list(samples)[processes.process_index :: processes.num_processes]
        missing = [sample for sample in own if cache.read(paths[sample]) is None]
        if missing:
            self.training.report(f"draws {len(missing)} {kind}")
        for first in range(0, len(missing), batch_size):
            yield missing[first : first + batch_size]

    def _embeds(self, pipe: Any, samples: Sequence[Sample]) -> Tensor:
        generators = [sample.generator(self.training.options.seed) for sample in samples]
        prompts = [sample.prompt for sample in samples]
        embeds: Tensor = pipe(prompts, generator=generators, **pipe.generation_defaults).image_embeds
        return embeds.float().cpu()

    def embeddings(self, samples: Sequence[Sample]) -> list[Entry]:
        """Return entries of image embeddings that the prior generates.

        Args:
            samples: The samples.

        Raises:
            CheckpointError: Files are missing or damaged, or the cache cannot be written.
        """
        training = self.training
        pipe, key = self._prior()
        paths = self._paths(samples, {"kind": "generated prior", **key})
        size = EMBEDS_PER_CAPTION * training.options.train_batch_size
        for batch in self._missing(samples, paths, "image embeddings", size):
            for sample, embeds in zip(batch, self._embeds(pipe, batch), strict=True):
                training.cache.write(paths[sample], {"embeds": embeds[None]})
        del pipe
        training.free()
        training.accelerator.wait_for_everyone()
        return [Entry(sample.prompt, paths[sample], (0, 0), 1, sample.prompt) for sample in samples]

    def _paths(self, samples: Sequence[Sample], key: Mapping[str, Any]) -> dict[Sample, Path]:
        cache = self.training.cache
        return {sample: cache.path({**key, "prompt": sample.prompt, "number": sample.number}) for sample in samples}

    def with_embeddings(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return entries with `EMBEDS_PER_CAPTION` image embeddings each, sampled for their captions.

        Args:
            entries: Pictures, all with captions.

        Raises:
            CheckpointError: Files are missing or damaged, or the cache cannot be written.
        """
        captions = dict.fromkeys(str(entry.caption) for entry in entries)
        sampled = self.embeddings([Sample(text, number) for text in captions for number in range(EMBEDS_PER_CAPTION)])
        paths: dict[str, list[Path]] = {text: [] for text in captions}
        for sample in sampled:
            paths[sample.name].append(sample.path)
        return [dataclasses.replace(entry, sampled=tuple(paths[str(entry.caption)])) for entry in entries]
