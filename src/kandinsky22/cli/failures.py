"""One-line descriptions of the errors that the command reports."""

from __future__ import annotations

from kandinsky22.errors import KandinskyError, printable
from kandinsky22.generation.memory_errors import is_out_of_memory

OUT_OF_MEMORY = "out of memory; try a smaller --size, --low-memory, --dtype bfloat16 or another --device"

MIN_ADDRESS_SPACE = 10**9  # bytes; importing torch takes more


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
