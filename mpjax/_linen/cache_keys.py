"""Marks in Flax's scopes, which keep traces of different policies apart."""

from collections.abc import Callable
from typing import Any

from mpjax._policies.lookup import Matcher
from mpjax._policies.policy import Policy


class CacheKeys:
    """What one run of a wrapper puts into the scopes that it meets, and takes back.

    nn.jit caches traces by class, fields and scope flags: a flag tells by what rules,
    and inside what policy, a module runs. On a decorated method nn.jit reads the flags
    before any interceptor runs, so a scope has to be born with it. Scopes may outlive
    the run, in a module that runs without the wrapper as well, so it has to go again.

    Args:
      rules: those of the wrapper.
      root: the scope of the wrapped module.
      enclosing: gives the policy of the module that is running.
    """

    def __init__(
        self, rules: Matcher, root: Any, enclosing: Callable[[], Policy | None]
    ):
        self._rules = rules
        self._enclosing = enclosing
        self._depth = len(root.path)
        # Wrappers inside one another each have a flag of their own.
        self._flag = f"mpjax{sum(name.startswith('mpjax') for name in root.flags)}"
        self._pushes: dict[int, tuple[Any, Any]] = {}
        self._modules: dict[int, Any] = {}

    def enter(self, module: Any) -> None:
        """Marks the scope of a bound module, and those that will be born of it."""
        # Flax gives it a fresh scope, flags and all, after each compact method.
        self._modules[id(module)] = module
        scope = module.scope
        known = scope.flags.get(self._flag) if id(scope) in self._pushes else None
        if known is None or known[-1] is not self._enclosing():
            self._mark(scope)

    def _mark(self, scope) -> None:
        path = "/".join(scope.path[self._depth :])
        key = self._rules.key(path), self._enclosing()
        scope.flags = {**scope.flags, self._flag: key}
        if id(scope) in self._pushes:
            return
        self._pushes[id(scope)] = scope, vars(scope).get("push")
        bare_push = scope.push

        def push(name=None, prefix="", reuse=False):
            child = bare_push(name, prefix, reuse)
            self._mark(child)
            return child

        scope.push = push

    def clear(self) -> None:
        """Leaves every scope as it would be without the run."""
        scopes = [module.scope for module in self._modules.values()]
        for scope, push in self._pushes.values():
            scopes.append(scope)
            if push is None:
                del scope.push
            else:
                scope.push = push
        for scope in scopes:
            if self._flag in scope.flags:
                flags = dict(scope.flags)
                del flags[self._flag]
                scope.flags = flags
