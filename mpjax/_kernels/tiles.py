"""Operations on a part of an array that are the same as on all of it.

A tile is some rows and columns of the last two axes of an array. Arrays that go with it
have the array's shape, or one number for each block of rows and column, or that with
the rows of a block as an axis of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._kernels.programs import Constant, Op, Program
from mpjax._typing import Array

Shape: TypeAlias = tuple[int, ...]
# Of one element at a time, and known to Mosaic.
ELEMENTWISE = frozenset(
    """abs add and bitcast_convert_type ceil clamp convert_element_type cos div eq exp
    exp2 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
    not or rem reshard round rsqrt select_n shift_left shift_right_arithmetic
    sharding_constraint shift_right_logical sign sin sqrt square sub tanh xor""".split()
)


class UnservedError(ValueError):
    """Why a program cannot be computed tile by tile."""


class Kind(NamedTuple):
    """How an array goes with a tile.

    Attributes:
      name: "whole", of the array's own shape; "blocks", with one number for so many
        rows; "split", with those rows as an axis.
      block: the number of rows.
    """

    name: Literal["whole", "blocks", "split"]
    block: int

    def shape(self, rows: int, columns: int) -> Shape:
        """That of its part of a tile."""
        if self.name == "split":
            return rows // self.block, self.block, columns
        return rows // self.block, columns


WHOLE = Kind("whole", 1)


def kind_of(shape: Shape, of: Shape) -> Kind:
    """How an array of a shape goes with tiles of another.

    Raises:
      UnservedError: it does not.
    """
    *lead, rows, columns = of
    if shape == of:
        return WHOLE
    start, rest = list(shape[: len(lead)]), shape[len(lead) :]
    if start == lead and rest[-1:] == (columns,):
        if len(rest) == 2 and rest[0] and rows % rest[0] == 0:
            return Kind("blocks", rows // rest[0])
        if len(rest) == 3 and rest[0] * rest[1] == rows:
            return Kind("split", rest[1])
    raise UnservedError(f"it has an array of shape {shape}")


def check(program: Program, ops: Sequence[Op], shape: Shape) -> None:
    """Raises `UnservedError` unless operations are the same on tiles of a shape."""
    for op in ops:
        if not any(map(program.is_array, op.outputs)):
            continue
        kinds = [
            kind_of(program.types[atom].shape, shape)
            for atom in (*op.inputs, *op.outputs)
            if program.is_array(atom)
        ]
        if op.name in ELEMENTWISE:
            if len(set(kinds)) != 1:
                raise UnservedError(f"{op.name} is of arrays of several shapes")
        elif not _is_known(op, kinds, len(shape)):
            raise UnservedError(f"it computes {op.name}")


def _is_known(op: Op, kinds: list[Kind], ndim: int) -> bool:
    """Whether an operation only cuts arrays into blocks, or repeats numbers."""
    names = [kind.name for kind in kinds]
    if op.name == "iota":
        return names == ["whole"]
    if op.name in ("reshape", "squeeze"):
        return sorted(names) == ["split", "whole"]
    if op.name == "broadcast_in_dim":
        skips = (*range(ndim - 1), ndim)
        given = op.params["broadcast_dimensions"]
        return len(names) == 1 or (names == ["blocks", "split"] and given == skips)
    if op.name in ("reduce_max", "reduce_min"):
        return names == ["split", "blocks"] and op.params["axes"] == (ndim - 1,)
    return False


@dataclasses.dataclass(frozen=True)
class Line:
    """Whole numbers ``first + row * (its row) + column * (its column)``, in 32 bits."""

    dtype: Any
    row: int
    column: int
    first: Any

    def __add__(self, other: "Line") -> "Line":
        first = self.first + other.first
        row, column = self.row + other.row, self.column + other.column
        return Line(self.dtype, row, column, first)

    def times(self, factor: int) -> "Line":
        row, column = self.row * factor, self.column * factor
        return Line(self.dtype, row, column, self.first * jnp.int32(signed(factor)))


@dataclasses.dataclass(frozen=True)
class Tile:
    """Computes operations on a tile.

    Attributes:
      program: where they are from.
      rows: of the tile.
      columns: of the tile.
      first: int32[], where the tile begins along each axis of the array.
      base: gives int32 of rows and columns as `Line` does, but for what comes first.
      is_mosaic: whether it is compiled for a TPU, and not interpreted.
    """

    program: Program
    rows: int
    columns: int
    first: Sequence[Any]
    base: Callable[[int, int], Array]
    is_mosaic: bool

    def run(self, ops: Sequence[Op], known: Mapping[int, Any], shape: Shape) -> dict:
        """The values of all operations, of those that are given by number as well."""
        env = dict(known)
        for op in ops:
            operands = [
                atom.number if isinstance(atom, Constant) else env[atom]
                for atom in op.inputs
            ]
            env[op.outputs[0]] = self._result(op, operands, shape)
        return env

    def _result(self, op: Op, operands: list[Any], shape: Shape) -> Any:
        aval = self.program.types[op.outputs[0]]
        if op.name == "iota":
            axis = op.params["dimension"] - len(shape)
            first = self.first[axis]
            if aval.dtype in (jnp.int32, jnp.uint32):
                return Line(aval.dtype, int(axis == -2), int(axis == -1), first)
            raise UnservedError(f"it counts in {aval.dtype}")
        if op.name in ("add", "mul"):
            line = _line(op, operands)
            if line is not None:
                return line
        kind = kind_of(aval.shape, shape)
        part = kind.shape(self.rows, self.columns)
        operands = [self._array(x) if isinstance(x, Line) else x for x in operands]
        if op.name == "broadcast_in_dim":
            (x,) = operands
            if jnp.ndim(x) == 0:
                return x  # a number stands for an array of it
            return jnp.broadcast_to(x[:, None, :], part)
        if op.name in ("reshard", "sharding_constraint"):
            return operands[0]  # a tile is of the part on one device
        if op.name in ("reshape", "squeeze"):
            return jnp.reshape(operands[0], part)
        if op.name in ("reduce_max", "reduce_min"):
            reduce = jnp.max if op.name == "reduce_max" else jnp.min
            return reduce(operands[0], axis=1)
        if op.name == "sqrt" and self.is_mosaic:
            return _sqrt(operands[0])
        arrays = [jnp.ndim(x) > 0 for x in operands]
        if any(arrays) and op.name in ("select_n", "clamp"):
            start = op.name == "select_n" and not arrays[0]
            operands = [
                x if i < start else jnp.broadcast_to(x, part)
                for i, x in enumerate(operands)
            ]
        return op.run(*operands)[0]

    def _array(self, line: Line) -> Array:
        return (self.base(line.row, line.column) + line.first).astype(line.dtype)

    def full(self, value: Any, kind: Kind) -> Array:
        """A value as an array, of which a number may take the place."""
        value = self._array(value) if isinstance(value, Line) else value
        return jnp.broadcast_to(value, kind.shape(self.rows, self.columns))


def _line(op: Op, operands: list[Any]) -> Line | None:
    """The result of a sum or a product, if it is a `Line`."""
    lines = [x for x in operands if isinstance(x, Line)]
    others = [x for x in operands if not isinstance(x, Line)]
    if op.name == "add" and len(lines) == 2:
        return lines[0] + lines[1]
    if len(lines) != 1 or jnp.ndim(others[0]) != 0:
        return None
    (line,), (other,) = lines, others
    if op.name == "add":
        is_number = isinstance(other, np.generic)
        first = jnp.int32(signed(other)) if is_number else other.astype(jnp.int32)
        return dataclasses.replace(line, first=line.first + first)
    # What is a line of both is one of few, and is not computed for each factor.
    is_simple = isinstance(other, np.generic) and not (line.row and line.column)
    return line.times(int(other)) if is_simple else None


def signed(number: Any) -> int:
    """The int32 that has the lower 32 bits of a whole number."""
    return (int(number) + 2**31) % 2**32 - 2**31


def _sqrt(x: Array) -> Array:
    """Without what Mosaic does for infinity, of which this is NaN."""
    return jnp.where(x == 0, x, x * lax.rsqrt(x))
