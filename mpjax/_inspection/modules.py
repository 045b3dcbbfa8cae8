"""The modules of a model, and which of them a step of a program belongs to."""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

_WRAPPER = "MixedPrecision"
# Part of the keys by which JAX remembers traces.
_collecting = jax.make_user_context(None)


@contextlib.contextmanager
def modules_of(
    fn: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> Iterator[dict[str, type]]:
    """Collects the classes of modules, by the paths that rules have for them.

    Of NNX these are the modules among the arguments, of Linen those that run while the
    function is traced. For these to run JAX traces again what it has traced before.
    """
    found: dict[str, type] = {}
    if "flax.nnx" in sys.modules:  # or no argument can be a module
        from mpjax._nnx.paths import modules_given

        owner = fn.__self__ if inspect.ismethod(fn) else fn
        found |= modules_given((owner, args, dict(kwargs)))
    if "flax.linen" not in sys.modules:
        yield found
        return
    from mpjax._linen.called import modules_called

    with modules_called() as called, _collecting(object()):
        yield found
    found |= called


class ModulePaths:
    """Finds the module that a path of a traced program ends in.

    Such a path has scopes in it that are no modules, and above the model the names of
    what it is in.

    Args:
      modules: classes by path, as `modules_of` collects them.
    """

    def __init__(self, modules: Mapping[str, type]):
        self.known = frozenset(modules)
        self._roots = {_WRAPPER} | {
            modules[path].__name__ for path in modules if path == ""
        }
        self._above = {
            "/".join(path.split("/")[:n])
            for path in modules
            for n in range(1, path.count("/") + 2)
        }

    def module(self, path: str) -> str | None:
        """The path of the innermost module, as rules have it; None: there is none.

        Example:
          >>> paths = ModulePaths({"": object, "mlp": object, "mlp/up": object})
          >>> paths.module("MixedPrecision/Model/mlp/softmax/mlp.call")
          'mlp'
          >>> paths.module("loss") is None
          True
        """
        names = [re.sub(r"\.\w+$", "", name) for name in path.split("/")]
        at = next((i for i, name in enumerate(names) if name in self._roots), None)
        if at is None or not self.known:
            return None
        here = ""
        for name in names[at + 1 :]:
            ahead = f"{here}/{name}" if here else name
            if ahead in self._above:
                here = ahead
        while here and here not in self.known:
            here = here.rpartition("/")[0]
        return here


def pattern_of(paths: list[str], known: frozenset[str]) -> str:
    r"""Writes a regular expression that matches some paths, and no other that is known.

    Args:
      paths: of modules.
      known: the paths of all modules.

    Example:
      >>> every = frozenset(["", "a_0/up", "a_1/up", "a_2/up", "head"])
      >>> pattern_of(["a_0/up", "a_1/up", "a_2/up", "head"], every)
      'a_\\d+/up|head'
      >>> pattern_of(["", "a_0/up", "a_2/up"], every)
      '|a_(0|2)/up'
    """
    groups: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        groups.setdefault(re.sub(r"\d+", "0", path), []).append(path)
    parts: list[str] = []
    for group in groups.values():
        pieces = list(zip(*(re.split(r"(\d+)", path) for path in group), strict=True))
        for form in (r"\d+", None):  # any number, or one of those
            folded = "".join(_any_of(some, form) for some in pieces)
            matched = {path for path in known if re.fullmatch(folded, path)}
            if matched <= {*paths}:
                parts.append(folded)
                break
        else:
            parts += map(re.escape, group)
    return "|".join(parts)


def _any_of(texts: Sequence[str], form: str | None) -> str:
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    if len(distinct) == 1:
        return re.escape(distinct[0])
    return form or f"({'|'.join(distinct)})"
