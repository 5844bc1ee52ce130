"""Settings of the server."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from kandinsky22.checkpoints.hub import EMBEDDED
from kandinsky22.errors import ConfigError, InputError, invalid

KINDS = ("decoder", "inpaint", "control")
GPU_BATCH = 4  # images that run together on a GPU
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MODES_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "decoder": ("generate", "img2img", "mix", "variations"),
    "inpaint": ("inpaint",),
    "control": ("control",),
}


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """A model that the server offers.

    Attributes:
        id: Name in the API.
        location: Folder, Hub id, or "embedded".
        kind: "decoder", "inpaint" or "control".
        prior: Folder or Hub id of the prior; None for the prior that belongs to the model.
        tiny_decoder: File, folder or Hub id of the tiny decoder that decodes results and previews; None for MoVQ.
    """

    id: str
    location: str
    kind: str = "decoder"
    prior: str | None = None
    tiny_decoder: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise invalid("models.kind", self.kind, " or ".join(map(repr, KINDS)), error=ConfigError)


EMBEDDED_MODELS = (
    ModelSettings("embedded", EMBEDDED),
    ModelSettings("embedded-inpaint", EMBEDDED, "inpaint"),
    ModelSettings("embedded-control", EMBEDDED, "control"),
)


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
        host: Address that the server listens on.
        port: Port; 0 takes a free one.
        token: Secret that every request must carry; None requires none, which only loopback addresses allow.
        state: Folder of the database, the pictures and the uploads; None for `default_state_folder`.
        models: The models, at least one. The first one of a kind is the default for its modes.
        devices: Devices, one worker process for each.
        dtype: Floating-point type of the networks; None for the device's default.
        quantize: Kind of quantized weights; None for none.
        low_memory: Whether each network is in memory only while it runs.
        compile: Whether the networks' blocks are compiled.
        sessions: Number of models that a worker keeps in memory.
        batch: Largest number of equal waiting jobs that are generated in one batch; None for 1 on a CPU, 4 on a GPU.
        allowed_hosts: Names in the Host header that are accepted besides the server's own address.
        allowed_origins: Origins of other sites whose scripts may use the API, such as "https://example.org".
        url_hosts: Hosts from which the server downloads images that requests name by address.
        max_upload_bytes: Largest size of an image file.
        max_body_bytes: Largest size of a request's body.
        max_upload_pixels: Largest number of pixels of an uploaded image.
        max_side: Longest side of a generated image in pixels.
        max_pixels: Largest number of pixels of a generated image.
        max_steps: Largest number of steps.
        max_count: Largest number of images per job.
        max_waiting: Largest number of waiting jobs.
        max_attempts: Number of times a job is tried when its worker crashes.
        body_seconds: Longest time that a request's body may take.
        stall_seconds: Longest time of a job without any progress, after which its worker is restarted.
        lease_seconds: Longest time without a sign of life of a worker.
        previews_per_second: Largest rate of previews; 0 disables them.
        depth_model: Folder or Hub id of a depth estimation model for hints; None for none.
        trash_days: Days after which deleted images are removed from the disk.
        upload_days: Days after its last use at which an upload is removed from the disk, unless a waiting job or an
            image of the gallery refers to it.
    """

    host: str = "127.0.0.1"
    port: int = 7822
    token: str | None = None
    state: Path | None = None
    models: tuple[ModelSettings, ...] = EMBEDDED_MODELS
    devices: tuple[str, ...] = ("auto",)
    dtype: str | None = None
    quantize: str | None = None
    low_memory: bool = False
    compile: bool = False
    sessions: int = 3
    batch: int | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    max_upload_bytes: int = 32 * 2**20
    max_body_bytes: int = 64 * 2**20
    max_upload_pixels: int = 40_000_000
    max_side: int = 2048
    max_pixels: int = 2048 * 2048
    max_steps: int = 1000
    max_count: int = 64
    max_waiting: int = 10_000
    max_attempts: int = 3
    body_seconds: float = 60.0
    stall_seconds: float = 1800.0
    lease_seconds: float = 60.0
    previews_per_second: float = 5.0
    depth_model: str | None = None
    trash_days: float = 30.0
    upload_days: float = 30.0

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models=() is invalid: expected at least one model")
        ids = [model.id for model in self.models]
        if len(set(ids)) < len(ids):
            raise invalid("models", ids, "different ids", error=ConfigError)
        if self.token is None and self.host not in LOOPBACK:
            raise InputError(
                f"host={self.host!r} is invalid: expected a loopback address, unless a token is set; "
                "add --token, or set KANDINSKY22_TOKEN"
            )
        if self.token is not None and len(self.token) < 8:
            raise InputError("token is invalid: expected at least 8 characters")

    @property
    def state_folder(self) -> Path:
        """Folder of the database, the pictures and the uploads."""
        return default_state_folder() if self.state is None else self.state

    def model(self, id: str) -> ModelSettings | None:
        """Return the model with this name, or None.

        Args:
            id: Name in the API.
        """
        return next((model for model in self.models if model.id == id), None)

    def default_model(self, mode: str) -> ModelSettings | None:
        """Return the first model that a mode can use, or None.

        Args:
            mode: Name of the mode.
        """
        return next((model for model in self.models if mode in MODES_OF_KIND[model.kind]), None)


def default_state_folder() -> Path:
    """Return the folder that keeps pictures and jobs when none is configured: $KANDINSKY22_STATE, or one per user."""
    if folder := os.environ.get("KANDINSKY22_STATE"):
        return Path(folder)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "kandinsky22"


def batch_limit(settings: ServerSettings, device_type: str) -> int:
    """Return the largest number of images that run together.

    On CPUs the default is 1: batches save little there, and an image equals the image of its seed alone to the last
    bit.

    Args:
        settings: Settings of the server.
        device_type: Type of the device, such as "cpu".
    """
    return settings.batch or (1 if device_type == "cpu" else GPU_BATCH)
