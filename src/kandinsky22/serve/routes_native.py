"""The native API, which the studio uses."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from kandinsky22 import __version__
from kandinsky22.generation.limits import MAX_STEPS
from kandinsky22.generation.modes import MODES
from kandinsky22.generation.scheduler_names import SCHEDULERS
from kandinsky22.sampling.presets import PRESETS
from kandinsky22.serve import schemas
from kandinsky22.serve.events import encode_event
from kandinsky22.serve.failures import ApiError, invalid_request, not_found
from kandinsky22.serve.files import open_picture
from kandinsky22.serve.gallery import ENDED, image_info
from kandinsky22.serve.hints import make_hint
from kandinsky22.serve.image_store import ImageQuery, ImageRow
from kandinsky22.serve.pictures import encoded_png, store_picture
from kandinsky22.serve.recipes import request_of
from kandinsky22.serve.services import Server, Services
from kandinsky22.serve.tokens import cookie_name

router = APIRouter(prefix="/api", tags=["native"])
login_router = APIRouter(tags=["native"])

JobId = Annotated[str, Path(min_length=1, max_length=64)]
ImageIdPath = Annotated[str, Path(min_length=1, max_length=64)]
Limit = Annotated[int, Query(ge=1, le=500)]
Cursor = Annotated[str | None, Query(max_length=20)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]
LastEvent = Annotated[str | None, Header(alias="Last-Event-ID", max_length=30)]
EVENT_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
KEPT = {"cache-control": "private, max-age=31536000, immutable"}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorBody, "description": "The request is invalid."},
    "507": {"model": schemas.ErrorBody, "description": "The disk is full."},
}


@router.get("/info")
def _info(server: Server) -> dict[str, Any]:
    """Return what the server offers: models, modes, presets, schedulers, kinds of hints and limits."""
    settings = server.settings
    return {
        "version": __version__,
        "device": server.supervisor.workers[0].device,
        "token_required": settings.token is not None,
        "models": [server.model_facts(model) for model in settings.models],
        "modes": [
            {"name": mode.name, "inputs": list(mode.inputs), "required": list(mode.required)} for mode in MODES.values()
        ],
        "presets": [
            {
                "name": name,
                "steps": None if preset.distilled else preset.decoder.steps,  # the adapter says how many
                "prior_steps": preset.prior.steps,
            }
            for name, preset in PRESETS.items()
        ],
        "schedulers": list(SCHEDULERS),
        "hints": ["edges", "depth"] if settings.depth_model is not None else ["edges"],
        "limits": {
            "max_side": settings.max_side,
            "max_pixels": settings.max_pixels,
            "max_steps": min(settings.max_steps, MAX_STEPS),
            "max_count": settings.max_count,
            "max_upload_bytes": settings.max_upload_bytes,
        },
        "worker": {"state": server.supervisor.state, "jobs_waiting": server.store.waiting_count()},
    }


# Uploads


@router.post(
    "/uploads",
    status_code=201,
    response_model=schemas.UploadInfo,
    responses=ERRORS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}}
                for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")
            },
        }
    },
)
async def _upload(request: Request, server: Server) -> schemas.UploadInfo:
    """Store a PNG, JPEG or WebP file. Its id is the SHA-256 of its bytes."""
    from starlette.concurrency import run_in_threadpool

    content = await request.body()
    return await run_in_threadpool(_store_upload, server, content)


def _store_upload(server: Services, content: bytes) -> schemas.UploadInfo:
    id, width, height = store_picture(server, content)
    return schemas.UploadInfo(id=id, width=width, height=height, url=f"/api/uploads/{id}")


@router.get("/uploads/{id}", responses={200: {"content": {"image/png": {}}}, **ERRORS}, response_class=Response)
def _uploaded(id: JobId, server: Server) -> Response:
    """Return an uploaded picture, re-encoded as PNG without its metadata."""
    import io

    if server.store.upload_size(id) is None:
        raise not_found("upload")
    try:
        content = server.files.upload(id).read_bytes()
    except OSError:
        raise not_found("upload") from None
    with open_picture(content, server.settings.max_upload_pixels) as image:
        plain = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    plain.info = {}
    encoded = io.BytesIO()
    plain.save(encoded, "PNG", compress_level=1)
    return Response(encoded.getvalue(), media_type="image/png", headers=KEPT)


# Jobs


@router.post(
    "/jobs", status_code=201, response_model=schemas.JobInfo, responses={200: {"model": schemas.JobInfo}, **ERRORS}
)
def _submit(job: schemas.JobRequest, server: Server, response: Response, key: Key = None) -> schemas.JobInfo:
    """Queue a job. The same Idempotency-Key again returns the same job with status 200."""
    row, is_new = server.submit(job, key)
    response.status_code = 201 if is_new else 200
    return server.gallery.job_info(row)


@router.get("/jobs", response_model=schemas.JobPage, responses=ERRORS)
def _jobs(
    server: Server,
    state: schemas.State | None = None,
    group: Annotated[str | None, Query(max_length=200)] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> schemas.JobPage:
    """Return jobs, newest first."""
    rows = server.store.jobs(state=state, group=group, before=_cursor(cursor), limit=limit)
    following = str(rows[-1].seq) if len(rows) == limit else None
    return schemas.JobPage(items=[server.gallery.job_info(row) for row in rows], next=following)


@router.get("/jobs/{id}", response_model=schemas.JobInfo, responses=ERRORS)
def _job(id: JobId, server: Server) -> schemas.JobInfo:
    """Return a job."""
    return server.gallery.job_info(server.job(id))


@router.delete("/jobs/{id}", response_model=schemas.JobInfo, responses=ERRORS)
def _cancel(id: JobId, server: Server) -> schemas.JobInfo:
    """Cancel a job. A running job stops at its next step."""
    return server.gallery.job_info(server.cancel(id))


@router.post("/jobs/{id}/retry", response_model=schemas.JobInfo, responses=ERRORS)
def _retry(id: JobId, server: Server) -> schemas.JobInfo:
    """Queue a failed or cancelled job again, with the same seed."""
    request = schemas.JobRequest.model_validate(server.job(id).request)
    for name, picture in request.pictures().items():
        server.gallery.picture_size(name, picture)  # an upload may have been removed since
    row = server.store.retry(id)
    if row is None:
        raise ApiError(409, "not_ended", "only failed and cancelled jobs can be retried")
    server.gallery.publish_job(id, "state")
    server.supervisor.wake()
    return server.gallery.job_info(row)


# Events


@router.get("/jobs/{id}/events", response_class=StreamingResponse, responses=ERRORS)
async def _job_events(id: JobId, server: Server, last_event: LastEvent = None) -> StreamingResponse:
    """Send the events of a job: state, progress, preview, image, end."""
    from starlette.concurrency import run_in_threadpool

    await run_in_threadpool(server.job, id)  # an unknown job is an error before the stream begins

    async def stream() -> AsyncIterator[bytes]:
        # The listener begins with the stream: a client that has gone before leaves none behind.
        listener = server.gallery.hub.listen(id, _event_id(last_event))
        try:
            info = await run_in_threadpool(lambda: server.gallery.job_info(server.job(id)))
            yield encode_event("state", info.model_dump())
            if info.state in ENDED:
                yield encode_event("end", info.model_dump())
                return
            async for event in listener.events():
                yield b": keepalive\n\n" if event is None else encode_event(event.name, event.data, event.id)
                if event is not None and event.name == "end":
                    return
        finally:
            listener.close()

    return StreamingResponse(stream(), media_type="text/event-stream", headers=EVENT_HEADERS)


@router.get("/events", response_class=StreamingResponse, responses=ERRORS)
async def _all_events(server: Server, last_event: LastEvent = None) -> StreamingResponse:
    """Send the events of all jobs, of the gallery and of the workers."""

    async def stream() -> AsyncIterator[bytes]:
        listener = server.gallery.hub.listen(None, _event_id(last_event))
        try:
            yield encode_event("worker", {"state": server.supervisor.state})
            async for event in listener.events():
                if event is None:
                    yield b": keepalive\n\n"
                    continue
                data = event.data if event.job is None else {**event.data, "job": event.job}
                yield encode_event(event.name, data, event.id)
        finally:
            listener.close()

    return StreamingResponse(stream(), media_type="text/event-stream", headers=EVENT_HEADERS)


# Images


@router.get("/images", response_model=schemas.ImagePage, responses=ERRORS)
def _images(
    server: Server,
    search: Annotated[str | None, Query(max_length=500)] = None,
    mode: schemas.Mode | None = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
    starred: bool | None = None,
    trash: bool = False,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> schemas.ImagePage:
    """Return images of the gallery, newest first."""
    query = ImageQuery(search, mode, model, starred, trash)
    rows = server.store.images(query, before=_cursor(cursor), limit=limit)
    following = str(rows[-1].seq) if len(rows) == limit else None
    return schemas.ImagePage(items=[image_info(row) for row in rows], next=following)


@router.get("/images/{id}", response_model=schemas.ImageDetails, responses=ERRORS)
def _image(id: ImageIdPath, server: Server) -> schemas.ImageDetails:
    """Return an image with its recipe and its inputs."""
    row = _known_image(server, id)
    _, inputs = request_of(row.recipe, server.gallery)
    request = row.request
    return schemas.ImageDetails(**image_info(row).model_dump(), recipe=row.recipe, request=request, inputs=inputs)


@router.get("/images/{id}/file", responses={200: {"content": {"image/png": {}}}, **ERRORS}, response_class=FileResponse)
def _image_file(id: ImageIdPath, server: Server, download: bool = False) -> FileResponse:
    """Return an image as a PNG file that contains its recipe."""
    row = _known_image(server, id)
    path = server.files.image(row.id)
    if not path.is_file():
        raise not_found("image")
    name = f"kandinsky22-{row.seed}-{row.id[:8]}.png" if download else None
    return FileResponse(path, media_type="image/png", filename=name, headers=KEPT)


@router.get(
    "/images/{id}/thumbnail", responses={200: {"content": {"image/webp": {}}}, **ERRORS}, response_class=Response
)
def _thumbnail(id: ImageIdPath, server: Server) -> Response:
    """Return an image as a WebP file whose longer side has at most 320 pixels."""
    import PIL.Image

    row = _known_image(server, id)
    path = server.files.thumbnail(row.id)
    if not path.is_file():
        try:
            with PIL.Image.open(server.files.image(row.id)) as image:
                server.files.save_thumbnail(row.id, image)
        except OSError:
            raise not_found("image") from None
    return FileResponse(path, media_type="image/webp", headers=KEPT)


@router.patch("/images/{id}", response_model=schemas.ImageInfo, responses=ERRORS)
def _change(id: ImageIdPath, change: schemas.ImageChange, server: Server) -> schemas.ImageInfo:
    """Star an image, or remove its star."""
    return image_info(server.gallery.change(_known_image(server, id).id, starred=change.starred))


@router.delete("/images/{id}", response_model=schemas.ImageInfo, responses=ERRORS)
def _delete(id: ImageIdPath, server: Server) -> schemas.ImageInfo:
    """Move an image to the trash."""
    return image_info(server.gallery.change(_known_image(server, id).id, trashed=True))


@router.post("/images/{id}/restore", response_model=schemas.ImageInfo, responses=ERRORS)
def _restore(id: ImageIdPath, server: Server) -> schemas.ImageInfo:
    """Move an image from the trash back into the gallery."""
    return image_info(server.gallery.change(_known_image(server, id).id, trashed=False))


# Recipes and hints


@router.post(
    "/recipes",
    response_model=schemas.RecipeInfo,
    responses=ERRORS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def _recipe(request: Request, server: Server) -> schemas.RecipeInfo:
    """Return the recipe in a picture file, and the request that repeats it."""
    from starlette.concurrency import run_in_threadpool

    from kandinsky22.serve.recipes import recipe_of_file

    content = await request.body()

    def read() -> schemas.RecipeInfo:
        recipe = recipe_of_file(content, server.settings.max_upload_pixels)
        repeated, inputs = request_of(recipe, server.gallery)
        missing = [name for name, source in inputs.items() if source == "missing"]
        return schemas.RecipeInfo(recipe=recipe, request=repeated, missing=missing)

    return await run_in_threadpool(read)


@router.post("/hints", status_code=201, response_model=schemas.UploadInfo, responses=ERRORS)
def _hint(hint: schemas.HintRequest, server: Server) -> schemas.UploadInfo:
    """Make a hint from a picture: edges, or a depth map."""
    server.gallery.picture_size("image", hint.image)
    path = server.gallery.picture_path(hint.image)
    with open_picture(path.read_bytes(), server.settings.max_upload_pixels) as image:
        # A depth model takes long: decoding of other pictures must not wait for it.
        picture = image.copy() if hint.kind == "depth" else make_hint(hint, image, server.settings)
    if hint.kind == "depth":
        picture = make_hint(hint, picture, server.settings)
    return _store_upload(server, encoded_png(picture))


# Login


@login_router.post("/login", status_code=204, responses=ERRORS)
def _login(login: schemas.Login, server: Server, request: Request, response: Response) -> None:
    """Store the token in a cookie of the browser."""
    token = server.settings.token
    if token is None:
        return
    if not server.guard.accepts(request.scope, login.token):
        if (seconds := server.guard.seconds_to_wait(request.scope)) > 0:
            raise ApiError(429, "too_many_tokens", f"too many wrong tokens; try again in {math.ceil(seconds)} s")
        raise ApiError(401, "unauthorized", "the token is wrong")
    is_secure = request.url.scheme == "https"
    name = cookie_name(request.headers)
    response.set_cookie(name, token, httponly=True, samesite="strict", secure=is_secure, max_age=30 * 86400)


@login_router.get("/healthz", tags=["server"])
def _health() -> dict[str, str]:
    """Tell that the server runs."""
    return {"status": "ok"}


@login_router.get("/readyz", tags=["server"], responses={503: {}})
def _readiness(server: Server) -> JSONResponse:
    """Tell whether a worker can take jobs."""
    state = server.supervisor.state
    return JSONResponse({"status": state}, 200 if state in ("ready", "busy") else 503)


@login_router.get("/metrics", tags=["server"], response_class=Response)
def _metrics(server: Server) -> Response:
    """Return metrics in Prometheus' text format."""
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _known_image(server: Server, id: str) -> ImageRow:
    row = server.store.image(id)
    if row is None:
        raise not_found("image")
    return row


def _cursor(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise invalid_request("cursor is invalid: expected the value of next in the page before", "cursor")
    return int(text)


def _event_id(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None
