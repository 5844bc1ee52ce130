"""A subset of /sdapi/v1, the API of the Stable Diffusion web UI, for programs that speak it."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from kandinsky22.errors import invalid
from kandinsky22.generation.image_files import GALLERY_KEYWORD, RECIPE_KEYWORD
from kandinsky22.generation.limits import MAX_SEED
from kandinsky22.generation.recipe import Recipe
from kandinsky22.generation.scheduler_names import SCHEDULERS
from kandinsky22.serve import pictures
from kandinsky22.serve.failures import ApiError, invalid_request
from kandinsky22.serve.files import open_picture
from kandinsky22.serve.image_store import ImageRow
from kandinsky22.serve.job_store import JobRow
from kandinsky22.serve.routes_native import ERRORS
from kandinsky22.serve.schemas import JobRequest
from kandinsky22.serve.services import Server, Services
from kandinsky22.serve.settings import MODES_OF_KIND, ModelSettings

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])

# Names by which programs know the schedulers.
SAMPLERS = {
    "Euler a": "euler-ancestral",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "kdpm2",
    "DPM2 a": "kdpm2-ancestral",
    "DPM++ 2M": "dpm",
    "DPM++ 2S": "dpm-single",
    "DPM++ SDE": "dpm-sde",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "DEIS": "deis",
    "LCM": "lcm",
}
# Settings of that application which would change the picture there and have no meaning here.
IGNORED = (
    *("enable_hr", "restore_faces", "tiling", "subseed_strength", "styles", "script_name", "alwayson_scripts", "eta"),
    *("refiner_checkpoint", "clip_skip", "mask_blur", "mask_blur_x", "mask_blur_y", "inpainting_fill", "resize_mode"),
)
NOISE_SCHEDULES = (" karras", " exponential")  # ends of names of samplers
# Kinds of additions that programs ask for, and of which there are none.
NO_ADDITIONS = (
    *("upscalers", "latent-upscale-modes", "face-restorers", "realesrgan-models", "hypernetworks", "loras", "sd-vae"),
    "prompt-styles",
)
Picture64 = Annotated[str, Field(min_length=1)]


class TextRequest(BaseModel):
    """Body of `POST /sdapi/v1/txt2img`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"prompt": "a red circle", "steps": 8, "width": 128, "height": 128}]},
    )

    prompt: Annotated[str, Field(max_length=10_000)] = ""
    negative_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = -1
    steps: Annotated[int, Field(ge=1)] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = 1
    n_iter: Annotated[int, Field(ge=1)] | None = 1
    sampler_name: Annotated[str, Field(max_length=100)] | None = None
    sampler_index: Annotated[str, Field(max_length=100)] | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool | None = True


class ImageRequest(TextRequest):
    """Body of `POST /sdapi/v1/img2img`."""

    init_images: Annotated[list[Picture64], Field(min_length=1, max_length=1)]
    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = 0.75
    mask: Picture64 | None = None
    inpainting_mask_invert: int | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=8192)] | None = 0


class PngInfoRequest(BaseModel):
    """Body of `POST /sdapi/v1/png-info`."""

    image: Picture64


class Options(BaseModel):
    """Options of the server that programs of this API may change."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: Annotated[str, Field(max_length=200)] | None = None


@router.post("/txt2img", responses=ERRORS)
async def _txt2img(body: TextRequest, server: Server, request: Request) -> dict[str, Any]:
    """Generate images from a prompt."""
    job = _job(server, body, "generate", {"prompt": body.prompt})
    return await _respond(server, request, body, job)


@router.post("/img2img", responses=ERRORS)
async def _img2img(body: ImageRequest, server: Server, request: Request) -> dict[str, Any]:
    """Generate images from an image, or repaint it where a mask is white."""

    def make() -> JobRequest:
        content = pictures.decoded_picture(server, "init_images", body.init_images[0])
        values: dict[str, Any] = {"prompt": body.prompt, "image": pictures.upload(server, content)}
        if body.mask is None:
            return _job(server, body, "img2img", {**values, "strength": body.denoising_strength})
        values["mask"] = pictures.upload(server, _mask(server, body))
        if body.inpaint_full_res:
            values["crop"] = body.inpaint_full_res_padding or 0
        return _job(server, body, "inpaint", values)

    return await _respond(server, request, body, await run_in_threadpool(make))


@router.get("/progress", responses=ERRORS)
def _progress(server: Server, skip_current_image: bool = False) -> dict[str, Any]:
    """Return the progress of the running job."""
    running = server.store.jobs(state="running", group=None, before=None, limit=1)
    waiting = server.store.waiting_count()
    progress = server.supervisor.progress(running[0].id) if running else None
    preview = None if skip_current_image or not running else server.supervisor.preview(running[0].id)
    return {
        "progress": 0.0 if progress is None else progress.fraction,
        "eta_relative": 0.0 if progress is None else progress.seconds_left or 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": running[0].id if running else "",
            "job_count": waiting + len(running),
            "job_timestamp": running[0].started_at if running else "",
            "job_no": 0,
            "sampling_step": 0 if progress is None else progress.step,
            "sampling_steps": 0 if progress is None else progress.steps,
        },
        "current_image": None if preview is None else preview.partition(",")[2],
        "textinfo": None,
    }


@router.post("/interrupt", responses=ERRORS)
def _interrupt(server: Server) -> dict[str, Any]:
    """Stop the jobs that this API has started and that run now."""
    for job in server.store.jobs(state="running", group=None, before=None, limit=100):
        if job.id in server.sdapi.jobs:
            server.cancel(job.id)
    return {}


@router.get("/samplers")
def _samplers() -> list[dict[str, Any]]:
    """List the samplers."""
    return [{"name": name, "aliases": [short], "options": {}} for name, short in SAMPLERS.items()]


@router.get("/schedulers")
def _schedulers() -> list[dict[str, Any]]:
    """List the noise schedules: each sampler has its own."""
    return [{"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}]


@router.get("/sd-models")
def _sd_models(server: Server) -> list[dict[str, Any]]:
    """List the models."""
    return [
        {"title": model.id, "model_name": model.id, "hash": None, "sha256": None, "filename": model.id, "config": None}
        for model in server.settings.models
    ]


@router.get("/options")
def _options(server: Server) -> dict[str, Any]:
    """Return the options."""
    default = server.settings.default_model("generate")
    name = server.sdapi.model or (server.settings.models[0].id if default is None else default.id)
    return {"sd_model_checkpoint": name, "samples_format": "png"}


@router.post("/options", responses=ERRORS)
def _set_options(body: Options, server: Server) -> None:
    """Select the model of requests that name none."""
    if body.sd_model_checkpoint is not None:
        server.sdapi.model = _model(server, body.sd_model_checkpoint).id


@router.post("/png-info", responses=ERRORS)
def _png_info(body: PngInfoRequest, server: Server) -> dict[str, Any]:
    """Return the generation parameters that a picture contains."""
    content = pictures.decoded_picture(server, "image", body.image)
    with open_picture(content, server.settings.max_upload_pixels) as image:
        texts = {name: value for name, value in image.info.items() if isinstance(name, str) and isinstance(value, str)}
    recipe = texts.get(RECIPE_KEYWORD)
    return {
        "info": texts.get(GALLERY_KEYWORD, ""),
        "items": texts,
        "parameters": {} if recipe is None else _parsed_json(recipe),
    }


@router.get("/scripts")
def _scripts() -> dict[str, list[str]]:
    """List the scripts, of which there are none."""
    return {"txt2img": [], "img2img": []}


def _nothing() -> list[dict[str, Any]]:
    """Return no additions, of which there are none; programs expect an answer."""
    return []


for _name in NO_ADDITIONS:
    router.get(f"/{_name}", name=_name.replace("-", "_"))(_nothing)


@router.get("/embeddings")
def _embeddings() -> dict[str, Any]:
    """Return the embeddings, of which there are none."""
    return {"loaded": {}, "skipped": {}}


@router.post("/refresh-checkpoints")
def _refresh_checkpoints() -> None:
    """Do nothing: the list of models is that of the server's settings."""


@router.get("/memory")
def _memory() -> dict[str, Any]:
    """Return nothing about memory; programs expect an answer."""
    return {"ram": {}, "cuda": {}}


def _job(server: Services, body: TextRequest, mode: str, own: dict[str, Any]) -> JobRequest:
    override = (body.override_settings or {}).get("sd_model_checkpoint")
    values = {
        "mode": mode,
        "model": _model_id(server, override if isinstance(override, str) else server.sdapi.model, mode),
        "negative_prompt": body.negative_prompt or None,
        "seed": None if body.seed in (None, -1) else body.seed,
        "count": (body.batch_size or 1) * (body.n_iter or 1),
        "steps": body.steps,
        "guidance": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "scheduler": _scheduler(body.sampler_name or body.sampler_index),
        **own,
    }
    if values["steps"] is None and values["scheduler"] is None:
        values["quality"] = "balanced"
    try:
        return JobRequest.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "body"
        raise invalid_request(f"{name} is invalid: {first['msg']}", name) from None


def _scheduler(name: str | None) -> str | None:
    if name is None:
        return None
    names = {**{key.lower(): value for key, value in SAMPLERS.items()}, **{key: key for key in SCHEDULERS}}
    base = name.lower()
    for ending in NOISE_SCHEDULES:
        base = base.removesuffix(ending)
    if base in ("automatic", ""):
        return None
    if base not in names:
        raise ApiError(404, "not_found", f"there is no sampler {name!r}; see /sdapi/v1/samplers", "sampler_name")
    return names[base]


def _model_id(server: Services, name: str | None, mode: str) -> str | None:
    model = None if name is None else _model(server, name)
    return model.id if model is not None and mode in MODES_OF_KIND[model.kind] else None


def _model(server: Services, name: str) -> ModelSettings:
    model = server.settings.model(name)
    if model is None:
        raise invalid("sd_model_checkpoint", name, " or ".join(repr(each.id) for each in server.settings.models))
    return model


def _mask(server: Services, body: ImageRequest) -> bytes:
    from PIL import ImageOps

    content = pictures.decoded_picture(server, "mask", str(body.mask))
    with open_picture(content, server.settings.max_upload_pixels) as image:
        mask = image.convert("L")
    return pictures.encoded_png(ImageOps.invert(mask) if body.inpainting_mask_invert else mask)


async def _respond(server: Services, request: Request, body: TextRequest, job: JobRequest) -> dict[str, Any]:
    row, _ = await run_in_threadpool(server.submit, job)
    server.sdapi.jobs.add(row.id)
    try:
        row = await server.wait(row.id, cancel_if=request.is_disconnected)
    finally:
        server.sdapi.jobs.discard(row.id)
    if row.state == "failed":
        raise row.failure.api_error
    return await run_in_threadpool(_response, server, body, row)


def _response(server: Services, body: TextRequest, row: JobRow) -> dict[str, Any]:
    images = server.store.images_of(row.id)
    parameters = body.model_dump(exclude={"init_images", "mask"})
    encoded = [base64.b64encode(server.files.image(image.id).read_bytes()).decode() for image in images]
    return {
        "images": encoded if body.send_images is not False else [],
        "parameters": parameters,
        "info": json.dumps(_info(body, row, images)),
    }


def _ignored(body: TextRequest) -> list[str]:
    """Return the names of settings in a request that do not change the picture here."""
    extra = body.model_extra or {}
    names = [name for name in IGNORED if extra.get(name)]
    if (body.sampler_name or body.sampler_index or "").lower().endswith(NOISE_SCHEDULES):
        names.append("sampler_name")
    if str(extra.get("scheduler") or "automatic").lower() != "automatic":
        names.append("scheduler")
    if isinstance(body, ImageRequest) and body.mask is not None and "denoising_strength" in body.model_fields_set:
        names.append("denoising_strength")
    others = set(body.override_settings or ()) - {"sd_model_checkpoint"}
    return [*names, *(f"override_settings.{name}" for name in sorted(others))]


def _infotext(image: ImageRow) -> str:
    """Return the line of parameters in the file of a picture."""
    return Recipe.from_json(json.dumps(image.recipe), origin=image.id).texts()[GALLERY_KEYWORD]


def _info(body: TextRequest, row: JobRow, images: list[ImageRow]) -> dict[str, Any]:
    first = images[0] if images else None
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(images),
        "negative_prompt": body.negative_prompt or "",
        "all_negative_prompts": [body.negative_prompt or ""] * len(images),
        "seed": row.request["seed"],
        "all_seeds": [image.seed for image in images],
        "width": None if first is None else first.width,
        "height": None if first is None else first.height,
        "sampler_name": body.sampler_name or body.sampler_index,
        "cfg_scale": None if first is None else first.recipe["guidance"],
        "denoising_strength": None if first is None else first.recipe.get("strength"),
        "steps": None if first is None else first.recipe["steps"],
        "batch_size": body.batch_size,
        "sd_model_name": row.request["model"],
        "sd_model_hash": None if first is None else first.recipe["model_digest"][:10],
        "job_timestamp": row.created_at,
        "index_of_first_image": 0,
        "infotexts": [_infotext(image) for image in images],
        "ids": [image.id for image in images],
        "sha256": [image.sha256 for image in images],
        "recipes": [image.recipe for image in images],
        "ignored": _ignored(body),
        "interrupted": row.state == "cancelled",
    }


def _parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}
