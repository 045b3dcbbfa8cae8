"""Products under the recipe of a rule."""

import functools
import math
from typing import Any

import jax

from mpjax._autocast.body import Body
from mpjax._autocast.operations import is_free, result_dtype, rewrite_product
from mpjax._autocast.settings import Matches, Wish
from mpjax._policies.rule import Rule
from mpjax._products.conv import scaled_conv_general_dilated
from mpjax._products.dot_general import scaled_dot_general

_OF_CONVOLUTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
)


def rewrite_under_recipe(body: Body, eqn: Any, wish: Wish, matches: Matches) -> None:
    """Writes a product under the recipe of a rule, if the rule is for it.

    Args:
      body: what is written.
      eqn: of the program.
      wish: the dtype in which its operands come, and the rule.
      matches: is told that the rule is of use.
    """
    rule = wish.rule
    if rule is None or not is_free(eqn) or not _serves(rule, eqn):
        rewrite_product(body, eqn, wish.dtype)
        return
    matches.serves(rule)
    result = result_dtype(eqn, wish.dtype)
    options = {"recipe": rule.recipe, "preferred_element_type": result}
    if eqn.primitive.name == "conv_general_dilated":
        options |= {key: eqn.params[key] for key in _OF_CONVOLUTIONS}
        product = functools.partial(scaled_conv_general_dilated, **options)
    else:
        for key in ("dimension_numbers", "precision", "out_sharding"):
            options[key] = eqn.params.get(key)
        product = functools.partial(scaled_dot_general, **options)
    operands = [body.read(body.value(v), wish.dtype, eqn) for v in eqn.invars]
    traced = jax.make_jaxpr(product)(*(atom.aval for atom in operands))
    (atom,) = body.splice(traced, operands, eqn)
    body.enter_result(eqn.outvars[0], result, atom)


def _serves(rule: Rule, eqn: Any) -> bool:
    """Whether the recipe of a rule is for a product: by its kind and its size."""
    shapes = [atom.aval.shape for atom in eqn.invars[:2]]
    smallest = rule.min_size or 0
    if eqn.primitive.name == "conv_general_dilated":
        out = eqn.params["dimension_numbers"].rhs_spec[0]
        features = shapes[1][out]
        return min(features, math.prod(shapes[1]) // features) >= smallest
    if eqn.primitive.name != "dot_general":
        return False
    contracting, batch = eqn.params["dimension_numbers"]
    if batch[0] and not rule.attention:
        return False
    summed = math.prod(shapes[0][axis] for axis in contracting[0])
    taken = (*contracting[1], *batch[1])
    free = [n for axis, n in enumerate(shapes[1]) if axis not in taken]
    return min(summed, math.prod(free)) >= smallest
