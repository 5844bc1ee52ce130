"""Errors of the API."""

from __future__ import annotations

import dataclasses
import errno
import re
import sqlite3
from typing import Any

from kandinsky22.errors import KandinskyError

OPENAI_PREFIX = "/v1/"
DISK_FULL = "the disk is full: free some space, and try again"
# HTTP status of a failed job by the kind of its failure. Memory is short because the request asks for too much.
STATUS_OF_FAILURE = {
    "generation_failed": 422,
    "out_of_memory": 422,
    "disk_full": 507,
    "worker_ended": 500,
    "internal_error": 500,
}
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class ApiError(KandinskyError):
    """An error with its HTTP status.

    Args:
        status: HTTP status.
        code: Name of the kind of error in the response.
        message: Description for the user.
        argument: Name of the invalid argument; None if there is none.
    """

    def __init__(self, status: int, code: str, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.argument = argument


@dataclasses.dataclass(frozen=True)
class JobFailure:
    """Why a job failed.

    Attributes:
        message: Description for the user.
        code: Kind of failure, one of `STATUS_OF_FAILURE`.
    """

    message: str
    code: str = "generation_failed"

    @property
    def api_error(self) -> ApiError:
        """The error that answers a client which waits for the job."""
        return ApiError(STATUS_OF_FAILURE[self.code], self.code, self.message)


def error_body(path: str, status: int, code: str, message: str, argument: str | None = None) -> dict[str, Any]:
    """Return the body of an error. Below /v1 it also has the fields that OpenAI's clients read.

    Args:
        path: Path of the request.
        status: HTTP status.
        code: Name of the kind of error.
        message: Description for the user.
        argument: Name of the invalid argument; None if there is none.
    """
    error: dict[str, Any] = {"message": message, "argument": argument, "code": code}
    if path.startswith(OPENAI_PREFIX):
        error |= {"param": argument, "type": "server_error" if status >= 500 else "invalid_request_error"}
    return {"error": error}


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, or a quota of it, is full.

    Args:
        error: The error.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, sqlite3.Error) and "disk is full" in str(error)


def not_found(what: str) -> ApiError:
    """Return the error for an id that does not exist.

    Args:
        what: Kind of object, such as "job".
    """
    return ApiError(404, "not_found", f"there is no such {what}")


def invalid_request(message: str, argument: str | None = None) -> ApiError:
    """Return the error for an invalid request.

    Args:
        message: Description for the user.
        argument: Name of the invalid argument; None if there is none.
    """
    return ApiError(422, "invalid_request", message, argument)


def argument_of(error: KandinskyError) -> str | None:
    """Return the name of the argument that an error of the library is about, or None.

    Args:
        error: The error.
    """
    match = re.match(r"(?:size of )?([a-z_]+)=", str(error))
    return None if match is None else match[1]
