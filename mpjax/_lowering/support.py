"""Which recipe runs natively on which target: the table, and what compilers say."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpjax._hardware.targets import E5M2, INT8, PAIRS, TARGETS
from mpjax._lowering.hlo import bits
from mpjax._lowering.pipeline import report
from mpjax._printing.table import render
from mpjax._printing.text import short_dtypes
from mpjax._products.dot_general import scaled_dot_general
from mpjax._recipes.named import (
    block_scaling,
    current_scaling,
    delayed_scaling,
    delayed_weight_scaling,
    mx_scaling,
    per_channel_scaling,
)
from mpjax._recipes.recipe import Recipe
from mpjax._typing import Array

RECIPES: dict[str, Recipe] = {
    "current_scaling()": current_scaling(),
    "delayed_scaling()": delayed_scaling(),
    "delayed_weight_scaling()": delayed_weight_scaling(),
    "per_channel_scaling()": per_channel_scaling(),
    "block_scaling()": block_scaling(),
    "mx_scaling()": mx_scaling(),
    "current_scaling('float8_e5m2')": current_scaling(E5M2),
    "current_scaling('int8', 'int8')": current_scaling(INT8, INT8),
    "current_scaling().fnuz()": current_scaling().fnuz(),
}


class Cell(NamedTuple):
    """An answer of the table, and that of a compiler.

    Attributes:
      what: a recipe, or the two formats of a product.
      table: whether the table calls it native.
      compiled: whether the compiler made it so.
      shown: what it was made of.
    """

    what: str
    table: bool
    compiled: bool
    shown: str


def compiled_targets() -> tuple[str, ...]:
    """Names the targets whose compiler says the same on every machine."""
    return tuple(name for name, t in TARGETS.items() if t.platform in ("cuda", "tpu"))


def matrix() -> str:
    """Lays out which recipe is native on which target, as ``Recipe.is_supported`` says.

    Example:
      >>> print(matrix().splitlines()[0])
      Where all three products of a recipe are native
    """
    rows = [
        (name, *("yes" if recipe.is_supported(t)[0] else "-" for t in TARGETS))
        for name, recipe in RECIPES.items()
    ]
    title = "Where all three products of a recipe are native"
    return render(rows, ("recipe", *TARGETS), title)


def verify(target: str, size: int = 512) -> list[Cell]:
    """Asks the compiler of a target for every cell of its column.

    Args:
      target: name of a device.
      size: of the square matrices that are multiplied.

    Returns:
      The cells of pairs of formats, then those of recipes.
    """
    device = TARGETS[target]
    answers = {f"{a} x {b}": device.multiplies(a, b) for a, b in PAIRS}
    answers |= {name: r.is_supported(target)[0] for name, r in RECIPES.items()}
    operand = functools.partial(jax.ShapeDtypeStruct, (size, size))
    pairs = [(operand(jnp.dtype(a)), operand(jnp.dtype(b))) for a, b in PAIRS]
    # Each cell has operands of its own, or XLA finds that some are alike.
    trained = [(operand(jnp.bfloat16),) * 2] * len(RECIPES)

    def program(pairs: list[tuple], trained: list[tuple]) -> list[Any]:
        fns = [_multiply] * len(pairs)
        fns += [functools.partial(_train, recipe=r) for r in RECIPES.values()]
        results = []
        for i, (fn, own) in enumerate(zip(fns, [*pairs, *trained], strict=True)):
            with jax.named_scope(f"cell{i}"):
                results.append(fn(*own))
        return results

    products = report(program, pairs, trained, target=target).products
    cells = []
    for i, (what, table) in enumerate(answers.items()):
        own = [p for p in products if p.traced.path.split("/")[0] == f"cell{i}"]
        compiled = all(p.is_native and bits(p.unit) == 8 for p in own)
        shown = dict.fromkeys(
            short_dtypes(f"{p.traced.operands} as {p.unit or p.verdict}") for p in own
        )
        cells.append(Cell(what, table, compiled, ", ".join(shown)))
    return cells


def _multiply(lhs: Array, rhs: Array) -> Array:
    out = jnp.int32 if lhs.dtype == jnp.int8 else jnp.float32
    return lax.dot(lhs, rhs, preferred_element_type=out)


def _train(x: Array, w: Array, recipe: Recipe) -> tuple[Array, Array]:
    """Computes the two gradients of a product."""
    numbers = (((1,), (0,)), ((), ()))
    scales = jnp.ones(3, jnp.float32) if recipe.stateful else None

    def loss(x: Array, w: Array) -> Array:
        out = scaled_dot_general(x, w, numbers, recipe=recipe, scales=scales)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1))(x, w)
