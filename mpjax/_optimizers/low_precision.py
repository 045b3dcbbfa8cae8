"""An optimizer whose state is stored in few bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mpjax._checks import check_same_shapes, check_transformation, whole_number
from mpjax._optimizers.codes import CODES, LowPrecisionArray
from mpjax._optimizers.noise import USES, salt_of
from mpjax._optimizers.rules import (
    Formats,
    Place,
    StateRule,
    block_of,
    places,
    read_formats,
    rule_for,
)
from mpjax._optimizers.trees import check_floating_leaves, has_arrays
from mpjax._tree import is_numeric, widen
from mpjax._typing import Array, ArrayTree

_SHOWN = 8


class LowPrecisionState(NamedTuple):
    """State of `low_precision_state`.

    Attributes:
      inner_state: that of the optimizer, with some arrays stored in few bits.
      seed: uint32[], from which the random bits of the next step are made.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.low_precision_state(optax.sgd(1.0, momentum=0.9))
      >>> print(tx.init(jnp.ones((64, 64))).seed)
      0
    """

    inner_state: optax.OptState
    seed: Array


def low_precision_state(
    inner: optax.GradientTransformation,
    formats: Formats = "8bit",
    *,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stores the state of an optimizer in few bits, and computes in float32.

    Of each array of the state that is shaped like the parameters, the field's name and
    the parameter's path decide by rules how it is stored between steps. ``inner`` sees
    float32: it is initialized with and given float32 copies of parameters and
    gradients. The presets:

    ==============  ======================  =====================  ==============
    ``formats``     first moments           second moments         bytes for both
    ==============  ======================  =====================  ==============
    (none)          float32                 float32                8
    ``"bfloat16"``  bfloat16                bfloat16               4
    ``"8bit"``      float8_e5m2, blocks     ``"log8"``, blocks     2.03
    ==============  ======================  =====================  ==============

    bfloat16 first moments are rounded to nearest, since they change by a tenth in each
    step; all others stochastically, by bits that are a function of ``seed``, of the
    step and of the place in the array, so that they are made in the same pass over
    memory and do not depend on how arrays are sharded. Arrays of fewer than 4096
    elements, and all others (averages of parameters, accumulated gradients, factored
    moments, counts), stay as they are. A block lies along one axis and has at most 128
    elements; no block crosses a shard of an axis in up to 8 parts. Under ``vmap``, and
    in a ``shard_map`` with ``check_vma=False``, members share their random bits.

    It goes inside of loss scaling, ``dynamic_loss_scaling(low_precision_state(tx))``,
    so that a skipped step leaves every bit as it was.

    Args:
      inner: an optimizer of optax.
      formats: a preset, or rules, the first match of which decides.
      seed: of the random bits.

    Returns:
      A transformation whose state is a `LowPrecisionState`.

    Raises:
      TypeError: ``inner`` is no transformation, or ``formats`` are no rules.
      ValueError: there is no such preset. From ``init``: a rule matches nothing, a
        format cannot hold what it is to, what is to be stored is not float32, or there
        is no array that a rule matches. From ``update``: the state is that of another
        tree, or of other shapes.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> params = {"w": jnp.ones((256, 64))}
      >>> tx = mpjax.low_precision_state(optax.rmsprop(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> moments = optax.tree.get(state, "nu")["w"]
      >>> moments.values.dtype.name, moments.scale.shape
      ('int8', (8, 64))

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    check_transformation(inner, lambda value: False)
    rules = read_formats(formats)
    seed = whole_number("seed", seed) % 2**32
    inner = optax.with_extra_args_support(inner)

    def init(params):
        check_floating_leaves(params)
        wide = widen(params)
        state = inner.init(wide)
        stored = _stored(state, params, rules)
        return LowPrecisionState(stored, jnp.array(seed, jnp.uint32))

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, LowPrecisionState):
            raise TypeError(
                "state is a LowPrecisionState, got "
                f"{type(state).__name__}; pass what the init or update of this "
                "optimizer returned."
            )
        old, structure = jax.tree.flatten(state.inner_state, is_leaf=_is_stored)
        before = structure.unflatten(
            leaf.decode() if _is_stored(leaf) else leaf for leaf in old
        )
        _check_same_arrays(old, before, updates)
        out, after = inner.update(widen(updates), before, widen(params), **extra_args)
        check_same_shapes("the states before and after", before, after)
        new = [
            leaf.encode(x, state.seed) if _is_stored(leaf) else x
            for leaf, x in zip(old, jax.tree.leaves(after), strict=True)
        ]
        like = updates if params is None else params
        out = jax.tree.map(_cast_like, out, like, is_leaf=lambda x: x is None)
        # An odd step: the seed runs through all numbers before it comes back.
        next_seed = state.seed + jnp.uint32(0x9E3779B9)
        return out, LowPrecisionState(structure.unflatten(new), next_seed)

    return optax.GradientTransformationExtraArgs(init, update)


def _stored(
    state: ArrayTree, params: ArrayTree, rules: tuple[StateRule, ...]
) -> ArrayTree:
    """A new state with some of its arrays in few bits."""
    if not has_arrays(params):
        return state  # of placeholders, for optax.tree.map_params
    leaves, structure = jax.tree.flatten(state)
    found = list(places(state, params))
    new, matched, uses = [], set(), {}
    for leaf, place in zip(leaves, found, strict=True):
        if place is not None:
            matched |= {rule for rule in rules if rule.matches(place)}
        rule = None if place is None else rule_for(place, rules)
        if place is None or rule is None or rule.format is None:
            new.append(leaf)
            continue
        _check_wide(leaf, place, rule)
        code = CODES[rule.format](rule.rounding)
        block = block_of(leaf.shape, rule.block) if code.scales_blocks else ()
        # A parameter and its moments share random bits: it has the first use of them.
        uses[place.path] = use = uses.get(place.path, 0) + 1
        salt = salt_of(place.path if use < USES else f"{place.path} {place.field}")
        # Of zeros of known shape XLA would make constants, which takes it seconds each.
        leaf = lax.optimization_barrier(leaf)
        empty = LowPrecisionArray(leaf, None, code, block, salt, use % USES)
        new.append(empty.encode(leaf, jnp.zeros((), jnp.uint32)))
    unused = [rule for rule in rules if rule not in matched and not rule.optional]
    fields = {f"{p.field} of {p.path}" for p in found if p is not None}
    fields = ", ".join(sorted(fields)[:_SHOWN]) or "none"
    if unused:
        raise ValueError(
            f"A rule for the state of the optimizer matches nothing: {unused[0]}. "
            f"Arrays shaped like parameters are {fields}."
        )
    if not matched:
        raise ValueError(
            "No array of the optimizer's state is stored in few bits. Arrays shaped "
            f"like parameters are {fields}: name their fields by rules, "
            "mpjax.StateRule(field, format), or leave the wrapper out."
        )
    return structure.unflatten(new)


def _check_wide(leaf: Array, place: Place, rule: StateRule) -> None:
    """Raises a ValueError if an array that is to be stored is not in float32."""
    if leaf.dtype != jnp.float32:
        raise ValueError(
            f"{place.field} of {place.path!r} is {leaf.dtype}, and is stored in "
            f"{rule.format} from float32: leave out the optimizer's own option for its "
            "dtype, mu_dtype say, and parameters in float64, or let a rule with format "
            "None match it, which leaves it as it is."
        )


def _check_same_arrays(stored: list[Any], state: ArrayTree, updates: ArrayTree) -> None:
    """Raises a ValueError if an array in few bits is none of the parameters now."""
    if not has_arrays(updates):
        return
    for leaf, place in zip(stored, places(state, updates), strict=True):
        if _is_stored(leaf) and place is None:
            raise ValueError(
                "The state is that of other parameters: it has an array in few bits of "
                f"shape {leaf.values.shape}, for which the updates have none at its "
                "place. Begin with the state of a new init, or keep what is frozen "
                "among the parameters, by optax.multi_transform."
            )


def _is_stored(node: Any) -> bool:
    return isinstance(node, LowPrecisionArray)


def _cast_like(update: Any, x: Any) -> Any:
    if update is None or not is_numeric(update):
        return update
    return update.astype(jnp.result_type(x))
