"""The classes that modules of a mixed NNX model have: a bare class and a decision.

Their methods run under the policy of the decision, and see parameters in its compute
dtype.
"""

import functools
import inspect
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from mpjax._layers.dtypes import (
    any_complex,
    complex_error,
    is_frequency,
    is_of_flax,
    perturb_wide,
    says_dtype,
)
from mpjax._layers.errors import mixed_dtypes, no_pytree
from mpjax._layers.loops import frame_id
from mpjax._layers.region import (
    Exit,
    RunningMethod,
    loop_between,
    rounded_within,
    running_method,
    running_policy,
)
from mpjax._layers.results import NoPytreeError
from mpjax._nnx.hooks import bare_type, derive
from mpjax._nnx.parameters import map_params, reader_for, unwrap_for_storage
from mpjax._nnx.recipes import (
    hook_names,
    replacement_for,
    replacement_method,
    with_own_products,
)
from mpjax._nnx.scope_names import note, running_path, scope
from mpjax._nnx.sums import shown_attributes, summing_method
from mpjax._policies.lookup import Decision
from mpjax._policies.policy import Policy, spelled_like
from mpjax._tree import cast_floating, opaque

_is_opaque = opaque(nnx.Pytree, nnx.Variable)


def decision_of(module) -> Decision | None:
    """What a module follows; None: it is bare, or left alone."""
    return getattr(type(module), "_mpjax_decision", None)


def set_type(module, decision: Decision | None) -> None:
    """Makes a module follow a decision; None: end the region around it."""
    is_pytree = not jax.tree_util.all_leaves([module])
    dtype = None
    no_dtype = "dtype" not in vars(module)
    if decision is not None and no_dtype and computes_in_a_dtype(module):
        # In place of a property, or of the class's dtype.
        dtype = spelled_like(module.dtype, decision.policy.compute_dtype)
    module.__class__ = _mixed_type(bare_type(module), decision, is_pytree, dtype)


# For good, as JAX and Flax keep every class of modules in their registries.
@functools.cache
def _mixed_type(bare: type, decision: Decision | None, is_pytree: bool, dtype) -> type:
    """The subclass of a module class that follows a decision; None: left alone.

    Its ``__name__`` is that of the bare class, for scopes and tables; its
    ``__qualname__``, in the repr of the class, has the policy as well.
    """
    suffix = "" if decision is None else f"[{decision.policy}]"
    namespace = {
        "__module__": bare.__module__,
        "__qualname__": bare.__qualname__ + suffix,
        "__doc__": bare.__doc__,
        "_mpjax_key": (bare, decision, is_pytree, dtype),
        "_mpjax_bare_type": bare,
        "_mpjax_decision": decision,
        "__reduce__": _reduce,
    }
    for name in _public_methods(bare):
        namespace[name] = _method(bare, name, decision)
    namespace["__getattribute__"] = _getattribute(bare, decision)
    if decision is not None:
        namespace["__setattr__"] = _setattr(bare, decision)
        if issubclass(bare, nnx.Module):
            namespace["perturb"] = _perturb
        if issubclass(bare, nnx.SimpleCell):
            namespace["initialize_carry"] = _initialize_carry
        if issubclass(bare, nnx.MultiHeadAttention):
            namespace["init_cache"] = _init_cache
    if dtype is not None:
        namespace["dtype"] = dtype
    return derive(bare, is_pytree, namespace)


def _reduce(self):
    return _new, type(self)._mpjax_key, vars(self).copy()


def _new(*key) -> nnx.Module:
    return object.__new__(_mixed_type(*key))


def _public_methods(bare: type) -> Iterator[str]:
    """Names of the methods with which the world outside may run a module."""
    if not issubclass(bare, nnx.Module) or issubclass(bare, nnx.List | nnx.Dict):
        return
    for name in set(dir(bare)) - set(dir(nnx.Module)):
        method = inspect.getattr_static(bare, name)
        if (
            (name == "__call__" or not name.startswith("_"))
            and callable(method)
            and hasattr(method, "__get__")
            and not isinstance(method, type | staticmethod | classmethod)
        ):
            yield name


def _getattribute(bare: type, decision: Decision | None) -> Callable:
    inherited: Callable = bare.__getattribute__
    policy = None if decision is None else decision.policy
    hooks = () if decision is None or decision.recipe is None else hook_names(bare)

    def getattribute(self, name):
        value = inherited(self, name)
        if name == "__dict__":
            return value
        module, shown = shown_attributes.get()
        if module is self and name in shown:
            return shown[name]
        note(self, name, value)
        if policy is None or running_policy.value is None:
            return value
        if name in hooks:
            return replacement_for(self, name, value)
        if is_frequency(name):
            return value
        return map_params(functools.partial(reader_for, policy), value)

    return getattribute


def _setattr(bare: type, decision: Decision) -> Callable:
    inherited: Callable = bare.__setattr__
    kept = functools.partial(unwrap_for_storage, decision.policy)

    def setattr_(self, name, value):
        if running_policy.value is not None:
            value = map_params(kept, value)
        inherited(self, name, value)

    return setattr_


def _perturb(self, name, value, *args, **kwargs):
    perturb = type(self)._mpjax_bare_type.perturb
    if running_policy.value is None:
        return perturb(self, name, value, *args, **kwargs)
    return perturb_wide(lambda v: perturb(self, name, v, *args, **kwargs), value)


def _init_cache(self, input_shape, dtype=None):
    del dtype  # keys and values come in the compute dtype
    type(self)._mpjax_bare_type.init_cache(self, input_shape, _compute_dtype(self))


def _initialize_carry(self, *args, **kwargs):
    # This cell answers in its compute dtype, which a scan wants of the first carry too.
    carry = type(self)._mpjax_bare_type.initialize_carry(self, *args, **kwargs)
    return _cast(carry, _compute_dtype(self))


def _compute_dtype(module):
    return type(module)._mpjax_decision.policy.compute_dtype


def _method(bare: type, name: str, decision: Decision | None) -> Callable:
    function = getattr(bare, name)
    policy = None if decision is None else decision.policy
    run = function
    if decision is not None and decision.recipe is not None:
        run = replacement_method(function)
        if decision.own_products:
            run = with_own_products(run)
    if policy is not None:
        run = summing_method(function, policy, run)
    of_flax = is_of_flax(function, "nnx")
    is_layer = of_flax and not issubclass(bare, nnx.Sequential)
    casts_outputs = decision is not None and decision.cast_outputs

    def under_policy(self, *args, **kwargs):
        if policy is not None and of_flax:
            _check_real(self, policy, (*args, *kwargs.values()))
        around, trace = running_policy.value, get_opaque_trace_state()
        outer, given = running_method.get(), (args, kwargs)
        handed, rounded = loop_between(outer, trace), rounded_within(outer, trace)
        is_new = is_layer or (outer is not None and outer.module is self)
        if decision is not None and around != policy and decision.cast_inputs:
            args, kwargs = _cast(given, decision.policy.compute_dtype)
        running = RunningMethod(self, trace, frame_id(), rounded)
        token = running_method.set(running)
        try:
            if around == policy:
                outputs = run(self, *args, **kwargs)
            else:
                with running_policy(policy):
                    outputs = run(self, *args, **kwargs)
            way = policy, around, outer, handed, rounded
            end = Exit(*way, casts_outputs, is_new)
            return end.cast(outputs, given, _is_opaque)
        except NoPytreeError as error:
            assert policy is not None  # which it was to be cast for
            raise no_pytree(bare, running_path(), str(error), policy) from None
        except TypeError as error:
            if policy is None or (told := _explain(error, bare, policy)) is None:
                raise
            raise told from error
        finally:
            running_method.reset(token)

    @functools.wraps(function)
    def method(self, *args, **kwargs):
        with scope(self, name):
            return under_policy(self, *args, **kwargs)

    return method


def _explain(error: TypeError, bare: type, policy: Policy) -> TypeError | None:
    path = running_path()
    inside = path.partition("/")[2]  # of the module whose method was called first
    below = f"{inside}(/.*)?" if inside else ".*"
    return mixed_dtypes(error, path, bare, policy, f"the policy {policy}", below)


def _check_real(module, policy: Policy, args: tuple) -> None:
    """Raises where a layer of Flax would drop the imaginary part of an argument."""
    arrays = [arg for arg in args if isinstance(arg, jax.Array | np.ndarray)]
    if any_complex(arrays) and computes_in_a_dtype(module):
        raise complex_error(type(module), None, policy, "argument")


def _cast(tree, dtype):
    """Casts the arrays among arguments or results; modules and states are no arrays."""
    return jax.tree.map(
        lambda leaf: leaf if _is_node(leaf) else cast_floating(leaf, dtype),
        tree,
        is_leaf=_is_node,
    )


def _is_node(value) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def computes_in_a_dtype(module) -> bool:
    """Whether the ``dtype`` of a module says what it computes in."""
    return says_dtype(getattr(module, "dtype", "none"))
