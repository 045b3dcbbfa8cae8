"""A jaxpr as it is written: values in the dtypes that are asked of them.

A `Value` is what the program computes, and its versions are the arrays that hold it,
one for each dtype at most: no value is cast twice. What only moves elements is written
when it is read, in the dtype that is asked for, so that a cast comes before it, where
others may share it. An input that is asked for in another dtype becomes one more input,
and whoever calls the jaxpr casts it: once, outside of a loop.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.core import ShapedArray
from jax.extend import core
from jax.extend.core.primitives import convert_element_type_p

from mpjax._autocast.values import Kind, Program, Value, float_dtype


class Body:
    """A jaxpr that is being written.

    Args:
      jaxpr: the one of the program.
      kinds: what is known of its inputs.
      open_inputs: how many of the first inputs may become several, one for each dtype.
    """

    def __init__(self, jaxpr: Any, kinds: Sequence[Kind], open_inputs: int):
        self._original = jaxpr
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        self.eqns: list[core.JaxprEqn] = []
        self._values: dict[Any, Value] = {}
        # References are known by their positions.
        if not all(isinstance(v.aval, ShapedArray) for v in inner.invars):
            open_inputs = 0
        for var in inner.constvars:
            self.enter(var, Kind(float_dtype(var.aval)), var)
        self._inputs = []
        for i, (var, kind) in enumerate(zip(inner.invars, kinds, strict=True)):
            is_open = i < open_inputs and kind.dtype is not None
            value = Value(var.aval, kind, var=var if is_open else None)
            if not is_open:
                value.versions[kind.dtype] = self._like(var, kind.dtype)
            self._values[var] = value
            self._inputs.append((var, value))

    def value(self, atom: Any) -> Value:
        """What an atom of the program holds."""
        if not isinstance(atom, core.Literal):
            return self._values[atom]
        dtype = float_dtype(atom.aval)
        number = np.asarray(atom.val)
        numbers = (float(number),) if number.size == 1 and dtype is not None else ()
        kind = Kind(dtype, number.ndim == 0, numbers)
        return Value(atom.aval, kind, {dtype: atom})

    def enter(self, var: Any, kind: Kind, atom: Any) -> None:
        """Says what holds a variable of the program."""
        self._values[var] = Value(var.aval, kind, {kind.dtype: atom})

    def enter_move(self, eqn: core.JaxprEqn) -> None:
        """Says that a variable is moved out of another, to be written when read."""
        source, (out,) = self.value(eqn.invars[0]), eqn.outvars
        self._values[out] = Value(out.aval, source.kind, {}, eqn, source)

    def enter_alias(self, var: Any, source: Value, dtype: np.dtype, eqn: Any) -> None:
        """Says that a variable is another in some dtype."""
        kind = source.kind._replace(dtype=dtype)
        self.enter(var, kind, self.read(source, dtype, eqn))

    def enter_result(self, var: Any, dtype: np.dtype | None, atom: Any) -> None:
        """Says what holds a result of the program, unless nothing reads it."""
        if not isinstance(var, core.DropVar):
            self.enter(var, Kind(dtype), atom)

    def enter_same(self, var: Any, source: Value) -> None:
        """Says that a variable is another."""
        self._values[var] = source

    def mark_constant(self, var: Any, numbers: tuple[float, ...]) -> None:
        """Says that a variable is made of constants alone."""
        value = self._values[var]
        value.kind = Kind(value.dtype, True, numbers)

    def read(self, value: Value, dtype: np.dtype | None, eqn: Any) -> Any:
        """The atom that holds a value in a dtype.

        Args:
          value: what is read.
          dtype: in which it is wanted.
          eqn: the equation that reads it, in whose scope it is cast.
        """
        atom = value.versions.get(dtype)
        if atom is not None:
            return atom
        if value.move is not None and value.source is not None:
            source = self.read(value.source, dtype, eqn)
            (var,) = value.move.outvars
            atom = self._like(var, dtype)
            self.write(value.move, [source], [atom])
        elif value.var is not None:
            atom = self._like(value.var, dtype)
        else:
            atom = self._cast(value, dtype, eqn)
        value.versions[dtype] = atom
        return atom

    def settle_moves(self, value: Value, eqn: Any) -> None:
        """Writes what is moved out of a value before its memory is given away."""
        for one in self._values.values():
            root = one
            while root.move is not None and root.source is not None:
                root = root.source
            if root is value and one is not value:
                self.read(one, one.dtype, eqn)
                one.move = None

    def write(
        self, eqn: Any, inputs: Sequence[Any], outputs: Sequence[Any], **changed: Any
    ) -> None:
        """Writes an equation that is another one on other atoms.

        Args:
          eqn: the equation of the program.
          inputs: atoms.
          outputs: variables.
          **changed: parameters.
        """
        same = all(a is b for a, b in zip(eqn.invars, inputs, strict=False))
        same = same and all(a is b for a, b in zip(eqn.outvars, outputs, strict=True))
        if same and not changed and len(inputs) == len(eqn.invars):
            self.eqns.append(eqn)
            return
        params = {**eqn.params, **changed} if changed else eqn.params
        new = eqn.replace(invars=list(inputs), outvars=list(outputs), params=params)
        self.eqns.append(new)

    def outputs(self, eqn: Any, dtypes: Sequence[np.dtype | None]) -> list[Any]:
        """The variables of an equation's results in dtypes, entered as such."""
        made = []
        for var, dtype in zip(eqn.outvars, dtypes, strict=True):
            atom = self._like(var, dtype)
            if not isinstance(var, core.DropVar):
                is_number = bool(getattr(var.aval, "weak_type", False))
                self.enter(var, Kind(dtype, is_number), atom)
            made.append(atom)
        return made

    def splice(self, closed: Any, inputs: Sequence[Any], eqn: Any) -> list[Any]:
        """Writes all equations of a jaxpr that has just been traced.

        Args:
          closed: used for nothing else, since its variables become the body's.
          inputs: the atoms that it is called with.
          eqn: the equation in whose place it stands, and whose scope it gets.

        Returns:
          The atoms of its results.
        """
        inner = getattr(closed, "jaxpr", closed)
        consts = [core.Literal(c, v.aval) for c, v in _constants(closed, inner)]
        known = dict(zip(inner.constvars, consts, strict=True))
        known |= zip(inner.invars, inputs, strict=True)

        def atom(old):
            return old if isinstance(old, core.Literal) else known.get(old, old)

        outer = eqn.source_info
        for old in inner.eqns:
            stack = outer.name_stack + old.source_info.name_stack
            self.eqns.append(
                old.replace(
                    invars=[atom(v) for v in old.invars],
                    source_info=outer.replace(name_stack=stack),
                )
            )
        return [atom(v) for v in inner.outvars]

    def kinds_of_results(self) -> list[Kind]:
        """What is known of the results, as they are made."""
        inner = getattr(self._original, "jaxpr", self._original)
        return [self.value(atom).kind for atom in inner.outvars]

    def close(self, kinds: Sequence[Kind]) -> Program:
        """Ends the jaxpr with its results in dtypes."""
        inner = getattr(self._original, "jaxpr", self._original)
        last = inner.eqns[-1] if inner.eqns else None
        results = [
            self.read(self.value(atom), kind.dtype, last)
            for atom, kind in zip(inner.outvars, kinds, strict=True)
        ]
        inputs, asked = [], []
        for var, value in self._inputs:
            if not value.versions:
                value.versions[value.dtype] = self._like(var, value.dtype)
            versions = value.versions
            if value.var is None:  # the others are cast in the body
                versions = {value.dtype: versions[value.dtype]}
            asked.append(tuple(versions))
            inputs.append(list(versions.values()))
        flat = [var for versions in inputs for var in versions]
        unchanged = (
            _same(flat, inner.invars)
            and _same(results, inner.outvars)
            and _same(self.eqns, inner.eqns)
        )
        jaxpr = self._original
        if not unchanged:
            info = inner.debug_info
            if info is not None and info.arg_names is not None:
                pairs = zip(info.arg_names, asked, strict=True)
                names = tuple(name for name, versions in pairs for _ in versions)
                info = info._replace(arg_names=names)
            new = inner.replace(
                invars=flat, outvars=results, eqns=self.eqns, debug_info=info
            )
            jaxpr = new if inner is jaxpr else jaxpr.replace(jaxpr=new)
        return Program(jaxpr, tuple(asked), tuple(kinds))

    def _like(self, var: Any, dtype: np.dtype | None) -> Any:
        """A variable in the place of one of the program: itself in its own dtype."""
        if dtype is None or var.aval.dtype == dtype:
            return var
        return core.Var(_retyped(var.aval, dtype))

    def _cast(self, value: Value, dtype: np.dtype | None, eqn: Any) -> Any:
        source = value.versions[value.dtype]
        aval = _retyped(value.aval, dtype)
        if isinstance(source, core.Literal):
            with np.errstate(over="ignore"):
                return core.Literal(np.asarray(source.val).astype(dtype), aval)
        var = core.Var(aval)
        self.eqns.append(
            core.new_jaxpr_eqn(
                [source],
                [var],
                convert_element_type_p,
                {"new_dtype": dtype, "weak_type": False, "sharding": None},
                core.no_effects,
                None if eqn is None else eqn.source_info,
                None if eqn is None else eqn.ctx,
            )
        )
        return var


def _retyped(aval: Any, dtype: Any) -> Any:
    return aval.update(dtype=dtype, weak_type=False)


def _constants(closed: Any, inner: Any):
    return zip(getattr(closed, "consts", ()), inner.constvars, strict=True)


def _same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs = zip(ones, others, strict=False)
    return len(ones) == len(others) and all(a is b for a, b in pairs)
