"""`--server URL`: let a running server generate the images of a command, and save them as if they came from here."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.cli.api_client import ApiClient, Event, ServerError
from kandinsky22.cli.run import SHEET, Command
from kandinsky22.cli.settings import FROM_SETTINGS
from kandinsky22.errors import InputError, KandinskyError
from kandinsky22.generation.adapters import distilled_record
from kandinsky22.generation.engine_names import TORCH
from kandinsky22.generation.image_files import contact_sheet, embedded_recipe
from kandinsky22.generation.recipe import InputFile, Recipe
from kandinsky22.generation.request import Request
from kandinsky22.sampling.presets import PRESETS, find_preset

if TYPE_CHECKING:
    from PIL.Image import Image

# Options that a server does not take: it has loaded its networks with settings of its own.
LOCAL_OPTIONS = (
    *("prior", "device", "dtype", "low_memory", "quantize", "cache_every", "compile"),
    *("lora", "tiny_decoder", "subject", "engine"),
)
NO_VALUES = (None, False, "none", ["none"], TORCH)  # "none" leaves out what a recipe has
DIRECT = (
    *("prompt", "negative_prompt", "strength", "keep_pixels", "crop", "extend", "steps", "guidance", "prior_steps"),
    *("prior_guidance", "prompt_weights", "guidance_interval", "prior_guidance_interval", "guidance_rescale"),
    *("guidance_threshold", "width", "height"),
)
SCHEDULER_FIELDS = ("scheduler", "scheduler_settings", "prior_scheduler", "prior_scheduler_settings")
UPLOADED_FORMATS = ("PNG", "JPEG", "WEBP")
PATIENCE = 60.0  # seconds for which a server that has gone is awaited
ENDED = ("done", "failed", "cancelled")


def run_on_server(command: Command) -> Path | None:
    """Let a server generate the images of a command, and save them. An interrupt cancels what is queued or runs.

    Args:
        command: The command.

    Returns:
        Path of the last file; None for standard output.

    Raises:
        InputError: If the API cannot express the request.
        ServerError: If the server cannot be reached, or refuses the request.
        KandinskyError: If the generation fails.
        OSError: If a file cannot be written.
    """
    _check_request(command.request)
    client = ApiClient(command.args.server, command.args.token)
    info = client.info()
    uploads = _upload_inputs(client, command)
    job = _job_request(command, info, uploads)
    results: list[tuple[Image, Recipe]] = []
    path = None
    for first, count in _consecutive(command.request.seeds):
        for image, recipe in _ServerJob(client, command, {**job, "seed": first, "count": count}).images():
            named = _with_local_names(recipe, uploads)
            path = command.saver.save(image, command.names[len(results)], named.texts())
            results.append((image, named))
    if len(results) > 1:
        recipe = dataclasses.replace(results[0][1], seeds=command.request.seeds)
        path = command.saver.save(contact_sheet([image for image, _ in results]), SHEET, recipe.texts())
    return path


def refuse_local_options(args: argparse.Namespace) -> None:
    """End the command with an error if an option has no effect on a server.

    Args:
        args: Parsed command line.
    """
    from_settings = getattr(args, FROM_SETTINGS, ())
    values = {name: getattr(args, name, None) for name in LOCAL_OPTIONS if name not in from_settings}
    if names := [name for name, value in values.items() if value not in NO_VALUES]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        args.fail(f"{options} would have no effect: the server has settings of its own")


def _check_request(request: Request) -> None:
    """Raise an error if the request has parts, also from a recipe, that the API cannot express."""
    if request.lora:  # the server applies the distilled adapter of its own model
        raise InputError("the server applies no adapters; add --lora none to generate without those of the recipe")
    if request.subject is not None or any(part.subject is not None for part in request.parts or ()):
        raise InputError("the server mixes no learned subjects; generate without --server")


# The request


@dataclasses.dataclass(frozen=True)
class Upload:
    """An input image on the server.

    Attributes:
        id: SHA-256 of the uploaded bytes.
        record: Record of the local file.
    """

    id: str
    record: InputFile


def _upload_inputs(client: ApiClient, command: Command) -> dict[InputFile, Upload]:
    """Upload the input images that the request uses."""
    request = command.request
    records = [getattr(request, name) for name in ("image", "mask", "hint")]
    records += [part.image for part in request.parts or ()]
    return {
        record: Upload(client.upload(_upload_content(command, record)), record)
        for record in dict.fromkeys(records)
        if record is not None
    }


def _upload_content(command: Command, record: InputFile) -> bytes:
    """Return the bytes of an input file; other formats than those of the server are encoded as PNG."""
    import PIL.Image

    content = command.inputs.contents[record]
    with PIL.Image.open(io.BytesIO(content)) as image:
        if image.format in UPLOADED_FORMATS:
            return content
    encoded = io.BytesIO()
    command.inputs.images[record].save(encoded, "PNG")
    return encoded.getvalue()


def _job_request(command: Command, info: Mapping[str, Any], uploads: Mapping[InputFile, Upload]) -> dict[str, Any]:
    """Return the job without its seed."""
    request = command.request
    job: dict[str, Any] = {"mode": command.mode.name, "previews": command.preview is not None}
    job |= {name: value for name in DIRECT if (value := getattr(request, name)) is not None}
    if request.extend is not None and request.crop is None:  # it sets the size
        job = {name: value for name, value in job.items() if name not in ("width", "height")}
    for name in ("image", "mask", "hint"):
        if (record := getattr(request, name)) is not None:
            job[name] = {"upload": uploads[record].id}
    if request.parts is not None:
        job["parts"] = [
            {"weight": part.weight, "text": part.text}
            if part.image is None
            else {"weight": part.weight, "upload": uploads[part.image].id}
            for part in request.parts
        ]
    job |= _schedulers(request)
    if not request.texts():  # the prior samples only for texts; recipes record its settings of a preset all the same
        job = {name: value for name, value in job.items() if not name.startswith("prior_")}
        job |= {"quality": command.args.quality} if command.args.quality is not None else {}
    if (quality := _distilled_preset(command)) is not None:
        job["quality"] = quality
        if command.args.quality is not None and command.args.steps is None:
            job.pop("steps")  # its adapter says how many
    if (model := _model(command, info)) is not None:
        job["model"] = model
    return job


def _distilled_preset(command: Command) -> str | None:
    """Return the preset with the distilled adapter if the command, else its recipe, has that adapter; else None."""
    if (quality := command.args.quality) is not None:
        return str(quality) if find_preset(quality).distilled else None
    recipe = command.old_recipe
    has_adapter = recipe is not None and distilled_record(recipe.lora, recipe.model) is not None
    return next(name for name, preset in PRESETS.items() if preset.distilled) if has_adapter else None


def _schedulers(request: Request) -> dict[str, Any]:
    """Return the schedulers with their settings."""
    values = {name: getattr(request, name) for name in SCHEDULER_FIELDS}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items() if value}


def _model(command: Command, info: Mapping[str, Any]) -> str | None:
    """Return the name of the model on the server; None for the server's own choice."""
    name = command.request.model
    if command.args.model is not None:
        return name
    if command.old_recipe is None:
        return None
    kind = {"inpaint": "inpaint", "control": "control"}.get(command.mode.name, "decoder")
    models = [str(model["id"]) for model in info["models"] if model.get("kind") == kind]
    fitting = [id for id in models if id == name or (name == EMBEDDED and id.split("-")[0] == EMBEDDED)]
    if not fitting:
        command.console.warn(f"the server has no model {name}, which generated {command.args.source}")
    return fitting[0] if fitting else None


def _consecutive(seeds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first seed and the length of each run of consecutive seeds: a job has one run."""
    start = 0
    for end in range(1, len(seeds) + 1):
        if end == len(seeds) or seeds[end] != seeds[end - 1] + 1:
            yield seeds[start], end - start
            start = end


def _with_local_names(recipe: Recipe, uploads: Mapping[InputFile, Upload]) -> Recipe:
    """Return a recipe in which inputs are recorded by their local files, so that `--from` finds them."""
    local = {upload.id: upload.record for upload in uploads.values()}
    changes: dict[str, Any] = {
        name: local[record.sha256]
        for name in ("image", "mask", "hint")
        if (record := getattr(recipe, name)) is not None and record.sha256 in local
    }
    if recipe.parts is not None:
        changes["parts"] = tuple(
            part if part.image is None else dataclasses.replace(part, image=local.get(part.image.sha256, part.image))
            for part in recipe.parts
        )
    return dataclasses.replace(recipe, **changes)


# The job


class _ServerJob:
    """A job on the server: its images as they are finished, and its progress in the terminal."""

    def __init__(self, client: ApiClient, command: Command, request: Mapping[str, Any]) -> None:
        self._client, self._command, self._request = client, command, request
        self._bar: Any = None
        self._stage: tuple[object, ...] = ()
        self._last_event = ""

    def images(self) -> Iterator[tuple[Image, Recipe]]:
        """Queue the job, and yield each image with its recipe."""
        job = self._submit()
        id, count = str(job["id"]), 0
        try:
            for event in self._events(id):
                self._show(event)
                # Images arrive in the order of their seeds; those that were missed are in the list of the job.
                entries = [event.data] if event.name == "image" else []
                if event.name in ("state", "end"):
                    entries = sorted(event.data["images"], key=lambda entry: entry["seed"])
                for entry in entries:
                    if entry["seed"] == self._request["seed"] + count:
                        count += 1
                        self._close_bar()
                        yield self._image(entry)
                if event.name == "end":
                    self._check_end(event.data, count)
        except BaseException:
            self._client.cancel(id)
            raise
        finally:
            self._close_bar()

    def _submit(self) -> Mapping[str, Any]:
        key = secrets.token_urlsafe(16)
        try:
            return self._client.submit(self._request, key)
        except ServerError as error:
            if error.status is not None:
                raise
            return self._client.submit(self._request, key)  # the key keeps this from queueing it twice

    def _events(self, id: str) -> Iterator[Event]:
        """Yield events until the job has ended; the connection is opened again where it breaks."""
        silent_since = time.monotonic()
        while True:
            try:
                for event in self._client.events(id, self._last_event):
                    silent_since = time.monotonic()
                    self._last_event = event.id or self._last_event
                    yield event
                    if event.name == "end":
                        return
                job = self._client.job(id)
                if job["state"] in ENDED:
                    yield Event("end", job, "")
                    return
            except ServerError as error:
                if error.status is not None or time.monotonic() - silent_since > PATIENCE:
                    raise
            time.sleep(0.5)

    def _show(self, event: Event) -> None:
        """Show progress and previews in the terminal."""
        command = self._command
        if event.name == "preview" and command.preview is not None:
            image = _decoded_url(str(event.data.get("url", "")))
            if image is not None:
                command.preview.show(image, f"step {event.data.get('step')}")
        if event.name != "progress" or command.preview is not None or command.args.quiet:
            return
        from kandinsky22.pipelines.progress_bars import new_bar

        stage = (event.data["image"], event.data["stage"])
        if stage != self._stage:
            self._close_bar()
            self._stage = stage
            if event.data["stage"] in ("prior", "decoder"):
                self._bar = new_bar(None, int(event.data["steps"]), {})
        if self._bar is not None:
            self._bar.update(int(event.data["step"]) - self._bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ()

    def _check_end(self, job: Mapping[str, Any], count: int) -> None:
        if job["state"] == "cancelled":
            raise KandinskyError("the server has cancelled the job")
        if job["state"] == "failed" or count < int(self._request["count"]):
            error = job.get("error") or {}
            raise KandinskyError(f"the server could not generate the image: {error.get('message', 'it is missing')}")

    def _image(self, entry: Mapping[str, Any]) -> tuple[Image, Recipe]:
        """Return an image of the server with its recipe."""
        import PIL.Image

        content = self._client.file(str(entry["url"]))
        try:
            with PIL.Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                image.load()
                text = embedded_recipe(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise ServerError(f"the server sent a damaged image: {error}") from error
        if text is None:
            raise ServerError("the server sent an image without a recipe")
        command = self._command
        seed = int(entry["seed"])
        command.announce(command.request.seeds.index(seed) + 1)
        if command.preview is not None:
            command.preview.show(image, f"seed {seed}")
            command.preview.finish()
        return image.copy(), Recipe.from_json(text, origin=str(entry["url"]))


def _decoded_url(url: str) -> Image | None:
    """Return the image of a data URL; None if it is damaged: a preview is no reason to stop."""
    import PIL.Image

    try:
        content = base64.b64decode(url.partition("base64,")[2], validate=True)
        image = PIL.Image.open(io.BytesIO(content), formats=["WEBP"])
        image.load()
    except (OSError, ValueError):
        return None
    return image
