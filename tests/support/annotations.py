"""Holds annotations of the core to what its functions take and return in tests.

Every function and method of CORE is wrapped as its module is imported. A call that
raises says nothing about annotations, so that tests of bad input see the library's own
errors; a call that returns was given, and gave, what is annotated, or the test fails.
``jaxtyping``'s own hook checks arguments before the function sees them, and would hide
those errors.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import typing

import jax.export
import jax.numpy as jnp
from beartype import BeartypeConf
from beartype.door import is_bearable

# The folders that pyright holds to its strict rules too.
CORE = ("mpjax._numerics.", "mpjax._recipes.", "mpjax._products.")
# An int is a float, as for every static checker.
CONF = BeartypeConf(is_pep484_tower=True)


class WrongAnnotation(BaseException):
    """Not an ``Exception``: no ``except`` of the library or of a test hides it."""


def install():
    """For all modules of the core that are not imported yet."""
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(CORE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(
            spec.loader, importlib.machinery.SourceFileLoader
        ):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        _wrap_functions(module, module.__name__)
        for value in list(vars(module).values()):
            if inspect.isclass(value) and value.__module__ == module.__name__:
                _wrap_functions(value, module.__name__)


def _wrap_functions(holder, module):
    for name, value in list(vars(holder).items()):
        # Constructors are dunders: JAX builds pytrees of anything.
        if inspect.isfunction(value) and value.__module__ == module:
            if not name.startswith("__"):
                setattr(holder, name, check(value))


def check(function):
    """The function, whose calls are compared with its annotations."""
    signature, hints = inspect.signature(function), None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal hints
        result = function(*args, **kwargs)
        if hints is None:
            hints = _hints(function)
        given = {**signature.bind(*args, **kwargs).arguments, "return": result}
        for name, hint in hints.items():
            if name in given and not _fits(given[name], hint, signature, name):
                raise WrongAnnotation(
                    f"{function.__module__}.{function.__qualname__}: {name} is "
                    f"annotated as {hint}, and was {given[name]!r:.200} of "
                    f"{type(given[name])}."
                )
        return result

    return call


def _hints(function):
    try:
        return typing.get_type_hints(function)
    except NameError:  # of a type that is imported for static checkers alone
        return {}


def _fits(value, hint, signature, name):
    kind = signature.parameters[name].kind if name in signature.parameters else None
    values = [value]
    if kind == inspect.Parameter.VAR_POSITIONAL:
        values = value
    elif kind == inspect.Parameter.VAR_KEYWORD:
        values = value.values()
    return all(_is(each, hint) for each in values)


def _is(value, hint):
    if type(value) is tuple:  # a shape in which jax.export has sizes without value
        value = tuple(1 if jax.export.is_symbolic_dim(each) else each for each in value)
    if is_bearable(value, hint, conf=CONF):
        return True
    # Transformations put numpy arrays, shapes and symbolic zeros in place of arrays.
    in_place_of_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return in_place_of_array and is_bearable(jnp.zeros(()), hint, conf=CONF)
