"""Recognition of errors that report exhausted memory."""

from __future__ import annotations

import errno

from kandinsky22.errors import KandinskyError

# Parts of messages, in lower case, with which torch, oneDNN, CUDA, the dynamic linker and memory mapping report that
# memory is exhausted. Most of them raise a plain RuntimeError, ImportError or OSError.
MEMORY_MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not allocate",
    "failed to allocate",
    "unable to allocate",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
    "could not map",
    "failed to map",
    "can't start new thread",
    "invalid buffer size",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, reports that memory is exhausted.

    Args:
        error: Any error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _says_out_of_memory(cause):
            return True
        cause = cause.__cause__
    return False


def _says_out_of_memory(error: BaseException) -> bool:
    # torch's exception class is compared by name, because the command imports torch only where it needs it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # Our own messages repeat values and file names, which may be any text.
    if isinstance(error, KandinskyError) or not isinstance(error, RuntimeError | ImportError | OSError):
        return False
    return any(message in str(error).lower() for message in MEMORY_MESSAGES)
