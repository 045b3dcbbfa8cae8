"""A part of a program as one kernel for a TPU, which reads and writes all once."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpjax._kernels.programs import Op, Program
from mpjax._kernels.tiles import (
    WHOLE,
    Kind,
    Tile,
    UnservedError,
    check,
    kind_of,
    signed,
)
from mpjax._typing import Array

_LANES, _SUBLANES = 128, 32  # of the narrowest dtype
_IN_FLIGHT = 9 * 2**20  # bytes of a tile of all arrays; as much again is fetched


@dataclasses.dataclass(frozen=True)
class OnePass:
    """What is computed of some arrays that go with tiles of one of them.

    Attributes:
      program: what it is a part of.
      shape: of that array.
      outputs: the results, by number.
      donated: of each result the input that it takes the place of, or None.
      ops: what they are made by.
      arrays: the inputs.
      scalars: numbers that are computed before.
    """

    program: Program
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int | None, ...]
    ops: tuple[Op, ...]
    arrays: tuple[int, ...]
    scalars: tuple[int, ...]

    def check_local(self, shape: tuple[int, ...]) -> None:
        """Raises an `UnservedError` unless a part of such a shape can be computed."""
        rows, columns = shape[-2:]
        for wrong, text in (
            (rows % _SUBLANES, f"{rows} rows are no multiple of {_SUBLANES}"),
            (columns < _LANES, f"{columns} columns are fewer than {_LANES}"),
            (rows % self.block, f"{rows} rows are no multiple of {self.block}"),
        ):
            if wrong:
                raise UnservedError(f"its shape is {shape}, and {text}")

    @functools.cached_property
    def kinds(self) -> dict[int, Kind]:
        return {
            number: kind_of(self.program.types[number].shape, self.shape)
            for number in (*self.arrays, *self.outputs)
        }

    @property
    def block(self) -> int:
        """The most rows that share a number."""
        return max(kind.block for kind in self.kinds.values())

    def __call__(
        self,
        scalars: Sequence[Any],
        arrays: Sequence[Array],
        first: Sequence[Any],
        interpret: bool,
    ) -> list[Array]:
        """The results.

        Args:
          scalars: values of `scalars`.
          arrays: values of `arrays`, or the same part of each.
          first: int32[], where the part begins along each axis.
          interpret: on any device, by operations of JAX.
        """
        types, kinds = self.program.types, self.kinds
        wholes = [
            x.shape
            for n, x in zip(self.arrays, arrays, strict=True)
            if kinds[n] == WHOLE
        ]
        shape = wholes[0]
        *lead, rows, columns = shape
        chunk = max(math.gcd(rows, 128), self.block)
        bytes_of_element = sum(
            types[n].dtype.itemsize
            for n in (*self.arrays, *self.outputs)
            if kinds[n] == WHOLE
        )
        tile_columns = min(8 * _LANES, columns // _LANES * _LANES)
        tile_rows = 8 * chunk
        while tile_rows * tile_columns * bytes_of_element > _IN_FLIGHT:
            if tile_columns > _LANES:
                tile_columns = tile_columns // (2 * _LANES) * _LANES
            elif self.block == 1 and tile_rows > chunk:
                tile_rows //= 2
            else:
                break
        tile_rows = min(tile_rows, rows)
        floats, whole = _packed(scalars, first)

        def spec(number: int) -> pl.BlockSpec:
            block = (None,) * len(lead) + (
                tile_rows // kinds[number].block,
                tile_columns,
            )
            return pl.BlockSpec(block, lambda *place: place)

        def out_type(number: int) -> jax.ShapeDtypeStruct:
            kind = kinds[number]
            local = (*lead, rows // kind.block, columns)
            return jax.ShapeDtypeStruct(local, types[number].dtype)

        smem = pl.BlockSpec(memory_space=pltpu.SMEM)
        aliases = {
            2 + self.arrays.index(given): i
            for i, given in enumerate(self.donated)
            if given is not None
        }
        body = functools.partial(
            self._body,
            tile=(tile_rows, tile_columns, chunk),
            dtypes=[types[n].dtype for n in self.scalars],
            lead=len(lead),
            is_mosaic=not interpret,
        )
        made = pl.pallas_call(
            body,
            out_shape=[out_type(n) for n in self.outputs],
            grid=(*lead, pl.cdiv(rows, tile_rows), pl.cdiv(columns, tile_columns)),
            in_specs=[smem, smem, *map(spec, self.arrays)],
            out_specs=[spec(n) for n in self.outputs],
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=3 * _IN_FLIGHT),
            name="mpjax_one_pass",
        )(floats, whole, *arrays)
        return list(made)

    def _body(self, floats, whole, *refs, tile, dtypes, lead, is_mosaic) -> None:
        """The kernel: a tile, by chunks of some rows and one vector's lanes."""
        rows, columns, chunk = tile
        ndim = lead + 2
        inputs, outputs = refs[: len(self.arrays)], refs[len(self.arrays) :]
        known: dict[int, Any] = dict(
            zip(self.scalars, _unpacked(floats, whole, dtypes), strict=True)
        )
        place = [pl.program_id(axis) for axis in range(ndim)]
        corner = [whole[len(dtypes) + axis] for axis in range(ndim)]
        starts = [
            a + b * n
            for a, b, n in zip(
                corner, place, (1,) * lead + (rows, columns), strict=True
            )
        ]

        def lane(j: Array, carry: None) -> None:
            start = pl.multiple_of(j * _LANES, _LANES)
            lanes = pl.ds(start, _LANES)
            base = functools.cache(functools.partial(_base, chunk))
            blocks = {
                n: ref[:, lanes]
                for n, ref in zip(self.arrays, inputs, strict=True)
                if self.kinds[n] != WHOLE
            }
            new: dict[int, list[Array]] = {n: [] for n in self.outputs}
            for i in range(rows // chunk):
                env = dict(known)
                for n, ref in zip(self.arrays, inputs, strict=True):
                    per = chunk // self.kinds[n].block
                    part = slice(i * per, (i + 1) * per)
                    env[n] = blocks[n][part] if n in blocks else ref[part, lanes]
                first = [*starts[:-2], starts[-2] + i * chunk, starts[-1] + start]
                tile = Tile(self.program, chunk, _LANES, first, base, is_mosaic)
                env = tile.run(self.ops, env, self.shape)
                for n, ref in zip(self.outputs, outputs, strict=True):
                    kind = self.kinds[n]
                    value = tile.full(env[n], kind)
                    if kind == WHOLE:
                        ref[i * chunk : (i + 1) * chunk, lanes] = value
                    else:
                        new[n].append(value)
            for n, ref in zip(self.outputs, outputs, strict=True):
                if new[n]:
                    ref[:, lanes] = jnp.concatenate(new[n])
            return carry

        lax.fori_loop(0, columns // _LANES, lane, None)


def _base(rows: int, row: int, column: int) -> Array:
    """int32[rows, 128] of whole numbers, as `Line` has them."""
    shape = rows, _LANES
    i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return i * jnp.int32(signed(row)) + j * jnp.int32(signed(column))


def _packed(scalars: Sequence[Any], first: Sequence[Any]) -> tuple[Array, Array]:
    """Numbers as f32[...] and int32[...], of which each has its own kind."""
    floats, whole = [jnp.float32(0.0)], []
    for x in scalars:
        x = jnp.reshape(x, ())
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        floats.append(x.astype(jnp.float32) if is_float else jnp.float32(0.0))
        if x.dtype == jnp.uint32:
            x = lax.bitcast_convert_type(x, jnp.int32)
        whole.append(jnp.int32(0) if is_float else x.astype(jnp.int32))
    return jnp.stack(floats), jnp.stack([*whole, *(jnp.int32(0) + x for x in first)])


def _unpacked(floats: Any, whole: Any, dtypes: Sequence[Any]) -> list[Any]:
    """Numbers that were `_packed`, within the kernel."""
    numbers = []
    for i, dtype in enumerate(dtypes):
        if jnp.issubdtype(dtype, jnp.floating):
            numbers.append(floats[i + 1].astype(dtype))
        elif jnp.issubdtype(dtype, jnp.bool_):
            numbers.append(whole[i] != 0)
        else:
            numbers.append(whole[i].astype(dtype))
    return numbers


def part_of(
    program: Program,
    outputs: Sequence[int],
    donated: Sequence[int | None],
    shape: tuple[int, ...],
    scalars_from: frozenset[int],
) -> OnePass:
    """The part of a program that makes some results.

    Args:
      program: all of it.
      outputs: the results.
      donated: of each the input that it takes the place of.
      shape: of the arrays.
      scalars_from: the arrays that may be read once more, for numbers such as a norm.

    Raises:
      UnservedError: it is not the same on tiles.
    """

    def is_outside(number: int) -> bool:
        return not program.is_array(number)

    ops = program.needed(outputs, is_outside)
    inputs = dict.fromkeys(
        atom for op in ops for atom in op.inputs if isinstance(atom, int)
    )
    made = {number for op in ops for number in op.outputs}
    left = [n for n in (*inputs, *outputs) if n not in made]
    arrays = tuple(dict.fromkeys(n for n in left if program.is_array(n)))
    scalars = tuple(dict.fromkeys(n for n in left if not program.is_array(n)))
    check(program, ops, shape)
    read = program.needed(scalars, lambda number: False)
    for op in read:
        for atom in op.inputs:
            if (
                program.is_array(atom)
                and atom not in program.makers
                and atom not in scalars_from
            ):
                raise UnservedError("a sum over its state is needed before")
    for number in scalars:
        dtype = program.types[number].dtype
        if dtype not in (
            jnp.float32,
            jnp.bfloat16,
            jnp.float16,
            jnp.int32,
            jnp.uint32,
            bool,
        ):
            raise UnservedError(f"it has a number of dtype {dtype}")
    if any(
        kind_of(program.types[n].shape, shape).name == "split"
        for n in (*arrays, *outputs)
    ):
        raise UnservedError("it has an array in blocks")
    donated = tuple(
        n
        if n in arrays
        and program.types[n].shape == program.types[out].shape
        and program.types[n].dtype == program.types[out].dtype
        else None
        for n, out in zip(donated, outputs, strict=True)
    )
    return OnePass(program, shape, tuple(outputs), donated, tuple(ops), arrays, scalars)
