"""Why a compiler gave no answer: refused, crashed, killed, or without a disk."""

import re
import signal

_RAISED = re.compile(r"[A-Za-z][\w.]*(Error|Exception)\b: ")
_LONGEST = 2000  # characters of an error message
_FULL_DISK = "No space left on device", "Disk quota exceeded"
_NO_MEMORY = "std::bad_alloc", "MemoryError", "Cannot allocate memory"
# What a compiler raises itself, on a program that it cannot take.
_CRASHES = ("SIGABRT", "SIGSEGV", "SIGILL", "SIGFPE", "SIGTRAP")


def shorten(message: str) -> str:
    """Cuts a message of a library to what a person reads."""
    return message[:_LONGEST]


def full_disk(target: str, directory: str) -> str:
    """What to tell the user if the program or what comes of it cannot be written."""
    return (
        f"The disk is full, which says nothing about this program: the compiler for "
        f"{target} writes to {directory}. Free space there, or set TMPDIR to a folder "
        "that has some."
    )


def timed_out(target: str, timeout: float) -> str:
    """What to tell the user if the compiler has not finished in time."""
    return (
        f"The compiler for {target} was ended: it had not finished this program after "
        f"timeout={timeout:g} seconds. Allow more, take quick=True on a TPU, or "
        "report on a smaller program."
    )


def failure(target: str, directory: str, status: int, errors: str) -> str:
    """Explains why a compiler ended without an answer.

    Args:
      target: name of the device.
      directory: where it wrote.
      status: its exit status: of a signal, the number negated or 128 and the number.
      errors: what it wrote to standard error.
    """
    said = _said(errors)
    if any(text in errors for text in _FULL_DISK):
        return f"{full_disk(target, directory)}\n{said}".rstrip()
    by = _signal(status)
    if (by and by not in _CRASHES) or any(text in errors for text in _NO_MEMORY):
        why = f"was killed by {by}" if by else f"found no memory (exit status {status})"
        return (
            f"The compiler for {target} {why}, which says nothing about this program: "
            "the system does so if its memory is used up. Free some, or report on a "
            f"smaller program.\n{said}"
        ).rstrip()
    if by:
        return f"The compiler for {target} crashed on this program ({by}):\n{said}"
    return (
        f"The compiler for {target} refused this program (exit status {status}):\n"
        f"{said}"
    )


def _said(errors: str) -> str:
    """The last error among the lines that a compiler wrote, or the last of them."""
    lines = [line for line in errors.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line)]
    return shorten("\n".join(lines[raised[-1] :][:20] if raised else lines[-20:]))


def _signal(status: int) -> str:
    """The name of the signal that ended a process, or ""."""
    number = -status if status < 0 else status - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""
