"""Every equation of a traced program: where it stands, how often it runs, its operands.

The only file of lowering reports that looks into jaxprs.
`tests/inspection/test_census.py` fails loudly when a new JAX lays them out in another
way.
"""

import functools
import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from mpjax._inspection.primitives import (
    CAST,
    COMBINERS,
    REMAT,
    inner,
    is_jaxpr,
    name_of,
)
from mpjax._inspection.tags import TAG


class Step(NamedTuple):
    """One equation of a program whose calls, loops and branches are all opened.

    Attributes:
      eqn: the equation.
      path: the names of the modules and scopes around it, joined by "/".
      backward: whether it belongs to a transposed, that is, a backward pass.
      runs: how often it runs on all devices; a scan counts by its length, a while loop
        once.
      inputs: a number for each operand, the same for the same value; -1 for a literal.
      outputs: a number for each result.
      tag: the number of the product that it is, if `tags.tag` numbered the program.
      calls: the equations that it is inside of, outermost first.
    """

    eqn: core.JaxprEqn
    path: str
    backward: bool
    runs: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tag: int | None
    calls: tuple[core.JaxprEqn, ...]

    @property
    def loops(self) -> int:
        """How often it runs on one device."""
        lengths = [c.params["length"] for c in self.calls if name_of(c) == "scan"]
        return math.prod(lengths)

    @property
    def in_kernel(self) -> bool:
        """Whether it is written in Pallas."""
        return any(name_of(c) == "pallas_call" for c in self.calls)


def steps(jaxpr: Any, platform: str) -> Generator[Step, None, list[int]]:
    """Reads a program with all calls, loops and branches opened.

    Args:
      jaxpr: as tracing returns it.
      platform: of ``lax.platform_dependent`` only the branch of this platform is read.

    Returns:
      The numbers of the program's results, at the end of the steps.
    """
    numbers = itertools.count()
    jaxpr = inner(jaxpr)
    inputs = [next(numbers) for _ in jaxpr.invars]
    return (yield from _steps_of(jaxpr, inputs, ((), False, 1, ()), platform, numbers))


def needed_steps(jaxpr: Any, platform: str) -> list[Step]:
    """Reads a program without what nobody needs of its backward pass.

    Such are the gradients of inputs: layers with a derivative of their own make them,
    and compilers remove them. In loops and kernels everything counts as needed.
    """
    program: list[Step] = []
    reader = steps(jaxpr, platform)
    while True:
        try:
            program.append(next(reader))
        except StopIteration as end:
            needed = set(end.value)
            break
    kept = []
    for step in reversed(program):
        inside = any(name_of(c) in ("scan", "while", "pallas_call") for c in step.calls)
        always = not step.backward or inside or step.eqn.effects
        if always or not needed.isdisjoint(step.outputs):
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _steps_of(
    jaxpr: Any,
    inputs: Sequence[int],
    context: tuple[tuple[str, ...], bool, int, tuple[core.JaxprEqn, ...]],
    platform: str,
    numbers: Iterator[int],
) -> Generator[Step, None, list[int]]:
    """Yields the steps of one jaxpr; returns the numbers of its results."""
    scopes, backward, runs, calls = context
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= {var: next(numbers) for var in jaxpr.constvars}

    def number(atom: Any) -> int:
        return -1 if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [number(atom) for atom in eqn.invars]
        names, transposed, tag = _names(eqn)
        names, transposed = _once((*scopes, *names)), backward or transposed
        ends = []
        for sub, reads, times in _opened(eqn, operands, platform):
            sub = inner(sub)
            if len(reads) != len(sub.invars):  # an unknown way of calling
                reads = [next(numbers) for _ in sub.invars]
            ends.append(
                (
                    yield from _steps_of(
                        sub,
                        reads,
                        (names, transposed, runs * times, (*calls, eqn)),
                        platform,
                        numbers,
                    )
                )
            )
        path = "/".join(name for name, _ in itertools.groupby(names))
        # Of a while loop, the condition comes first and the body last.
        one = len(ends) == 1 or (len(ends) == 2 and name_of(eqn) == "while")
        one = one and len(ends[-1]) == len(eqn.outvars)
        results = [
            ends[-1][i] if one and ends[-1][i] >= 0 else next(numbers)
            for i in range(len(eqn.outvars))
        ]
        env.update(zip(eqn.outvars, results, strict=True))
        if not one:
            read = operands + [n for end in ends for n in end]
            places = tuple(read), tuple(results)
            yield Step(eqn, path, transposed, runs, *places, tag, calls)
    return [number(atom) for atom in jaxpr.outvars]


def _opened(
    eqn: core.JaxprEqn, operands: list[int], platform: str
) -> list[tuple[Any, list[int], int]]:
    """The jaxprs that an equation runs, what each reads, and how often it runs."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        branches, platforms = params["branches"], params.get("branches_platforms")
        if platforms:
            chosen = zip(platforms, branches, strict=True)
            takes = (b for names, b in chosen if names is None or platform in names)
            branches = list(itertools.islice(takes, 1))
        return [(branch, operands[1:], 1) for branch in branches]
    if name == "while":
        reads, carry = params["cond_nconsts"], params["body_nconsts"]
        looked_at = operands[:reads] + operands[reads + carry :]
        body = params["body_jaxpr"], operands[reads:], 1
        return [(params["cond_jaxpr"], looked_at, 1), body]
    if name == "custom_linear_solve":  # the rest is for its transpose
        matvec, _, solve, _ = params["jaxprs"]
        starts = list(itertools.accumulate(params["const_lengths"], initial=0))
        i = 0 if solve is None else 2
        reads = operands[starts[i] : starts[i + 1]] + operands[starts[-1] :]
        return [(matvec if solve is None else solve, reads, 1)]
    if name.startswith(COMBINERS):
        return []
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":  # what one device does
        times = math.prod(
            params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
        )
    elif name == "pallas_call":
        times = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
    jaxprs = [v for v in jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr)]
    return [(v, operands, times) for v in jaxprs if is_jaxpr(v)]


def _names(eqn: core.JaxprEqn) -> tuple[list[str], bool, int | None]:
    """The scopes of an equation, whether it was transposed, and its tag."""
    names, transposed, tag = [], False, None
    for entry in eqn.source_info.name_stack.stack:
        if type(entry).__name__ == "Transform":
            transposed |= entry.name == "transpose"
        elif found := TAG.fullmatch(entry.name):
            tag = None if found[2] else int(found[1])
        elif entry.name not in REMAT:
            names.append(entry.name)
    return names, transposed, tag


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    """Drops a repeated beginning, as names of backward passes have."""
    for n in range(1, len(names) // 2 + 1):
        if names[:n] == names[n : 2 * n]:
            return _once(names[n:])
    return names


def makers(program: Sequence[Step]) -> dict[int, Step]:
    """Maps each value to the step that it is a result of."""
    return {output: step for step in program for output in step.outputs}


def indices_of_makers(program: Sequence[Step]) -> dict[int, int]:
    """Maps each value to the index of the step that it is a result of."""
    return {out: index for index, step in enumerate(program) for out in step.outputs}


def carried_by(loop: core.JaxprEqn) -> tuple[core.Jaxpr, list[core.Var]]:
    """The body of a scan or a while loop, and what it carries as the body reads it."""
    if name_of(loop) == "while":
        body = inner(loop.params["body_jaxpr"])
        return body, body.invars[loop.params["body_nconsts"] :]
    body = inner(loop.params["jaxpr"])
    carries = _without_step_axis(loop.outvars, body.outvars)  # the rest are stacked
    unstacked = _without_step_axis(loop.invars, body.invars)
    return body, body.invars[unstacked - carries : unstacked]


def _without_step_axis(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values of a scan have no axis for its steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(out.aval.shape == own.aval.shape for out, own in pairs)


def dependents(body: core.Jaxpr, sources: Sequence[core.Var]) -> set[int]:
    """The values of a jaxpr that come from some of them, by identity."""
    depends = set(map(id, sources))
    for eqn in body.eqns:
        if any(id(atom) in depends for atom in eqn.invars):
            depends |= set(map(id, eqn.outvars))
    return depends


def input_aval(step: Step, i: int = 0) -> Any:
    """The shape and dtype of an operand."""
    return step.eqn.invars[i].aval


def output_aval(step: Step) -> Any:
    """The shape and dtype of the first result."""
    return step.eqn.outvars[0].aval


def float_bits(aval: Any) -> int:
    """Bits of a floating-point value, 0 of any other."""
    dtype = getattr(aval, "dtype", None)
    return 0 if dtype is None else _float_bits(dtype)


@functools.cache
def _float_bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0


def widens(step: Step, low: int, high: int) -> bool:
    """Whether it casts an array of at most `low` bits to at least `high` bits."""
    if step.eqn.primitive.name != CAST or input_aval(step).size < 2:
        return False
    return (
        0 < float_bits(input_aval(step)) <= low
        and float_bits(output_aval(step)) >= high
    )
