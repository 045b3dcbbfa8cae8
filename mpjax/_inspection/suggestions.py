"""Rules that mend what is found, where a rule can; elsewhere it takes an edit.

Each function here is given the steps that have one cause and says which rule removes
it, or None. A rule gives a module a policy of its own, which other modules do not
follow. So a module computes in float32 by a rule only if it multiplies nothing and has
no modules in it: products would be in float32 as well.
"""

from collections.abc import Sequence

from mpjax._inspection.facts import Facts, is_below
from mpjax._inspection.places import author, reads_parameter
from mpjax._inspection.positions import way_to_a_sine
from mpjax._inspection.primitives import CAST, MOVES, name_of
from mpjax._inspection.products import dtype_name, is_product
from mpjax._inspection.routers import routers
from mpjax._inspection.steps import Step, float_bits, input_aval
from mpjax._policies.rule import Rule
from mpjax._printing.text import short_dtypes

_ATTENTION = frozenset({"MultiHeadDotProductAttention", "MultiHeadAttention"})


def in_float32(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """Lets modules compute in float32 what follows their policy in 16 bits."""
    steps = [facts.program[index] for index in indices]
    paths = facts.modules(steps)
    if paths is None or not all(map(facts.follows_policy, steps)):
        return None
    if any(path in facts.multiplying or facts.has_modules(path) for path in paths):
        return None
    return facts.rule(paths, "f32", _narrow(steps))


def reductions(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """As `in_float32`; layers of Flax add up gradients in float32 by a policy.

    They do so where their parameters are float32.
    """
    steps = [facts.program[index] for index in indices]
    paths = facts.modules(steps)
    if paths is not None and all(_is_layer_of_flax(facts, path) for path in paths):
        if all(step.backward and author(step) == "library" for step in steps):
            return facts.rule(paths, _narrow(steps), _narrow(steps))
    return in_float32(facts, indices)


def exponentials(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """As `in_float32`; a layer of attention has its softmax in float32 by any rule."""
    steps = [facts.program[index] for index in indices]
    paths = facts.modules(steps)
    if paths is not None and all(_is_attention(facts, path) for path in paths):
        if all(author(step) == "library" for step in steps):
            return facts.rule(paths, _narrow(steps), _narrow(steps))
    return in_float32(facts, indices)


def promotions(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """Gives modules a policy of 16 bits where their own, or none, makes float32.

    That is at the border of a module whose policy computes in float32, and in a module
    under no policy whose parameters are float32.
    """
    program, rules = facts.program, []
    choosing = routers(program)
    for index in indices:
        step = program[index]
        path = facts.module(step)
        at_border = author(step) == "mpjax" and name_of(step.eqn) == CAST
        if path is None or not (at_border or _meets_parameter(facts, index)):
            return None
        wide = {
            own
            for i, s in enumerate(program)
            if is_product(s) and not s.backward and i not in choosing
            if max(float_bits(input_aval(s, 0)), float_bits(input_aval(s, 1))) >= 32
            if (own := facts.module(s)) is not None and is_below(own, path)
        }
        multiplies = path in facts.multiplying or facts.has_modules(path)
        rules.append(({path} | wide, bool(wide) or multiplies))
    narrow = _narrow([program[index] for index in indices])
    paths = set().union(*(paths for paths, _ in rules))
    multiplies = any(some for _, some in rules)
    return facts.rule(paths, narrow if multiplies else "f32", narrow)


def angles(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """Keeps inputs and frequencies in float32 in all modules on the way to a sine."""
    steps = [facts.program[index] for index in indices]
    sources = [facts.source(value) for step in steps for value in step.inputs]
    entries = [facts.program[i] for i in sources if i is not None]
    entries = [s for s in entries if _casts_input(s) and facts.module(s) == ""]
    if not entries:
        return in_float32(facts, indices)
    way = [s for i in indices for s in way_to_a_sine(facts.program, i)]
    paths = facts.modules(way)
    if paths is None:
        return None
    values = {value for step in entries for value in step.outputs}
    if not any(map(is_product, way)) and all(
        any(facts.origin(value) in values for value in step.inputs) for step in steps
    ):
        return facts.rule(["", *paths], _narrow(steps), "f32", cast_inputs=False)
    # Layers with few inputs, such as coordinates.
    return None if _combines(facts, "") else facts.rule(["", *paths], "f32", "f32")


def integers(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """Lets a layer that casts whole numbers itself compute in float32."""
    steps = [facts.program[index] for index in indices]
    paths = facts.modules(steps)
    if paths is None or any(author(step) == "user" for step in steps):
        return None
    return facts.rule(paths, "f32", _narrow(steps))


def gathers(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """Gives a module a policy of 16 bits that gathers its arguments in float32."""
    steps = [facts.program[index] for index in indices]
    paths = facts.modules(steps)
    if paths is None:
        return None
    for step in steps:
        source = facts.source(step.inputs[0])
        is_given = source is not None and _casts_input(facts.program[source])
        if not is_given and not facts.is_argument(step.inputs[0]):
            return None
    outputs = {value for step in steps for value in step.outputs}
    narrow = _narrow([s for s in facts.program if not outputs.isdisjoint(s.inputs)])
    return facts.rule(paths, narrow, narrow)


def logits(facts: Facts, indices: Sequence[int]) -> Rule | None:
    """Lets modules return float32 that their policy rounds."""
    steps = [facts.program[index] for index in indices]
    paths = facts.modules(steps)
    if paths is None or any(author(step) != "mpjax" for step in steps):
        return None
    wide = {
        facts.module(s)
        for s in facts.program
        if is_product(s) and not s.backward and float_bits(input_aval(s)) >= 32
    }
    compute = "f32" if wide.issuperset(paths) else _narrow(steps)
    return facts.rule(paths, compute, "f32")


def _is_attention(facts: Facts, path: str) -> bool:
    """Whether a module is a layer of attention of Flax."""
    names = (base.__name__ for base in facts.classes.get(path, object).__mro__)
    return not _ATTENTION.isdisjoint(names)


def _is_layer_of_flax(facts: Facts, path: str) -> bool:
    """Whether a module is a layer of Flax that multiplies."""
    kind = facts.classes.get(path, object)
    return kind.__module__.startswith("flax.") and path in facts.multiplying


def _casts_input(step: Step) -> bool:
    """Whether mpjax casts what a module is given."""
    is_cast = name_of(step.eqn) == CAST and author(step) == "mpjax"
    return is_cast and not reads_parameter(step)


def _combines(facts: Facts, path: str) -> bool:
    """Whether a module itself computes one array from two, as a residual stream is."""
    for step in facts.program:
        if step.backward or facts.module(step) != path:
            continue
        sizes = [getattr(v.aval, "size", 0) for v in step.eqn.invars]
        floats = [float_bits(v.aval) > 0 for v in step.eqn.invars]
        if sum(n > 1 and f for n, f in zip(sizes, floats, strict=True)) > 1:
            return True
    return False


def _meets_parameter(facts: Facts, index: int) -> bool:
    """Whether 16 bits meet a float32 argument in a module under no policy."""
    program, step = facts.program, facts.program[index]
    home = facts.module(step)
    if any(facts.module(s) == home and author(s) == "mpjax" for s in program):
        return False
    reached = set(step.outputs) if name_of(step.eqn) == CAST else set(step.inputs)
    for other in program[index:]:
        if reached.isdisjoint(other.inputs) or other.backward:
            continue
        if name_of(other.eqn) in MOVES:
            reached.update(other.outputs)
            continue
        for value, atom in zip(other.inputs, other.eqn.invars, strict=True):
            if float_bits(atom.aval) >= 32 and facts.is_argument(value):
                if name_of(step.eqn) != CAST or value not in reached:
                    return facts.module(other) == home
        if other is not step:
            return False
    return False


def _narrow(steps: Sequence[Step]) -> str:
    """The 16-bit dtype of steps, as policies spell it."""
    for step in steps:
        for var in (*step.eqn.invars, *step.eqn.outvars):
            if float_bits(var.aval) == 16:
                return short_dtypes(dtype_name(var.aval))
    return "bf16"
