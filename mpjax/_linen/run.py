"""One run of a wrapped model, and the interceptor of its methods."""

import functools
from contextvars import ContextVar
from functools import partial
from typing import Any

import flax.linen as nn
from jax.extend.core import get_opaque_trace_state

from mpjax._layers.dtypes import is_of_flax
from mpjax._layers.errors import mixed_dtypes, no_pytree
from mpjax._layers.loops import frame_id
from mpjax._layers.region import (
    Exit,
    RunningMethod,
    loop_between,
    rounded_within,
    running_method,
)
from mpjax._layers.results import NoPytreeError
from mpjax._linen.attributes import check_real, method_under_rule, overrides
from mpjax._linen.cache_keys import CacheKeys
from mpjax._linen.own_products import run_with_own_products
from mpjax._linen.recipes import make_multiplier
from mpjax._linen.states import StateOwner, StateStore
from mpjax._linen.structure import Beginning, structure_of, waits_for_run
from mpjax._policies.lookup import Matcher
from mpjax._policies.policy import Policy
from mpjax._policies.roles import UNKNOWN, Structure
from mpjax._tree import opaque

# The policy of the module whose method runs. Traced calls nest, so it is put back on
# the way out; each thread has its own. It is no context of JAX's, as NNX has one: that
# is in the keys of all caches, and an eager ``init``, where Linen computes parameters
# under the policy, would compile every operation again for each wrapper and policy.
enclosing_policy: ContextVar[Policy | None] = ContextVar(
    "mpjax_enclosing", default=None
)
# Where a wrapper leaves what it has seen, for ``tabulate``.
recording: ContextVar[dict | None] = ContextVar("mpjax_record", default=None)
_ABSENT = object()
_is_opaque = opaque(nn.Module, nn.Variable)


@functools.cache
def _is_layer(kind: type, method: str) -> bool:
    """Whether a method is one of Flax's own layers, and none that runs others."""
    function = getattr(kind, method, None)
    return is_of_flax(function, "linen") and not issubclass(kind, nn.Sequential)


class Run:
    """One run of a wrapper, and what it meets.

    Attributes:
      rules: of the wrapper.
      seen: by path and type, the structure of every module, in order of their first
        calls.
      served: by path, the products that used a recipe.
      refused: by path, the products of modules themselves that did not, and why.
      marks: in the scopes of the modules.
    """

    def __init__(self, rules: Matcher, root: nn.Module, wrapper: type[nn.Module]):
        self.rules = rules
        self.seen: dict[tuple[str, type], Structure] = {}
        self.served: dict[str, set[str]] = {}
        self.refused: dict[str, dict[str, str]] = {}
        self.marks = CacheKeys(rules, root.scope, enclosing_policy.get)
        self.marks.enter(root)
        self._wrapper = wrapper  # the class of wrappers, which have runs of their own
        self._root, self._depth = root, len(root.path)
        self._scope_type = type(root.scope)
        self._inside: str | None = None  # the path of the module that runs
        self._states = StateStore()
        self._apart: dict[int, str] = {}  # paths of modules that the model applies
        # Of a module whose copy runs next, its path and counts of random keys.
        self._copied: tuple[str, dict] | None = None
        self._copies: set[int] = set()  # ids of their scopes
        self._prefix: str | None = None  # the path of the module whose copy runs
        self._multiplying: set[int] = set()  # ids of modules that have copies

    def intercept(self, method, args, kwargs, context, known=None):
        """Runs one method of one module of the model under the module's policy.

        Args:
          method: of the module.
          args: of the method.
          kwargs: the same, by name.
          context: of the interceptor.
          known: the structure of the module; None: it shows now.
        """
        module, given = context.module, (method, args, kwargs)
        # Flax tries each setup in a scope of another type, at no path of the model.
        if type(module.scope) is not self._scope_type:
            return method(*args, **kwargs)
        self.marks.enter(module)
        if isinstance(module, self._wrapper):
            return method(*args, **kwargs)
        path, kind = self._path(module), type(module)
        structure = UNKNOWN if known is None else known
        if self.rules.asks_structure and known is None:
            structure = structure_of(module, path, (*args, *kwargs.values()))
        waits = waits_for_run(structure) and context.method_name != "setup"
        beginning = Beginning(module) if waits else None
        self.seen[path, kind] = structure
        decision = self.rules.decision(path, kind, structure)
        policy = None if decision is None else decision.policy
        around, trace = enclosing_policy.get(), get_opaque_trace_state()
        outer = running_method.get()
        is_own = outer is not None and outer.module == (self, path)
        rounded = rounded_within(outer, trace)
        end = Exit(
            policy,
            around,
            outer,
            loop_between(outer, trace),
            rounded,
            decision is not None and decision.cast_outputs,
            is_own or _is_layer(type(module), context.method_name),
        )
        own, name, replaced = vars(module), context.method_name, {}
        states, came = self._states, (args, kwargs)
        if decision is not None and policy is not None:
            served = self.served.setdefault(path, set())
            refused = self.refused.setdefault(path, {})
            products = make_multiplier(module, path, decision, served, refused, states)
            replaced = overrides(module, path, decision, products, name)
            check_real(module, path, policy, name, args, kwargs)
            method = method_under_rule(module, products, policy, name, method)
            if products is not None and decision.own_products:
                method = partial(self._run_own, module, products, policy, name, method)
        before = {field: own.get(field, _ABSENT) for field in replaced}
        if decision is not None and policy != around and decision.cast_inputs:
            args, kwargs = decision.policy.cast_to_compute(came)
        running = RunningMethod((self, path), trace, frame_id(), rounded)
        tokens = enclosing_policy.set(policy), running_method.set(running)
        outside = self._inside, states.owner
        self._inside = path
        if isinstance(module, StateOwner.kinds):
            states.owner = StateOwner(module)
        # A bound module is Flax's private clone of the user's, and may be changed.
        own.update(replaced)
        try:
            result = end.cast(method(*args, **kwargs), came, _is_opaque)
        except NoPytreeError as error:
            assert policy is not None  # which it was to be cast for
            raise no_pytree(type(module), path, str(error), policy) from None
        except TypeError as error:
            if (
                policy is None
                or (told := self._explain(error, module, path, policy)) is None
            ):
                raise
            raise told from error
        finally:
            for field, value in before.items():
                if value is _ABSENT:
                    del own[field]
                else:
                    own[field] = value
            enclosing_policy.reset(tokens[0])
            running_method.reset(tokens[1])
            self._inside, states.owner = outside
        if beginning is not None:
            structure = structure_of(module, path, given[1], has_run=True)
            self.seen[path, kind] = structure
            other = self.rules.decision(path, kind, structure)
            if other != decision and structure.is_leaf:
                beginning.restore()
                return self.intercept(*given, context, known=structure)
        return result

    def _explain(
        self, error: TypeError, module: nn.Module, path: str, policy: Policy
    ) -> TypeError | None:
        kind = type(module)
        index = self.rules.find(path, kind, self.seen[path, kind])
        rule = str(policy) if index is None else str(self.rules.rules[index])
        below = f"{path}(/.*)?" if path else ".*"
        return mixed_dtypes(error, path, type(module), policy, rule, below)

    def _run_own(self, module, products, policy, name, method, *args, **kwargs):
        """Runs a method with what it multiplies itself under the recipe."""
        is_copy = id(module.scope.root) in self._copies and not module.path
        if is_copy or id(module) in self._multiplying:  # called by another method
            return method(*args, **kwargs)
        path, outside = products.path, self._prefix

        def entering(rng_counters):
            self._copied, self._prefix = (path, rng_counters), path

        self._multiplying.add(id(module))
        try:
            return run_with_own_products(
                module, products, policy, name, method, args, kwargs, entering
            )
        finally:
            self._multiplying.remove(id(module))
            self._prefix = outside

    def _path(self, module: nn.Module) -> str:
        """The path of a module in the model.

        A model may apply a layer by itself, ``self.head.apply(variables, x)``: that has
        scopes of its own, and stands below the module that does so.
        """
        scope: Any = module.scope
        names, root = module.path[self._depth :], id(scope.root)
        if self._copied is not None and root not in self._apart:
            self._apart[root], scope.rng_counters = self._copied
            self._copied = None
            self._copies.add(root)
        if root in self._apart:
            names = *filter(None, (self._apart[root],)), *module.path
        elif self._prefix is not None:  # inside of a transformation
            names = *filter(None, (self._prefix,)), *module.path
        elif (
            not names
            and self._inside is not None
            and module.name not in (None, self._root.name)
        ):
            path = "/".join(filter(None, (self._inside, module.name)))
            self._apart[root] = path
            names = (path,)
        return "/".join(names)
