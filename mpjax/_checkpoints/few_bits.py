"""Arrays in few bits, of a checkpoint and of a state, as the float32 ones they are of.

What `low_precision_state` and `low_precision_params` have stored is known in a
checkpoint by its paths, dtypes and shapes: beside ``inner_state`` there is a ``seed``;
an array of the optimizer is its ``values``, or its ``log8``, and a ``scale``; and a
parameter in 16 bits has the rest of it in ``rest/<method>``, at its own path.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._checkpoints.layout import Path, shown
from mpjax._checkpoints.leaves import is_cast
from mpjax._optimizers.codes import CODES, Code, Linear, Logarithmic
from mpjax._optimizers.halves import METHODS, joined, split
from mpjax._typing import Array


@dataclass(frozen=True)
class Stored:
    """Where a float32 array is, and how.

    Attributes:
      values: the path of its numbers.
      code: the name of their code; None: they are the array itself.
      scale: the path of the scales of blocks.
      rest: the path of what a 16-bit parameter lacks.
      method: how it is kept.
    """

    values: Path
    code: str | None = None
    scale: Path | None = None
    rest: Path | None = None
    method: Any = None

    @property
    def members(self) -> list[Path]:
        """The paths of its arrays."""
        return [p for p in (self.values, self.scale, self.rest) if p is not None]

    def form(self, leaves: Mapping[Path, Any]) -> tuple:
        """What is equal for two arrays that are stored in the same way."""
        scale = None if self.scale is None else tuple(leaves[self.scale].shape)
        return self.code, scale, self.method

    def decode(self, arrays: Mapping[Path, Array]) -> Array:
        """f32[...], of its arrays."""
        values = arrays[self.values]
        if self.code is not None:
            scale = None if self.scale is None else arrays[self.scale]
            code, block = _code_of(self.code, values, scale)
            return jax.jit(code.decode, static_argnums=2)(values, scale, block)
        if self.rest is None:
            return jnp.asarray(values).astype(jnp.float32)
        rest = {self.method: {"": arrays[self.rest]}}
        return jax.jit(joined)({"": values}, rest)[""]

    def encode(self, x: Array, leaves: Mapping[Path, Any]) -> dict[Path, Array]:
        """Its arrays by path, rounded to nearest.

        Args:
          x: f32[...].
          leaves: what they are to be like.
        """
        like = leaves[self.values]
        if self.code is not None:
            scale = None if self.scale is None else leaves[self.scale]
            code, block = _code_of(self.code, like, scale)
            bits = np.zeros((), np.uint32)  # which are not looked at
            values, scale = jax.jit(code.encode, static_argnums=1)(x, block, bits)
            return {self.values: values} | ({self.scale: scale} if self.scale else {})
        if self.rest is None:
            return {self.values: x}
        halves = jax.jit(split, static_argnums=(1, 2))
        value, rest = halves(x, jnp.dtype(like.dtype), self.method)
        return {self.values: value, self.rest: rest}


def wrappers_of(leaves: Mapping[Path, Any]) -> set[Path]:
    """Where there are states of the two wrappers."""
    inside = {
        path[:i]
        for path in leaves
        for i, name in enumerate(path)
        if name == "inner_state"
    }
    return {path for path in inside if (*path, "seed") in leaves}


def stored_arrays(
    paths: Iterable[Path], leaves: Mapping[Path, Any], wrappers: set[Path]
) -> dict[Path, Stored]:
    """Arrays by the paths that they would have as float32 ones.

    Args:
      paths: those that are looked at.
      leaves: arrays, or what is known of them, by path.
      wrappers: of `wrappers_of`.

    Returns:
      How each is stored. A rest whose parameter is not in the tree, or that might be of
      several, is an array of its own.
    """
    found: dict[Path, Stored] = {}
    rests: dict[Path, tuple[str, Path]] = {}
    outside: list[Path] = []
    for path in paths:
        starts = [i for i in range(len(path)) if path[:i] in wrappers]
        rest = next((r for i in starts if (r := _rest_of(path[i:]))), None)
        if rest is not None:
            rests[path] = rest
            continue
        if not starts:
            outside.append(path)
        code = _code_at(path, leaves[path])
        if starts and code is not None:
            scale = (*path[:-1], "scale")
            scale = scale if scale in leaves else None
            found[path[:-1]] = Stored(path, code, scale)
        else:
            found[path] = Stored(path)
    for scale in [x.scale for x in found.values() if x.scale is not None]:
        found.pop(scale, None)
    for path, (method, param) in rests.items():
        place = _param_of(path, param, outside, leaves)
        if place is None:
            found[path] = Stored(path)
        else:
            found[place] = Stored(place, rest=path, method=method)
    return found


def check_converts(
    own: Stored, other: Stored, leaves: Mapping[Path, Any], saved: Mapping[Path, Any]
) -> None:
    """Raises a ValueError unless one array can be made of the other.

    Args:
      own: of the state.
      other: of the checkpoint.
      leaves: of the state, by path.
      saved: what is known of the arrays of the checkpoint, by path.
    """
    values, there = leaves[own.values], saved[other.values]
    if tuple(there.shape) != np.shape(values):
        raise ValueError(
            f"The checkpoint is of another model: {shown(other.values)} has the shape "
            f"{tuple(there.shape)}, and {shown(own.values)} of the state has "
            f"{np.shape(values)}."
        )
    for stored, leaf in ((own, values), (other, there)):
        floating = stored.code is not None or is_cast(getattr(leaf, "dtype", bool))
        if not floating:
            raise ValueError(
                f"{shown(own.values)} of the state is stored in another way than "
                f"{shown(other.values)} of the checkpoint, and {shown(stored.values)} "
                "is no floating-point array of 16 bits or more."
            )


def _param_of(
    rest: Path, param: Path, outside: list[Path], leaves: Mapping[Path, Any]
) -> Path | None:
    """The path of the parameter that a rest is of, if there is one."""
    places = [
        path
        for path in outside
        if path[len(path) - len(param) :] == param
        and "collections" not in path  # of a TrainState
        and np.shape(leaves[path]) == tuple(leaves[rest].shape)
        and _dtype_name(leaves[path]) in ("bfloat16", "float16")
    ]
    return places[0] if len(places) == 1 else None


def _rest_of(path: Path) -> tuple[str, Path] | None:
    """Of the path of a rest in a wrapper, the method and the path of the parameter."""
    if path[0] == "rest" and len(path) > 1 and path[1] in METHODS:
        return path[1], path[2:]
    return None


def _code_at(path: Path, leaf: Any) -> str | None:
    """The name of the code whose numbers are in an array, if it is one's."""
    dtype = _dtype_name(leaf)
    if path and path[-1] == Logarithmic.key and dtype == "int8":
        return Logarithmic.key
    return dtype if path and path[-1] == Linear.key and dtype in CODES else None


def _dtype_name(leaf: Any) -> str:
    return str(getattr(leaf, "dtype", ""))


def _code_of(name: str, values: Any, scale: Any) -> tuple[Code, tuple[int, ...]]:
    """A code that rounds to nearest, and its blocks."""
    block = ()
    if scale is not None:
        block = tuple(n // m for n, m in zip(values.shape, scale.shape, strict=True))
    return CODES[name]("nearest"), block
