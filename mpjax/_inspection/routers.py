"""What products lead to: other products, or a choice.

Routers are recognized by it: products by whose few results a model chooses.
"""

from collections.abc import Container, Sequence

from mpjax._inspection.primitives import GATES, name_of
from mpjax._inspection.products import is_product
from mpjax._inspection.steps import Step, input_aval, output_aval


def chooses(step: Step, wide: Container[int]) -> bool:
    """Whether a product makes few numbers of many.

    Args:
      step: the product.
      wide: the values that became float32, of which the largest it reads counts.
    """
    sizes = (input_aval(step, i).size for i in (0, 1) if step.inputs[i] in wide)
    return output_aval(step).size < max(sizes, default=0)


def routers(program: Sequence[Step]) -> set[int]:
    """Finds products whose results end in a softmax or a choice before any product.

    Those of attention have batches.

    Returns:
      The indices of their steps.
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
        elif name_of(step.eqn) in GATES:
            gates.update(step.inputs)
        else:
            _extend_backward(gates, step)
            _extend_backward(multiplied, step)
    return found


def feeding_products(program: Sequence[Step]) -> set[int]:
    """The values that a product of the forward pass comes from."""
    feeds: set[int] = set()
    for step in reversed(program):
        if not step.backward:
            if is_product(step) or not feeds.isdisjoint(step.outputs):
                feeds.update(step.inputs)
    feeds.discard(-1)  # literals
    return feeds


def _extend_backward(values: set[int], step: Step) -> None:
    """Adds the operands of a step of which any result is among the values."""
    if not values.isdisjoint(step.outputs):
        values.update(step.inputs)


def _batches(step: Step) -> bool:
    """Whether a product is several, or no ordinary one."""
    if name_of(step.eqn) != "dot_general":
        return True
    _, (batch, _) = step.eqn.params["dimension_numbers"]
    return bool(batch)
