"""OpenAI's images API."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from kandinsky22.generation.limits import MAX_SEED
from kandinsky22.sampling.presets import PRESETS
from kandinsky22.serve import pictures
from kandinsky22.serve.failures import ApiError, invalid_request
from kandinsky22.serve.image_store import ImageRow
from kandinsky22.serve.job_store import JobRow
from kandinsky22.serve.output import encoded_image, preview_image
from kandinsky22.serve.routes_native import ERRORS, EVENT_HEADERS, Key
from kandinsky22.serve.schemas import JobRequest, Part
from kandinsky22.serve.services import Server, Services
from kandinsky22.serve.settings import MODES_OF_KIND
from kandinsky22.serve.tokens import signature

router = APIRouter(prefix="/v1", tags=["openai"])

# Programs have the names of OpenAI's models built in: these stand for the server's own.
ALIASES = ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5")
QUALITIES = {
    "low": "draft",
    "medium": "balanced",
    "standard": "balanced",
    "auto": "balanced",
    "high": "best",
    "hd": "best",
    "xhigh": "best",
    "max": "best",
}
MAX_PARTIAL_IMAGES = 3
MAX_IMAGES = 16  # input images of an edit
URL_SECONDS = 3600  # time for which addresses in responses are open without the token


class ImagesRequest(BaseModel):
    """Parameters that all calls share. Those of OpenAI that concern its own service are accepted and ignored."""

    model_config = ConfigDict(extra="ignore")

    model: Annotated[str, Field(max_length=200)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] | None = None
    quality: Annotated[str, Field(max_length=50)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    user: Annotated[str, Field(max_length=500)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    negative_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None


class GenerationRequest(ImagesRequest):
    """Body of `POST /v1/images/generations`. `seed`, `negative_prompt`, `steps` and `guidance` are additions."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"prompt": "a red circle", "n": 1, "size": "auto", "seed": 7}]}
    )

    prompt: Annotated[str, Field(max_length=10_000)]


class EditRequest(ImagesRequest):
    """Fields of `POST /v1/images/edits`, besides the images."""

    prompt: Annotated[str, Field(max_length=10_000)]


@router.get("/models")
def _models(server: Server) -> dict[str, Any]:
    """List the models."""
    return {"object": "list", "data": [_model(model.id) for model in server.settings.models]}


@router.get("/models/{id}", responses=ERRORS)
def _one_model(id: str, server: Server) -> dict[str, Any]:
    """Return a model."""
    if server.settings.model(id) is None:
        raise ApiError(404, "model_not_found", f"there is no model {id!r}", "model")
    return _model(id)


@router.post("/images/generations", responses=ERRORS)
async def _generate(body: GenerationRequest, server: Server, request: Request, key: Key = None) -> Any:
    """Generate images from a prompt. With `stream`, they are sent as events."""
    job = JobRequest(mode="generate", prompt=body.prompt, **_common(server, body, "generate"))
    return await _respond(server, request, body, job, "image_generation", key)


@router.post(
    "/images/edits",
    responses=ERRORS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image", "prompt"],
                        "properties": {
                            "image": {"type": "string", "format": "binary"},
                            "mask": {"type": "string", "format": "binary"},
                            "prompt": {"type": "string"},
                        },
                    }
                }
            },
        }
    },
)
async def _edit(request: Request, server: Server, key: Key = None) -> Any:
    """Repaint an image where the mask is transparent, change it, or mix several images with the prompt."""
    form = await _form(request)
    body = _parsed(EditRequest, form)
    images = await _files(form, "image")
    if not 1 <= len(images) <= MAX_IMAGES:
        raise invalid_request(f"image is invalid: expected 1 to {MAX_IMAGES} files", "image")
    masks = await _files(form, "mask")
    job = await run_in_threadpool(_edit_job, server, body, images, masks[0] if masks else None)
    return await _respond(server, request, body, job, "image_edit", key)


@router.post(
    "/images/variations",
    responses=ERRORS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "properties": {"image": {"type": "string", "format": "binary"}},
                    }
                }
            },
        }
    },
)
async def _vary(request: Request, server: Server, key: Key = None) -> Any:
    """Generate variations of an image."""
    form = await _form(request)
    body = _parsed(ImagesRequest, form)
    images = await _files(form, "image")
    if len(images) != 1:
        raise invalid_request("image is invalid: expected one file", "image")

    def make() -> JobRequest:
        image = pictures.upload(server, images[0])
        values = _common(server, body, "variations")
        return JobRequest(mode="variations", image=image, **values)

    return await _respond(server, request, body, await run_in_threadpool(make), "image_edit", key)


# From requests to jobs


def _edit_job(server: Services, body: EditRequest, images: list[bytes], mask: bytes | None) -> JobRequest:
    if len(images) > 1 and mask is None:
        texts = [Part(text=body.prompt, weight=1 / (len(images) + 1))] if body.prompt.strip() else []
        weight = 1 / (len(images) + len(texts))
        mixed = [Part(upload=pictures.upload(server, image).upload, weight=weight) for image in images]
        values = _common(server, body, "mix")
        return JobRequest(mode="mix", parts=[*texts, *mixed], **values)
    if len(images) > 1:
        raise invalid_request("mask is invalid: expected none, because several images are mixed", "mask")
    picture = pictures.upload(server, images[0])
    repainted = pictures.transparent_mask(server, images[0] if mask is None else mask)
    if mask is None and repainted is images[0]:  # no mask, and nothing of the image is transparent
        return JobRequest(
            mode="img2img", prompt=body.prompt, image=picture, strength=0.6, **_common(server, body, "img2img")
        )
    common = _common(server, body, "inpaint")
    return JobRequest(
        mode="inpaint", prompt=body.prompt, image=picture, mask=pictures.upload(server, repainted), **common
    )


def _common(server: Services, body: ImagesRequest, mode: str) -> dict[str, Any]:
    """Return the fields of a job that all calls share."""
    values: dict[str, Any] = {
        "model": _model_id(server, body.model, mode),
        "count": body.n or 1,
        "seed": body.seed,
        "negative_prompt": body.negative_prompt,
        "steps": body.steps,
        "guidance": body.guidance,
        "quality": _quality(body.quality),
        "previews": bool(body.stream and body.partial_images),
    }
    if (limit := server.settings.max_count) < values["count"]:
        raise invalid_request(f"n={body.n} is invalid: expected an integer from 1 to {limit}", "n")
    if body.size not in (None, "auto"):
        width, height = map(int, str(body.size).split("x"))
        if not 0 < min(width, height) <= max(width, height) <= server.settings.max_side:
            expected = f"WIDTHxHEIGHT with sides up to {server.settings.max_side} pixels"
            raise invalid_request(f"size={body.size!r} is invalid: expected {expected}", "size")
        values |= {"width": width, "height": height}
    try:
        JobRequest(mode="generate", **values)
    except ValidationError as error:
        raise _validation_error(error) from None
    return {name: value for name, value in values.items() if value is not None}


def _model_id(server: Services, name: str | None, mode: str) -> str | None:
    if name is None or name in ALIASES:
        return None
    model = server.settings.model(name)
    if model is None:
        raise ApiError(404, "model_not_found", f"there is no model {name!r}", "model")
    if mode in MODES_OF_KIND[model.kind]:
        return model.id
    # A program names one model for all its calls: the model of the same place that has the kind of the mode.
    relatives = [each for each in server.settings.models if each.location == model.location]
    return next((each.id for each in relatives if mode in MODES_OF_KIND[each.kind]), None)


def _quality(name: str | None) -> str | None:
    if name is None:
        return "balanced"
    quality = QUALITIES.get(name, name)
    if quality not in PRESETS:
        expected = ", ".join([*QUALITIES, *PRESETS])
        raise invalid_request(f"quality={name!r} is invalid: expected one of {expected}", "quality")
    return quality


async def _form(request: Request) -> FormData:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "expected a body of type multipart/form-data")
    return await request.form(max_files=2 * MAX_IMAGES, max_fields=64, max_part_size=2**16)


def _parsed(kind: type[Any], form: FormData) -> Any:
    texts = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    try:
        return kind.model_validate(texts)
    except ValidationError as error:
        raise _validation_error(error) from None


def _validation_error(error: ValidationError) -> ApiError:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "body"
    return invalid_request(f"{name} is invalid: {first['msg']}", name)


async def _files(form: FormData, name: str) -> list[bytes]:
    files = [*form.getlist(name), *form.getlist(f"{name}[]")]
    return [await file.read() for file in files if isinstance(file, UploadFile)]


# From jobs to responses


async def _respond(
    server: Services, request: Request, body: ImagesRequest, job: JobRequest, kind: str, key: str | None
) -> Any:
    """Answer with the images of a job. If its client disconnects, it is cancelled, unless a key can find it again."""
    row, _ = await run_in_threadpool(server.submit, job, key)
    if body.stream:
        stream = _Stream(server, body, row, kind, cancels=key is None)
        return StreamingResponse(stream.events(), media_type="text/event-stream", headers=EVENT_HEADERS)
    row = await _until_done(server, row, cancel_if=request.is_disconnected if key is None else None)
    return await run_in_threadpool(_images_response, server, request, body, row)


async def _until_done(server: Services, row: JobRow, cancel_if: Callable[[], Awaitable[bool]] | None) -> JobRow:
    """Return a job when it is done."""
    row = await server.wait(row.id, cancel_if=cancel_if)
    if row.state == "done":
        return row
    if row.state == "cancelled":
        raise ApiError(409, "cancelled", "the job was cancelled")
    raise row.failure.api_error


def _images_response(server: Services, request: Request, body: ImagesRequest, row: JobRow) -> dict[str, Any]:
    images = server.store.images_of(row.id)
    is_url = body.response_format == "url" or (body.response_format is None and _default_is_url(body.model))
    data = []
    for image in images:
        content = {"url": _url(server, request, image)} if is_url else {"b64_json": _encoded(server, body, image)}
        data.append({**content, **_origin(image)})
    return {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": body.output_format or "png",
        "size": f"{images[0].width}x{images[0].height}" if images else None,
        "usage": _USAGE,
    }


_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _default_is_url(model: str | None) -> bool:
    return model is None or model.startswith("dall-e")


def _origin(image: ImageRow) -> dict[str, Any]:
    """Return what comes back with every picture besides OpenAI's fields."""
    return {"id": image.id, "seed": image.seed, "sha256": image.sha256, "recipe": image.recipe}


def _url(server: Services, request: Request, image: ImageRow) -> str:
    path = f"/api/images/{image.id}/file"
    address = f"{request.url.scheme}://{request.headers['host']}{path}"
    if server.settings.token is None:
        return address
    expires = int(time.time()) + URL_SECONDS
    return f"{address}?expires={expires}&signature={signature(path, expires, server.settings.token)}"


def _encoded(server: Services, body: ImagesRequest, image: ImageRow) -> str:
    content = encoded_image(server.files.image(image.id), body.output_format or "png", body.output_compression)
    return base64.b64encode(content).decode()


class _Stream:
    """Events of a streamed call."""

    def __init__(self, server: Services, body: ImagesRequest, row: JobRow, kind: str, *, cancels: bool) -> None:
        self._server, self._body, self._row, self._kind = server, body, row, kind
        self._cancels = cancels  # the job, if its client disconnects
        self._format = body.output_format or "png"
        self._sent: dict[int, int] = {}  # partial images by image

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events until the job has ended. The job is cancelled if the client disconnects."""
        listener = self._server.gallery.hub.listen(self._row.id)
        events = listener.events()
        try:
            row = await run_in_threadpool(self._server.job, self._row.id)
            if row.finished_at is None:
                async for event in events:
                    if event is None:
                        yield b": keepalive\n\n"
                    elif event.name == "preview" and self._wants(event.data["image"], event.data["step"]):
                        yield await run_in_threadpool(self._partial, event.data)
                    elif event.name == "end":
                        break
            row = await run_in_threadpool(self._server.job, self._row.id)
            if row.state == "done":
                for image in await run_in_threadpool(self._server.store.images_of, row.id):
                    yield await run_in_threadpool(self._completed, image)
            else:
                code = row.failure.code if row.state == "failed" else row.state
                error = {"type": "error", "code": code, "message": row.error or f"the job is {row.state}"}
                yield _event("error", {"type": "error", "error": error})
        except BaseException:
            if self._cancels:
                with anyio.CancelScope(shield=True):  # this task has been cancelled, and may not wait otherwise
                    await run_in_threadpool(self._server.cancel, self._row.id)
            raise
        finally:
            listener.close()

    def _wants(self, image: int, step: int) -> bool:
        """Return whether a preview becomes a partial image: they are spread evenly over the steps."""
        wanted = self._body.partial_images or 0
        sent = self._sent.get(image, 0)
        progress = self._server.supervisor.progress(self._row.id)
        steps = progress.steps if progress is not None and progress.stage == "decoder" else step
        if sent >= wanted or step * (wanted + 1) < steps * (sent + 1):
            return False
        self._sent[image] = sent + 1
        return True

    def _partial(self, preview: dict[str, Any]) -> bytes:
        width, height = self._size()
        content = preview_image(preview["url"], (width, height), self._format)
        name = f"{self._kind}.partial_image"
        data = self._common(name, content, f"{width}x{height}")
        return _event(name, {**data, "partial_image_index": self._sent[preview["image"]] - 1})

    def _completed(self, image: ImageRow) -> bytes:
        content = encoded_image(self._server.files.image(image.id), self._format, self._body.output_compression)
        name = f"{self._kind}.completed"
        data = self._common(name, content, f"{image.width}x{image.height}")
        return _event(name, {**data, "usage": _USAGE, **_origin(image)})

    def _common(self, name: str, content: bytes, size: str) -> dict[str, Any]:
        return {
            "type": name,
            "b64_json": base64.b64encode(content).decode(),
            "created_at": int(time.time()),
            "size": size,
            "quality": self._body.quality or "auto",
            "background": "opaque",
            "output_format": self._format,
        }

    def _size(self) -> tuple[int, int]:
        request = self._row.request
        if request.get("width"):
            return int(request["width"]), int(request["height"])
        model = self._server.settings.model(str(request["model"]))
        facts = self._server.model_facts(model) if model is not None else {"default_width": 512, "default_height": 512}
        return int(facts["default_width"]), int(facts["default_height"])


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _model(id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": 0, "owned_by": "kandinsky22"}
