"""Looks in a traced program for what mixed precision rarely means."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from mpjax._inspection.products import is_product
from mpjax._inspection.steps import MOVES, Step, inner

Kind: TypeAlias = Literal[
    "promotion",
    "dequantized",
    "reduction",
    "exponential",
    "statistics",
    "accumulation",
    "round trip",
]
Found: TypeAlias = tuple[int, Kind, str]  # which step, and what happens there

REMEDIES: dict[Kind, str] = {
    "promotion": "Cast the float32 operand down, or the result at once; parameters "
    "that a module reads itself follow its policy under MixedPrecision.",
    "dequantized": "Multiply the 8-bit values and apply their scales to the result, "
    "as mpjax.scaled_dot_general does.",
    "reduction": "Sum in float32: jnp.sum(x, dtype=jnp.float32). In a backward pass it "
    "is the gradient of what was broadcast, as a bias: add that in float32 if it "
    "matters.",
    "exponential": "Cast to float32 before exp or log, and back after the softmax.",
    "statistics": "Compute means, variances and their roots in float32; policies with "
    "a name do so for normalization layers.",
    "accumulation": "Ask for the sum: preferred_element_type=jnp.float32, or int32.",
    "round trip": "Leave the value in its dtype: both casts are for nothing.",
}

_CAST = "convert_element_type"
# Near 0 expm1 and log1p keep all bits.
_EXPONENTIALS = ("exp", "exp2", "log", "cumlogsumexp")
_SUMS = ("reduce_sum", "cumsum", "reduce_prod", "cumprod", "psum", "psum_invariant")
_ENDS_A_STREAM = ("reduce_", "argm", "cum", "gather", "iota", "random", "sort")
_MULTIPLIED = "is multiplied in float32"
_GATES = (*_EXPONENTIALS[:2], "logistic", "top_k", "argmax", "sort")
_SHORT_ACCUMULATION = ("F16_F16_F16", "BF16_BF16_BF16")


def find(program: list[Step]) -> Iterator[Found]:
    """Yields the indices of suspicious steps, their kind, and what happens there."""
    made = {output: step for step in program for output in step.outputs}
    # As in softplus, whose exp is at most 1.
    in_log1p = {s.inputs[0] for s in program if s.eqn.primitive.name == "log1p"}
    yield from _promotions(program)
    for index, step in enumerate(program):
        if not step.eqn.invars:
            continue
        if is_product(step):
            yield from _product(index, step, made)
        elif step.eqn.primitive.name == _CAST:
            yield from _round_trip(index, step, made)
        elif step.outputs[0] not in in_log1p:
            yield from _half(index, step)


def _in(step: Step, i: int = 0) -> Any:
    return step.eqn.invars[i].aval


def _out(step: Step) -> Any:
    return step.eqn.outvars[0].aval


def _bits(aval: Any) -> int:
    """Bits of a floating-point value, 0 of any other."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return 0
    return jnp.finfo(dtype).bits


def _widens(step: Step, low: int, high: int) -> bool:
    """Whether it casts an array of at most `low` bits to at least `high` bits."""
    if step.eqn.primitive.name != _CAST or _in(step).size < 2:
        return False
    return 0 < _bits(_in(step)) <= low and _bits(_out(step)) >= high


def _promotions(program: list[Step]) -> Iterator[Found]:
    """16-bit arrays that become float32 and, still so, meet a product or a module.

    Every cast has a bit. `streams` maps a value to the bits of the casts that it comes
    from without a sum, a product or a cast down between. What is cast for a router, a
    product that makes few numbers of many and chooses by them, is meant, and so are the
    products of its gradients.
    """
    feeds, routers = _feeding_products(program), _routers(program)
    casts: list[int] = []  # indices of steps
    products = 0  # the bits of those that are products with a float32 result
    entered: dict[int, str] = {}  # a bit -> the first module that it enters
    sources: dict[int, int] = {}  # a value of 16 bits -> the bits of its casts
    streams: dict[int, int] = {}
    guilty: dict[int, str] = {}  # a bit -> what comes of it
    meant = 0  # the bits of those that are cast for a router
    backward = 0  # the bits of those that a product of a backward pass reads
    for index, step in enumerate(program):
        name = step.eqn.primitive.name
        if _widens(step, 16, 32):
            bit = 1 << len(casts)
            casts.append(index)
            sources[step.inputs[0]] = sources.get(step.inputs[0], 0) | bit
            streams[step.outputs[0]] = bit
            continue
        carried = [streams.get(value, 0) for value in step.inputs]
        if is_product(step) and not step.backward and not any(carried):
            sizes = sorted(_bits(_in(step, i)) for i in (0, 1))
            if sizes == [16, 16] and _bits(_out(step)) == 32:
                products |= 1 << len(casts)
                streams[step.outputs[0]] = 1 << len(casts)
                casts.append(index)
            elif sizes == [16, 32]:
                narrow = next(i for i in (0, 1) if _bits(_in(step, i)) == 16)
                what = f"{_in(step, narrow).dtype} is multiplied with float32"
                yield index, "promotion", what
        if not any(carried) or (name == _CAST and _bits(_out(step)) < 32):
            continue
        joint = 0
        for bits in carried:
            joint |= bits
        if is_product(step):
            read = [_in(step, i).size for i in (0, 1) if carried[i]]
            if index in routers and _out(step).size < max(read):
                meant |= joint
            elif step.backward:
                backward |= joint & ~products
                meant |= joint if joint & meant else 0
            else:
                guilty |= dict.fromkeys(_ones(joint), _MULTIPLIED)
            continue
        forward = not step.backward and any(feeds[value] for value in step.outputs)
        known = joint & ~products
        for bit in _ones(known) if forward and name not in MOVES else ():
            cast = program[casts[bit]]
            if cast.path and step.path and cast.path != step.path:
                # A module that is alone in it was handed float32 on purpose.
                first = entered.setdefault(bit, step.path)
                if not f"{step.path}/".startswith(f"{first}/"):
                    module = first.rpartition("/")[2]
                    guilty.setdefault(bit, f"enters {module} in float32")
            elif name == "add" and _in(cast).size == _out(step).size:
                own, size = sources[cast.inputs[0]], _in(cast).size
                others = _ones(joint & ~own) if all(carried) else ()
                if any(_in(program[casts[other]]).size == size for other in others):
                    guilty.setdefault(bit, "makes a sum float32")
        if not name.startswith(_ENDS_A_STREAM):
            for value, var in zip(step.outputs, step.eqn.outvars, strict=True):
                if _bits(var.aval) >= 32:
                    streams[value] = joint
    guilty |= dict.fromkeys(_ones(backward & ~meant), _MULTIPLIED)
    for bit, what in guilty.items():
        old, new = _in(program[casts[bit]]), _out(program[casts[bit]])
        yield casts[bit], "promotion", f"{old.dtype} becomes {new.dtype} and {what}"


def _ones(mask: int) -> Iterable[int]:
    """The positions of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _routers(program: list[Step]) -> set[int]:
    """Products whose results end in a softmax or a choice before any other product.

    Those of attention have batches.
    """
    found: set[int] = set()
    gates: set[int] = set()  # values that a softmax, a sigmoid or a choice reads
    multiplied: set[int] = set()  # values that a product reads before
    for index, step in reversed(list(enumerate(program))):
        if is_product(step):
            result = step.outputs[0]
            if result in gates and result not in multiplied and not _batches(step):
                found.add(index)
            if not step.backward:
                multiplied.update(step.inputs)
        elif step.eqn.primitive.name in _GATES:
            gates.update(step.inputs)
        else:
            for values in (gates, multiplied):
                if not values.isdisjoint(step.outputs):
                    values.update(step.inputs)
    return found


def _batches(step: Step) -> bool:
    """Whether a product is several, or no ordinary one."""
    if step.eqn.primitive.name != "dot_general":
        return True
    _, (batch, _) = step.eqn.params["dimension_numbers"]
    return bool(batch)


class _Feeding(dict[int, bool]):
    def __missing__(self, value):
        return False


def _feeding_products(program: list[Step]) -> _Feeding:
    """The values that a product of the forward pass comes from."""
    feeds = _Feeding()
    for step in reversed(program):
        if not step.backward:
            if is_product(step) or any(feeds[value] for value in step.outputs):
                feeds.update(dict.fromkeys(step.inputs, True))
    feeds[-1] = False  # literals
    return feeds


def _product(index: int, step: Step, made: dict[int, Step]) -> Iterator[Found]:
    for i in (0, 1):
        wide = _in(step, i)
        narrow = _narrow_source(step.inputs[i], made) if _bits(wide) > 8 else None
        if narrow:
            what = f"{narrow} becomes {wide.dtype} before the product"
            yield index, "dequantized", what
    asked = str(step.eqn.params.get("precision")).rpartition(".")[2]
    result = _out(step).dtype
    if asked in _SHORT_ACCUMULATION:
        yield index, "accumulation", f"adds up in {asked}"
    elif result.itemsize == 1:
        yield index, "accumulation", f"{_in(step).dtype} with a result of {result}"


def _narrow_source(value: int, made: dict[int, Step], depth: int = 16) -> str | None:
    """The 8-bit dtype that a value is a scaled copy of."""
    step = made.get(value)
    if step is None or depth == 0:
        return None
    if _widens(step, 8, 16) or _is_scaled_integer(step):
        return _in(step).dtype.name
    if step.eqn.primitive.name in MOVES:
        return _narrow_source(step.inputs[0], made, depth - 1)
    if step.eqn.primitive.name in ("mul", "div"):
        found = (_narrow_source(i, made, depth - 1) for i in step.inputs)
        return next(filter(None, found), None)
    return None


def _is_scaled_integer(step: Step) -> bool:
    """Whether it casts int8 or int4 up; uint8 are images."""
    if step.eqn.primitive.name != _CAST or _in(step).size < 2:
        return False
    signed = jnp.issubdtype(_in(step).dtype, jnp.signedinteger)
    return signed and _in(step).dtype.itemsize == 1 and _bits(_out(step)) >= 16


def _round_trip(index: int, step: Step, made: dict[int, Step]) -> Iterator[Found]:
    first = made.get(step.inputs[0])
    while first and first.eqn.primitive.name in MOVES:
        if first.eqn.primitive.name == _CAST:
            break
        first = made.get(first.inputs[0])
    if first and first.eqn.primitive.name == _CAST and _in(step).size > 1:
        old, between, new = _in(first), _in(step), _out(step)
        if old.dtype == new.dtype and 0 < _bits(old) < _bits(between):
            yield index, "round trip", f"{old.dtype} to {between.dtype} and back"


def _half(index: int, step: Step) -> Iterator[Found]:
    """What 16 bits are too few for."""
    name, value = step.eqn.primitive.name, _in(step)
    if _bits(value) != 16 or value.size < 2:
        return
    if name in _SUMS:
        terms = value.size // max(_out(step).size, 1)
        if terms > 1:
            yield index, "reduction", f"{name} in {value.dtype} of {terms} terms"
        elif not name.startswith("reduce"):
            yield index, "reduction", f"{name} in {value.dtype}"
    elif name == "reduce_window_sum":
        terms = math.prod(step.eqn.params["window_dimensions"])
        if terms > 1:
            yield index, "reduction", f"{name} in {value.dtype} of {terms} terms"
    elif name == "scatter-add":
        terms = _in(step, 2).size // value.size
        if terms > 1:
            yield index, "reduction", f"{name} in {value.dtype} of {terms} terms"
    elif name in ("add", "add_any") and (terms := _terms(step)) > 1:
        yield index, "reduction", f"sum in {value.dtype} over {terms} steps of a scan"
    elif name in _EXPONENTIALS:
        yield index, "exponential", f"{name} in {value.dtype}"
    elif name in ("rsqrt", "sqrt"):
        yield index, "statistics", f"{name} in {value.dtype}"


def _terms(step: Step) -> int:
    """How many values a scan adds to what it carries by this, or 0.

    The residual stream of layers in a scan is no such sum: what is added depends on it.
    """
    scan = step.calls[-1] if step.calls else None
    if scan is None or scan.primitive.name != "scan":
        return 0
    body = inner(scan.params["jaxpr"])
    carries = _alike(scan.outvars, body.outvars)  # the rest are stacked
    unstacked = _alike(scan.invars, body.invars)
    for i in range(carries):
        carried = body.invars[unstacked - carries + i]
        if body.outvars[i] is step.eqn.outvars[0] and any(
            atom is carried for atom in step.eqn.invars
        ):
            depends = {id(carried)}
            for eqn in body.eqns:
                if any(id(atom) in depends for atom in eqn.invars):
                    depends |= set(map(id, eqn.outvars))
            others = [atom for atom in step.eqn.invars if atom is not carried]
            own = any(id(atom) in depends for atom in others)
            return 0 if own else scan.params["length"]
    return 0


def _alike(outside: list[Any], inside: list[Any]) -> int:
    """How many values of a scan have no axis for its steps."""
    pairs = zip(outside, inside, strict=True)
    return sum(one.aval.shape == two.aval.shape for one, two in pairs)
