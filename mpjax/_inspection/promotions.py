"""16-bit values that become float32 and stay so."""

from collections.abc import Iterable, Iterator

from mpjax._inspection.findings import Found
from mpjax._inspection.primitives import CAST, ENDS_A_STREAM, GATES, MOVES
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import Step, float_bits, input_aval, output_aval, widens

_MULTIPLIED = "is multiplied in float32"


def promotions(program: list[Step]) -> Iterator[Found]:
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
        if widens(step, 16, 32):
            bit = 1 << len(casts)
            casts.append(index)
            sources[step.inputs[0]] = sources.get(step.inputs[0], 0) | bit
            streams[step.outputs[0]] = bit
            continue
        carried = [streams.get(value, 0) for value in step.inputs]
        if is_product(step) and not step.backward and not any(carried):
            sizes = sorted(float_bits(input_aval(step, i)) for i in (0, 1))
            if sizes == [16, 16] and float_bits(output_aval(step)) == 32:
                products |= 1 << len(casts)
                streams[step.outputs[0]] = 1 << len(casts)
                casts.append(index)
            elif sizes == [16, 32]:
                narrow = next(
                    i for i in (0, 1) if float_bits(input_aval(step, i)) == 16
                )
                what = f"{input_aval(step, narrow).dtype} is multiplied with float32"
                yield index, "promotion", what
        if not any(carried) or (name == CAST and float_bits(output_aval(step)) < 32):
            continue
        joint = 0
        for bits in carried:
            joint |= bits
        if is_product(step):
            read = [input_aval(step, i).size for i in (0, 1) if carried[i]]
            if index in routers and output_aval(step).size < max(read):
                meant |= joint
            elif step.backward:
                backward |= joint & ~products
                meant |= joint if joint & meant else 0
            else:
                guilty |= dict.fromkeys(_bit_numbers(joint), _MULTIPLIED)
            continue
        forward = not step.backward and any(feeds[value] for value in step.outputs)
        known = joint & ~products
        for bit in _bit_numbers(known) if forward and name not in MOVES else ():
            cast = program[casts[bit]]
            if cast.path and step.path and cast.path != step.path:
                # A module that is alone in it was handed float32 on purpose.
                first = entered.setdefault(bit, step.path)
                if not f"{step.path}/".startswith(f"{first}/"):
                    module = first.rpartition("/")[2]
                    guilty.setdefault(bit, f"enters {module} in float32")
            elif name == "add" and input_aval(cast).size == output_aval(step).size:
                own, size = sources[cast.inputs[0]], input_aval(cast).size
                others = _bit_numbers(joint & ~own) if all(carried) else ()
                if any(
                    input_aval(program[casts[other]]).size == size for other in others
                ):
                    guilty.setdefault(bit, "makes a sum float32")
        if not name.startswith(ENDS_A_STREAM):
            for value, var in zip(step.outputs, step.eqn.outvars, strict=True):
                if float_bits(var.aval) >= 32:
                    streams[value] = joint
    guilty |= dict.fromkeys(_bit_numbers(backward & ~meant), _MULTIPLIED)
    for bit, what in guilty.items():
        old, new = input_aval(program[casts[bit]]), output_aval(program[casts[bit]])
        yield casts[bit], "promotion", f"{old.dtype} becomes {new.dtype} and {what}"


def _bit_numbers(mask: int) -> Iterable[int]:
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
        elif step.eqn.primitive.name in GATES:
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


class _FeedsProduct(dict[int, bool]):
    def __missing__(self, value):
        return False


def _feeding_products(program: list[Step]) -> _FeedsProduct:
    """The values that a product of the forward pass comes from."""
    feeds = _FeedsProduct()
    for step in reversed(program):
        if not step.backward:
            if is_product(step) or any(feeds[value] for value in step.outputs):
                feeds.update(dict.fromkeys(step.inputs, True))
    feeds[-1] = False  # literals
    return feeds
