"""Operations that run programs: calls, loops, branches, recomputation, shards.

A program is rewritten for operands in the dtypes in which they come. What a loop
carries stays in the dtype of the program, and so do references. What calls, loops and
branches are made with (donation, shardings, names, policies) is kept.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from mpjax._autocast.body import Body
from mpjax._autocast.rewriting import Rewriter
from mpjax._autocast.scopes import Scope
from mpjax._autocast.values import Kind, Program, Value

# Parameters of a call that have one entry for each input.
_BY_INPUT = ("in_shardings", "in_layouts", "donated_invars")


def rewrite_jit(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """A jitted function. A cast of an argument is made by who calls it.

    An argument that is donated is, in the dtype of the program; a cast of it may be
    what others read.
    """
    values = _values(body, eqn.invars)
    jaxpr, donated = eqn.params["jaxpr"], eqn.params["donated_invars"]
    program = rewriter.rewrite(jaxpr, _kinds(values), scope, len(values))
    changed = {"jaxpr": program.jaxpr}
    if program.asks_for_more:
        changed |= {key: _repeated(eqn.params[key], program) for key in _BY_INPUT}
    if any(donated):
        for value, is_donated in zip(values, donated, strict=True):
            if is_donated:
                body.settle_moves(value, eqn)
        own = [
            v
            for v, asked in zip(eqn.invars, program.inputs, strict=True)
            for _ in asked
        ]
        atoms = _read(body, eqn, values, program)
        given = zip(_repeated(donated, program), own, atoms, strict=True)
        donated = tuple(d and var is atom for d, var, atom in given)
        if donated != eqn.params["donated_invars"]:
            changed["donated_invars"] = donated
    _write(body, eqn, values, program, program.outputs, changed)


def rewrite_remat(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """What the backward pass recomputes: casts in it too, so that it keeps no more."""
    values = _values(body, eqn.invars)
    program = rewriter.rewrite(eqn.params["jaxpr"], _kinds(values), scope)
    _write(body, eqn, values, program, program.outputs, {"jaxpr": program.jaxpr})


def rewrite_call(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """A call with nothing but a name."""
    values = _values(body, eqn.invars)
    jaxpr = eqn.params["call_jaxpr"]
    program = rewriter.rewrite(jaxpr, _kinds(values), scope)
    changed = {"call_jaxpr": program.jaxpr}
    _write(body, eqn, values, program, program.outputs, changed)


def rewrite_cond(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """Branches, whose results are cast to the widest dtype that one of them has."""
    index, *values = _values(body, eqn.invars)
    kinds = _kinds(values)
    begun = [rewriter.begin(branch, kinds, scope) for branch in eqn.params["branches"]]
    results = begun[0].kinds_of_results()
    for one in begun[1:]:
        pairs = zip(results, one.kinds_of_results(), strict=True)
        results = [kind.join(other) for kind, other in pairs]
    programs = [one.close(results) for one in begun]
    changed = {"branches": tuple(program.jaxpr for program in programs)}
    chosen = Program(None, ((None,), *programs[0].inputs), tuple(results))
    _write(body, eqn, [index, *values], chosen, results, changed)


def rewrite_while(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """A loop until a condition. Its constants are cast before it."""
    params = eqn.params
    values = _values(body, eqn.invars)
    ends = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_cond, of_body = values[: ends[0]], values[ends[0] : ends[1]]
    carried = [Kind(value.written) for value in values[ends[1] :]]
    cond, run = (
        rewriter.rewrite(
            jaxpr, [*_kinds(consts), *carried], scope, len(consts), results
        )
        for jaxpr, consts, results in (
            (params["cond_jaxpr"], of_cond, [Kind(None)]),
            (params["body_jaxpr"], of_body, carried),
        )
    )
    inputs = (*cond.inputs[: len(of_cond)], *run.inputs)
    program = Program(None, inputs, run.outputs)
    changed = {
        "cond_jaxpr": cond.jaxpr,
        "cond_nconsts": sum(map(len, cond.inputs[: len(of_cond)])),
        "body_jaxpr": run.jaxpr,
        "body_nconsts": sum(map(len, run.inputs[: len(of_body)])),
    }
    _write(body, eqn, values, program, run.outputs, changed)


def rewrite_scan(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """A loop over slices. Its constants are cast before it, slices in it."""
    inner = eqn.params["jaxpr"]
    opened = getattr(inner, "jaxpr", inner)
    values = _values(body, eqn.invars)
    # What has an axis for the steps stands after what has none.
    before = _count_alike(eqn.invars, opened.invars)
    carries = _count_alike(eqn.outvars, opened.outvars)
    consts = before - carries
    carried = [Kind(value.written) for value in values[consts:before]]
    slices = [Kind(value.dtype) for value in values[before:]]
    kinds = [*_kinds(values[:consts]), *carried, *slices]
    begun = rewriter.begin(inner, kinds, scope, consts)
    made = [Kind(kind.dtype) for kind in begun.kinds_of_results()[carries:]]
    program = begun.close([*carried, *made])
    if not program.asks_for_more:
        changed = {"jaxpr": program.jaxpr}
        _write(body, eqn, values, program, program.outputs, changed)
        return
    # With more constants the equation has to be made anew.
    operands = _read(body, eqn, values, program)
    more = len(operands) - len(values)
    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    run = core.jaxpr_as_fun(closed(program.jaxpr))

    def loop(*operands):
        own, start = operands[: consts + more], operands[consts + more : before + more]

        def step(carry, one):
            out = run(*own, *carry, *one)
            return tuple(out[:carries]), tuple(out[carries:])

        last, stacked = lax.scan(step, start, operands[before + more :], **options)
        return *last, *stacked

    traced = jax.make_jaxpr(loop)(*(atom.aval for atom in operands))
    atoms = body.splice(traced, operands, eqn)
    for var, atom, kind in zip(eqn.outvars, atoms, program.outputs, strict=True):
        body.enter_result(var, kind.dtype, atom)


def rewrite_shard_map(rewriter: Rewriter, body: Body, eqn: Any, scope: Scope) -> None:
    """What each device runs, rewritten where its axes have names."""
    params = eqn.params
    values = _values(body, eqn.invars)
    kinds = _kinds(values)
    operands = [body.read(value, value.dtype, eqn) for value in values]
    outputs: list[Kind] = []

    def run(*shards):
        program = rewriter.rewrite(params["jaxpr"], kinds, scope)
        outputs[:] = program.outputs
        return tuple(core.jaxpr_as_fun(closed(program.jaxpr))(*shards))

    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    with eqn.ctx.manager:
        traced = jax.make_jaxpr(mapped)(*(atom.aval for atom in operands))
    atoms = body.splice(traced, operands, eqn)
    for var, atom, kind in zip(eqn.outvars, atoms, outputs, strict=True):
        body.enter_result(var, kind.dtype, atom)


def _values(body: Body, atoms: Iterable[Any]) -> list[Value]:
    return [body.value(atom) for atom in atoms]


def _kinds(values: Iterable[Value]) -> list[Kind]:
    return [value.kind for value in values]


def _read(body: Body, eqn: Any, values: Sequence[Value], program: Program) -> list:
    return [
        body.read(value, dtype, eqn)
        for value, asked in zip(values, program.inputs, strict=True)
        for dtype in asked
    ]


def _write(
    body: Body,
    eqn: Any,
    values: Sequence[Value],
    program: Program,
    outputs: Sequence[Kind],
    changed: dict[str, Any],
) -> None:
    """Writes a call of a rewritten program, as it is if that has not changed."""
    atoms = _read(body, eqn, values, program)
    if all(eqn.params[key] is value for key, value in changed.items()):
        changed = {}
    made = body.outputs(eqn, [kind.dtype for kind in outputs])
    body.write(eqn, atoms, made, **changed)
    for var, kind in zip(eqn.outvars, outputs, strict=True):
        if kind.is_constant:
            body.mark_constant(var, kind.numbers)


def _repeated(entries: Sequence[Any], program: Program) -> tuple[Any, ...]:
    """The entries of inputs, each as often as its input is asked for."""
    pairs = zip(entries, program.inputs, strict=True)
    return tuple(entry for entry, asked in pairs for _ in asked)


def _count_alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values of a scan have no axis for its steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(out.aval.shape == own.aval.shape for out, own in pairs)


def closed(jaxpr: Any) -> Any:
    """A jaxpr that can be evaluated."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


CALLERS = {
    "jit": rewrite_jit,
    "remat2": rewrite_remat,
    "checkpoint": rewrite_remat,
    "closed_call": rewrite_call,
    "call": rewrite_call,
    "cond": rewrite_cond,
    "while": rewrite_while,
    "scan": rewrite_scan,
    "shard_map": rewrite_shard_map,
}
