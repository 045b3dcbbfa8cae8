"""Products that a module writes itself, under the recipe of its rule.

A module may multiply by ``jnp.einsum``, ``jnp.dot``, ``@`` or ``lax.dot_general``, and
by names that it has imported from there. No function of JAX is replaced for that, which
would reach other models and threads, and would miss such names: the method is traced,
and its jaxpr run again with other products in place of those of which one operand is
made of parameters of the module alone, by casts, transpositions, slices and the like.
Arrays that know where they come from would have been another way; but what is no
``jax.Array`` is refused by ``lax``, and loses what it knows in ``jnp``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from mpjax._layers.multiplier import Multiplier, check_convolution
from mpjax._layers.sizes import convolution_size, dot_size
from mpjax._products.conv import scaled_conv_general_dilated
from mpjax._products.dot_general import scaled_dot_general
from mpjax._typing import Array, ArrayTree

# The names of the parameters that a value is made of, "" for those of other modules;
# None: it is made of more than parameters.
_Origin: TypeAlias = "frozenset[str] | None"
_LITERAL: frozenset[str] = frozenset()
_OTHER = frozenset({""})


@dataclass(frozen=True)
class _Product:
    """An equation to run under a recipe.

    Attributes:
      name: of the parameter.
      is_first: whether the operand made of parameters is the first.
    """

    name: str
    is_first: bool


# By the index of an equation: a product, or what is in a call that has some in it.
_Plan: TypeAlias = "dict[int, _Product | _Plan]"


def run_own_products(
    function: Callable[[Mapping[str, ArrayTree], ArrayTree], Any],
    own: Mapping[str, ArrayTree],
    others: ArrayTree,
    products: Multiplier,
    compute_dtype: np.dtype,
    *,
    look_only: bool = False,
) -> Any:
    """Runs a function with its products by parameters under a recipe.

    Those that sum over less than ``min_size``, or whose operands have another dtype
    than the compute dtype, as in a router that casts to float32, stay as they are.

    Args:
      function: of ``own`` and ``others``; traced.
      own: parameters of the module, by name.
      others: parameters of modules in it, and what else is traced.
      products: of the module.
      compute_dtype: of its policy.
      look_only: compute nothing, but make the states of its products.

    Returns:
      What the function returns; None with ``look_only``.

    Raises:
      ValueError: the function multiplies by a parameter inside of a loop or a branch.
    """
    names, leaves = [], []
    for name, tree in sorted(own.items()):  # as JAX has the keys of a dict
        arrays = jax.tree.leaves(tree)
        of_tree = (
            [name] if len(arrays) == 1 else [f"{name}_{i}" for i in range(len(arrays))]
        )
        names, leaves = names + of_tree, leaves + arrays
    own_tree = jax.tree.structure(dict(own))
    rest, rest_tree = jax.tree.flatten(others)
    results: list[tuple[Any, list]] = []

    def flat(leaves, rest):
        result = function(own_tree.unflatten(leaves), rest_tree.unflatten(rest))
        parts, tree = jax.tree.flatten(result)
        arrays = {i: part for i, part in enumerate(parts) if hasattr(part, "dtype")}
        results.append(
            (tree, [None if i in arrays else p for i, p in enumerate(parts)])
        )
        return arrays

    closed = jax.make_jaxpr(flat)(leaves, rest)
    origins = [frozenset({name}) for name in names] + [_OTHER] * len(rest)
    planner = _Planner(products, np.dtype(compute_dtype))
    plan, _ = planner.plan(closed.jaxpr, origins)
    if look_only:
        for name in sorted(_names(plan)):
            products.observe(name, None, lambda *_: None)
        return None
    arrays = _run(closed.jaxpr, closed.consts, [*leaves, *rest], plan, products)
    (tree, parts), remaining = results[-1], iter(arrays)
    # An array is a leaf, and None is not.
    return tree.unflatten([next(remaining) if p is None else p for p in parts])


@dataclass(frozen=True)
class _Planner:
    """Finds the products of a jaxpr that a recipe is for.

    Attributes:
      multiplier: of the module.
      dtype: of operands.
      inside: the name of a loop or a branch; None: outside of all.
    """

    multiplier: Multiplier
    dtype: np.dtype
    inside: str | None = None

    def plan(
        self, jaxpr: Any, origins: Sequence[_Origin]
    ) -> tuple[_Plan, list[_Origin]]:
        """The products of a jaxpr whose inputs come from there, and its outputs."""
        known: dict[Any, _Origin] = dict.fromkeys(jaxpr.constvars)
        known |= zip(jaxpr.invars, origins, strict=True)
        plan: _Plan = {}

        def origin(atom) -> _Origin:
            return _LITERAL if isinstance(atom, core.Literal) else known[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            given = [origin(atom) for atom in eqn.invars]
            if eqn.primitive in (dot_general_p, conv_general_dilated_p):
                product = self._product(eqn, given)
                if product is not None:
                    plan[index] = product
                made = _union(given)
                out = [None if made is None or "" in made else made]
            elif eqn.primitive.name == "jit":
                inner, out = self.plan(eqn.params["jaxpr"].jaxpr, given)
                if inner:
                    plan[index] = inner
            elif any(core.jaxprs_in_params(eqn.params)):
                for body, inputs in _bodies(eqn, given):
                    _Planner(self.multiplier, self.dtype, eqn.primitive.name).plan(
                        body, inputs
                    )
                out = [None] * len(eqn.outvars)
            else:
                out = [_union(given)] * len(eqn.outvars)
            known |= zip(eqn.outvars, out, strict=True)
        return plan, [origin(atom) for atom in jaxpr.outvars]

    def _product(self, eqn: Any, given: Sequence[_Origin]) -> _Product | None:
        weights = [bool(origin and origin - _OTHER) for origin in given]
        if sum(weights) != 1 or given[1 - weights.index(True)] is not None:
            return None
        first = weights[0]
        avals = [atom.aval for atom in eqn.invars]
        name = min((given[weights.index(True)] or _LITERAL) - _OTHER)
        shape = avals[weights.index(True)].shape
        if eqn.primitive is dot_general_p:
            contracting, batch = eqn.params["dimension_numbers"]
            side = weights.index(True)
            size = dot_size(shape, contracting[side], batch[side])
        elif first:
            return None
        else:
            out = eqn.params["dimension_numbers"].rhs_spec[0]
            size = convolution_size(shape, shape[out])
        if self.multiplier.is_small(size):
            return None
        if any(aval.dtype != self.dtype for aval in avals):
            dtypes = " x ".join(aval.dtype.name for aval in avals)
            self.multiplier.refused[name] = f"operands {dtypes}"
            return None
        if self.inside is not None:
            raise ValueError(
                f"Module {self.multiplier.path!r} multiplies by its parameter {name!r} "
                f"inside of a {self.inside}, where own_products does not reach. "
                "Multiply there by mpjax.scaled_dot_general or mpjax.einsum, or give "
                "the module a rule without own_products, before the one that matches."
            )
        if eqn.primitive is conv_general_dilated_p:
            sharding = eqn.params.get("out_sharding")
            check_convolution(self.multiplier.path, self.multiplier.recipe, sharding)
        return _Product(name, first)


def same_arrays(one: Any, other: Any) -> bool:
    """Whether two trees have the same arrays."""
    (ones, tree), (others, other_tree) = jax.tree.flatten(one), jax.tree.flatten(other)
    return tree == other_tree and all(a is b for a, b in zip(ones, others, strict=True))


def _union(origins: Sequence[_Origin]) -> _Origin:
    if any(origin is None for origin in origins):
        return None
    return frozenset().union(*(origin for origin in origins if origin is not None))


def _names(plan: _Plan) -> set[str]:
    names = set()
    for step in plan.values():
        names |= {step.name} if isinstance(step, _Product) else _names(step)
    return names


def _bodies(eqn: Any, given: Sequence[_Origin]):
    """The jaxprs of loops and branches, and where their inputs come from."""
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        consts = params["cond_nconsts"]
        yield params["body_jaxpr"].jaxpr, given[consts:]
    elif name == "cond":
        for branch in params["branches"]:
            yield branch.jaxpr, given[1:]
    elif not name.startswith("custom_vjp"):  # such a product is one of its own kind
        for body in core.jaxprs_in_params(params):
            body = getattr(body, "jaxpr", body)
            if len(body.invars) == len(given):
                yield body, given


def _run(
    jaxpr: Any, consts: Sequence[Array], args: Sequence[Array], plan: _Plan, multiplier
) -> list[Array]:
    """Evaluates a jaxpr, with the products of a plan under the recipe."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    done = 0
    for index in (*sorted(plan), len(jaxpr.eqns)):
        _run_plain(jaxpr.eqns[done:index], known)
        done = index + 1
        if index == len(jaxpr.eqns):
            break
        eqn, step = jaxpr.eqns[index], plan[index]
        given = [read(atom) for atom in eqn.invars]
        if isinstance(step, _Product):
            out = [_multiply(eqn, given, step, multiplier)]
        else:
            inner = eqn.params["jaxpr"]
            out = _run(inner.jaxpr, inner.consts, given, step, multiplier)
        known |= zip(eqn.outvars, out, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _run_plain(eqns: Sequence[Any], known: dict[Any, Array]) -> None:
    """Evaluates equations as they are, and enters their results."""
    made = {var: None for eqn in eqns for var in eqn.outvars}
    inputs = {
        atom: None
        for eqn in eqns
        for atom in eqn.invars
        if not isinstance(atom, core.Literal) and atom not in made
    }
    outputs = [var for var in made if not isinstance(var, core.DropVar)]
    info = core.DebugInfo(
        "own_products", "equations", ("",) * len(inputs), ("",) * len(outputs)
    )
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    body = core.Jaxpr((), list(inputs), outputs, list(eqns), effects, info)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(body, ()))
    known |= zip(outputs, run(*(known[var] for var in inputs)), strict=True)


def _multiply(eqn: Any, operands: list, product: _Product, multiplier) -> Array:
    options = dict(eqn.params)
    if eqn.primitive is conv_general_dilated_p:
        options.pop("out_sharding", None)
        return multiplier.observe(
            product.name,
            None,
            lambda recipe, scales, _: scaled_conv_general_dilated(
                *operands, recipe=recipe, scales=scales, **options
            ),
        )
    numbers = options.pop("dimension_numbers")
    lhs, rhs = operands
    if product.is_first:  # a recipe has the weight second
        lhs, rhs, numbers = rhs, lhs, tuple(side[::-1] for side in numbers)
    out = multiplier.observe(
        product.name,
        None,
        lambda recipe, scales, _: scaled_dot_general(
            lhs, rhs, numbers, recipe=recipe, scales=scales, **options
        ),
    )
    if not product.is_first:
        return out
    batch, free = len(numbers[1][0]), lhs.ndim - len(numbers[0][0])
    order = (*range(batch), *range(free, out.ndim), *range(batch, free))
    return lax.transpose(out, order)
