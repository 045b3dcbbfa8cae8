"""Mixed precision for Flax Linen modules.

A method interceptor, active only while the wrapped model runs, gives each layer its
policy: it sets the ``dtype`` of the layer for the time of the call, and casts what
crosses the boundary between two policies. Nothing of the model is copied or replaced,
so that parameters, names and random keys stay those of the bare model.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from mpjax._linen.attributes import classes
from mpjax._linen.lifted_states import PARAMS, lifts, put_in, take_out
from mpjax._linen.run import Run, recording
from mpjax._policies.lookup import Matcher, matcher
from mpjax._policies.rule import Rules, read_rules
from mpjax._recipes.state import SCALING

_OPTIONS_OF_CLONE = inspect.signature(nn.Module.clone).parameters.keys()


class MixedPrecision(nn.Module):
    """Runs a Linen module under a policy, or under rules that give each layer one.

    The wrapper adds nothing to the parameters: they have the bare module's names,
    shapes and, cast to ``param_dtype``, its initial values. It has the bare module's
    methods, fields and properties, so that ``model.apply(variables, tokens,
    method="encode")`` works as before, and ``model.clone(deterministic=True)`` is the
    wrapped variant.

    A layer with a ``dtype`` computes in the ``compute_dtype`` of its policy; parameters
    that a module reads itself are cast to it as they are read. Where the policy of a
    module differs from that of the module around it, floating arguments are cast to
    ``compute_dtype`` and results to ``output_dtype``. So under ``"mixed_bfloat16"``
    everything between the inputs of the model and its float32 outputs flows in
    bfloat16. What a module is given and returns changed leaves it in the dtype in which
    it came: carries of loops, the stream of residual layers, and caches and other state
    that go through the model. A float32 array that a module returns in place of a
    16-bit argument of its shape is rounded to it, unless it is what the model returns;
    ``Rule(cast_outputs=False)`` keeps it. Stock attention computes its softmax in
    float32.

    Note:
      Delayed scaling has its states in a collection ``"scaling"``. A loss is
      differentiated with respect to it as well, and `mpjax.scaled` updates it.
      Of several uses of a layer in one call of ``apply`` the largest amax counts,
      through the transformations of Linen too. JAX adds up what is observed

      - by several calls in one loss, unless each is given the states that the one
        before returns under ``mutable=["scaling"]``;
      - by the steps of an ``nn.scan`` that broadcasts the states, as it does parameters
        which all steps share: name them to ``variable_carry`` instead, but in ``init``;
      - by functions that the model gives to ``jax.checkpoint``, ``jax.lax.scan`` and
        the like, and by transformations of Linen where the wrapper stands inside
        another module, unless ``apply`` gets ``mutable=["scaling"]``.

      A sum is an upper bound: nothing overflows under it, but after many uses it leaves
      small numbers few bits.

    Note:
      Some things stay the model's own. Batch statistics and other collections than
      ``params`` hold what the model writes there, as it writes it: activations that it
      sows are in 16 bits. A parameter that the model reads by ``self.get_variable``,
      ``self.variable`` or ``self.variables``, and not by ``self.param``, has its
      ``param_dtype``. An initializer that is given the compute dtype draws in float32;
      one that was made with it, ``normal(dtype=x.dtype)``, draws in the dtype of ``x``,
      and so other values than in the bare model.

    Attributes:
      module: the module to run; it is not changed.
      rules: a policy, its name, or a list of ``mpjax.Rule``, the first match of which
        decides. Paths are relative to ``module``. Modules without a match are left
        alone.

    Raises:
      ValueError: a rule has never decided for a module, or a layer cannot follow its
        policy (complex numbers, NNX inside); the message has the path.
      TypeError: arrays of two dtypes meet in the code of a module, where JAX wants one,
        or a result that is to be cast is no pytree.

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
        rules, inner = read_rules(self.rules), self.module
        if isinstance(inner, MixedPrecision):  # its rules come first
            first = read_rules(inner.rules)
            outer = (
                dataclasses.replace(r, optional=True) for r in rules if r not in first
            )
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
        module, record = self.module, recording.get()
        if self.scope is None or module.scope is None:
            return function(module, *args, **kwargs)
        if self.scope.path != module.scope.path:  # nn.share_scope has moved the wrapper
            nn.share_scope(self, module)
        # A fresh matcher is a fresh key for nn.jit: every module is seen.
        rules, model = read_rules(self.rules), classes(module)
        rules = matcher(rules, model) if record is None else Matcher(rules, model)
        run = Run(rules, module, MixedPrecision)
        try:
            with nn.intercept_methods(run.intercept):
                result = function(module, *args, **kwargs)
        finally:
            run.marks.clear()
        if run.seen:  # a method without layers, or a trace from a cache, shows none
            known = functools.partial(_variable_paths, module.variables)
            served, refused = run.served, run.refused
            rules.check_all_used(list(run.seen), known, served, run.seen, refused)
        if record is not None:
            record[module.path] = run
        return result

    @nn.nowrap
    def clone(self, *, parent: Any = None, **updates: Any) -> "MixedPrecision":
        """As ``nn.Module.clone``; ``updates`` may be fields of the wrapped module."""
        own = {field.name for field in dataclasses.fields(self)} | _OPTIONS_OF_CLONE
        inner = {name: updates.pop(name) for name in updates.keys() - own}
        # Bound, the module has the scope of the wrapper, which the clone has not.
        if inner or (self.scope is not None and "module" not in updates):
            module = updates.get("module", self.module)
            updates["module"] = module.clone(parent=None, **inner)
        return super().clone(parent=parent, **updates)

    @nn.nowrap
    def apply(
        self,
        variables: Any,
        *args: Any,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ):
        """As ``nn.Module.apply``; ``method`` may be one of the wrapped module."""
        # A layer passes its scales to its next use in its variable, which is no result.
        names = {mutable} if isinstance(mutable, str) else mutable or ()
        hidden = SCALING in variables and isinstance(names, Collection)
        hidden = hidden and SCALING not in names
        with _lifting():
            result = super().apply(
                put_in(variables),
                *args,
                method=self._named(method),
                mutable=[*names, SCALING] if hidden else mutable,
                capture_intermediates=_of_the_model(capture_intermediates),
                **kwargs,
            )
        if mutable is False and not hidden:
            return result
        result, changed = result
        changed = take_out(changed)
        lifted = variables.get(SCALING, {}).get(PARAMS)
        if lifted is not None and SCALING in changed:  # nothing in there can change
            changed = {**changed, SCALING: {PARAMS: lifted, **changed[SCALING]}}
        if hidden:
            changed = {name: tree for name, tree in changed.items() if name != SCALING}
        return result if mutable is False else (result, changed)

    @nn.nowrap
    def init_with_output(
        self,
        rngs: Any,
        *args: Any,
        method: Any = None,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ):
        """As ``nn.Module.init_with_output``; ``method`` may be the module's."""
        capture = _of_the_model(capture_intermediates)
        with _lifting():
            result, variables = super().init_with_output(
                rngs,
                *args,
                method=self._named(method),
                capture_intermediates=capture,
                **kwargs,
            )
        return result, take_out(variables)

    @nn.nowrap
    def bind(self, variables: Any, *args: Any, **kwargs: Any) -> "MixedPrecision":
        """As ``nn.Module.bind``."""
        return super().bind(put_in(variables), *args, **kwargs)

    @nn.nowrap
    def unbind(self) -> tuple["MixedPrecision", Any]:
        """As ``nn.Module.unbind``."""
        module, variables = super().unbind()
        return module, take_out(variables)

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


@contextlib.contextmanager
def _lifting() -> Iterator[None]:
    token = lifts.set(True)
    try:
        yield
    finally:
        lifts.reset(token)


def _of_the_model(capture: Any) -> Any:
    """What to capture, without the wrappers: their results are their modules'."""
    if not capture:
        return capture
    return lambda module, name: (
        not isinstance(module, MixedPrecision)
        and (name == "__call__" if capture is True else capture(module, name))
    )


def _variable_paths(variables: Mapping) -> Iterator[str]:
    """Paths of the modules that hold variables."""
    for collection in variables.values():
        for names in flatten_dict(collection):
            for end in range(len(names)):
                yield "/".join(names[:end])
