"""16-bit values that become float32 and stay so.

`casts` finds where that happens, `streams.py` follows them, and a rule for each
consequence judges who reads them. What has one origin is found once: the first cast of
each region of float32 that hangs together.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence

from mpjax._inspection.places import author, where
from mpjax._inspection.primitives import name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.recurrences import recurrent_products
from mpjax._inspection.routers import chooses, feeding_products, routers
from mpjax._inspection.steps import Step, float_bits, input_aval, output_aval, widens
from mpjax._inspection.streams import (
    Cast,
    Reached,
    Use,
    carried,
    exits,
    persistent,
    reach,
    regions,
    uses,
)


def promotions(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds 16-bit arrays that become float32 and, still so, meet a product or module.

    A product in float32 is meant if it is a router, the step of a recurrence that is
    cast back, a head that a policy keeps in float32, mpjax's own, or the loss's.
    """
    seeds = casts(program, backward=False)
    reached = reach(program, seeds)
    readers = uses(program, reached, seeds)
    products = [use for use in readers if is_product(use.step)]
    meant = _meant(program, products, reached) if products else set()
    yield from _mixed_products(program, reached)
    judge = _Judge(program, reached, [u for u in readers if u.index not in meant])
    stays = persistent(program, reached, seeds)
    for region in regions(program, reached, seeds):
        told = (judge.consequence(cast) for cast in region)
        found = next(filter(None, told), None)
        if found is None and not stays.isdisjoint(region):
            if author(program[region[0].index]) != "library":  # the state of a cell
                found = region[0].index, f"{region[0].dtypes} and stays so for layers"
        if found is not None:
            yield found
    yield from _backward_products(program)


class _Judge:
    """Says what comes of each cast, and of each product once.

    Args:
      program: the steps.
      reached: what comes from casts.
      readers: the steps that read a cast and are not meant to.
    """

    def __init__(
        self, program: Sequence[Step], reached: Reached, readers: Sequence[Use]
    ):
        self._program = program
        self._readers: dict[Cast, list[Use]] = collections.defaultdict(list)
        self._exits: dict[Cast, list[Use]] = collections.defaultdict(list)
        for found, some in (
            (self._readers, readers),
            (self._exits, exits(program, reached)),
        ):
            for use in some:
                for cast in use.casts:
                    found[cast].append(use)
        self._exponents = _exponents(program, reached)
        self._told: set[int] = set()  # products

    def consequence(self, cast: Cast) -> tuple[int, str] | None:
        """Where a cast is a fault, and what comes of it: a product, or a module."""
        readers = self._readers[cast]
        products = [use for use in readers if is_product(use.step)]
        if products:
            new = [use for use in products if use.index not in self._told]
            self._told.update(use.index for use in new)
            if not new:
                return None
            what = f"{cast.dtypes}{self._border(cast)} and is multiplied in float32"
            # A softmax is float32 for good reason: what is missing is the cast after.
            late = not self._exponents.isdisjoint(new[0].step.inputs)
            return (new[0].index if late else cast.index), what
        if cast.is_product:
            return None
        others = [u.step.path for u in readers if _is_in_another_module(cast, u)]
        for path in others:
            # One that is alone in reading it was handed float32 on purpose.
            if not f"{path}/".startswith(f"{others[0]}/"):
                name = others[0].rpartition("/")[2]
                what = f"{cast.dtypes}{self._border(cast)} and enters {name} in float32"
                return cast.index, what
        if self._leaves(cast, readers):
            return cast.index, f"{cast.dtypes} and leaves its module in float32"
        return None

    def _leaves(self, cast: Cast, readers: Sequence[Use]) -> bool:
        """Whether another layer has to cast down what the author's arithmetic made."""
        if author(self._program[cast.index]) != "user":
            return False
        computing = {use.step.path for use in readers}
        return cast.path in computing and any(
            _is_in_another_module(cast, use)
            and use.step.path not in computing
            and author(use.step) != "user"
            for use in self._exits[cast]
        )

    def _border(self, cast: Cast) -> str:
        """Says between which policies mpjax casts, if it is mpjax that does."""
        step = self._program[cast.index]
        if cast.is_product or author(step) != "mpjax":
            return ""
        module = cast.path.rpartition("/")[2] or "the model"
        policies = input_aval(step).dtype, output_aval(step).dtype
        return " at the border of {}, from a policy in {} to one in {},".format(
            module, *policies
        )


def _exponents(program: Sequence[Step], reached: Reached) -> set[int]:
    """The float32 values that come from a softmax or a sigmoid of casts."""
    found: set[int] = set()
    for step in program:
        if not step.outputs or step.outputs[0] not in reached:
            continue
        if name_of(step.eqn) in ("exp", "exp2", "logistic") or not found.isdisjoint(
            step.inputs
        ):
            found.update(step.outputs)
    return found


def casts(program: Sequence[Step], *, backward: bool) -> dict[int, Cast]:
    """The casts from 16 bits to float32, by the indices of their steps.

    Of the forward pass also products of 16 bits with float32 results.
    """
    found = {}
    for index, step in enumerate(program):
        if step.backward != backward:
            continue
        multiplies = is_product(step) and not backward
        widened = multiplies and operand_bits(step) == [16, 16]
        widened = widened and float_bits(output_aval(step)) == 32
        if widened or widens(step, 16, 32):
            old, new = input_aval(step), output_aval(step)
            dtypes = f"{old.dtype} becomes {new.dtype}"
            found[index] = Cast(
                index, step.inputs[0], old.size, step.path, dtypes, multiplies
            )
    return found


def operand_bits(step: Step) -> list[int]:
    """The bits of the operands of a product, the fewer first."""
    return sorted(float_bits(input_aval(step, i)) for i in (0, 1))


def _meant(
    program: Sequence[Step], products: Sequence[Use], reached: Reached
) -> set[int]:
    """The indices of products that are meant to read float32."""
    choosing, recurrent = routers(program), recurrent_products(program)
    feeding = feeding_products(program)
    narrow = {
        _root(step)
        for step in program
        if is_product(step) and not step.backward and operand_bits(step)[0] <= 16
    }
    found = set()
    for use in products:
        last = feeding.isdisjoint(use.step.outputs)
        if (
            use.index in recurrent
            or (use.index in choosing and chooses(use.step, reached))
            or (last and narrow and _root(use.step) not in narrow)
            or (last and all(author(program[c.index]) == "mpjax" for c in use.casts))
            or author(use.step) == "mpjax"
        ):
            found.add(use.index)
    return found


def _root(step: Step) -> str:
    return step.path.split("/")[0]


def _is_in_another_module(cast: Cast, use: Use) -> bool:
    return bool(cast.path and use.step.path) and cast.path != use.step.path


def _mixed_products(
    program: Sequence[Step], reached: Reached
) -> Iterator[tuple[int, str]]:
    """Finds products of the forward pass of 16 bits with what was float32 before."""
    for index, step in enumerate(program):
        if is_product(step) and not step.backward and not carried(step, reached):
            if operand_bits(step) == [16, 32] and author(step) != "mpjax":
                is_second = float_bits(input_aval(step, 0)) == 32
                narrow = input_aval(step, int(is_second)).dtype
                yield index, f"{narrow} is multiplied with float32"


def _backward_products(program: Sequence[Step]) -> Iterator[tuple[int, str]]:
    """Finds products in float32 that only a backward pass has, as one written by hand.

    Others follow from the forward pass, where they are found or meant.
    """
    seeds = casts(program, backward=True)
    reached = reach(program, seeds)
    candidates = [step for step in program if step.backward and _reads(step, reached)]
    if not candidates:
        return
    forward = {
        _place(step)
        for step in program
        if is_product(step) and not step.backward
        if 32 in (*operand_bits(step), float_bits(output_aval(step)))
    }
    for step in candidates:
        if author(step) != "mpjax" and _place(step) not in forward:
            for cast in carried(step, reached):
                yield cast.index, f"{cast.dtypes} and is multiplied in float32"


def _reads(step: Step, reached: Mapping[int, object]) -> bool:
    return is_product(step) and any(value in reached for value in step.inputs)


def _place(step: Step) -> str:
    return where(step) or step.path
