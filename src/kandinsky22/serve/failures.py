"""Errors of the API."""

from __future__ import annotations

import re

from kandinsky22.errors import KandinskyError


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
