"""Checks of arguments, in the words of one table: what is wanted, and what was got.

They look at Python values and at types, never at the numbers of arrays that JAX holds,
and run while a program is traced.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_DType: TypeAlias = Any
_LONGEST = 60


def wrong(name: str, wanted: str, got: Any, remedy: str = "") -> TypeError:
    """The error for an argument of the wrong type."""
    shown = _shown(got)
    return TypeError(f"{name} {wanted}, got {shown}{f'; {remedy}' if remedy else ''}.")


def _shown(got: Any) -> str:
    kind = type(got).__name__
    if isinstance(got, jax.Array | np.ndarray):
        return f"an array {getattr(got, 'dtype', kind)}{list(np.shape(got))}"
    text = repr(got)
    if len(text) > _LONGEST or "\n" in text:
        return f"an object of type {kind}"
    return f"{text} of type {kind}"


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that only stands for them."""
    if not isinstance(value, bool | np.bool_):
        raise wrong(name, "is a flag", value, "pass True or False")
    return bool(value)


def check_instance(name: str, value: Any, kinds: Any, wanted: str, remedy: str) -> None:
    """An instance of a class."""
    if not isinstance(value, kinds):
        raise wrong(name, wanted, value, remedy)


def check_callable(name: str, value: Any) -> None:
    """A function, or something else that is called."""
    if not callable(value):
        raise wrong(name, "is a function", value, "pass the function itself")


def whole_number(name: str, value: Any) -> int:
    """A whole number as an ``int``; an array of one element is one."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool | np.bool_):
        try:
            if getattr(value, "shape", ()) == ():
                return operator.index(value)
        except TypeError:
            pass
    raise wrong(name, "is a whole number", value, "pass an int")


def check_argnums(value: Any) -> None:
    """An int, or several of them."""
    several = value if isinstance(value, tuple | list | range) else (value,)
    for one in several:
        whole_number("argnums", one)


def check_has_arrays(x: Any) -> None:
    """Raises a TypeError for a dtype, or an array, of which XLA has no arrays.

    Those are the floats of six bits: what is compiled with them ends the process.
    """
    dtype = getattr(x, "dtype", x)
    if isinstance(dtype, str):  # no array, and refused where it is used
        return
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:  # a number, or what is refused where it is used
        return
    if not jnp.issubdtype(dtype, jnp.floating):
        return
    bits = jnp.finfo(dtype).bits
    if bits & (bits - 1):
        raise TypeError(
            f"XLA has no arrays of {dtype.name}; mpjax.numerics.round_to_format gives "
            "its values in a wider dtype."
        )


def check_dtype(name: str, value: Any) -> np.dtype:
    """A dtype or its name. Arrays have one and are none."""
    if isinstance(value, str | type | np.dtype):
        try:
            # "a", say, is an old name of bytes, of which NumPy warns.
            with warnings.catch_warnings(action="error", category=DeprecationWarning):
                return jnp.dtype(value)
        except (TypeError, ValueError, DeprecationWarning):
            pass
    raise wrong(name, "is a dtype", value, "pass one such as jnp.float32, or its name")


def check_floating_dtype(name: str, value: Any) -> np.dtype:
    """A dtype of real floating-point numbers."""
    dtype = check_dtype(name, value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} is a floating dtype, got {dtype.name}; pass jnp.float32 say."
        )
    check_has_arrays(dtype)
    return dtype


def check_array(name: str, value: Any) -> jax.Array:
    """An array of numbers, or a Python number."""
    check_has_arrays(value)
    if isinstance(value, jax.Array):
        return value
    is_number = isinstance(value, bool | int | float | complex | np.generic)
    if not (is_number or isinstance(value, np.ndarray)) and not hasattr(
        value, "__jax_array__"
    ):
        raise wrong(name, "is an array", value, "pass one of numbers")
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong(name, "is an array of numbers", value) from None


def check_floating(name: str, value: Any) -> jax.Array:
    """An array of real floating-point numbers, or a Python number."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    x = check_array(name, value)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} is a floating array, got {x.dtype.name}; cast it to float32 first."
        )
    return x


def check_amount(name: str, value: Any, shape: tuple[int, ...] | None = None) -> None:
    """A real number that is not negative; of arrays of JAX the dtype alone is seen.

    With ``shape`` given, one number, or one for each of the elements.
    """
    if shape is not None and _shape_of(value) not in ((), shape):
        raise wrong(name, "is a number", value, f"or one for each of {list(shape)}")
    if isinstance(value, Tracer | jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise wrong(name, "is a floating number", value, "cast it to float32")
        return
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.number | np.ndarray
    ):
        raise wrong(name, "is a number", value, "pass a float")
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iufV":  # V: of ml_dtypes
        raise wrong(name, "is a real number", value, "pass a float")
    if (
        not (numbers.astype(np.float64) >= 0).all()
        or not np.isfinite(numbers.astype(np.float64)).all()
    ):
        raise ValueError(f"{name} is finite and not negative, got {_shown(value)}.")


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, jax.Array | np.ndarray) else ()


def check_axis_name(value: Any) -> None:
    """The name of a mapped axis, several names, or None."""
    several = value if isinstance(value, tuple | list | set | frozenset) else (value,)
    if value is not None and not all(isinstance(name, str) for name in several):
        raise wrong(
            "axis_name",
            "is the name of an axis or a tuple of names",
            value,
            "pass that of the shard_map, pmap or vmap, 'data' say",
        )


def check_transformation(value: Any, is_other: Callable[[Any], bool]) -> None:
    """An optimizer of optax, or what has its two functions."""
    has_both = all(callable(getattr(value, name, None)) for name in ("init", "update"))
    if not has_both or isinstance(value, type) or is_other(value):
        raise TypeError(
            "inner must be a gradient transformation, such as optax.adamw(1e-3), got "
            f"{_shown(value)}."
        )


def check_same_structure(names: str, one: Any, other: Any, is_leaf: Any = None) -> None:
    """Two trees of the same structure."""
    first = jax.tree.structure(one, is_leaf=is_leaf)
    second = jax.tree.structure(other, is_leaf=is_leaf)
    if first != second:
        raise ValueError(
            f"{names} are trees of one structure, got {str(first)[:200]} and "
            f"{str(second)[:200]}."
        )


def check_same_shapes(names: str, one: Any, other: Any) -> None:
    """Two trees of one structure whose leaves have the same shapes, or are None."""

    def is_none(node):
        return node is None

    check_same_structure(names, one, other, is_none)
    first = jax.tree.leaves_with_path(one, is_none)
    second = jax.tree.leaves(other, is_none)
    for (path, x), y in zip(first, second, strict=True):
        if x is not None and y is not None and np.shape(x) != np.shape(y):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{names} have the same shapes, got {np.shape(x)} and {np.shape(y)} at "
                f"{where!r}."
            )


def check_arrays(name: str, tree: Any, is_leaf: Any = None) -> None:
    """A tree of arrays; nodes for which ``is_leaf`` holds are let through."""
    for leaf in jax.tree.leaves(tree, is_leaf=is_leaf):
        if is_leaf is None or not is_leaf(leaf):
            if not isinstance(leaf, jax.Array):
                check_array(f"A leaf of {name}", leaf)
