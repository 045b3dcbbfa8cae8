"""Names of an NNX model's modules in what it is traced to, as Linen gives them.

A module does not know what it is called: in its graph definition a path would make
equal layers unequal, and each a trace of its own. So a method notes the modules that it
reads, and one of these whose method runs opens a scope of the name it was read by. A
module that a transformation has put together anew was not read: it has the name of the
only one of its class that was, or that of its class.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

_CONTAINERS = (nnx.List, nnx.Dict, list, tuple, dict)
_READ = (nnx.Pytree, list, tuple, dict)


class _RunningMethod(NamedTuple):
    """A method that runs: its module, and by id the modules read and their names."""

    path: str
    module: nnx.Pytree
    read: dict[int, tuple[nnx.Pytree, str]]


_running: contextvars.ContextVar[_RunningMethod | None] = contextvars.ContextVar(
    "mpjax_nnx_scopes", default=None
)


@contextlib.contextmanager
def scope(module: nnx.Pytree, method: str) -> Iterator[None]:
    """Names what a method of a module does; a method of the one that runs does not."""
    outer = _running.get()
    name = type(module).__name__ if outer is None else _name(module, outer)
    if not name:
        yield
        return
    path = name if outer is None else f"{outer.path}/{name}"
    token = _running.set(_RunningMethod(path, module, {}))
    try:
        with jax.named_scope(name if method == "__call__" else f"{name}.{method}"):
            yield
    finally:
        _running.reset(token)


def running_path() -> str:
    """The name of the module whose method runs, below those that have called it."""
    run = _running.get()
    return "" if run is None else run.path


def note(holder: nnx.Pytree, name: str, value: Any) -> None:
    """Notes the modules in an attribute that a method reads."""
    run = _running.get()
    if run is not None and isinstance(value, _READ):
        # Through a module none of whose methods runs, such as `self.encoder.norm`.
        _, prefix = run.read.get(id(holder), (None, ""))
        _note(run, f"{prefix}/{name}" if prefix else name, value)


def _note(run: _RunningMethod, path: str, value: Any) -> None:
    if isinstance(value, nnx.Pytree):
        run.read[id(value)] = value, path
    if isinstance(value, _CONTAINERS):
        for key, item in _items(value):
            if isinstance(item, _READ):
                _note(run, f"{path}/{key}", item)


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(container, list | tuple):
        return enumerate(container)
    return (container if isinstance(container, dict) else vars(container)).items()


def _name(module: nnx.Pytree, run: _RunningMethod) -> str:
    """By what name a method has read a module; "" for its own."""
    if module is run.module:
        return ""
    if id(module) in run.read:
        return run.read[id(module)][1]
    kind = type(module)
    alike = {name for other, name in run.read.values() if type(other) is kind}
    if len(alike) == 1:
        return alike.pop()
    return "" if kind is type(run.module) and not alike else kind.__name__
