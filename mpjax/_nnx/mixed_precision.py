"""Mixed precision for Flax NNX models.

Each module of a clone of the model gets a subclass of its class, which knows a policy.
Parameters, their paths and their types stay those of the bare model: a policy shows in
the graph definition, which is in the key of every jit cache, and not in the state.
"""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import jax
from flax import nnx

from mpjax._layers.dtypes import any_complex, complex_error
from mpjax._layers.table import unserved_reason
from mpjax._nnx.attention import attention
from mpjax._nnx.classes import computes_in_a_dtype, decision_of, set_type
from mpjax._nnx.hooks import bare_type
from mpjax._nnx.layers import is_inside, layers_by_path
from mpjax._nnx.parameters import cast_stored, own_params
from mpjax._nnx.recipes import served_product_names
from mpjax._nnx.scaling import ScalingStat
from mpjax._nnx.states import keep_copies, set_states
from mpjax._nnx.structure import structures_of
from mpjax._policies.lookup import Decision, Matcher
from mpjax._policies.policy import Policy, spelled_like
from mpjax._policies.roles import UNKNOWN
from mpjax._policies.rule import Rules, read_rules
from mpjax._products.xla_cpu import conv_general_dilated

M = TypeVar("M", bound=nnx.Module)


def mixed_precision(model: M, rules: Rules) -> M:
    """Makes a model that computes under a policy, or under rules with one a layer.

    The result shares its arrays with ``model``, which stays as it is and usable (as
    long as no step donates the arrays). It has the same parameters at the same paths,
    so that states, checkpoints, optimizers and gradients fit both; outside of the
    model's methods they are in ``param_dtype``. A method that would round one, as it
    writes there what it computed in fewer bits, raises a TypeError.

    A layer with a ``dtype`` attribute computes in its policy's ``compute_dtype``;
    parameters that a module reads itself are cast to it as they are read, inside the
    methods of the model and nowhere else. Where a module's policy differs from that of
    the module around it, floating arguments of its public methods are cast to
    ``compute_dtype`` and results to ``output_dtype``. So under ``"mixed_bfloat16"``
    everything between the model's inputs and its float32 outputs flows in bfloat16.
    What a module is given and returns changed leaves it in the dtype in which it came:
    carries of loops, the stream of residual layers, and caches and other state that go
    through the model. A float32 array that a module returns in place of a 16-bit
    argument of its shape is rounded to it, unless it is what the model returns;
    ``Rule(cast_outputs=False)`` keeps it. Stock attention computes its softmax in
    float32.
    A plain list or dict of parameters is read as a copy, to which no method may append;
    ``nnx.List`` and ``nnx.Dict`` are themselves. Other state than ``nnx.Param`` holds
    what the model writes there, as it writes it: batch statistics in float32, but
    activations that it sows in 16 bits.

    Under a rule with a recipe Linear, Einsum and convolution layers, the projections of
    attention, ``Embed.attend`` and modules with a ``dot_general`` that is stock or None
    multiply in its formats. Delayed scaling adds `ScalingStat` variables to them, which
    `mpjax.nnx.Optimizer` updates.

    Of a model that has policies already, the new rules replace all of the old ones.

    Args:
      model: an NNX module; its parameters may be ``jax.ShapeDtypeStruct``.
      rules: a policy, its name, or a list of ``mpjax.Rule``, the first match of which
        decides. Modules without a match are left alone.

    Returns:
      A model of the same kind (``isinstance`` holds).

    Raises:
      ValueError: a rule decides for no module or its recipe serves none, or a layer
        cannot follow its rule (complex parameters, a Linen module inside, a
        ``dot_general`` of its own, a bound method kept); the message has the path.
        Later, when a method runs, a layer of Flax gets a complex argument.
      TypeError: ``model`` is no NNX module. Later, when a method runs: arrays of two
        dtypes meet in its code, where JAX wants one, or a result that is to be cast is
        no pytree.

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
    lookup = Matcher(read_rules(rules))
    model = nnx.clone(model)
    layers = layers_by_path(model)
    seen = {path: bare_type(layer) for path, (layer, *_) in layers.items()}
    modules = {path: nodes[0] for path, nodes in layers.items()}
    structures = structures_of(modules) if lookup.asks_structure else {}
    found = {
        path: lookup.decision(path, kind, structures.get((path, kind), UNKNOWN))
        for path, kind in seen.items()
    }
    served = {
        path: served_product_names(path, module, seen[path], found[path])
        for path, module in modules.items()
    }
    lookup.check_all_used(seen, served=served, structures=structures)
    set_states(modules, found, served)
    owners: dict[int, tuple[str, Policy]] = {}
    for path, nodes in layers.items():
        decision = found[path]
        if decision is None:
            if decision_of(nodes[0]) is None and _meets_a_rule(path, found):
                if not isinstance(nodes[0], nnx.bridge.ToNNX):
                    set_type(nodes[0], None)  # left alone, it ends the region around it
            continue
        has_params = any(any(own_params(node)) for node in nodes)
        decision, policy = _used(decision, served[path], has_params), decision.policy
        for node in nodes:
            _check(path, node)
            cast_stored(path, node, policy, owners)
            # These two write what they normalize into the layer inside them.
            if not isinstance(node, nnx.WeightNorm | nnx.SpectralNorm):
                _set_dtype(path, node, policy)
                set_type(node, decision)
    keep_copies(model, modules, served)
    return model


def _used(decision: Decision, served: set[str], has_params: bool) -> Decision:
    """A decision without a recipe that serves nothing, so that classes are fewer."""
    if served:
        return decision
    if decision.recipe is not None and has_params:
        decision = replace(decision, reason=unserved_reason(decision))
    return replace(
        decision, recipe=None, min_size=0, attention=False, own_products=False
    )


def _meets_a_rule(path: str, found: Mapping[str, Decision | None]) -> bool:
    """Whether a module stands around or inside of one that follows a rule."""
    return any(
        decision is not None and (is_inside(other, path) or is_inside(path, other))
        for other, decision in found.items()
    )


def _check(path: str, module) -> None:
    """Raises for what could only be left as it is silently."""
    if isinstance(module, nnx.bridge.ToNNX):
        raise ValueError(
            f"Module {path!r} holds a Linen module, whose layers NNX does not see. "
            "Give nnx.bridge.ToNNX a mpjax.linen.MixedPrecision(module, rules), and "
            f"put mpjax.Rule({path!r}, None) first among the rules here."
        )
    if isinstance(module, nnx.WeightNorm):
        states = nnx.to_flat_state(nnx.state(module.layer_instance, ScalingStat))
        if any(module.variable_filter(*state) for state in states):
            raise ValueError(
                f"Module {path!r} (WeightNorm) normalizes all variables of what is in "
                "it, states of delayed scaling too. Make it with "
                "variable_filter=nnx.Param, or give the layer in it a rule without "
                "delayed scaling."
            )
    for name, value in vars(module).items():
        if isinstance(value, nnx.Param) and not issubclass(type(value), nnx.Param):
            raise ValueError(
                f"Parameter {name!r} of module {path!r} is a hijax variable, which "
                "shows its value without asking. Make it with hijax=False."
            )
        while isinstance(value, functools.partial):
            value = value.func
        if inspect.ismethod(value) and isinstance(value.__self__, nnx.Module):
            raise ValueError(
                f"Attribute {name!r} of module {path!r} is the bound method "
                f"{value.__name__!r} of the model without a policy, and would run "
                "that. Keep the name of the method, and look it up for each call: "
                f"getattr(self, {value.__name__!r})."
            )


def _set_dtype(path: str, module, policy: Policy) -> None:
    """Tells a module by its attributes to compute in ``compute_dtype``."""
    dtype = policy.compute_dtype
    if computes_in_a_dtype(module):
        for name, param in own_params(module):
            if any_complex(jax.tree.leaves(param.get_value())):
                kind, what = bare_type(module), f"parameter {name!r}"
                raise complex_error(kind, path, policy, what)
        if "dtype" in vars(module):
            module.dtype = spelled_like(module.dtype, dtype)
    for name, value in list(vars(module).items()):
        if value is nnx.dot_product_attention and dtype.itemsize == 2:
            setattr(module, name, attention)
        if value is jax.lax.conv_general_dilated:
            setattr(module, name, conv_general_dilated)
    if isinstance(module, nnx.MultiHeadAttention):
        for cache in module.cached_key, module.cached_value:
            if cache is not None:
                cache.set_value(policy.cast_to_compute(cache.get_value()))
