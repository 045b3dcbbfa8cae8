"""The names around an operation, and the mark of a region in full precision."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, overload

import jax

from mpjax._checks import check_callable

MARK = "mpjax.full_precision"
# Names that JAX gives to what it recomputes.
_OF_JAX = ("checkpoint", "rematted_computation", MARK)


@overload
def full_precision(fn: None = None) -> contextlib.AbstractContextManager[None]: ...


@overload
def full_precision(fn: Callable) -> Callable: ...


def full_precision(fn: Callable | None = None) -> Any:
    """Marks a region that ``autocast`` leaves in the dtypes in which it is written.

    A decorator or a context. Inside of the region every operation reads its operands
    in the dtypes that the program has without ``autocast``, float32 as a rule; so does
    its derivative, and so do functions that it calls, also if they are jitted. What
    leaves the region is cast where the next operation asks for that. Outside of
    ``autocast`` the mark does nothing; it is a name in the stack of `jax.named_scope`.

    Args:
      fn: the function to decorate; None: return a context manager.

    Returns:
      The function with its body in the region, or a context manager.

    Raises:
      TypeError: ``fn`` is not callable.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> @mpjax.full_precision
      ... def head(x, w):
      ...     return x @ w
      >>> def model(x, w):
      ...     with mpjax.full_precision():
      ...         x = x @ w
      ...     return head(x, w)
      >>> x = jnp.full((1, 1), 1.01)
      >>> float(mpjax.autocast(model)(x, x)[0, 0]) == float(model(x, x)[0, 0])
      True
    """
    if fn is None:
        return jax.named_scope(MARK)
    check_callable("fn", fn)

    @functools.wraps(fn)
    def marked(*args, **kwargs):
        with jax.named_scope(MARK):
            return fn(*args, **kwargs)

    return marked


class Scope:
    """The names around the equations of one jaxpr.

    Attributes:
      names: outermost first.
      is_marked: whether one of them marks full precision.
    """

    def __init__(self, names: tuple[str, ...] = (), is_marked: bool = False):
        self.names, self.is_marked = names, is_marked
        self._known: dict[Any, Scope] = {(): self}

    def of(self, eqn: Any) -> "Scope":
        """The scope of an equation of the jaxpr."""
        stack = eqn.source_info.name_stack.stack
        found = self._known.get(stack)
        if found is None:
            # What transformations leave in the stack has names too: "transpose", say.
            own = [entry.name for entry in stack if type(entry).__name__ == "Scope"]
            is_marked = self.is_marked or MARK in own
            names = *self.names, *(name for name in own if name not in _OF_JAX)
            found = self._known[stack] = Scope(names, is_marked)
        return found

    @property
    def path(self) -> str:
        """The names joined by "/", without repetitions that a backward pass has."""
        return "/".join(name for name, _ in itertools.groupby(_once(self.names)))

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells scopes apart."""
        return self.names, self.is_marked

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    for n in range(1, len(names) // 2 + 1):
        if names[:n] == names[n : 2 * n]:
            return _once(names[n:])
    return names
