"""Sizes of products: what a rule's ``min_size`` is compared with.

Each is the number of elements that a product sums over, and the number of features
that it gives; both follow from the shape of the kernel.
"""

import math
from collections.abc import Collection, Sequence


def dot_size(
    shape: Sequence[int], contracting: Collection[int], batch: Collection[int] = ()
) -> tuple[int, int]:
    """The size of a ``lax.dot_general``.

    Args:
      shape: of the second operand.
      contracting: its axes that are summed over.
      batch: its batch axes.

    Example:
      >>> dot_size((64, 4, 32), contracting=[0])
      (64, 128)
    """
    sums = math.prod(shape[axis] for axis in contracting)
    apart = {*contracting, *batch}
    return sums, math.prod(n for axis, n in enumerate(shape) if axis not in apart)


def einsum_size(subscripts: str, shape: Sequence[int]) -> tuple[int, int]:
    """The size of an einsum whose second operand has this shape.

    Example:
      >>> einsum_size("bsd,ndh->bnsh", (4, 64, 32))
      (64, 128)
    """
    inputs, _, out = subscripts.replace(" ", "").partition("->")
    one, two = inputs.split(",")
    two = two.replace("...", "." * (len(shape) - len(two.replace("...", ""))))
    sizes = [pair for pair in zip(two, shape, strict=True) if pair[0] != "."]
    sums = math.prod(size for index, size in sizes if index not in out)
    gives = math.prod(
        size for index, size in sizes if index in out and index not in one
    )
    return sums, gives


def convolution_size(shape: Sequence[int], features: int) -> tuple[int, int]:
    """The size of a convolution whose kernel has this shape and gives ``features``.

    Example:
      >>> convolution_size((3, 3, 16, 32), features=32)
      (144, 32)
    """
    return math.prod(shape) // features, features
