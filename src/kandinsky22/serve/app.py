"""The web application: routes, errors, static files, and the life of a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles

from kandinsky22 import __version__
from kandinsky22.errors import KandinskyError
from kandinsky22.serve import routes_native, routes_openai, routes_sdapi
from kandinsky22.serve.docs_page import DOCS_STYLE, docs_page
from kandinsky22.serve.events import EventHub
from kandinsky22.serve.failures import (
    DISK_FULL,
    OPENAI_PREFIX,
    ApiError,
    argument_of,
    error_body,
    is_disk_full,
)
from kandinsky22.serve.files import Files
from kandinsky22.serve.gallery import Gallery
from kandinsky22.serve.housekeeping import tidy_regularly
from kandinsky22.serve.metrics import Metrics
from kandinsky22.serve.security import SecurityMiddleware
from kandinsky22.serve.services import Services
from kandinsky22.serve.settings import ServerSettings
from kandinsky22.serve.store import Store
from kandinsky22.serve.supervisor import Supervisor
from kandinsky22.serve.tokens import TokenGuard

logger = logging.getLogger("kandinsky22.serve")

NOT_JSON = "expected a body in JSON, with the header Content-Type: application/json"

STUDIO = Path(__file__).parent / "studio"


def build_app(settings: ServerSettings) -> FastAPI:
    """Return the application of a server. Its workers start with it.

    Args:
        settings: Settings of the server, whose state folder this process has locked.
    """
    files = Files(settings.state_folder)
    gallery = Gallery(settings, Store(files.database), files, EventHub())
    supervisor, metrics, guard = Supervisor(settings, gallery), Metrics(), TokenGuard(settings.token)
    metrics.watch_jobs(gallery.store.counts, lambda: {worker.name: worker.restarts for worker in supervisor.workers})

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        gallery.recover()
        supervisor.start()
        housekeeping = asyncio.create_task(tidy_regularly(gallery))
        try:
            yield
        finally:
            housekeeping.cancel()
            gallery.hub.close()
            supervisor.stop()
            gallery.store.close()

    app = FastAPI(
        title="kandinsky22",
        version=__version__,
        description="Images from prompts and images with Kandinsky 2.2.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.state.services = Services(settings, gallery, supervisor, metrics, guard)
    for router in (routes_native.router, routes_openai.router, routes_sdapi.router, routes_native.login_router):
        app.include_router(router)
    for route in app.routes:
        if isinstance(route, APIRoute):
            route.summary = _operation_id(route).replace("_", " ").capitalize()
    _add_studio(app)
    _add_error_handlers(app)
    app.add_middleware(SecurityMiddleware, settings=settings, metrics=metrics, guard=guard)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name.strip("_")


def _add_studio(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def _studio() -> FileResponse:
        return FileResponse(STUDIO / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    def _docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    @app.get("/docs.css", include_in_schema=False)
    def _docs_style() -> Response:
        return Response(DOCS_STYLE, media_type="text/css")

    app.mount("/studio", GZipMiddleware(StaticFiles(directory=STUDIO)), name="studio")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(KandinskyError)
    async def _library_error(request: Request, error: KandinskyError) -> JSONResponse:
        if isinstance(error, ApiError):
            return _error(request, error.status, error.code, str(error), error.argument)
        return _error(request, 422, "invalid_request", str(error), argument_of(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(request, 400, "invalid_json", "the body is not valid JSON", None)
        if first["loc"] == ("body",) and not is_json(request.headers.get("content-type", "")):
            return _error(request, 415, "unsupported_media_type", NOT_JSON, None)
        place = [str(part) for part in first["loc"][1:]]
        name = ".".join(place) or None
        message = f"{name or 'body'} is invalid: {first['msg']}"
        return _error(request, 422, "invalid_request", message, name)

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.Error)
    async def _disk_error(request: Request, error: Exception) -> JSONResponse:
        if not is_disk_full(error):
            raise error
        logger.error("%s %s failed: %s", request.method, request.url.path, error)
        return _error(request, 507, "disk_full", DISK_FULL, None)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        response = _error(
            request, error.status_code, codes.get(error.status_code, "invalid_request"), str(error.detail), None
        )
        response.headers.update(error.headers or {})
        return response


def is_json(content_type: str) -> bool:
    """Return whether a media type is that of JSON.

    Args:
        content_type: Value of the header.
    """
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _error(request: Request, status: int, code: str, message: str, argument: str | None) -> JSONResponse:
    headers = {}
    if request.url.path.startswith(OPENAI_PREFIX):
        status = 400 if status == 422 else status  # as OpenAI's clients expect it
        if status != 429:  # OpenAI's clients repeat a request by themselves: a job that was cancelled would run again
            headers["x-should-retry"] = "false"
    return JSONResponse(error_body(request.url.path, status, code, message, argument), status, headers)
