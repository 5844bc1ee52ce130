"""Base of the pipelines of prior and decoder: two stages, whose components and settings are those of the whole."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from torch import Tensor

from kandinsky22.errors import InputError, invalid
from kandinsky22.inputs import prompts, validation
from kandinsky22.models import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.noise import Generators
from kandinsky22.pipelines.base import DiffusionPipeline
from kandinsky22.pipelines.consistency import check_consistency
from kandinsky22.pipelines.decoder_base import (
    DecoderPipeline,
    EmbeddingOptions,
    ImageOptions,
    Images,
    OutputOptions,
    TensorNames,
)
from kandinsky22.pipelines.denoising import Callbacks, SamplingOptions, StepEndCallback
from kandinsky22.pipelines.prior import KandinskyV22PriorPipeline
from kandinsky22.runtime.calls import check_idle, running_call
from kandinsky22.sampling.guidance import Guidance, Interval
from kandinsky22.sampling.presets import PRIOR_PREFIX
from kandinsky22.sampling.scheduler_adapter import Sigmas, TimestepOptions, Timesteps

Texts: TypeAlias = str | list[str]

D = TypeVar("D", bound=DecoderPipeline)

P = TypeVar("P", bound=DiffusionPipeline)

C = TypeVar("C", bound="CombinedPipeline[Any]")


@dataclasses.dataclass(frozen=True)
class PriorOptions:
    """The arguments of a combined call that begin with `prior_`. The prior validates them like its own.

    Attributes:
        num_inference_steps: Number of denoising steps.
        timesteps: Descending timesteps instead of a number; None leaves them to the scheduler.
        sigmas: Descending noise levels instead of a number; None leaves them to the scheduler.
        guidance_scale: See `Guidance.scale`.
        guidance_rescale: See `Guidance.rescale`.
        guidance_interval: See `Guidance.interval`.
        guidance_threshold: See `Guidance.threshold`.
        callback_on_step_end: See `Callbacks.on_step_end`.
        callback_on_step_end_tensor_inputs: See `Callbacks.tensor_inputs`.
    """

    num_inference_steps: int
    timesteps: Timesteps
    sigmas: Sigmas
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: Interval
    guidance_threshold: float | None
    callback_on_step_end: StepEndCallback | None
    callback_on_step_end_tensor_inputs: TensorNames

    def sampling(self, generator: Generators, latents: Tensor | None) -> SamplingOptions:
        """Return the options as the prior takes them.

        Args:
            generator: Generators of the call.
            latents: Initial noise of the prior; None draws it.
        """
        return SamplingOptions(
            TimestepOptions(self.num_inference_steps, self.timesteps, self.sigmas),
            Guidance(self.guidance_scale, self.guidance_rescale, self.guidance_interval, self.guidance_threshold),
            Callbacks(self.callback_on_step_end, self.callback_on_step_end_tensor_inputs),
            generator,
            latents,
        )


def _of_decoder(name: str) -> Any:
    """Return a property of a combined pipeline that reads and sets this attribute of its decoder."""
    return property(
        lambda self: getattr(self._decoder_pipe, name), lambda self, value: setattr(self._decoder_pipe, name, value)
    )


def _of_both(name: str) -> Any:
    """Return a property of a combined pipeline that reads this attribute of its decoder, and sets it in both stages."""

    def set_both(self: CombinedPipeline[Any], value: Any) -> None:
        for stage in (self._prior_pipe, self._decoder_pipe):
            setattr(stage, name, value)

    return property(lambda self: getattr(self._decoder_pipe, name), set_both)


class CombinedPipeline(DiffusionPipeline, Generic[D]):
    """A decoder and its prior, whose components carry the prefix `prior_`.

    `prior_pipe` and `decoder_pipe` are pipelines of their own, which hold the components and the settings of calls.
    Whatever is assigned to a component here is one there, and the other way round.

    Args:
        unet: The UNet of the decoder.
        scheduler: Scheduler of the decoder: any object with the scheduler protocol.
        movq: MoVQ of the decoder.
        prior_prior: The prior transformer.
        prior_image_encoder: CLIP vision tower with projection.
        prior_text_encoder: CLIP text tower with projection.
        prior_tokenizer: CLIP tokenizer.
        prior_scheduler: Scheduler of the prior: any object with the scheduler protocol.
        prior_image_processor: CLIP image processor.
    """

    unet: UNet2DConditionModel
    scheduler: Any
    movq: VQModel
    prior_prior: PriorTransformer
    prior_image_encoder: Any
    prior_text_encoder: Any
    prior_tokenizer: Any
    prior_scheduler: Any
    prior_image_processor: Any
    decoder_class: type[D]
    model_cpu_offload_seq: ClassVar[str] = "prior_text_encoder->prior_image_encoder->prior_prior->unet->movq"
    origin = _of_both("origin")
    _hub_options = _of_both("_hub_options")
    _progress_bar_config = _of_both("_progress_bar_config")
    _feature_caching = _of_decoder("_feature_caching")
    _cuda_graphs = _of_decoder("_cuda_graphs")
    _tiny_decoder = _of_decoder("_tiny_decoder")

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        movq: VQModel,
        prior_prior: PriorTransformer,
        prior_image_encoder: Any,
        prior_text_encoder: Any,
        prior_tokenizer: Any,
        prior_scheduler: Any,
        prior_image_processor: Any,
    ) -> None:
        self._prior_pipe = _without_components(KandinskyV22PriorPipeline)
        self._decoder_pipe: D = _without_components(self.decoder_class)
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            movq=movq,
            prior_prior=prior_prior,
            prior_image_encoder=prior_image_encoder,
            prior_text_encoder=prior_text_encoder,
            prior_tokenizer=prior_tokenizer,
            prior_scheduler=prior_scheduler,
            prior_image_processor=prior_image_processor,
        )

    # Stages

    @property
    def prior_pipe(self) -> KandinskyV22PriorPipeline:
        """The prior as a pipeline of its own. Another one that is assigned takes its position, with all components.

        Raises:
            InputError: If it is set to something else, or while a call of this pipeline runs in another thread.
        """
        return self._prior_pipe

    @prior_pipe.setter
    def prior_pipe(self, pipe: KandinskyV22PriorPipeline) -> None:
        self._check_stage("prior_pipe", pipe, KandinskyV22PriorPipeline)
        self._prior_pipe = pipe
        self._adopt(pipe, PRIOR_PREFIX)

    @property
    def decoder_pipe(self) -> D:
        """The decoder as a pipeline of its own. Another one that is assigned takes its position, with all components.

        Raises:
            InputError: If it is set to something else, or while a call of this pipeline runs in another thread.
        """
        return self._decoder_pipe

    @decoder_pipe.setter
    def decoder_pipe(self, pipe: D) -> None:
        self._check_stage("decoder_pipe", pipe, self.decoder_class)
        self._decoder_pipe = pipe
        self._adopt(pipe, "")

    def _check_stage(self, name: str, pipe: Any, kind: type[Any]) -> None:
        if not isinstance(pipe, kind):
            raise invalid(name, pipe, f"a {kind.__name__}")
        check_idle(self, name)

    def _adopt(self, stage: DiffusionPipeline, prefix: str) -> None:
        """Offload the networks of a new stage like the others, and take over its defaults of calls."""
        for name, component in stage._components.items():
            self._offload_like_others(prefix + name, component)
        accepted = self._call_arguments()
        others = {
            name: value
            for name, value in self._generation_defaults.items()
            if name.startswith(PRIOR_PREFIX) != (prefix == PRIOR_PREFIX)
        }
        adopted = {prefix + name: value for name, value in stage._generation_defaults.items()}
        self._generation_defaults = others | {name: value for name, value in adopted.items() if name in accepted}

    # Components and settings, which are those of the stages

    @property
    def _components(self) -> dict[str, Any]:
        """Components by name, in a new dict: those of the stages, and any others that a subclass has registered."""
        prior = {PRIOR_PREFIX + name: component for name, component in self._prior_pipe._components.items()}
        return {**self._decoder_pipe._components, **prior, **self._other_components}

    @_components.setter
    def _components(self, components: dict[str, Any]) -> None:
        self._other_components = components

    def _stage_of(self, name: str) -> tuple[DiffusionPipeline | None, str]:
        """Return the stage that holds a component, and its name there; None for a component of a subclass."""
        in_prior = name.removeprefix(PRIOR_PREFIX)
        if in_prior != name and in_prior in self._prior_pipe._components:
            return self._prior_pipe, in_prior
        return (self._decoder_pipe if name in self._decoder_pipe._components else None), name

    def _store_component(self, name: str, component: Any) -> None:
        stage, name_there = self._stage_of(name)
        if stage is None:
            self._other_components[name] = component
        else:
            setattr(stage, name_there, component)

    def _remove_component(self, name: str) -> None:
        stage, name_there = self._stage_of(name)
        if stage is None:
            del self._other_components[name]
        else:
            delattr(stage, name_there)

    def _set_defaults(self, arguments: Mapping[str, Any]) -> None:
        super()._set_defaults(arguments)
        self._prior_pipe._copy_defaults(self, PRIOR_PREFIX)
        self._decoder_pipe._copy_defaults(self, "")

    def __copy__(self: C) -> C:
        copied = object.__new__(type(self))
        stages = {name: copy.copy(self.__dict__[name]) for name in ("_prior_pipe", "_decoder_pipe")}
        copied.__dict__.update(self.__dict__, **stages, _other_components=dict(self._other_components))
        return copied

    # Calls

    def interrupt(self) -> None:
        """Stop running calls after their current step. They return what the decoder has by then.

        A callback stops its own call. Any other thread stops all running calls of this pipeline.
        """
        self._prior_pipe.interrupt()
        self._decoder_pipe.interrupt()

    def _call(
        self,
        prompt: Texts,
        negative_prompt: Texts | None,
        prior_options: PriorOptions,
        sampling: SamplingOptions,
        output: OutputOptions,
        inputs: ImageOptions,
        prompt_weights: bool,
    ) -> Images:
        """Run both stages as one call."""
        check_consistency(type(self).__name__, self._components)
        prior, decoder = self.prior_pipe, self.decoder_pipe
        with running_call(prior), running_call(decoder):
            pairs = prompts.prompt_pairs(prompt, negative_prompt, prompt_weights)
            return self._run_stages(prior, decoder, pairs, prior_options, sampling, output, inputs)

    @staticmethod
    def _run_stages(
        prior: KandinskyV22PriorPipeline,
        decoder: D,
        pairs: prompts.PromptPairs,
        prior_options: PriorOptions,
        sampling: SamplingOptions,
        output: OutputOptions,
        inputs: ImageOptions,
    ) -> Images:
        """Plan everything first, then run the prior, then the decoder."""
        latents = sampling.latents
        # latents with two dimensions are initial noise of the prior, with four of the decoder
        for_prior = isinstance(latents, Tensor) and latents.ndim == 2
        images_per_prompt = validation.copy_count(output.num_images_per_prompt)
        with _prior_arguments():
            prior_sampling = prior_options.sampling(sampling.generator, latents if for_prior else None)
            prior_plan = prior._plan(pairs, images_per_prompt, prior_sampling)
        sampling = dataclasses.replace(sampling, latents=None if for_prior else latents)
        plan = decoder._plan(len(pairs.prompts), sampling, output, inputs)
        with _prior_arguments():
            embeds = prior._sample_embeddings(prior_plan)
        prior.maybe_free_model_hooks()
        tensors = decoder._condition_tensors(
            EmbeddingOptions(embeds.positive, embeds.negative), 1, guided=sampling.guidance.enabled
        )
        return decoder._generate(plan, tensors)


def _without_components(kind: type[P]) -> P:
    components: dict[str, Any] = dict.fromkeys(kind.component_names())
    return kind(**components)


PRIOR_ARGUMENTS = ("scheduler", *(field.name for field in dataclasses.fields(PriorOptions)))
ARGUMENT_NAME = re.compile(rf"\b(?:{'|'.join(PRIOR_ARGUMENTS)})\b")


@contextlib.contextmanager
def _prior_arguments() -> Iterator[None]:
    """Name arguments in errors as the combined call does: with the prefix `prior_`."""
    try:
        yield
    except InputError as error:
        message = str(error)
        subject = re.match(r"[^=:]*(?==|: )", message)  # what is wrong, in front of its value and of what is expected
        if subject is None or not ARGUMENT_NAME.search(subject[0]):
            raise
        with_prefix = ARGUMENT_NAME.sub(lambda name: PRIOR_PREFIX + name[0], subject[0])
        raise InputError(with_prefix + message[subject.end() :]) from error
