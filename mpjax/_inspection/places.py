"""Where in the code a step of a program comes from, and who wrote that."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import jax

from mpjax._inspection.steps import Step

_PLUMBING = (contextlib.__file__, functools.__file__)  # what decorators call
Author: TypeAlias = Literal["mpjax", "library", "user"]


def where(step: Step) -> str:
    """The innermost line of the user's code, as "file:line in function", or ""."""
    for frame in _frames(step):
        if not frame.file_name.startswith(_libraries()):
            file = os.path.basename(frame.file_name)
            return f"{file}:{frame.line_num} in {frame.function_name}"
    return ""


def function_of_jax(step: Step) -> str:
    """The function of JAX that a line of the user's calls for a step, or ""."""
    jaxs, names = _libraries()[1], []
    for frame in _frames(step):
        if not frame.file_name.startswith(jaxs):
            # Methods and operators of arrays call the function that they stand for.
            is_method = names and names[-1].endswith((".meth", ".op"))
            return names[-2 if is_method else -1] if len(names) > 1 else ""
        names.append(frame.function_name)
    return ""


def author(step: Step) -> Author:
    """Who wrote the line that asks JAX for a step."""
    here, jaxs, *others = _libraries()
    for frame in _frames(step):
        if frame.file_name.startswith(here):
            return "mpjax"
        if frame.file_name.startswith(tuple(others)):
            return "library"
        if not frame.file_name.startswith(jaxs):
            return "user"
    return "library"


def reads_parameter(step: Step) -> bool:
    """Whether mpjax makes a step where a module reads a parameter of its own."""
    here, jaxs, *_ = _libraries()
    for frame in _frames(step):
        if frame.file_name.startswith(here):
            if os.path.basename(frame.file_name) == "parameters.py":
                return True
        elif not frame.file_name.startswith(jaxs):
            return False
    return False


def is_called_in(step: Step, name: str) -> bool:
    """Whether a function of JAX of this name asks for a step."""
    jaxs = _libraries()[1]
    return any(
        frame.function_name == name and frame.file_name.startswith(jaxs)
        for frame in _frames(step)
    )


def _frames(step: Step) -> Iterator[Any]:
    """The lines that lead to a step, the innermost first."""
    for eqn in (step.eqn, *reversed(step.calls)):
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback else ():
            if frame.file_name not in _PLUMBING:
                yield frame


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Folders whose lines are not those of the user: mpjax, JAX, and others."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # mpjax
    packages = os.path.dirname(os.path.dirname(os.path.abspath(jax.__file__)))
    names = ("jax", "flax", "optax", "numpy", "haiku", "equinox")
    return (here + os.sep, *(os.path.join(packages, n) + os.sep for n in names))
