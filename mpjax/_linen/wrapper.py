"""Mixed precision for Flax Linen modules.

A method interceptor, active only while the wrapped model runs, gives each layer its
policy: it sets the ``dtype`` of the layer for the time of the call, and casts what
crosses the border between two policies. Nothing of the model is copied or replaced, so
that parameters, names and random keys stay those of the bare model.
"""

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from mpjax._linen.attributes import attributes, check_real, classes, method_of
from mpjax._linen.cache_keys import Marks
from mpjax._linen.recipes import make_products
from mpjax._linen.states import SCALING, Keeper, States
from mpjax._policies.lookup import Matcher, matcher
from mpjax._policies.policy import Policy
from mpjax._policies.rule import Rules, expand_rules
from mpjax._printing import table as _table


class MixedPrecision(nn.Module):
    """Runs a Linen module under a policy, or under rules that give each layer one.

    The wrapper adds nothing to the parameters: they have the bare module's names,
    shapes and, cast to ``param_dtype``, its initial values. It has the bare module's
    methods, fields and properties, so that ``model.apply(variables, tokens,
    method="encode")`` works as before.

    A layer with a ``dtype`` computes in the ``compute_dtype`` of its policy; parameters
    that a module reads itself are cast to it as they are read. Where the policy of a
    module differs from that of the module around it, floating arguments are cast to
    ``compute_dtype`` and results to ``output_dtype``; elsewhere nothing is cast, so
    that under ``"mixed_bfloat16"`` everything between the inputs of the model and its
    float32 outputs flows in bfloat16. Stock attention computes its softmax in float32.

    Delayed scaling has its states in a collection ``"scaling"``, with respect to which
    a loss is differentiated too, and which `mpjax.update_scaling` keeps. Of several
    uses of a layer in a call of ``apply`` the largest amax counts, through the
    transformations of Linen as well. JAX adds up what is observed

    - by several calls in one loss, unless each is given the states that the one before
      returns under ``mutable=["scaling"]``;
    - by the steps of an ``nn.scan`` that broadcasts the states, as it does parameters
      which all steps share: name them to ``variable_carry`` instead, but in ``init``;
    - by functions that the model gives to ``jax.checkpoint``, ``jax.lax.scan`` and the
      like, and by transformations of Linen where the wrapper stands inside another
      module, unless ``apply`` is told ``mutable=["scaling"]``.

    A sum is an upper bound, under which nothing overflows; of many uses it leaves small
    numbers few bits.

    Some things stay the model's own. Batch statistics and other collections than
    ``params`` hold what the model writes there, as it writes it: activations that it
    sows are 16-bit ones. A parameter that it does not read by ``self.param``, but by
    ``self.get_variable``, ``self.variable`` or ``self.variables``, has its
    ``param_dtype``. An initializer that is handed the compute dtype draws in float32;
    one that was made with it, ``normal(dtype=x.dtype)``, draws in the dtype of ``x``,
    and so other values than the bare model's.

    Attributes:
      module: the module to run; it is not changed.
      rules: a policy, its name, or a list of ``mpjax.Rule``, the first match of which
        decides. Paths are relative to ``module``. Modules without a match are left
        alone.

    Raises:
      ValueError: a rule has never decided for a module, or a layer cannot follow its
        policy (complex numbers, NNX inside); the message has the path.

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
        # keys, below the wrapper's. The two share one scope instead, that of a module
        # bound already or else the wrapper's; and it gets a name, which is what Flax
        # tells from that it is bound.
        module = self.module
        object.__setattr__(self, "module", None)
        super().__post_init__()
        if self.scope is not None and module.scope is None:
            name = self.name or type(module).__name__
            module = module.clone(parent=self.scope, name=name)
        elif self.scope is not None:
            object.__setattr__(self, "scope", module.scope)
        object.__setattr__(self, "module", module)

    def __call__(self, *args, **kwargs):
        return self._run(type(self.module).__call__, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        module = vars(self).get("module")
        if module is None or name.startswith("__"):
            return super().__getattr__(name)
        if self.scope is None:
            return getattr(module, name)
        function = inspect.getattr_static(type(module), name, None)
        if isinstance(function, types.FunctionType):

            def method(self, *args, **kwargs):
                return self._run(function, args, kwargs)

            return types.MethodType(method, self)
        value = self._run(getattr, (name,), {})
        if any(isinstance(leaf, nn.Module) for leaf in jax.tree.leaves(value)):
            raise AttributeError(
                f"The submodule {name!r} would run without the policy of the wrapper. "
                f"Use method=lambda model, *args: model.{name}(*args); to read what is "
                f"in it, use .module.{name}."
            )
        return value

    @nn.nowrap
    def _run(self, function: Callable, args, kwargs):
        """Calls a function of the wrapped module under the rules."""
        module, record = self.module, _record.get()
        if self.scope is None or module.scope is None:
            return function(module, *args, **kwargs)
        if self.scope.path != module.scope.path:  # nn.share_scope has moved the wrapper
            nn.share_scope(self, module)
        # A fresh matcher is a fresh key for nn.jit: every module is seen.
        rules, model = expand_rules(self.rules), classes(module)
        rules = matcher(rules, model) if record is None else Matcher(rules, model)
        run = _Run(rules, module)
        try:
            with nn.intercept_methods(run.intercept):
                result = function(module, *args, **kwargs)
        finally:
            run.marks.clear()
        if run.seen:  # a method without layers, or a trace from a cache, shows none
            known = functools.partial(_variable_paths, module.variables)
            rules.check_all_used(list(run.seen), known, run.served)
        if record is not None:
            record[module.path] = run
        return result

    @nn.nowrap
    def apply(
        self,
        variables,
        *args,
        method=None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs,
    ):
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
            capture_intermediates=_of_the_model(capture_intermediates),
            **kwargs,
        )
        if not hidden:
            return result
        result, changed = result
        changed = {name: tree for name, tree in changed.items() if name != SCALING}
        return result if mutable is False else (result, changed)

    @nn.nowrap
    def init_with_output(
        self, rngs, *args, method=None, capture_intermediates: Any = False, **kwargs
    ):
        """As ``nn.Module.init_with_output``; ``method`` may be the module's."""
        capture = _of_the_model(capture_intermediates)
        return super().init_with_output(
            rngs,
            *args,
            method=self._named(method),
            capture_intermediates=capture,
            **kwargs,
        )

    @nn.nowrap
    def _named(self, method):
        """A method of the wrapper, which runs one of the module under the rules."""
        own = vars(MixedPrecision)
        if isinstance(method, str) and method not in own:
            method = getattr(type(self.module), method, method)
        method = getattr(method, "__func__", method)
        if isinstance(method, str | None) or method in own.values():
            return method

        def run(wrapper, *args, **kwargs):
            return wrapper._run(method, args, kwargs)

        return run


def _of_the_model(capture: Any) -> Any:
    """What to capture, without the wrappers: their results are their modules'."""
    if not capture:
        return capture
    return lambda module, name: (
        not isinstance(module, MixedPrecision)
        and (name == "__call__" if capture is True else capture(module, name))
    )


# The policy of the module whose method runs. Traced calls nest, so it is put back on
# the way out; each thread has its own.
_enclosing: ContextVar[Policy | None] = ContextVar("mpjax_enclosing", default=None)

# Where a wrapper leaves what it has seen, for ``tabulate``.
_record: ContextVar[dict | None] = ContextVar("mpjax_record", default=None)

_ABSENT = object()


class _Run:
    """One run of a wrapper, and what it meets.

    Attributes:
      rules: of the wrapper.
      seen: path and type of every module, in order of their first calls.
      served: by path, the products that used a recipe.
      marks: in the scopes of the modules.
    """

    def __init__(self, rules: Matcher, root: nn.Module):
        self.rules = rules
        self.seen: dict[tuple[str, type], None] = {}
        self.served: dict[str, set[str]] = {}
        self.marks = Marks(rules, root.scope, _enclosing.get)
        self.marks.enter(root)
        self._root, self._depth = root, len(root.path)
        self._scope_type = type(root.scope)
        self._inside: str | None = None  # the path of the module that runs
        self._states = States()
        self._apart: dict[int, str] = {}  # paths of modules that the model applies

    def intercept(self, method, args, kwargs, context):
        """Runs one method of one module of the model under the module's policy."""
        module = context.module
        # Flax tries each setup in a scope of another type, at no path of the model.
        if type(module.scope) is not self._scope_type:
            return method(*args, **kwargs)
        self.marks.enter(module)
        if isinstance(module, MixedPrecision):
            return method(*args, **kwargs)
        path = self._path(module)
        self.seen[path, type(module)] = None
        rule = self.rules.rule(path, type(module))
        policy = self.rules.policy(path, type(module))
        border = policy if policy != _enclosing.get() else None
        own, name, lent = vars(module), context.method_name, {}
        states = self._states
        if rule is not None and policy is not None:
            served = self.served.setdefault(path, set())
            products = make_products(module, path, rule, served, states)
            lent = attributes(module, path, rule, products, name)
            check_real(module, path, policy, name, args, kwargs)
            method = method_of(module, products, policy, name, method)
        before = {name: own.get(name, _ABSENT) for name in lent}
        token, outside = _enclosing.set(policy), (self._inside, states.keeper)
        self._inside = path
        if isinstance(module, Keeper.kinds):
            states.keeper = Keeper(module)
        # A bound module is Flax's private clone of the user's, and may be lent some.
        own.update(lent)
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
            self._inside, states.keeper = outside

    def _path(self, module: nn.Module) -> str:
        """The path of a module in the model.

        A model may apply a layer by itself, ``self.head.apply(variables, x)``: that has
        scopes of its own, and stands below the module that does so.
        """
        scope: Any = module.scope
        names, root = module.path[self._depth :], id(scope.root)
        if root in self._apart:
            names = self._apart[root], *module.path
        elif (
            not names
            and self._inside is not None
            and module.name not in (None, self._root.name)
        ):
            path = "/".join(filter(None, (self._inside, module.name)))
            self._apart[root] = path
            names = (path,)
        return "/".join(names)


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
      *args: as for ``model.init``; arrays may be ``jax.ShapeDtypeStruct``.
      **kwargs: likewise.

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
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def init(rngs, arrays):
        traced = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, traced)
        return model.init(rngs, *args, **kwargs)

    record: dict[tuple[str, ...], _Run] = {}
    token = _record.set(record)
    try:
        variables = jax.eval_shape(init, rngs, arrays)
    finally:
        _record.reset(token)
    if not record:
        raise ValueError(
            "tabulate shows what mpjax.linen.MixedPrecision does, and found none in "
            f"{type(model).__name__}."
        )
    params = flatten_dict(variables.get("params", {}))
    rows = []
    for root, run in record.items():
        last = dict(run.seen.keys())  # two may share a path, and its parameters
        for path, kind in run.seen:
            full = (*root, *filter(None, path.split("/")))
            own = [leaf for names, leaf in params.items() if names[:-1] == full]
            own = jax.tree.leaves(own) if last[path] is kind else []
            policy, recipe = run.rules.policy(path, kind), None
            if run.served.get(path):
                recipe = run.rules.recipe(path, kind)
            rows.append(("/".join(full), kind, policy, recipe, own))
    return _table.layers(rows)
