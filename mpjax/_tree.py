"""Casts and selections over pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._checks import (
    check_array,
    check_dtype,
    check_has_arrays,
    check_same_structure,
)
from mpjax._typing import Array, ArrayTree, DType


def cast_floating(tree: ArrayTree, dtype: DType) -> ArrayTree:
    """Casts the real floating-point arrays of a tree and leaves all else alone.

    Integers, booleans, complex numbers, PRNG keys, ``None``, strings and Python
    scalars (whose type is weak: they follow the arrays they meet) stay what they are.
    So do arrays of floats in eight bits or fewer, whose values mean nothing without the
    scale that goes with them, a ``QArray`` and a ``ScalingState``.

    Args:
      tree: any pytree. Leaves may be jax arrays, numpy arrays and numpy scalars, or
        ``jax.ShapeDtypeStruct``.
      dtype: a floating dtype.

    Returns:
      The tree with every floating leaf of 16 bits and more in ``dtype``. A leaf that
      has it already is returned as it is; numpy leaves come back as numpy.

    Raises:
      TypeError: the dtype is not a floating one, or an fp6, of which XLA has no arrays.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> tree = {"w": jnp.ones(2), "step": jnp.array(3), "name": "layer"}
      >>> cast = mpjax.cast_floating(tree, jnp.bfloat16)
      >>> cast["w"].dtype.name, cast["step"].dtype.name, cast["name"]
      ('bfloat16', 'int32', 'layer')
    """
    return _convert(tree, dtype, is_castable)


def convert_floating(tree: ArrayTree, dtype: DType) -> ArrayTree:
    """As `cast_floating`, and arrays of floats in eight bits or fewer as well."""
    return _convert(tree, dtype, _is_floating)


def _convert(tree: ArrayTree, dtype: DType, is_converted: Callable) -> ArrayTree:
    dtype = check_dtype("dtype", dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"cast_floating casts to floating dtypes, got {dtype}.")
    check_has_arrays(dtype)

    def cast(leaf):
        if not is_converted(leaf) or leaf.dtype == dtype:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=dtype)
        with np.errstate(over="ignore"):  # of numpy arrays: jax has no such warning
            return leaf.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=keeps_dtypes)


def keeps_dtypes(node) -> bool:
    """Whether the dtypes of what is inside are a part of what it means."""
    return getattr(type(node), "keeps_dtypes", False)


def opaque(*kinds: type) -> Callable[[Any], bool]:
    """Says of a node whether arrays in it keep their dtypes, as all do in ``kinds``."""
    return lambda node: isinstance(node, kinds) or keeps_dtypes(node)


def widen(tree: ArrayTree) -> ArrayTree:
    """The tree with its floating-point arrays of fewer than 32 bits in float32."""

    def cast(leaf):
        narrow = _is_floating(leaf) and jnp.finfo(leaf.dtype).bits < 32
        return convert_floating(leaf, jnp.float32) if narrow else leaf

    return jax.tree.map(cast, tree)


def is_numeric(leaf) -> bool:
    """Whether a leaf has values to compute with; PRNG keys and ``float0`` have none."""
    dtype = getattr(leaf, "dtype", None)
    return dtype != jax.dtypes.float0 and not (
        dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
    )


def _is_floating(leaf) -> bool:
    return isinstance(
        leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    ) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_castable(leaf) -> bool:
    """Whether `cast_floating` casts a leaf: an array of floats in 16 bits or more."""
    return _is_floating(leaf) and leaf.dtype.itemsize > 1


def select_tree(pred: Array, on_true: ArrayTree, on_false: ArrayTree) -> ArrayTree:
    """Chooses one of two trees, without mixing in the other's values.

    After an optimizer step that was skipped, it keeps what the forward pass has changed
    (batch statistics, an EMA, a step counter) as it was before::

        batch_stats = mpjax.select_tree(
            mpjax.last_step_finite(opt_state), new_batch_stats, batch_stats)

    Args:
      pred: bool[].
      on_true: the tree returned where ``pred`` holds.
      on_false: the tree returned elsewhere; same structure, shapes and dtypes.

    Returns:
      A tree like the two.

    Raises:
      ValueError: the trees differ in structure.
      TypeError: two leaves differ in shape or dtype, or ``pred`` is no bool[].

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.select_tree(jnp.array(False), {"n": jnp.array(2)}, {"n": jnp.array(1)})
      {'n': Array(1, dtype=int32, weak_type=True)}
    """
    pred = check_array("pred", pred)
    if pred.dtype != bool or pred.shape != ():
        raise TypeError(
            f"pred is one flag, bool[], got {pred.dtype.name}{list(pred.shape)}."
        )
    check_same_structure("on_true and on_false", on_true, on_false)

    def select(new, old):
        if is_numeric(new) and is_numeric(old):
            new, old = check_array("A leaf", new), check_array("A leaf", old)
        if jnp.shape(new) != jnp.shape(old) or jnp.result_type(new) != jnp.result_type(
            old
        ):
            raise TypeError(
                "select_tree needs leaves of one shape and dtype, got "
                f"{jax.typeof(new)} and {jax.typeof(old)}; cast the new tree to the "
                "dtypes of the old one first."
            )
        return jax.lax.select(pred, new, old)

    return jax.tree.map(select, on_true, on_false)
