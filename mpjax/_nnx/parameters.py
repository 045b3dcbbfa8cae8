"""The parameters of an NNX module, and how its methods see them under a policy."""

import functools
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from mpjax._policies.policy import Policy


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


def cast_stored(path: str, module: nnx.Pytree, policy: Policy, owners: dict) -> None:
    """Casts the parameters of a module to ``param_dtype``.

    Args:
      path: of the module, for errors.
      module: is changed.
      policy: of the module.
      owners: by id of a parameter, path and policy of the first module that had it.

    Raises:
      ValueError: another module stores a parameter in another dtype.
    """
    for name, param in own_params(module):
        first, other = owners.setdefault(id(param), (path, policy))
        if other.param_dtype != policy.param_dtype:
            raise ValueError(
                f"Modules {first!r} and {path!r} share parameter {name!r}, and their "
                f"policies, {other} and {policy}, store it in two dtypes. Give them "
                "the same param_dtype."
            )
        value = param.get_value()
        cast = policy.cast_to_param(value)
        if any(map(operator.is_not, jax.tree.leaves(value), jax.tree.leaves(cast))):
            param.set_raw_value(jax.new_ref(cast) if param.ref else cast)


# A method that holds a reader gets it again, so that tied parameters are one. At each
# level of tracing it is another, as a variable can be written at its own level only.
_readers: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()


def reader_for(policy: Policy, param: nnx.Param) -> nnx.Param:
    """What a method gets that reads a parameter: one that shows the compute dtype."""
    stored: Any = param.get_raw_value()
    if isinstance(param, _Reader):
        return param
    if getattr(stored, "dtype", None) == policy.compute_dtype:
        return param
    kind: Any = _reader_type(type(param), policy)
    key, trace = (threading.get_ident(), id(param), kind), get_opaque_trace_state()
    known = _readers.get(key)
    if known is not None and known._mpjax_trace == trace:
        if known.get_raw_value() is stored:
            return known
    reader = kind.from_metadata(stored, param.get_metadata())
    object.__setattr__(reader, "_mpjax_param", param)
    object.__setattr__(reader, "_mpjax_trace", trace)
    _readers[key] = reader
    return reader


def unwrap_for_storage(policy: Policy, param: nnx.Param) -> nnx.Param:
    """What a module keeps of a parameter that a method assigns to it.

    Raises:
      TypeError: the parameter has fewer bits than ``param_dtype``.
    """
    if isinstance(param, _Reader):
        return param._mpjax_stored()
    _check_bits(policy, param.get_raw_value())
    return param


def _check_bits(policy: Policy, value: Any) -> None:
    stored = policy.param_dtype
    for leaf in jax.tree.leaves(value):
        dtype = getattr(leaf, "dtype", stored)
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < stored.itemsize:
            raise TypeError(
                f"A method of the model writes a {dtype.name} value to a parameter "
                f"kept in {stored.name}, which would round it: inside of methods "
                "the model computes in a lower precision than it stores. Write "
                "parameters from outside, as optimizers do."
            )


class _Reader:
    """Shows a parameter in the compute dtype and passes on what is written to it.

    Comes before the class of the parameter in the types that ``_reader_type`` makes.
    Once a transformation has taken it apart and put it together again, it is a variable
    of its own that still shows its stored value in the compute dtype.
    """

    _mpjax_policy: Policy
    _mpjax_param: nnx.Param | None = None
    _mpjax_kind: Any

    def get_value(self, **index):
        source: Any = super() if self._mpjax_param is None else self._mpjax_param
        return self._mpjax_policy.cast_to_compute(source.get_value(**index))

    def __getattr__(self, name):
        if self.has_metadata(name):
            return self.get_metadata(name)
        return getattr(self.get_value(), name)

    def set_value(self, value, **index):
        _check_bits(self._mpjax_policy, value)
        self._write("set_value", value, **index)

    def set_raw_value(self, *args, **kwargs):
        self._write("set_raw_value", *args, **kwargs)

    def update_from_state(self, variable_state):
        self._write("update_from_state", variable_state)

    def set_metadata(self, *args, **kwargs):
        self._write("set_metadata", *args, **kwargs)

    def _mpjax_stored(self) -> nnx.Param:
        if self._mpjax_param is not None:
            return self._mpjax_param
        reader: Any = self
        value, metadata = reader.get_raw_value(), reader.get_metadata()
        return self._mpjax_kind.from_metadata(value, metadata)

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
        "_mpjax_kind": kind,
    }
    return types.new_class(
        kind.__name__, (_Reader, kind), exec_body=lambda ns: ns.update(namespace)
    )
