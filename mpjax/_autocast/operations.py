"""Operations that compute: their operands cast by category."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from mpjax._autocast.body import Body
from mpjax._autocast.categories import MOVES, Category
from mpjax._autocast.settings import Wish
from mpjax._autocast.values import FLOAT32, Value, float_dtype

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def is_product(eqn: Any) -> bool:
    """Whether an equation is a matrix product or a convolution."""
    return eqn.primitive.name in _PRODUCTS


def rewrite_operation(body: Body, eqn: Any, wish: Wish) -> None:
    """Writes an equation that runs no program of its own.

    Args:
      body: what is written.
      eqn: of the program.
      wish: what it is to do.
    """
    name = eqn.primitive.name
    values = [body.value(atom) for atom in eqn.invars]
    floats = [value for value in values if value.written is not None]
    if name == "convert_element_type" and floats and written(eqn.outvars)[0]:
        _rewrite_cast(body, eqn, values[0])
        return
    if not floats or wish.category is Category.UNCHANGED or _combines_freely(eqn):
        keep(body, eqn)
    elif name in MOVES and len(values) == 1 and wish.category is not Category.LOW:
        body.enter_move(eqn)
    elif wish.category is Category.EACH:
        dtypes = [value.dtype for value in values]
        _write(body, eqn, values, dtypes, dtypes)
    elif is_product(eqn) and wish.category is Category.LOW:
        rewrite_product(body, eqn, wish.dtype)
    else:
        if wish.category is Category.FLOAT32:
            dtype = FLOAT32
        elif wish.category is Category.LOW:
            dtype = wish.dtype
            if not _fits(floats, dtype):
                dtype = FLOAT32
        else:
            dtype = _widest(floats)
        inputs = [None if v.written is None else dtype for v in values]
        outputs = [None if d is None else dtype for d in written(eqn.outvars)]
        _write(body, eqn, values, inputs, outputs)


def keep(body: Body, eqn: Any) -> None:
    """Writes an equation as it is, on operands in the dtypes of the program."""
    values = [body.value(atom) for atom in eqn.invars]
    inputs = [body.read(value, value.written, eqn) for value in values]
    body.write(eqn, inputs, body.outputs(eqn, written(eqn.outvars)))
    if all(v.kind.is_constant for v in values) and values:
        _enter_constants(body, eqn, values)


def written(atoms: Iterable[Any]) -> list[np.dtype | None]:
    """The dtypes of atoms in the program; None: not ones that autocast changes."""
    return [float_dtype(atom.aval) for atom in atoms]


def rewrite_product(body: Body, eqn: Any, dtype: np.dtype) -> None:
    """Writes a product of operands that are cast, unless the program says otherwise."""
    if not is_free(eqn):
        keep(body, eqn)
        return
    values = [body.value(atom) for atom in eqn.invars]
    inputs = [dtype if v.written is not None else None for v in values]
    atoms = [body.read(v, d, eqn) for v, d in zip(values, inputs, strict=True)]
    result = result_dtype(eqn, dtype)
    made = body.outputs(eqn, [result])
    body.write(eqn, atoms, made, preferred_element_type=result)


def is_free(eqn: Any) -> bool:
    """Whether a program leaves the precision of a product to others.

    It does not if it multiplies integers, complex numbers or float64, has cast both
    operands to 16 bits itself, or asks for more than the default precision.
    """
    operands = written(eqn.invars[:2])
    if None in operands or FLOAT32 not in operands or _asks(eqn.params["precision"]):
        return False
    return written(eqn.outvars)[0] is not None


def result_dtype(eqn: Any, dtype: np.dtype) -> np.dtype:
    """The dtype of a product's result; one that is not float32 was asked for."""
    (out,) = written(eqn.outvars)
    return dtype if out is None or out == FLOAT32 else out


def _asks(precision: Any) -> bool:
    several = precision if isinstance(precision, tuple) else (precision,)
    return any(p not in (None, lax.Precision.DEFAULT) for p in several)


def _rewrite_cast(body: Body, eqn: Any, value: Value) -> None:
    """Enters the result of a cast by the program as its operand in another dtype.

    A cast from float32 to float32, which only says that a number is one of JAX and not
    of Python, is none at all.
    """
    (out,) = eqn.outvars
    dtype, sharding = out.aval.dtype, eqn.params.get("sharding")
    if sharding is not None and sharding != value.aval.sharding:
        keep(body, eqn)
    elif value.written == dtype:
        body.enter_same(out, value)
    else:
        body.enter_alias(out, value, dtype, eqn)


def _write(
    body: Body,
    eqn: Any,
    values: Sequence[Value],
    inputs: Sequence[np.dtype | None],
    outputs: Sequence[np.dtype | None],
) -> None:
    atoms = [body.read(v, d, eqn) for v, d in zip(values, inputs, strict=True)]
    changed, combiner = {}, eqn.params.get("update_jaxpr")
    if combiner is not None and outputs[0] != eqn.outvars[0].aval.dtype:
        changed = {"update_jaxpr": _in_dtype(combiner, outputs[0])}
    body.write(eqn, atoms, body.outputs(eqn, outputs), **changed)
    floats = [v for v in values if v.written is not None]
    if all(v.kind.is_constant for v in floats):
        _enter_constants(body, eqn, floats)


def _enter_constants(body: Body, eqn: Any, values: Sequence[Value]) -> None:
    """Says of the results of an operation on constants that they are constants.

    Scalars are, and what is chosen from constants by flags; an array that is computed
    is one of the program's.
    """
    chosen = eqn.primitive.name in ("select_n", "concatenate")
    numbers = tuple(sorted({n for v in values for n in v.kind.numbers}))
    for var in eqn.outvars:
        if isinstance(var, core.DropVar) or float_dtype(var.aval) is None:
            continue
        if chosen or var.aval.ndim == 0:
            body.mark_constant(var, numbers if chosen else ())


def _widest(values: Sequence[Value]) -> np.dtype:
    """The widest dtype of values; constants have a say if it cannot hold them."""
    found = {v.dtype for v in values if not v.kind.is_constant}
    if not found:
        found = {v.dtype for v in values}
    (dtype,) = found if len(found) == 1 else (FLOAT32,)
    return dtype if dtype is not None and _fits(values, dtype) else FLOAT32


def _fits(values: Sequence[Value], dtype: np.dtype) -> bool:
    """Whether constants stay finite, and are not rounded to zero, in a dtype."""
    if dtype == FLOAT32:
        return True
    numbers = [n for v in values if v.kind.is_constant for n in v.kind.numbers]
    info = jnp.finfo(dtype)
    finite = [abs(n) for n in numbers if np.isfinite(n) and n != 0]
    return all(float(info.smallest_subnormal) <= n <= float(info.max) for n in finite)


def _combines_freely(eqn: Any) -> bool:
    """Whether a scatter applies a function of the program's to what it finds."""
    combiner = eqn.params.get("update_jaxpr")
    if eqn.primitive.name != "scatter" or combiner is None:
        return False
    return bool(getattr(combiner, "jaxpr", combiner).eqns)


def _in_dtype(jaxpr: Any, dtype: np.dtype | None) -> Any:
    """A jaxpr of one operation on two numbers, on numbers of another dtype."""
    known = {}

    def new(atom):
        if isinstance(atom, core.Literal) or float_dtype(atom.aval) is None:
            return atom
        if atom not in known:
            known[atom] = core.Var(atom.aval.update(dtype=dtype))
        return known[atom]

    inner = getattr(jaxpr, "jaxpr", jaxpr)
    result = inner.replace(
        invars=[new(v) for v in inner.invars],
        eqns=[
            e.replace(
                invars=[new(v) for v in e.invars], outvars=[new(v) for v in e.outvars]
            )
            for e in inner.eqns
        ],
        outvars=[new(v) for v in inner.outvars],
    )
    return result if inner is jaxpr else jaxpr.replace(jaxpr=result)
