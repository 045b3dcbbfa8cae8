"""Mixed precision for Flax NNX models.

Each module of a clone of the model gets a subclass of its class, which knows a policy.
Parameters, their paths and their types stay those of the bare model: a policy shows in
the graph definition, which is in the key of every jit cache, and not in the state.
"""

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpjax import _table
from mpjax._cpu_faults import conv_general_dilated
from mpjax._nnx_params import map_params, own_params, read
from mpjax._nnx_recipes import (
    HOOKS,
    attention,
    products_of,
    set_states,
    stand_in,
    stand_in_method,
)
from mpjax._policy import Policy, get_policy
from mpjax._rules import Rule, Rules, expand_rules, matcher
from mpjax._tree import cast_floating

# The policy of the module whose method runs; None outside of models. JAX has it in the
# key of its caches of traced functions, and each thread has its own.
_region = jax.make_user_context(None)

M = TypeVar("M", bound=nnx.Module)


def mixed_precision(model: M, rules: Rules) -> M:
    """Makes a model that computes under a policy, or under rules with one a layer.

    The result shares its arrays with ``model``, which stays as it is and usable (as
    long as no step donates the arrays). It has the same parameters at the same paths,
    so that states, checkpoints, optimizers and gradients fit both; outside of the
    model's methods they are in ``param_dtype``, and what methods write to them is too.

    A layer with a ``dtype`` attribute computes in its policy's ``compute_dtype``;
    parameters that a module reads itself are cast to it as they are read, inside the
    methods of the model and nowhere else. Where a module's policy differs from that of
    the module around it, floating arguments of its public methods are cast to
    ``compute_dtype`` and results to ``output_dtype``; elsewhere nothing is cast, so
    that under ``"mixed_bfloat16"`` everything between the model's inputs and its
    float32 outputs flows in bfloat16. Stock attention computes its softmax in float32.
    Batch statistics and other state than ``nnx.Param`` are left alone.

    Under a rule with a recipe Linear, Einsum and convolution layers, the projections of
    attention, ``Embed.attend`` and modules with a ``dot_general`` that is stock or None
    multiply in its formats. Delayed scaling adds `Scaling` variables to them, which
    `update_scaling` keeps.

    Args:
      model: an NNX module; its parameters may be ``jax.ShapeDtypeStruct``.
      rules: a policy, its name, or a list of ``mpjax.Rule``, the first match of which
        decides. Modules without a match are left alone.

    Returns:
      A model of the same kind (``isinstance`` holds).

    Raises:
      ValueError: a rule decides for no module or its recipe serves none, or a layer
        cannot follow its rule (complex parameters, a Linen module inside, a
        ``dot_general`` of its own); the message has the path.
      TypeError: ``model`` is no NNX module.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, mpjax.nnx
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> mixed = mpjax.nnx.mixed_precision(model, "p=f32,c=bf16")
      >>> mixed(jnp.ones((2, 4))).dtype.name, mixed.kernel[...].dtype.name
      ('bfloat16', 'float32')
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"mpjax.nnx.mixed_precision takes a flax.nnx.Module, got {model!r}. For a "
            "Linen module use mpjax.linen.MixedPrecision."
        )
    lookup = matcher(expand_rules(rules))
    model = nnx.clone(model)
    layers = _layers(model)
    seen = {path: _bare_type(layer) for path, (layer, *_) in layers.items()}
    found = {path: lookup.rule(path, kind) for path, kind in seen.items()}
    modules = {path: nodes[0] for path, nodes in layers.items()}
    served = {
        path: products_of(path, module, seen[path], found[path])
        for path, module in modules.items()
    }
    lookup.check_all_used(seen, served=served)
    set_states(modules, found, served)
    owners: dict[int, tuple[str, Policy]] = {}
    for path, nodes in layers.items():
        rule = found[path]
        if rule is None:
            below = (found[inner] for inner in layers if _is_inside(inner, path))
            if any(below) and _rule(nodes[0]) is None:
                _set_type(nodes[0], None)  # left alone, it ends the region around it
            continue
        rule, policy = _essence(rule, served[path]), get_policy(rule.policy)
        for node in nodes:
            _check(path, node)
            _store_params(path, node, policy, owners)
            # These two write what they normalize into the layer inside them.
            if not isinstance(node, nnx.WeightNorm | nnx.SpectralNorm):
                _set_dtype(path, node, policy)
                _set_type(node, rule)
    return model


def _essence(rule: Rule, served: set[str]) -> Rule:
    """What a class needs of a rule: classes of equal essence are one class."""
    rule = replace(rule, path=".*", module_type=None, optional=False)
    return rule if served else replace(rule, recipe=None, min_size=0, attention=False)


def _layers(model: nnx.Module) -> dict[str, list[nnx.Pytree]]:
    """By path, each module and the containers in it that hold parameters of its own."""
    nodes = {p: n for p, n in nnx.iter_graph(model) if isinstance(n, nnx.Pytree)}
    layers = {
        path: [node]
        for path, node in nodes.items()
        if not path
        or (isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict))
    }
    for path, node in nodes.items():
        if path not in layers and any(own_params(node)):
            while path not in layers:
                path = path[:-1]
            layers[path].append(node)
    return {
        "/".join(map(str, path)): layers[path] for path in sorted(layers, key=_order)
    }


def _order(path: tuple) -> list:
    return [(0, key, "") if isinstance(key, int) else (1, 0, str(key)) for key in path]


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(f"{outer}/"))


def _check(path: str, module) -> None:
    """Raises for what could only be left as it is without a word."""
    if isinstance(module, nnx.bridge.ToNNX):
        raise ValueError(
            f"Module {path!r} holds a Linen module, whose layers NNX does not see. "
            "Give nnx.bridge.ToNNX a mpjax.linen.MixedPrecision(module, rules), and "
            f"put mpjax.Rule({path!r}, None) first among the rules here."
        )
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param) and not issubclass(type(value), nnx.Param):
            raise ValueError(
                f"Parameter {name!r} of module {path!r} is a hijax variable, which "
                "shows its value without asking. Make it with hijax=False."
            )


def _store_params(path: str, module, policy: Policy, owners: dict) -> None:
    """Casts the parameters of a module to ``param_dtype``."""
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


def _set_dtype(path: str, module, policy: Policy) -> None:
    """Tells a module by its attributes to compute in ``compute_dtype``."""
    dtype = policy.compute_dtype
    if _has_dtype(module):
        for name, param in own_params(module):
            if any(map(jnp.iscomplexobj, jax.tree.leaves(param.get_value()))):
                raise ValueError(
                    f"Module {path!r} ({type(module).__name__}) has a complex "
                    f"parameter {name!r} and cannot compute in {dtype.name}. Put "
                    f"mpjax.Rule({path!r}, None) before the rule that matches it, to "
                    "leave it alone."
                )
        if "dtype" in vars(module):
            module.dtype = dtype
    for name, value in list(vars(module).items()):
        if value is nnx.dot_product_attention and dtype.itemsize == 2:
            setattr(module, name, attention)
        if value is jax.lax.conv_general_dilated:
            setattr(module, name, conv_general_dilated)
    if isinstance(module, nnx.MultiHeadAttention):
        for cache in module.cached_key, module.cached_value:
            if cache is not None:
                cache.set_value(policy.cast_to_compute(cache.get_value()))


def _has_dtype(module) -> bool:
    """Whether the module has a ``dtype`` that says what it computes in."""
    dtype = getattr(module, "dtype", "none")
    if not isinstance(dtype, str | type | np.dtype):
        return dtype is None
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # there is none, or another thing of that name
        return False


def _rule(module) -> Rule | None:
    return getattr(type(module), "_mpjax_rule", None)


def _bare_type(module) -> type:
    return getattr(type(module), "_mpjax_bare_type", type(module))


def _set_type(module, rule: Rule | None) -> None:
    is_pytree = not jax.tree_util.all_leaves([module])
    dtype = None
    if rule is not None and "dtype" not in vars(module) and _has_dtype(module):
        # In place of a property, or of the class's dtype.
        dtype = get_policy(rule.policy).compute_dtype
    module.__class__ = _mixed_type(_bare_type(module), rule, is_pytree, dtype)


@functools.cache
def _mixed_type(bare: type, rule: Rule | None, is_pytree: bool, dtype) -> type:
    """The subclass of a module class that follows a rule; None: that leaves it."""
    namespace = {
        "__module__": bare.__module__,
        "__qualname__": bare.__qualname__,
        "__doc__": bare.__doc__,
        "__reduce__": _reduce,
        "_mpjax_key": (bare, rule, is_pytree, dtype),
        "_mpjax_bare_type": bare,
        "_mpjax_rule": rule,
    }
    for name in _public_methods(bare):
        namespace[name] = _method(getattr(bare, name), rule)
    if rule is not None:
        namespace["__getattribute__"] = _getattribute(bare, rule)
        if issubclass(bare, nnx.SimpleCell):
            namespace["initialize_carry"] = _initialize_carry
        if issubclass(bare, nnx.MultiHeadAttention):
            namespace["init_cache"] = _init_cache
    if dtype is not None:
        namespace["dtype"] = dtype
    return types.new_class(
        bare.__name__, (bare,), {"pytree": is_pytree}, lambda ns: ns.update(namespace)
    )


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


def _getattribute(bare: type, rule: Rule) -> Callable:
    inherited: Callable = bare.__getattribute__
    show = functools.partial(read, get_policy(rule.policy))
    hooks = () if rule.recipe is None else HOOKS

    def getattribute(self, name):
        value = inherited(self, name)
        if _region.value is None or name == "__dict__":
            return value
        if name in hooks:
            return stand_in(self, name, value)
        return map_params(show, value)

    return getattribute


def _init_cache(self, input_shape, dtype=None):
    del dtype  # keys and values come in the compute dtype
    type(self)._mpjax_bare_type.init_cache(self, input_shape, _compute_dtype(self))


def _initialize_carry(self, *args, **kwargs):
    # This cell answers in its compute dtype, which a scan wants of the first carry too.
    carry = type(self)._mpjax_bare_type.initialize_carry(self, *args, **kwargs)
    return _cast(carry, _compute_dtype(self))


def _compute_dtype(module):
    return get_policy(type(module)._mpjax_rule.policy).compute_dtype


def _method(function: Callable, rule: Rule | None) -> Callable:
    policy = None if rule is None else get_policy(rule.policy)
    run = function
    if rule is not None and rule.recipe is not None:
        run = stand_in_method(function)

    @functools.wraps(function)
    def method(self, *args, **kwargs):
        if _region.value == policy:
            return run(self, *args, **kwargs)
        if rule is None or policy is None:
            with _region(None):
                return run(self, *args, **kwargs)
        if rule.cast_inputs:
            args, kwargs = _cast((args, kwargs), policy.compute_dtype)
        with _region(policy):
            outputs = run(self, *args, **kwargs)
        return _cast(outputs, policy.output_dtype)

    return method


def _cast(tree, dtype):
    """Casts the arrays among arguments or results; modules and states are no arrays."""
    return jax.tree.map(
        lambda leaf: leaf if _is_node(leaf) else cast_floating(leaf, dtype),
        tree,
        is_leaf=_is_node,
    )


def _is_node(value) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def tabulate(model: nnx.Module) -> str:
    """Shows what each layer of a model will do, before a step is run.

    Args:
      model: a model from ``mixed_precision``; its parameters may be
        ``jax.ShapeDtypeStruct``, from ``nnx.eval_shape``.

    Returns:
      A table with a row a module: path, type, policy ("-": left alone), the recipe of
      its products ("-": none uses it) and the dtypes and number of the parameters of
      its own.

    Example:
      >>> from flax import nnx
      >>> import mpjax.nnx
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> print(mpjax.nnx.tabulate(mpjax.nnx.mixed_precision(model, "mixed_bfloat16")))
      1 layers, 15 parameters in 60 bytes
        path   type     policy               recipe   dtypes   params
       ───────────────────────────────────────────────────────────────
               Linear   p=f32,c=bf16,o=f32   -        f32          15
    """
    rows = []
    for path, nodes in _layers(model).items():
        values = [p.get_raw_value() for node in nodes for _, p in own_params(node)]
        arrays = [leaf for leaf in jax.tree.leaves(values) if hasattr(leaf, "shape")]
        rule = _rule(nodes[0])
        policy, recipe = (rule.policy, rule.recipe) if rule else (None, None)
        rows.append((path, type(nodes[0]), policy, recipe, arrays))
    return _table.layers(rows)
