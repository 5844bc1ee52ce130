"""Networks that stay in memory between requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kandinsky22.generation import stages
from kandinsky22.generation.loading import Networks, load_networks, prepare_networks, set_scheduler
from kandinsky22.generation.modes import Mode
from kandinsky22.generation.recipe import InputFile, Recipe
from kandinsky22.generation.request import Request
from kandinsky22.generation.sizes import check_aspect_ratios, result_size

if TYPE_CHECKING:
    from PIL.Image import Image

# Settings that require other networks, or networks in another state.
_NETWORK_SETTINGS = (
    *("model_location", "prior_location", "device", "dtype"),
    *("quantize", "cache_every", "lora", "tiny_decoder", "engine"),
)

# Settings that differ between requests of one batch, besides seeds.
_OWN_SETTINGS = ("prompt", "negative_prompt", "image", "mask", "hint", "parts")


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that is ready to run: all settings resolved, all inputs checked.

    Attributes:
        mode: Mode of the request.
        request: Settings with the model's defaults filled in.
        inputs: The opened input images by record.
        networks: Pipelines with the request's schedulers. Their networks are those of the session.
        images: Images that the decoder receives.
        recipe: Recipe without seeds and, if the request does not set it, without the size.
    """

    mode: Mode
    request: Request
    inputs: Mapping[InputFile, Any]
    networks: Networks
    images: stages.DecoderImages
    recipe: Recipe

    def generate(self, seed: int, on_step: stages.OnStep | None = None) -> GeneratedImage:
        """Return the image of a seed. It equals that of the command with the same settings.

        Args:
            seed: Seed of the noise.
            on_step: Called after each step of both stages; None calls nothing.

        Raises:
            NanError: If the result contains NaN.
        """
        image = stages.generate_image(self.networks, self.request, self.inputs, self.images, seed, on_step)
        return GeneratedImage(image, stages.sized_recipe(self.recipe, (seed,), image, self.request))


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """An image with its recipe.

    Attributes:
        image: The image.
        recipe: Settings that generate the image again.
    """

    image: Image
    recipe: Recipe


class Session:
    """Networks of one model, which are loaded once and then serve any number of requests of one kind of decoder.

    Args:
        mode: Mode of the first request.
        request: First request, whose model, device, dtype and quantization are those of the session.
        low_memory: Whether each network is in memory only while it runs.
        compile: Whether the networks' blocks are compiled on first use.

    Raises:
        InputError: If a setting of the model is invalid or not available.
        CheckpointError: If a file of the checkpoint is missing or damaged.
    """

    def __init__(self, mode: Mode, request: Request, *, low_memory: bool = False, compile: bool = False) -> None:
        unscheduled = dataclasses.replace(
            request,
            scheduler=None,
            scheduler_settings=None,
            prior_scheduler=None,
            prior_scheduler_settings=None,
        )
        self._key = session_key(mode, request)
        self._networks = load_networks(
            unscheduled, prior_class=mode.prior_class(request), decoder_class=mode.decoder_class(request)
        )
        prepare_networks(self._networks, request, low_memory=low_memory, compile=compile)
        self._progress_bar_options: dict[str, Any] = {}

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set the options of the progress bars of all jobs that are prepared from now on.

        Args:
            **options: Options of tqdm, such as disable.
        """
        self._progress_bar_options = options

    @property
    def decoder(self) -> Any:
        """Decoder pipeline that the session was loaded with. The pipelines of jobs share its networks."""
        return self._networks.decoder

    def hide_progress_bars(self) -> None:
        """Show no progress bars for jobs that are prepared later."""
        for pipe in (self._networks.decoder, self._networks.prior, self._networks.combined):
            pipe.set_progress_bar_config(disable=True)

    def serves(self, mode: Mode, request: Request) -> bool:
        """Return whether the networks of this session are those that a request needs.

        Args:
            mode: Mode of the request.
            request: The request.
        """
        return session_key(mode, request) == self._key

    def prepare(self, mode: Mode, request: Request, inputs: Mapping[InputFile, Any], *, like: Job | None = None) -> Job:
        """Return a request that is ready to run. No network runs yet.

        Args:
            mode: Mode of the request.
            request: A request that this session serves.
            inputs: The opened input images by record.
            like: A job of this session whose request has the same `batch_key`. It saves most of the work: its
                pipelines, model defaults and fingerprint are those of the new job. None prepares them.

        Raises:
            InputError: If a setting or an input image is invalid.
        """
        base_images = {
            name: inputs[record] for name in mode.base_images if (record := getattr(request, name)) is not None
        }
        check_aspect_ratios(base_images)
        networks = self._pipelines(mode, request) if like is None else like.networks
        if base_images:
            width, height = result_size(request, networks.decoder, next(iter(base_images.values())).size)
            request = dataclasses.replace(request, width=width, height=height)
        if like is None:
            request = stages.with_model_defaults(request, networks)
            recipe = stages.build_recipe(mode.name, request, networks)
        else:
            own: dict[str, Any] = {name: getattr(request, name) for name in (*_OWN_SETTINGS, "width", "height")}
            request = dataclasses.replace(like.request, seeds=request.seeds, **own)
            recipe = dataclasses.replace(
                like.recipe, **(own | {"width": own["width"] or 0, "height": own["height"] or 0})
            )
        images = stages.prepare_images(networks.decoder, request, inputs)
        return Job(mode, request, inputs, networks, images, recipe)

    def _pipelines(self, mode: Mode, request: Request) -> Networks:
        """Return pipelines of the mode's classes around the session's networks, with schedulers of their own."""
        import kandinsky22

        decoder: Any = getattr(kandinsky22, mode.decoder_class(request)).from_pipe(self._networks.decoder)
        prior: Any = getattr(kandinsky22, mode.prior_class(request)).from_pipe(self._networks.combined)
        for pipe, name, settings in (
            (decoder, request.scheduler, request.scheduler_settings),
            (prior, request.prior_scheduler, request.prior_scheduler_settings),
        ):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            set_scheduler(pipe, name, settings)
            pipe.set_progress_bar_config(**self._progress_bar_options)
        return dataclasses.replace(self._networks, prior=prior, decoder=decoder)


def session_key(mode: Mode, request: Request) -> tuple[object, ...]:
    """Return the settings that decide which session serves a request. Requests with equal keys share their networks.

    Args:
        mode: Mode of the request.
        request: The request.
    """
    import kandinsky22

    # Classes with the same kind of weights share a folder of the embedded model.
    kind = getattr(kandinsky22, mode.decoder_class(request)).embedded_subfolder
    return (kind, *(getattr(request, name) for name in _NETWORK_SETTINGS))
