"""Mixed precision of a function: the call that users make."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mpjax._autocast.calls import CALLERS
from mpjax._autocast.derivatives import DERIVATIVES
from mpjax._autocast.rewriting import Rewriter
from mpjax._autocast.scopes import Scope
from mpjax._autocast.settings import DTYPES, LEVELS, Matches, Settings
from mpjax._autocast.values import CASTABLE, Kind, float_dtype
from mpjax._checks import check_callable, check_floating_dtype
from mpjax._policies.rule import Rule
from mpjax._typing import DType


def autocast(
    fn: Callable,
    dtype: DType = jnp.bfloat16,
    rules: Rule | Sequence[Rule] | None = None,
    *,
    opt_level: str = "O1",
    output_dtype: DType | None = None,
) -> Callable:
    r"""Runs a function with each operation in the precision that it wants.

    The function is traced, and operations on floats of at most 32 bits are cast by
    category:

    - matrix products and convolutions multiply in ``dtype`` and sum in float32;
    - exponentials, logarithms, powers, roots, trigonometric functions, sums, transforms
      and linear algebra run in float32;
    - arithmetic, comparisons and choices run in the widest dtype of their operands;
      Python's numbers and constants have no say in that;
    - what is left follows its operand.

    No value is cast twice to one dtype, and what a loop reads but does not change is
    cast before it. Functions that are jitted, loops, branches, ``jax.checkpoint``,
    ``jax.shard_map`` and derivatives of a user's own are rewritten as well; kernels,
    callbacks and calls of foreign code run as they are. What a loop carries keeps its
    dtype, and so do products whose operands the function itself casts to 16 bits, or
    for which it asks for more than the default precision.

    ``autocast(fn)`` traces ``fn`` at every call, as `jax.grad` does: jit what calls it.

    Args:
      fn: any function that `jax.jit` can trace. Of its arguments arrays are traced, and
        what else is in them (numbers, flags, functions) is handed on as it is.
      dtype: bfloat16, float16, or float32, which changes nothing.
      rules: the first that matches an operation decides. A rule matches by path, the
        names of modules and of `jax.named_scope` around the operation joined by "/",
        and by ``primitive``. Of its policy the compute dtype counts; with a recipe the
        products are scaled to 8 bits, with neither the operation is left alone.
      opt_level: Apex's levels. ``"O1"``: what is said above; ``"O0"``: nothing is cast,
        but by rules; ``"O2"``: arithmetic is cast to ``dtype`` too; ``"O3"``: all is
        that can be.
      output_dtype: of floating results; None: as ``fn`` returns them.

    Returns:
      A function like ``fn``, to which all transformations of JAX can be applied.

    Raises:
      TypeError: ``fn`` is not callable, ``dtype`` is no floating dtype, or, when it is
        called, ``fn`` returns what is no array.
      ValueError: ``dtype`` has no 16 or 32 bits, there is no such level, a rule is one
        for modules, or, when it is called, a rule matches nothing or ``fn`` writes to
        an NNX object among its arguments, which would be lost.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax
      >>> def loss(w, x):
      ...     return jnp.mean(jax.nn.log_softmax(x @ w) ** 2)
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> gradient = jax.jit(jax.grad(mpjax.autocast(loss)))(w, x)
      >>> gradient.dtype
      dtype('float32')
      >>> keep_head = mpjax.Rule("head", "float32")
      >>> def scoped(w, x):
      ...     with jax.named_scope("head"):
      ...         return x @ w
      >>> mpjax.autocast(scoped, rules=keep_head)(w, x).dtype
      dtype('float32')
    """
    check_callable("fn", fn)
    settings = Settings(_dtype(dtype), _rules(rules), _level(opt_level))
    output = None if output_dtype is None else _dtype(output_dtype, "output_dtype")
    name = getattr(fn, "__name__", type(fn).__name__)

    @functools.wraps(fn, updated=())
    def cast(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        found: list[Any] = []

        def flat(*values):
            given = leaves.copy()
            for i, value in zip(arrays, values, strict=True):
                given[i] = value
            args, kwargs = jax.tree.unflatten(tree, given)
            objects = _nnx_objects((args, kwargs))
            before = [jax.tree.leaves(one) for one in objects]
            result = fn(*args, **kwargs)
            _check_objects(name, objects, before)
            _check_result(name, result)
            out, found[:] = jax.tree.leaves(result), [jax.tree.structure(result)]
            return out

        values = [leaves[i] for i in arrays]
        traced = jax.make_jaxpr(flat)(*values)
        program = _rewritten(traced, settings, output)
        out = core.jaxpr_as_fun(program)(*values)
        return jax.tree.unflatten(found[0], out)

    return cast


def _rewritten(traced: Any, settings: Settings, output: np.dtype | None) -> Any:
    """A traced function in mixed precision."""
    if settings.are_idle and output is None:
        return traced
    matches = Matches(settings)
    rewriter = Rewriter(matches, CALLERS | DERIVATIVES)
    kinds = [Kind(float_dtype(aval)) for aval in traced.in_avals]
    body = rewriter.begin(traced, kinds, Scope())
    matches.check()
    results = [float_dtype(aval) for aval in traced.out_avals]
    if output is not None:
        results = [None if dtype is None else output for dtype in results]
    return body.close([Kind(dtype) for dtype in results]).jaxpr


def _dtype(value: Any, name: str = "dtype") -> np.dtype:
    dtype = check_floating_dtype(name, value)
    if dtype not in CASTABLE:
        remedy = (
            "8 bits need scales: give products a recipe, as in rules=mpjax.Rule("
            "recipe=mpjax.current_scaling())"
            if dtype.itemsize < 2
            else "pass jnp.bfloat16, or leave the function as it is"
        )
        raise ValueError(
            f"{name} is one of {', '.join(d.name for d in DTYPES)}, got {dtype.name}; "
            f"{remedy}."
        )
    return dtype


def _rules(rules: Any) -> tuple[Rule, ...]:
    several = (rules,) if isinstance(rules, Rule) else rules
    if several is None:
        return ()
    if not isinstance(several, tuple | list) or not all(
        isinstance(rule, Rule) for rule in several
    ):
        raise TypeError(
            "rules are an mpjax.Rule or a list of them, got "
            f"{type(rules).__name__}; a dtype for all operations is dtype=."
        )
    return tuple(several)


def _level(value: Any) -> str:
    if not isinstance(value, str) or value not in LEVELS:
        raise ValueError(
            f"opt_level is one of {', '.join(map(repr, LEVELS))}, got {value!r}."
        )
    return value


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array)


def _is_nnx(node: Any) -> bool:
    """Whether a node is an NNX module, optimizer or Rngs, which writes to itself."""
    return any(
        base.__name__ in ("Pytree", "Object") and base.__module__.startswith("flax.nnx")
        for base in type(node).__mro__
    )


def _nnx_objects(tree: Any) -> list[Any]:
    return [one for one in jax.tree.leaves(tree, is_leaf=_is_nnx) if _is_nnx(one)]


def _check_objects(
    name: str, objects: Sequence[Any], before: Sequence[Sequence[Any]]
) -> None:
    """Raises a ValueError if what an NNX object holds is no longer what it held."""
    for one, old in zip(objects, before, strict=True):
        new = jax.tree.leaves(one)
        if len(new) != len(old) or any(
            a is not b for a, b in zip(new, old, strict=True)
        ):
            raise ValueError(
                f"{name} writes to its argument of type {type(one).__name__} (batch "
                "statistics, counts of random keys, sown values, ...), which is a copy "
                "under autocast: the writes would be lost. Pass the two parts that "
                "flax.nnx.split gives, merge them in the function and return "
                "flax.nnx.state of the merged module."
            )


def _check_result(name: str, result: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(result):
        if not (_is_array(leaf) or isinstance(leaf, bool | int | float | complex)):
            where = jax.tree_util.keystr(path) or "all of it"
            raise TypeError(
                f"A function under autocast returns arrays, and {name} returns an "
                f"object of type {type(leaf).__name__} ({where}); return it from "
                "outside, or split it off first, as with equinox.partition."
            )
