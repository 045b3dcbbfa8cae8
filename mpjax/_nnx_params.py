"""The parameters of an NNX module, and how its methods see them under a policy."""

import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpjax._policy import Policy


def own_params(module: nnx.Pytree) -> Iterator[tuple[str, nnx.Param]]:
    """The parameters among the attributes of a module, in lists and dicts as well."""
    for name, value in vars(module).items():
        params: list[nnx.Param] = []
        map_params(params.append, value)
        yield from ((name, param) for param in params)


def map_params(fn: Callable, value: Any) -> Any:
    """Replaces an attribute that is a parameter, or the parameters in a container."""
    kind = type(value)
    if issubclass(kind, nnx.Param):
        return fn(value)
    if kind is list or kind is tuple:
        items = [map_params(fn, item) for item in value]
        return value if all(map(operator.is_, items, value)) else kind(items)
    if kind is dict:
        items = {key: map_params(fn, item) for key, item in value.items()}
        same = all(items[key] is item for key, item in value.items())
        return value if same else items
    return value


def read(policy: Policy, param: nnx.Param) -> nnx.Param:
    """What a method gets that reads a parameter: one that shows the compute dtype."""
    stored: Any = param.get_raw_value()
    if isinstance(param, _Reader):
        return param
    if getattr(stored, "dtype", None) == policy.compute_dtype:
        return param
    kind: Any = _reader_type(type(param), policy)
    reader = kind.from_metadata(stored, param.get_metadata())
    object.__setattr__(reader, "_mpjax_param", param)
    return reader


class _Reader:
    """Shows a parameter in the compute dtype and passes on what is written to it.

    Comes before the class of the parameter in the types that ``_reader_type`` makes.
    Once a transformation has taken it apart and put it together again, it is a variable
    of its own that still shows its stored value in the compute dtype.
    """

    _mpjax_policy: Policy
    _mpjax_param: nnx.Param | None = None

    def get_value(self, **index):
        source: Any = super() if self._mpjax_param is None else self._mpjax_param
        return self._mpjax_policy.cast_to_compute(source.get_value(**index))

    def __getattr__(self, name):
        if self.has_metadata(name):
            return self.get_metadata(name)
        return getattr(self.get_value(), name)

    def set_value(self, value, **index):
        stored = self._mpjax_policy.param_dtype
        for leaf in jax.tree.leaves(value):
            dtype = getattr(leaf, "dtype", stored)
            if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < stored.itemsize:
                raise TypeError(
                    f"A method of the model writes a {dtype.name} value to a parameter "
                    f"kept in {stored.name}, which would round it: inside of methods "
                    "the model computes in a lower precision than it stores. Write "
                    "parameters from outside, as optimizers do."
                )
        self._write("set_value", value, **index)

    def set_raw_value(self, *args, **kwargs):
        self._write("set_raw_value", *args, **kwargs)

    def update_from_state(self, variable_state):
        self._write("update_from_state", variable_state)

    def set_metadata(self, *args, **kwargs):
        self._write("set_metadata", *args, **kwargs)

    def _write(self, method: str, *args, **kwargs):
        getattr(super(), method)(*args, **kwargs)
        if self._mpjax_param is not None:
            getattr(self._mpjax_param, method)(*args, **kwargs)


@functools.cache
def _reader_type(kind: type, policy: Policy) -> type:
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "_mpjax_policy": policy,
    }
    return types.new_class(
        kind.__name__, (_Reader, kind), exec_body=lambda ns: ns.update(namespace)
    )
