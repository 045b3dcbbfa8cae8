"""Mixed precision for Flax Linen modules.

A method interceptor, active only while the wrapped model runs, gives each layer its
policy: it sets the ``dtype`` of the layer for the time of the call, and casts what
crosses the border between two policies. Nothing of the model is copied or replaced, so
that parameters, names and random keys stay those of the bare model.
"""

import functools
import itertools
import types
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from mpjax import _table
from mpjax._attention import dot_product_attention, drop_weights
from mpjax._cpu_faults import conv_general_dilated
from mpjax._layer_products import LayerProducts
from mpjax._linen_recipes import SCALING, make_products, stand_in_method, stand_ins
from mpjax._policy import Policy, get_policy
from mpjax._rules import Matcher, Rule, Rules, expand_rules, matcher
from mpjax._tree import cast_floating


class MixedPrecision(nn.Module):
    """Runs a Linen module under a policy, or under rules that give each layer one.

    The wrapper adds nothing to the variables: they have the bare module's names, shapes
    and, cast to ``param_dtype``, its initial values. It has the bare module's methods,
    so that ``model.apply(variables, tokens, method="encode")`` works as before.

    A layer with a ``dtype`` field computes in the ``compute_dtype`` of its policy;
    parameters that a module reads itself are cast to it as they are read. Where the
    policy of a module differs from that of the module around it, floating arguments are
    cast to ``compute_dtype`` and results to ``output_dtype``; elsewhere nothing is
    cast, so that under ``"mixed_bfloat16"`` everything between the inputs of the model
    and its float32 outputs flows in bfloat16. Stock attention computes its softmax in
    float32. Batch statistics and other collections than ``params`` are left alone.

    Attributes:
      module: the module to run; it is not changed.
      rules: a policy, its name, or a list of ``mpjax.Rule``, the first match of which
        decides. Paths are relative to ``module``. Modules without a match are left
        alone.

    Raises:
      ValueError: a rule decides for no module, or a layer cannot follow its policy
        (complex parameters); the message has the path.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax.linen
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(3), "mixed_bfloat16")
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> variables["params"]["kernel"].dtype.name
      'float32'
      >>> model.apply(variables, jnp.ones((2, 4))).dtype.name
      'float32'
    """

    module: nn.Module
    rules: Rules

    def __post_init__(self):
        if not isinstance(self.module, nn.Module):
            raise TypeError(
                "mpjax.linen.MixedPrecision wraps a flax.linen.Module instance, got "
                f"{self.module!r}. For an nnx.Module use mpjax.nnx.mixed_precision."
            )
        rules, inner = expand_rules(self.rules), self.module
        if isinstance(inner, MixedPrecision):  # its rules come first
            first = expand_rules(inner.rules)
            outer = (replace(r, optional=True) for r in rules if r not in first)
            rules, self.module = (*first, *outer), inner.module
        self.rules = rules
        # Bound as a submodule, the module would have a scope, and so names and random
        # keys, below the wrapper's. It gets the wrapper's scope instead; and a name,
        # which is what Flax tells from that it is bound.
        module = self.module
        object.__setattr__(self, "module", None)
        super().__post_init__()
        if self.scope is not None and module.scope is None:
            name = self.name or type(module).__name__
            module = module.clone(parent=self.scope, name=name)
        object.__setattr__(self, "module", module)

    def __call__(self, *args, **kwargs):
        return self._run("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        if name.startswith("__") or not callable(getattr(type(module), name, None)):
            return super().__getattr__(name)

        def method(self, *args, **kwargs):
            return self._method(name, args, kwargs)

        return types.MethodType(method, self)

    def _method(self, name, args, kwargs):
        return self._run(name, args, kwargs)

    @nn.nowrap
    def _run(self, name, args, kwargs):
        record = _record.get()
        # A fresh matcher is a fresh key for nn.jit: every module is seen.
        rules = expand_rules(self.rules)
        rules = matcher(rules) if record is None else Matcher(rules)
        seen: dict[str, type] = {}
        served: dict[str, set[str]] = {}
        module = self.module
        _mark(module.scope, rules, (), _enclosing.get())
        interceptor = functools.partial(_intercept, rules, module.path, seen, served)
        with nn.intercept_methods(interceptor):
            result = getattr(module, name)(*args, **kwargs)
        rules.check_all_used(seen, lambda: _variable_paths(module.variables), served)
        if record is not None:
            record[module.path] = rules, seen, served
        return result

    @nn.nowrap
    def apply(self, variables, *args, method=None, mutable: Any = False, **kwargs):
        """As ``nn.Module.apply``; ``method`` may be one of the wrapped module."""
        # Uses of a layer hand on its scales through its variable, which is no result.
        names = {mutable} if isinstance(mutable, str) else mutable or ()
        hidden = SCALING in variables and isinstance(names, Collection)
        hidden = hidden and SCALING not in names
        result = super().apply(
            variables,
            *args,
            method=self._named(method),
            mutable=[*names, SCALING] if hidden else mutable,
            **kwargs,
        )
        if not hidden:
            return result
        result, changed = result
        changed = {name: tree for name, tree in changed.items() if name != SCALING}
        return result if mutable is False else (result, changed)

    @nn.nowrap
    def init_with_output(self, rngs, *args, method=None, **kwargs):
        """As ``nn.Module.init_with_output``; ``method`` may be the module's."""
        method = self._named(method)
        return super().init_with_output(rngs, *args, method=method, **kwargs)

    @nn.nowrap
    def _named(self, method):
        # A function of the bare class would run on the wrapper, past the policy.
        function = getattr(method, "__func__", method)
        name = getattr(function, "__name__", "")
        own = getattr(type(self.module), name, None)
        return name if own is not None and own is function else method


# The policy of the module whose method runs. Traced calls nest, so it is put back on
# the way out; each thread has its own.
_enclosing: ContextVar[Policy | None] = ContextVar("mpjax_enclosing", default=None)

# Where a wrapper leaves what it has seen, for ``tabulate``.
_record: ContextVar[dict | None] = ContextVar("mpjax_record", default=None)


def _intercept(
    rules: Matcher, root: tuple, seen: dict, served: dict, method, args, kwargs, context
):
    """Runs one method of one module of the model under the module's policy."""
    module, scope = context.module, context.module.scope
    if isinstance(module, MixedPrecision) or scope is None:
        return method(*args, **kwargs)
    path = "/".join(module.path[len(root) :])
    seen[path] = type(module)
    rule = rules.rule(path, type(module))
    policy = None if rule is None else get_policy(rule.policy)
    border = policy if policy != _enclosing.get() else None
    own = vars(module)
    changes = {}
    if rule is not None:
        products = make_products(module, path, rule)
        if products is not None:
            served.setdefault(path, products.served)
            method = stand_in_method(module, context.method_name, products, method)
        changes = _changes(module, path, rule, products, context.method_name)
    before = {name: own.get(name, _ABSENT) for name in changes}
    _mark(scope, rules, module.path[len(root) :], _enclosing.get())
    token = _enclosing.set(policy)
    # A bound module is Flax's private clone of the user's: it may be lent attributes.
    own.update(changes)
    try:
        if border is not None and rule is not None and rule.cast_inputs:
            args, kwargs = border.cast_to_compute((args, kwargs))
        result = method(*args, **kwargs)
        return result if border is None else border.cast_to_output(result)
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                del own[name]
            else:
                own[name] = value
        _enclosing.reset(token)


def _mark(scope, rules: Matcher, path: tuple[str, ...], enclosing: Policy | None):
    """Puts what decides for a module, and for those below it, into its scope's flags.

    nn.jit caches traces by class, fields and scope flags. On a decorated method it
    reads them before any interceptor runs, so a scope has to be born with them.
    """
    once = next(_count) if _record.get() is not None else 0
    key = rules.rules, rules.key("/".join(path)), enclosing, once
    scope.flags = {**scope.flags, "mpjax": key}

    def push(name=None, prefix="", reuse=False):
        child = type(scope).push(scope, name, prefix, reuse)
        _mark(child, rules, (*path, child.name), _enclosing.get())
        return child

    scope.push = push


# Tells the traces of ``tabulate`` apart: it has to see every module.
_count = itertools.count(1)


_ABSENT = object()


def _changes(
    module: nn.Module,
    path: str,
    rule: Rule,
    products: LayerProducts | None,
    method: str,
) -> dict[str, Any]:
    """The attributes with which a bound module follows its rule."""
    policy, changes = get_policy(rule.policy), {}
    fields = type(module).__dataclass_fields__
    has_dtype = "dtype" in fields and _is_floating_or_none(vars(module).get("dtype"))
    if has_dtype:
        changes["dtype"] = policy.compute_dtype
    if "conv_general_dilated" in fields and _uses_stock_conv(module):
        changes["conv_general_dilated"] = conv_general_dilated
    if type(module) is nn.Embed and method != "setup":
        # Others that read the table find it cast; its own methods cast it themselves.
        changes["embedding"] = nn.unbox(module.get_variable("params", "embedding"))
    if products is not None:
        changes |= stand_ins(module, products, rule)
    if policy.compute_dtype.itemsize == 2 and "force_fp32_for_softmax" in fields:
        changes["force_fp32_for_softmax"] = True
    attention_fn = vars(module).get("attention_fn")
    if attention_fn is nn.dot_product_attention or _is_lent(attention_fn):
        if products is not None and rule.attention:
            changes["attention_fn"] = partial(_attention, einsum=products.einsum)
        elif policy.compute_dtype.itemsize == 2:
            changes["attention_fn"] = _attention
    # Flax's own layers cast what they read where that is cheapest, except in setup.
    casts_itself = method != "setup" and type(module).__module__.startswith(
        "flax.linen"
    )
    changes["param"] = _Param(module, path, policy, has_dtype, casts_itself)
    return changes


def _uses_stock_conv(conv: nn.Module) -> bool:
    own = vars(conv)
    return own["conv_general_dilated"] is None and (
        own.get("conv_general_dilated_cls") is None
    )


def _attention(
    query,
    key,
    value,
    mask=None,
    broadcast_dropout=True,
    dropout_rng: Any = None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    **einsum,
):
    """Stands in for ``nn.dot_product_attention``, which multiplies in float32."""

    def edit(weights):
        if module is not None:
            module.sow("intermediates", "attention_weights", weights)
        return drop_weights(
            weights, dropout_rng, dropout_rate, broadcast_dropout, deterministic
        )

    query, key, value = cast_floating((query, key, value), dtype)
    return dot_product_attention(
        query, key, value, mask=mask, edit_weights=edit, precision=precision, **einsum
    )


def _is_lent(attention_fn) -> bool:
    """Whether the module around this one, lifted by a transformation, was lent it."""
    return getattr(attention_fn, "func", attention_fn) is _attention


@functools.cache
def _is_floating_or_none(dtype) -> bool:
    try:
        return dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # a field that is called dtype and holds something else
        return False


@dataclass(frozen=True, eq=False)
class _Param:
    """``nn.Module.param`` of one bound module, under a policy."""

    module: nn.Module
    path: str
    policy: Policy
    has_dtype: bool
    casts_itself: bool

    def __call__(self, name, init_fn, *init_args, **kwargs):
        def stored(arg):
            # The dtype that the module was lent, passed on: not one for parameters.
            lent = arg is self.policy.compute_dtype
            return self.policy.param_dtype if lent else arg

        def init(*args, **kwargs):
            args = map(stored, args)
            kwargs = {key: stored(arg) for key, arg in kwargs.items()}
            return self.policy.cast_to_param(init_fn(*args, **kwargs))

        # Of the class: another wrapper may have lent the module a param of its own.
        declare = type(self.module).param
        value = declare(self.module, name, init, *init_args, **kwargs)
        if self.has_dtype and any(map(jnp.iscomplexobj, jax.tree.leaves(value))):
            raise ValueError(
                f"Module {self.path!r} ({type(self.module).__name__}) has a complex "
                f"parameter {name!r} and cannot compute in "
                f"{self.policy.compute_dtype.name}. To leave it alone, put "
                f"mpjax.Rule({self.path!r}, None) before the rule that matches it."
            )
        if self.casts_itself:  # but norms do not widen 16-bit parameters
            return jax.tree.map(self._widen, value)
        return self.policy.cast_to_compute(value)

    def _widen(self, value):
        narrow = value.dtype.itemsize < self.policy.compute_dtype.itemsize
        return self.policy.cast_to_compute(value) if narrow else value


def _variable_paths(variables: Mapping) -> Iterator[str]:
    """Paths of the modules that hold variables."""
    for collection in variables.values():
        for names in flatten_dict(collection):
            for end in range(len(names)):
                yield "/".join(names[:end])


def tabulate(model: nn.Module, rngs, *args, **kwargs) -> str:
    """Shows what each layer of a wrapped model will do, before a step is run.

    Nothing is computed: the model is traced with shapes only.

    Args:
      model: a ``MixedPrecision``, or a module with some inside.
      rngs: as for ``model.init``.
      *args: inputs, arrays or ``jax.ShapeDtypeStruct``, as for ``model.init``.
      **kwargs: as for ``model.init``.

    Returns:
      A table with a row a module: path, type, policy, the recipe of its products ("-":
      none uses it) and the dtypes and number of the parameters of its own.

    Raises:
      ValueError: there is no ``MixedPrecision`` in the model.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax.linen
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(3), "mixed_bfloat16")
      >>> table = mpjax.linen.tabulate(model, jax.random.key(0), jnp.ones((2, 4)))
      >>> "p=f32,c=bf16,o=f32" in table
      True
    """
    record: dict = {}
    token = _record.set(record)
    try:
        variables = jax.eval_shape(
            lambda rngs, *args: model.init(rngs, *args, **kwargs), rngs, *args
        )
    finally:
        _record.reset(token)
    if not record:
        raise ValueError(
            "tabulate shows what mpjax.linen.MixedPrecision does, and found none in "
            f"{type(model).__name__}."
        )
    params = flatten_dict(variables.get("params", {}))
    rows = []
    for root, (rules, seen, served) in record.items():
        for path, module_type in seen.items():
            full = (*root, *filter(None, path.split("/")))
            own = [leaf for names, leaf in params.items() if names[:-1] == full]
            policy = rules.policy(path, module_type)
            recipe = rules.recipe(path, module_type) if served.get(path) else None
            leaves = jax.tree.leaves(own)
            rows.append(("/".join(full), module_type, policy, recipe, leaves))
    return _table.layers(rows)
