"""A traced function as a list of operations, without calls and repetitions."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CALLS = ("jaxpr", "call_jaxpr")
_INLINED = (
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
)


class Constant(NamedTuple):
    """A number that is written in a program."""

    dtype: np.dtype
    bits: bytes

    @property
    def number(self) -> Any:
        if not self.bits:  # of float0
            return np.zeros((), self.dtype)[()]
        return np.frombuffer(self.bits, self.dtype)[0]

    @property
    def array(self) -> Any:
        if not self.bits:
            return np.zeros((), self.dtype)
        return jnp.asarray(self.number, self.dtype)


Atom: TypeAlias = int | Constant


class Op(NamedTuple):
    """An operation, with values by their numbers."""

    primitive: core.Primitive
    params: Mapping[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.primitive.name

    def run(self, *operands: Any) -> list[Any]:
        """Its results."""
        bound: Any = self.primitive.get_bind_params(self.params)
        # Up to JAX 0.10 with the functions that it calls.
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        out = self.primitive.bind(*functions, *operands, **params)
        return list(out) if self.primitive.multiple_results else [out]


class Program:
    """A traced function.

    Calls are opened, of ``lax.platform_dependent`` one branch is read, what is computed
    twice is computed once, and what undoes itself is left out.

    Attributes:
      inputs: numbers of the arguments.
      outputs: of the results.
      ops: all operations, in the order of the program.
      types: of each number its abstract value.
      values: arrays that the function closes over.
    """

    def __init__(self, jaxpr: core.ClosedJaxpr, platform: str):
        self.types: dict[int, Any] = {}
        self.ops: list[Op] = []
        self.values: dict[int, Any] = {}
        self.makers: dict[int, Op] = {}
        self._numbers = itertools.count()
        self._known: dict[Any, tuple[int, ...]] = {}
        self._platform = platform
        self.inputs = [self._new(var.aval) for var in jaxpr.jaxpr.invars]
        self.outputs = self._read(jaxpr, self.inputs)

    def is_array(self, atom: Atom) -> TypeGuard[int]:
        """Whether it has more than one element."""
        return isinstance(atom, int) and math.prod(self.types[atom].shape) != 1

    def needed(self, wanted: Iterable[Atom], stop: Callable[[int], bool]) -> list[Op]:
        """The operations that values are made by, but for those before ``stop``."""
        found: dict[int, Op] = {}
        seen: set[int] = set()
        left = [atom for atom in wanted if isinstance(atom, int)]
        while left:
            number = left.pop()
            if number in seen or number not in self.makers or stop(number):
                continue
            op = self.makers[number]
            seen |= set(op.outputs)
            found[op.outputs[0]] = op  # numbers are in the order of the program
            left += [atom for atom in op.inputs if isinstance(atom, int)]
        return [found[number] for number in sorted(found)]

    def evaluate(self, wanted: Sequence[Atom], args: Sequence[Any]) -> list[Any]:
        """Values of the program, computed as they stand there."""
        known = dict(zip(self.inputs, args, strict=True)) | self.values

        def value(atom: Atom) -> Any:
            return atom.array if isinstance(atom, Constant) else known[atom]

        for op in self.needed(wanted, lambda number: number in known):
            known.update(zip(op.outputs, op.run(*map(value, op.inputs)), strict=True))
        return [value(atom) for atom in wanted]

    def _new(self, aval: Any) -> int:
        number = next(self._numbers)
        self.types[number] = aval
        return number

    def _read(self, jaxpr: Any, inputs: Sequence[Atom]) -> list[Atom]:
        """Adds the operations of a jaxpr; returns its results."""
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = number = self._new(var.aval)
            self.values[number] = value

        def read(atom: Any) -> Atom:
            if isinstance(atom, core.Literal):
                return _constant(atom)
            return env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self._results(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, eqn: core.JaxprEqn, operands: list[Atom]) -> Sequence[Atom]:
        name, params = eqn.primitive.name, eqn.params
        if name in _INLINED:
            called = next(params[key] for key in _CALLS if key in params)
            return self._read(called, operands)
        if name == "cond" and params.get("branches_platforms"):
            chosen = zip(params["branches_platforms"], params["branches"], strict=True)
            branch = next(
                b for names, b in chosen if names is None or self._platform in names
            )
            return self._read(branch, operands[1:])
        same = self._same(eqn, operands)
        if same is not None:
            return [same]
        key = (eqn.primitive, _hashable(params), tuple(operands))
        known = None if eqn.effects else self._known.get(key)
        if known is None:
            known = tuple(self._new(var.aval) for var in eqn.outvars)
            op = Op(eqn.primitive, params, tuple(operands), known)
            self.ops.append(op)
            self.makers.update(dict.fromkeys(known, op))
            self._known[key] = known
        return known

    def _same(self, eqn: core.JaxprEqn, operands: list[Atom]) -> Atom | None:
        """The value that an operation has as its result, if it changes nothing."""
        if len(operands) == 0 or len(eqn.outvars) != 1:
            return None
        name, first = eqn.primitive.name, operands[0]
        out: Any = eqn.outvars[0].aval
        before = _type(self, first)
        alike = before.shape == out.shape and before.dtype == out.dtype
        if alike and name == "convert_element_type":
            return first
        if alike and isinstance(first, int) and name in _MOVES:
            return first
        if alike and name == "pad" and not any(map(any, eqn.params["padding_config"])):
            return first
        if alike and name == "integer_pow" and eqn.params["y"] == 1:
            return first
        if alike and name.startswith("reduce_m") and not eqn.params["axes"]:
            return first
        maker = self.makers.get(first) if isinstance(first, int) else None
        if name in ("bitcast_convert_type", "convert_element_type") and maker:
            start = maker.inputs[0] if maker.name == name else None
            if isinstance(start, int) and _is_undone(
                name, self.types[start], before, out
            ):
                return start
        if name == "xor":
            for one, other in (operands, operands[::-1]):
                maker = self.makers.get(other) if isinstance(other, int) else None
                if maker and maker.name == "xor" and one in maker.inputs:
                    index = maker.inputs.index(one)
                    return maker.inputs[1 - index]
        return None


_MOVES = ("broadcast_in_dim", "copy", "copy_p", "reshape", "slice", "squeeze")


def _type(program: Program, atom: Atom) -> Any:
    if isinstance(atom, int):
        return program.types[atom]
    return jax.ShapeDtypeStruct((), atom.dtype)


def _is_undone(name: str, start: Any, middle: Any, end: Any) -> bool:
    """Whether a cast to another type and back leaves every bit."""
    if start.dtype != end.dtype or start.shape != end.shape:
        return False
    if name == "bitcast_convert_type":
        return start.dtype.itemsize == middle.dtype.itemsize
    return start.dtype in (jnp.bfloat16, jnp.float16) and middle.dtype == jnp.float32


def _constant(literal: core.Literal) -> Constant:
    aval: Any = literal.aval
    dtype = np.dtype(aval.dtype)
    return Constant(dtype, np.asarray(literal.val, dtype).tobytes())


def _hashable(params: Mapping[str, Any]) -> Any:
    items = tuple(sorted(params.items()))
    try:
        hash(items)
    except TypeError:
        return tuple((key, id(value)) for key, value in items)
    return items
