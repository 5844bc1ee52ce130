"""What is compared: stages of text to image, each the same work done by ours and by the reference.

A stage loads what it needs in its constructor and does its work in `call(number)`. The number changes the prompt or
the timestep, so that nothing kept from an earlier call is of use; call 0 gives the result that is compared. Inputs are
drawn in float32 and converted, so they are the same for both libraries and all types.
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
    """What a worker is told, once.

    `low_memory`, `quality` (a preset), `caching` (every so many steps) and `quantize` are modes of ours. `compiled`
    compiles the networks of either library.
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
        """Whether this worker is ours."""
        return self.library == OURS


@dataclass
class Stage:
    """A stage at work. `pause` collects seconds of a call that do not count, `peaks` memory before each of them."""

    setting: Setting
    pause: float = 0.0
    peaks: list[float] = field(default_factory=list)
    alone: ClassVar[bool] = False  # a fresh process for each call, one at a time: for memory, or because loading counts
    libraries: ClassVar[tuple[str, ...]] = (THEIRS, OURS)
    rounds: ClassVar[int] = 3  # by default
    noisy: ClassVar[bool] = False  # draws random numbers in the working type, so types cannot be compared

    def __post_init__(self) -> None:
        import torch

        self.torch = torch
        self.library = importlib.import_module(self.setting.library)
        self.dtype = getattr(torch, self.setting.dtype)
        self.load()

    def load(self) -> None:
        """Make ready."""

    def call(self, number: int) -> Any:
        """Do the work; a tensor, or some of them."""
        raise NotImplementedError

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """What a call computes, told by `count`; None where that is the sum of other stages."""
        return count(lambda: self.call(-1))

    # What stages are made of

    def pipeline(self, name: str, part: str, **options: Any) -> Any:
        """A pipeline of the stage's library, from one of the folders."""
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
        """Quantize and compile, if that is asked for."""
        if self.setting.quantize is not None and type(network).__name__ != "VQModel":
            from kandinsky22.runtime.quantize import quantize

            quantize(network, self.setting.quantize)
        if not self.setting.compiled:
            return
        if self.setting.ours:
            from kandinsky22.runtime.compile import compile_blocks

            compile_blocks(network, mode="default", dynamic=False, backend="inductor")
        else:
            getattr(network, "decoder", network).compile()  # MoVQ is not called, but decodes

    def prior(self, **options: Any) -> Any:
        """The prior, with the towers that the setting asks for."""
        part = "prior-full" if self.setting.full_towers else "prior"
        return self.pipeline("KandinskyV22PriorPipeline", part, **options)

    def network(self, name: str, subfolder: str) -> Any:
        """One network of the decoder's folder."""
        folder = Path(self.setting.folder) / "decoder"
        kind = getattr(self.library, name)
        network = kind.from_pretrained(folder, subfolder=subfolder, torch_dtype=self.dtype).eval()
        self.adapt(network)
        return network.to(self.setting.device)

    def random(self, *shape: int, seed: int) -> Any:
        """Normal numbers."""
        drawn = self.torch.randn(*shape, generator=self.torch.Generator().manual_seed(seed))
        return drawn.to(device=self.setting.device, dtype=self.dtype)

    def generator(self, seed: int) -> Any:
        """A generator for a pipeline."""
        return self.torch.Generator().manual_seed(seed)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count; the peak of memory so far is noted, and begins anew."""
        if self.setting.device != "cpu":
            self.torch.cuda.synchronize()
        begun = time.perf_counter()
        self.peaks.append(machine.peak_memory())
        yield
        self.pause += time.perf_counter() - begun


def prompt(number: int) -> str:
    """A prompt for each call, all of the same length; those below 0 are for calls that do not count."""
    return f"a red cat, 4k photo, number {500 + number}"


class Load(Stage):
    """Both pipelines from their folders, files being in the system's cache and packages imported.

    What counts is the constructor.
    """

    alone, rounds = True, 2

    def load(self) -> None:
        """Both pipelines, ready to be called."""
        self.pipes = self.prior(), self.pipeline("KandinskyV22Pipeline", "decoder")

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """None."""
        return None


class Text(Stage):
    """A prompt and the empty one through the CLIP text tower."""

    def load(self) -> None:
        """All but the image encoder, which has no part in this."""
        self.pipe = self.prior(image_encoder=None)

    def call(self, number: int) -> Any:
        """The tensors that the prior is given."""
        with self.torch.no_grad():
            if self.setting.ours:
                return list(self.pipe.encode_prompts([prompt(number)], [""], 1, guided=True).values())
            return list(self.pipe._encode_prompt(prompt(number), self.setting.device, 1, True, None))


class Prior(Stage):
    """A call of the prior pipeline, guided; both towers have one layer here, so the prior itself counts."""

    rounds, noisy = 2, True

    def load(self) -> None:
        """The prior with thin towers."""
        self.pipe = self.pipeline("KandinskyV22PriorPipeline", "prior")

    def call(self, number: int, steps: int | None = None) -> Any:
        """An image embedding."""
        steps = self.setting.prior_steps if steps is None else steps
        options = {"num_inference_steps": steps, "generator": self.generator(number + 1)}
        return self.pipe(prompt(number), return_dict=False, **options)[0]

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """Counted for two and three steps; each further one adds the same. What is done once was done before."""
        self.call(-1, 2)
        few, more = (count(lambda n=n: self.call(-n, n)) for n in (2, 3))
        return {kind: few[kind] + (self.setting.prior_steps - 2) * (more[kind] - few[kind]) for kind in few}


class Step(Stage):
    """The UNet in one guided step, a batch of two. What ours computes once a generation is done before."""

    def load(self) -> None:
        """The UNet and its inputs."""
        self.unet = self.network("UNet2DConditionModel", "unet")
        side = self.setting.size // 8
        self.sample = self.random(1, 4, side, side, seed=0).repeat(2, 1, 1, 1)
        self.embeds = self.random(2, self.unet.config.encoder_hid_dim, seed=1)
        if self.setting.ours:
            with self.torch.no_grad():
                self.condition = self.unet.encode_condition(self.embeds)

    def call(self, number: int) -> Any:
        """Predicted noise and variance."""
        timestep = 500 - number
        with self.torch.no_grad():
            if self.setting.ours:
                return self.unet.denoise(self.sample, timestep, self.condition)
            added = {"image_embeds": self.embeds}
            return self.unet(
                self.sample, timestep, encoder_hidden_states=None, added_cond_kwargs=added, return_dict=False
            )[0]


class Decode(Stage):
    """Latents to a picture by MoVQ."""

    def load(self) -> None:
        """MoVQ alone."""
        self.movq = self.network("VQModel", "movq")

    def call(self, number: int) -> Any:
        """A picture, about [-1, 1]."""
        side = self.setting.size // 8
        with self.torch.no_grad():
            return self.movq.decode(self.random(1, 4, side, side, seed=number + 1), force_not_quantize=True)[0]


class Picture(Stage):
    """Text to image: the first picture that a process makes, so all that is done once counts, but for loading.

    The prior pipeline is let go before the decoder is loaded: in float32 both would not fit into the memory of many
    machines. Both peaks are noted.
    """

    alone, rounds, noisy = True, 1, True

    def load(self) -> None:
        """The prior."""
        self.first = self.prior()

    def call(self, number: int) -> Any:
        """A picture in [0, 1]."""
        options = self._options(self.first, self.setting.prior_steps)
        embeds, negatives = self.first(prompt(number), generator=self.generator(1), return_dict=False, **options)
        with self.paused():
            del self.first
            gc.collect()
            machine.forget_peak()
            decoder = self.pipeline("KandinskyV22Pipeline", "decoder")
        if self.setting.caching is not None:
            decoder.enable_feature_caching(self.setting.caching)
        size = {"height": self.setting.size, "width": self.setting.size}
        options = {**size, "output_type": "np", **self._options(decoder, self.setting.steps)}
        made = decoder(embeds, negatives, generator=self.generator(2), return_dict=False, **options)
        return self.torch.as_tensor(made[0])

    def _options(self, pipe: Any, steps: int) -> dict[str, Any]:
        if self.setting.quality is None:
            return {"num_inference_steps": steps}
        from kandinsky22.sampling.presets import apply_quality

        return apply_quality(pipe, self.setting.quality)

    def operations(self, count: Callable[[Callable[[], object]], Counts]) -> Counts | None:
        """None: those of the other stages."""
        return None


class LowMemory(Picture):
    """The same in our mode for little memory; the setting says so."""

    libraries = (OURS,)


class Fast(Picture):
    """The same with one of our presets for fewer steps, and feature caching; the setting says which."""

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
