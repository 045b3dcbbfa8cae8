"""Functions with derivatives of their own: both are rewritten, and stay together.

The derivative is the user's: its jaxpr is traced in the dtypes in which the user wrote
it, when a derivative is asked for, and rewritten as the function is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mpjax._autocast.body import Body
from mpjax._autocast.calls import closed
from mpjax._autocast.rewriting import Rewriter
from mpjax._autocast.scopes import Scope
from mpjax._autocast.values import Kind


def rewrite_custom_jvp(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """A `jax.custom_jvp`."""
    call = _Call(rewriter, body, eqn, scope)
    function = jax.custom_jvp(call.named())
    function.defjvp(call.run_with_tangents)
    call.write(function)


def rewrite_custom_vjp(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """A `jax.custom_vjp`."""
    call = _Call(rewriter, body, eqn, scope)
    function = jax.custom_vjp(call.named())
    function.defvjp(call.run_forward, call.run_backward)
    call.write(function)


class _Call:
    """A call of a function with a derivative of its own, on rewritten operands."""

    def __init__(self, rewriter: Rewriter, body: Body, eqn: Any, scope: Scope):
        self._rewriter, self._body, self._eqn = rewriter, body, eqn
        self._scope = Scope(scope.names, scope.is_marked)
        values = [body.value(atom) for atom in eqn.invars]
        self._kinds = [Kind(value.dtype) for value in values]
        self._atoms = [body.read(value, value.dtype, eqn) for value in values]
        self._program = rewriter.rewrite(eqn.params["call_jaxpr"], self._kinds, scope)
        self._results = [Kind(kind.dtype) for kind in self._program.outputs]
        # Inputs that have a tangent; those before them are what the function closes
        # over, which has none.
        self._active = [
            i
            for i, atom in enumerate(eqn.invars)
            if i >= eqn.params["num_consts"] and _has_tangent(atom.aval)
        ]
        # Of each backward pass: its jaxpr, and the dtypes of what it is given.
        self._backward: tuple[Any, list[Kind]] | None = None

    def write(self, function: Callable[..., Any]) -> None:
        """Writes the call of a function with a derivative."""
        atoms = self._atoms
        with self._eqn.ctx.manager:
            traced = jax.make_jaxpr(function)(*(atom.aval for atom in atoms))
        made = self._body.splice(traced, atoms, self._eqn)
        for var, atom, kind in zip(self._eqn.outvars, made, self._results, strict=True):
            self._body.enter_result(var, kind.dtype, atom)

    def named(self) -> Callable[..., Any]:
        """The function, under the name that the user has given it."""

        def run(*args):
            return tuple(core.jaxpr_as_fun(closed(self._program.jaxpr))(*args))

        jaxpr = self._eqn.params["call_jaxpr"]
        info = getattr(jaxpr, "jaxpr", jaxpr).debug_info
        run.__name__ = info.func_src_info.split(" ")[0]
        return run

    def run_with_tangents(self, primals, tangents):
        """The function and its derivative in one direction."""
        active = self._active
        of_results = [
            i for i, v in enumerate(self._eqn.outvars) if _has_tangent(v.aval)
        ]

        def both(primals, tangents):
            function, chosen = self._of_active(primals)
            out, moved = jax.jvp(function, chosen, tangents)
            return *out, *(moved[i] for i in of_results)

        avals = self._written()
        traced = jax.make_jaxpr(both)(avals, tuple(avals[i] for i in active))
        kinds = [*self._kinds, *(self._kinds[i] for i in active)]
        results = [*self._results, *(self._results[i] for i in of_results)]
        made = self._evaluate(
            traced, kinds, results, [*primals, *(tangents[i] for i in active)]
        )[0]
        count = len(self._results)
        zeros = [np.zeros(v.aval.shape, jax.dtypes.float0) for v in self._eqn.outvars]
        for i, tangent in zip(of_results, made[count:], strict=True):
            zeros[i] = tangent
        return tuple(made[:count]), tuple(zeros)

    def run_forward(self, *args):
        """The function, and what its backward pass needs."""
        found: list[Any] = []

        def both(*primals):
            function, chosen = self._of_active(primals)
            out, pull = jax.vjp(function, *chosen)
            leaves, tree = jax.tree.flatten(pull)
            found[:] = [tree]
            return *out, *leaves

        traced = jax.make_jaxpr(both)(*self._written())
        count = len(self._results)
        made, kinds = self._evaluate(traced, self._kinds, self._results, args)
        avals = traced.out_avals
        tree, of_results = found[0], [v.aval for v in self._eqn.outvars]

        def pull_back(residuals, cotangents):
            given = [
                np.zeros(aval.shape, jax.dtypes.float0)
                if cotangent is None
                else cotangent
                for aval, cotangent in zip(of_results, cotangents, strict=True)
            ]
            return jax.tree.unflatten(tree, residuals)(tuple(given))

        wanted = tuple(v if _has_tangent(v) else None for v in of_results)
        backward = jax.make_jaxpr(pull_back)(list(avals[count:]), wanted)
        self._backward = backward, kinds[count:]
        return tuple(made[:count]), tuple(made[count:])

    def run_backward(self, residuals, cotangents):
        """The gradients of the inputs that have one."""
        assert self._backward is not None
        traced, kinds = self._backward
        given = [
            (kind, ct)
            for kind, ct, var in zip(
                self._results, cotangents, self._eqn.outvars, strict=True
            )
            if _has_tangent(var.aval)
        ]
        made, _ = self._evaluate(
            traced,
            [*kinds, *(kind for kind, _ in given)],
            [self._kinds[i] for i in self._active],
            [*residuals, *(ct for _, ct in given)],
        )
        gradients: list[Any] = [None] * len(self._kinds)
        for i, gradient in zip(self._active, made, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    def _of_active(self, primals: Sequence[Any]):
        """The user's function of the inputs that have a tangent, and these."""
        eqn, active = self._eqn, self._active

        def function(*chosen):
            args = list(primals)
            for i, value in zip(active, chosen, strict=True):
                args[i] = value
            params = eqn.primitive.get_bind_params(eqn.params)
            return tuple(eqn.primitive.bind(*args, **params))

        return function, tuple(primals[i] for i in active)

    def _written(self) -> tuple[Any, ...]:
        return tuple(atom.aval for atom in self._eqn.invars)

    def _evaluate(
        self,
        traced: Any,
        kinds: Sequence[Kind],
        results: Sequence[Kind],
        args: Sequence[Any],
    ) -> tuple[list[Any], list[Kind]]:
        """Rewrites a jaxpr whose first results are in dtypes, and evaluates it."""
        begun = self._rewriter.begin(traced, kinds, self._scope)
        made = [Kind(kind.dtype) for kind in begun.kinds_of_results()]
        made[: len(results)] = results
        program = begun.close(made)
        return core.jaxpr_as_fun(closed(program.jaxpr))(*args), made


def _has_tangent(aval: Any) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", np.int32), jnp.inexact)


DERIVATIVES = {
    "custom_jvp_call": rewrite_custom_jvp,
    "custom_vjp_call": rewrite_custom_vjp,
}
