"""Sums in few bits, judged by the most values that can meet in one element.

Added one by one, equal values stop adding up as soon as one is less than half a unit in
the last place of their sum: after ``2**p`` of them, where ``p`` are the bits of the
significand, 256 in bfloat16. A sum that the program asks for is found from an eighth of
that on, where up to an eighth of it may be lost; one that only a gradient makes, as of
a bias, from there on, since shorter ones are everywhere and do no harm.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mpjax._inspection.primitives import CAST, MOVES, SUMS, SUMS_OVER_DEVICES, name_of
from mpjax._inspection.steps import (
    Step,
    carried_by,
    dependents,
    float_bits,
    input_aval,
    makers,
    output_aval,
)

_UNKNOWN = 2**31  # steps of a loop that does not say how many


def reductions(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds sums in 16 bits or fewer that lose what they add."""
    makers_of = makers(program)
    for index, step in enumerate(program):
        if not step.eqn.invars or not 0 < float_bits(input_aval(step)) <= 16:
            continue
        terms, counted = _terms(step, makers_of)
        dtype, name = input_aval(step).dtype, name_of(step.eqn)
        if terms > 1 and _loses(dtype, terms, name, step.backward):
            is_loop = name in ("add", "add_any")
            yield index, f"{'sum' if is_loop else name} in {dtype} {counted}"


def _loses(dtype: Any, terms: int, name: str, backward: bool) -> bool:
    bits = jnp.finfo(dtype).nmant + 1
    if backward:
        return terms > 2**bits
    return name in SUMS_OVER_DEVICES or terms >= 2 ** (bits - 3)


def _terms(step: Step, makers_of: Mapping[int, Step]) -> tuple[int, str]:
    """How many values can add up to one element, and that in words."""
    name = name_of(step.eqn)
    if name in SUMS_OVER_DEVICES:
        terms = _devices(step)
        return terms, f"over {terms} devices"
    if name in ("add", "add_any"):
        terms = _terms_over_steps(step)
        how = f"{terms} steps of a scan" if terms < _UNKNOWN else "the steps of a loop"
        return terms, f"over {how}"
    if name == "scatter-add":
        terms = _updates_of_one_element(step, makers_of)
        return terms, f"of up to {terms} terms"
    terms = 0
    if name == "reduce_window_sum":
        terms = math.prod(step.eqn.params["window_dimensions"])
    elif name in ("cumsum", "cumprod"):
        terms = input_aval(step).shape[step.eqn.params["axis"]]
    elif name in SUMS:
        if not _counts_ties(step, makers_of):
            terms = input_aval(step).size // max(output_aval(step).size, 1)
    return terms, f"of {terms} terms"


def _counts_ties(step: Step, makers_of: Mapping[int, Step]) -> bool:
    """Whether it counts the elements equal to their maximum, for the gradient of it."""
    made = makers_of.get(step.inputs[0])
    if made is None or name_of(made.eqn) != CAST:
        return False
    compared = makers_of.get(made.inputs[0])
    return compared is not None and name_of(compared.eqn) == "eq"


def _devices(step: Step) -> int:
    """Over how many devices it adds up."""
    params = step.eqn.params
    groups = params.get("axis_index_groups")
    if groups:
        return len(groups[0])
    if "axis_size" in params:
        return params["axis_size"]
    axes = params["axes"]
    sizes: dict[Any, int] = {}
    for call in step.calls:
        mesh = call.params.get("mesh")
        sizes |= {} if mesh is None else dict(mesh.shape)
        if "axis_size" in call.params and "axis_name" in call.params:
            sizes[call.params["axis_name"]] = call.params["axis_size"]
    shape = input_aval(step).shape
    # An axis that nothing around it names has at least two.
    return math.prod(
        shape[axis] if isinstance(axis, int) else sizes.get(axis, 2) for axis in axes
    )


def _updates_of_one_element(step: Step, makers_of: Mapping[int, Step]) -> int:
    """How many updates of a scatter can be for the same element: all, at worst."""
    params = step.eqn.params
    if params["unique_indices"]:
        return 1
    numbers = params["dimension_numbers"]
    indices, updates = input_aval(step, 1).shape, input_aval(step, 2).shape
    scattered = [
        n for i, n in enumerate(updates) if i not in numbers.update_window_dims
    ]
    # Those of a batch of scatters go to elements of their own.
    batches = numbers.scatter_indices_batching_dims
    free = {i: n for i, n in enumerate(scattered) if i not in batches}
    counted = _counted_axes(step.inputs[1], len(indices), makers_of)
    return math.prod(n for i, n in free.items() if i not in counted)


def _counted_axes(
    indices: int, rank: int, makers_of: Mapping[int, Step]
) -> frozenset[int]:
    """The axes along which indices, or a part of them, count: 0, 1, 2, ...

    As of ``x[jnp.arange(n), labels]``: no two rows of these are the same.
    """
    step = makers_of.get(indices)
    if step is None:
        return frozenset()
    parts = [indices]
    if name_of(step.eqn) == "concatenate" and step.eqn.params["dimension"] == rank - 1:
        parts = list(step.inputs)
    return frozenset().union(*(_counts_along(part, makers_of) for part in parts))


def _counts_along(
    value: int, makers_of: Mapping[int, Step], depth: int = 12
) -> frozenset[int]:
    """The axes along which a value is an iota."""
    step = makers_of.get(value)
    if step is None or depth == 0:
        return frozenset()
    name, params = name_of(step.eqn), step.eqn.params
    if name == "iota":
        return frozenset({params["dimension"]})
    if name == "select_n":  # of negative indices, which count from the end
        return _counts_along(step.inputs[1], makers_of, depth - 1)
    if name == "broadcast_in_dim":
        inside = _counts_along(step.inputs[0], makers_of, depth - 1)
        to = params["broadcast_dimensions"]
        return frozenset(int(to[i]) for i in inside if i < len(to))
    if name in ("reshape", "squeeze", "transpose", "rev"):
        # Which axis becomes which does not show: an axis of the same size may be it.
        return _axes_of_size(step, _counts_along(step.inputs[0], makers_of, depth - 1))
    if name in MOVES or name in ("add", "sub", "mul", "clamp"):
        operand = 1 if name == "clamp" else 0
        return _counts_along(step.inputs[operand], makers_of, depth - 1)
    return frozenset()


def _axes_of_size(step: Step, axes: frozenset[int]) -> frozenset[int]:
    sizes = [input_aval(step).shape[i] for i in axes]
    return frozenset(
        i for i, n in enumerate(output_aval(step).shape) if n in sizes and n > 1
    )


def _terms_over_steps(step: Step) -> int:
    """How many values a loop adds to what it carries by this addition, or 0.

    The residual stream of layers in a scan is no such sum: what is added depends on it.
    """
    loop = step.calls[-1] if step.calls else None
    if loop is None or name_of(loop) not in ("scan", "while"):
        return 0
    body, carry = carried_by(loop)
    for carried, result in zip(carry, body.outvars, strict=False):
        if result is step.eqn.outvars[0] and any(
            atom is carried for atom in step.eqn.invars
        ):
            depends = dependents(body, [carried])
            others = [atom for atom in step.eqn.invars if atom is not carried]
            own = any(id(atom) in depends for atom in others)
            return 0 if own else loop.params.get("length", _UNKNOWN)
    return 0
