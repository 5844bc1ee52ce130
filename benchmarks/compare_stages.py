"""Stages of text to image, each with the same work in kandinsky22 and in the reference.

The constructor of a stage loads what it needs, and `call(number)` does its work. The number changes the prompt or the
timestep, thus nothing that is cached from an earlier call helps; call 0 gives the result that is compared. Inputs are
generated in float32 and converted, thus they are the same for both libraries and all dtypes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import machine

OURS, THEIRS = "kandinsky22", "diffusers"
Counts = dict[str, int]


@dataclass(frozen=True)
class Setting:
    """Settings of a worker.

    Attributes:
        library: OURS or THEIRS.
        stage: Name of the stage, a key of STAGES.
        folder: Folder of the weights.
        dtype: Name of a dtype of torch.
        device: "cpu" or "cuda".
        threads: Number of threads of torch.
        size: Side of the image in pixels.
        prior_steps: Number of steps of the prior.
        steps: Number of steps of the decoder in complete images.
        full_towers: Whether the CLIP towers have all their layers.
        low_memory: Whether to call `enable_low_memory`; ours only.
        quality: Name of a preset, or None; ours only.
        caching: Interval of feature caching in steps, or None; ours only.
        quantize: Kind of quantized weights, or None; ours only.
        compiled: Whether the networks are compiled.
    """

    library: str
    stage: str
    folder: str
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    size: int = 512
    prior_steps: int = 25
    steps: int = 4
    full_towers: bool = False
    low_memory: bool = False
    quality: str | None = None
    caching: int | None = None
    quantize: str | None = None
    compiled: bool = False

    @property
    def ours(self) -> bool:
        """Whether the library is kandinsky22."""
        return self.library == OURS


@dataclass
class Stage:
    """Base class of stages.

    Attributes:
        setting: Settings of the worker.
        pause: Seconds of the current call that do not count.
        peaks: Peak memory in GiB before each pause.
        alone: Whether each call takes a fresh process, without another one at the same time.
        libraries: Libraries that have the stage.
        rounds: Default number of calls.
        noisy: Whether random numbers are generated in the working dtype, thus results of different dtypes cannot be
            compared.
    """

    setting: Setting
    pause: float = 0.0
    peaks: list[float] = field(default_factory=list)
    alone: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = (THEIRS, OURS)
    rounds: ClassVar[int] = 3
    noisy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        import torch

        self.torch = torch
        self.library = importlib.import_module(self.setting.library)
        self.dtype = getattr(torch, self.setting.dtype)
        self.load()

    def load(self) -> None:
        """Load everything that the calls need."""

    def call(self, number: int) -> Any:
        """Do the work of the stage.

        Args:
            number: Number of the call, below 0 for calls that do not count.

        Returns:
            A tensor or a list of tensors.
        """
        raise NotImplementedError

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """Return the number of operations of a call, or None if other stages count them.

        Args:
            count: Function that counts the operations of a function.
        """
        return count(lambda: self.call(-1))

    # Parts of stages

    def pipeline(self, name: str, part: str, **options: Any) -> Any:
        """Return a pipeline of the stage's library.

        Args:
            name: Name of the class.
            part: Subfolder of the weights.
            **options: Further arguments of `from_pretrained`.
        """
        pipe = getattr(self.library, name).from_pretrained(
            Path(self.setting.folder) / part, torch_dtype=self.dtype, **options
        )
        pipe.set_progress_bar_config(disable=True)
        for network in (getattr(pipe, name, None) for name in ("prior", "unet", "movq")):
            if network is not None:
                self.adapt(network)
        if self.setting.low_memory:
            pipe.enable_low_memory()
        return pipe if self.setting.device == "cpu" else pipe.to(self.setting.device)

    def adapt(self, network: Any) -> None:
        """Quantize and compile a network if the setting says so.

        Args:
            network: The network, changed in place.
        """
        if self.setting.quantize is not None and type(network).__name__ != "VQModel":
            from kandinsky22.runtime.quantize import quantize

            quantize(network, self.setting.quantize)
        if not self.setting.compiled:
            return
        if self.setting.ours:
            from kandinsky22.runtime.compile import compile_blocks

            compile_blocks(network, mode="default", dynamic=False, backend="inductor")
        else:
            getattr(network, "decoder", network).compile()  # the pipeline calls `decode` of MoVQ, not its forward

    def prior(self, **options: Any) -> Any:
        """Return the prior pipeline with the towers of the setting.

        Args:
            **options: Further arguments of `from_pretrained`.
        """
        part = "prior-full" if self.setting.full_towers else "prior"
        return self.pipeline("KandinskyV22PriorPipeline", part, **options)

    def network(self, name: str, subfolder: str) -> Any:
        """Return a network of the decoder's folder.

        Args:
            name: Name of the class.
            subfolder: Folder of the component.
        """
        folder = Path(self.setting.folder) / "decoder"
        kind = getattr(self.library, name)
        network = kind.from_pretrained(folder, subfolder=subfolder, torch_dtype=self.dtype).eval()
        self.adapt(network)
        return network.to(self.setting.device)

    def random(self, *shape: int, seed: int) -> Any:
        """Return a tensor of normally distributed values.

        Args:
            *shape: Its shape.
            seed: Seed of the values.
        """
        values = self.torch.randn(*shape, generator=self.torch.Generator().manual_seed(seed))
        return values.to(device=self.setting.device, dtype=self.dtype)

    def generator(self, seed: int) -> Any:
        """Return a seeded generator on the CPU.

        Args:
            seed: Its seed.
        """
        return self.torch.Generator().manual_seed(seed)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager whose time does not count; it records the peak memory before it."""
        if self.setting.device != "cpu":
            self.torch.cuda.synchronize()
        start = time.perf_counter()
        self.peaks.append(machine.peak_memory())
        yield
        self.pause += time.perf_counter() - start


def prompt(number: int) -> str:
    """Return the prompt of a call; all prompts have the same length.

    Args:
        number: Number of the call.
    """
    return f"a red cat, 4k photo, number {500 + number}"


class Load(Stage):
    """Both pipelines, from files in the system's cache and with packages imported; the constructor is timed."""

    alone, rounds = True, 2

    def load(self) -> None:
        """Load both pipelines."""
        self.pipes = self.prior(), self.pipeline("KandinskyV22Pipeline", "decoder")

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """Return None.

        Args:
            count: Function that counts the operations of a function.
        """
        return None


class Text(Stage):
    """A prompt and the empty one through the CLIP text tower."""

    def load(self) -> None:
        """Load all components except the image encoder, which is not used."""
        self.pipe = self.prior(image_encoder=None)

    def call(self, number: int) -> Any:
        """Return the inputs of the prior.

        Args:
            number: Number of the call.
        """
        with self.torch.no_grad():
            if self.setting.ours:
                return list(self.pipe.encode_prompts([prompt(number)], [""], 1, guided=True).values())
            return list(self.pipe._encode_prompt(prompt(number), self.setting.device, 1, True, None))


class Prior(Stage):
    """A guided call of the prior pipeline. Both towers have one layer, thus the prior itself dominates."""

    rounds, noisy = 2, True

    def load(self) -> None:
        """Load the prior with towers of one layer."""
        self.pipe = self.pipeline("KandinskyV22PriorPipeline", "prior")

    def call(self, number: int, steps: int | None = None) -> Any:
        """Return an image embedding.

        Args:
            number: Number of the call.
            steps: Number of steps; None takes that of the setting.
        """
        steps = self.setting.prior_steps if steps is None else steps
        options = {"num_inference_steps": steps, "generator": self.generator(number + 1)}
        return self.pipe(prompt(number), return_dict=False, **options)[0]

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """Return the number of operations, extrapolated from two and three steps.

        Args:
            count: Function that counts the operations of a function.
        """
        self.call(-1, 2)  # work that is done once per process does not count
        two, three = (count(lambda n=n: self.call(-n, n)) for n in (2, 3))
        return {kind: two[kind] + (self.setting.prior_steps - 2) * (three[kind] - two[kind]) for kind in two}


class Step(Stage):
    """One guided step of the UNet, a batch of two. Ours encodes the condition before, once per generation."""

    def load(self) -> None:
        """Load the UNet and make its inputs."""
        self.unet = self.network("UNet2DConditionModel", "unet")
        side = self.setting.size // 8
        self.sample = self.random(1, 4, side, side, seed=0).repeat(2, 1, 1, 1)
        self.embeds = self.random(2, self.unet.config.encoder_hid_dim, seed=1)
        if self.setting.ours:
            with self.torch.no_grad():
                self.condition = self.unet.encode_condition(self.embeds)

    def call(self, number: int) -> Any:
        """Return predicted noise and variance.

        Args:
            number: Number of the call.
        """
        timestep = 500 - number
        with self.torch.no_grad():
            if self.setting.ours:
                return self.unet.denoise(self.sample, timestep, self.condition)
            added = {"image_embeds": self.embeds}
            return self.unet(
                self.sample, timestep, encoder_hidden_states=None, added_cond_kwargs=added, return_dict=False
            )[0]


class Decode(Stage):
    """Decoding of latents by MoVQ."""

    def load(self) -> None:
        """Load MoVQ."""
        self.movq = self.network("VQModel", "movq")

    def call(self, number: int) -> Any:
        """Return an image, about [-1, 1].

        Args:
            number: Number of the call.
        """
        side = self.setting.size // 8
        with self.torch.no_grad():
            return self.movq.decode(self.random(1, 4, side, side, seed=number + 1), force_not_quantize=True)[0]


class Picture(Stage):
    """Text to image: the first image of a process, including all work that is done once, except loading.

    The prior pipeline is deleted before the decoder is loaded: in float32, both together exceed the memory of many
    machines. The peak memory of both is recorded.
    """

    alone, rounds, noisy = True, 1, True

    def load(self) -> None:
        """Load the prior."""
        self.prior_pipe = self.prior()

    def call(self, number: int) -> Any:
        """Return an image in [0, 1].

        Args:
            number: Number of the call.
        """
        options = self._options(self.prior_pipe, self.setting.prior_steps)
        embeds, negatives = self.prior_pipe(prompt(number), generator=self.generator(1), return_dict=False, **options)
        with self.paused():
            del self.prior_pipe
            gc.collect()
            machine.forget_peak()
            decoder = self.pipeline("KandinskyV22Pipeline", "decoder")
        if self.setting.caching is not None:
            decoder.enable_feature_caching(self.setting.caching)
        size = {"height": self.setting.size, "width": self.setting.size}
        options = {**size, "output_type": "np", **self._options(decoder, self.setting.steps)}
        images = decoder(embeds, negatives, generator=self.generator(2), return_dict=False, **options)[0]
        return self.torch.as_tensor(images)

    def _options(self, pipe: Any, steps: int) -> dict[str, Any]:
        if self.setting.quality is None:
            return {"num_inference_steps": steps}
        from kandinsky22.sampling.presets import apply_quality

        return apply_quality(pipe, self.setting.quality)

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """Return None: other stages count these operations.

        Args:
            count: Function that counts the operations of a function.
        """
        return None


class LowMemory(Picture):
    """Text to image of ours with `enable_low_memory`."""

    libraries = (OURS,)


class Fast(Picture):
    """Text to image of ours with a preset for fewer steps, and feature caching if the setting has an interval."""

    libraries = (OURS,)


STAGES: dict[str, type[Stage]] = {
    "load": Load,
    "text": Text,
    "prior": Prior,
    "step": Step,
    "decode": Decode,
    "picture": Picture,
    "low-memory": LowMemory,
    "fast": Fast,
}
