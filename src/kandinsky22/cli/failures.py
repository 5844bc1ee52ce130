"""One-line descriptions of the errors that the command reports."""

from __future__ import annotations

import errno

from kandinsky22.errors import KandinskyError, printable

OUT_OF_MEMORY = "out of memory; try a smaller --size, --low-memory, --dtype bfloat16 or another --device"

MIN_ADDRESS_SPACE = 10**9  # bytes; importing torch and transformers takes more

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


def failure_message(error: BaseException) -> str | None:
    """Return the description of an error, or None for an error that only a defect of kandinsky22 raises.

    Args:
        error: The error that ended a command.
    """
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = error.filename
        text = name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)
        return printable(f"{text}: {error.strerror}")
    if isinstance(error, KandinskyError | OSError):
        message = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return printable(" ".join(message.split())) or type(error).__name__
    return None


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


def check_address_space() -> None:
    """Raise an error if the address space of this process is limited to less than importing torch takes.

    Below the limit, the C++ runtime may end the process before Python can report anything.

    Raises:
        MemoryError: If the limit is that low.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < MIN_ADDRESS_SPACE:
        raise MemoryError
