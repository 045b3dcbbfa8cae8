"""The modules of Linen whose methods run while a function is traced."""

import contextlib
from collections.abc import Iterator

import flax.linen as nn

from mpjax._linen.wrapper import MixedPrecision


@contextlib.contextmanager
def modules_called() -> Iterator[dict[str, type]]:
    """Collects the classes of modules by their paths, as rules have them.

    Paths begin at the wrapper around a module, or else at the model that is applied:
    ``""`` is the model itself. What JAX remembers to have traced before does not run,
    and does not show.
    """
    wrappers: set[tuple[str, ...]] = set()
    called: dict[str, type] = {}

    def note(next_method, args, kwargs, context):
        module = context.module
        if isinstance(module, MixedPrecision):
            wrappers.add(module.path)
            called.setdefault("", type(module.module))
        else:
            above = (w for w in wrappers if module.path[: len(w)] == w)
            names = module.path[len(max(above, key=len, default=())) :]
            called.setdefault("/".join(names), type(module))
        return next_method(*args, **kwargs)

    with nn.intercept_methods(note):
        yield called
