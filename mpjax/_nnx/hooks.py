"""Subclasses of modules whose bases have an ``__init_subclass__`` of their own.

Such a model keeps a registry of the classes that its authors write:

    class Registered:
        def __init_subclass__(cls, *, key, **kwargs):
            super().__init_subclass__(**kwargs)
            REGISTRY[key] = cls

    class Model(Registered, nnx.Module, key="model"): ...

A class that `classes.py` derives from ``Model`` has no ``key``, and no place in the
registry. All other models get ordinary subclasses.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, Generic

from flax import nnx

from mpjax._layers.dtypes import is_of_flax

_MARK = "_mpjax_key"  # in the namespace of the classes that mpjax derives


def bare_type(module: Any) -> type:
    """The class of a module without a rule."""
    return getattr(type(module), "_mpjax_bare_type", type(module))


def derive(bare: type, is_pytree: bool, namespace: Mapping[str, Any]) -> type:
    """A subclass of a module class, which no ``__init_subclass__`` of a model sees.

    Args:
      bare: the class of a module.
      is_pytree: whether its modules are pytrees, as for ``nnx.Pytree``.
      namespace: of the subclass; has ``_mpjax_key``.
    """
    keywords: dict[str, Any] = {"pytree": is_pytree}
    if _has_hook(bare):
        keywords["metaclass"] = _metaclass(type(bare))
    return types.new_class(
        bare.__name__, (bare,), keywords, lambda ns: ns.update(namespace)
    )


def _has_hook(bare: type) -> bool:
    return any(
        "__init_subclass__" in vars(base) and not is_of_flax(base, "nnx")
        for base in bare.__mro__
        if base not in (object, Generic)
    )


class _First:
    """Comes right behind a derived class and calls the hook of ``nnx.Pytree`` alone."""

    def __init_subclass__(cls, **kwargs):
        if _MARK not in vars(cls):
            return super().__init_subclass__(**kwargs)
        vars(nnx.Pytree)["__init_subclass__"].__func__(cls, **kwargs)


class _Last:
    """Comes after ``nnx.Pytree``, before hooks of a model that stand behind it."""

    def __init_subclass__(cls, **kwargs):
        if _MARK not in vars(cls):
            super().__init_subclass__(**kwargs)


@functools.cache
def _metaclass(kind: Any) -> type:
    """A metaclass that puts these two among the bases of a derived class.

    As written bases they would change the layout of the class, and Python lets no
    module take a class of another layout.
    """

    def mro(cls):
        order = kind.mro(cls)
        if _MARK in vars(cls):
            order.insert(order.index(nnx.Pytree) + 1, _Last)
            order.insert(1, _First)
        return order

    return type(kind)(kind.__name__, (kind,), {"mro": mro})
