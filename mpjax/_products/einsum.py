"""``jnp.einsum`` of two operands under a recipe."""

import string

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._checks import wrong
from mpjax._numerics.qarray import QArray
from mpjax._products.dot_general import scaled_dot_general
from mpjax._products.operands import check_operand
from mpjax._recipes.recipe import Recipe
from mpjax._typing import Array, DType


def einsum(
    subscripts: str,
    lhs: Array,
    rhs: Array,
    /,
    *,
    recipe: Recipe,
    scales: Array | None = None,
    quantized_rhs: QArray | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DType | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """``jnp.einsum`` of two operands with its products in the formats of a recipe.

    The operands keep their roles: the first is scaled as ``lhs``, the second as
    ``rhs``. (``jnp.einsum`` exchanges them where that saves a transposition, which
    matters to a ``_dot_general`` that treats activations and weights differently.)

    Args:
      subscripts: as for ``jnp.einsum``, with or without ``...`` and ``->``.
      lhs: f[...], usually activations.
      rhs: f[...], usually weights.
      recipe: formats and scalings.
      scales: this and all that follows as for ``scaled_dot_general``.
      quantized_rhs: ``rhs`` already quantized.
      precision: of products in high precision.
      preferred_element_type: dtype of the result.
      out_sharding: of the result.

    Returns:
      f[...].

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: there are not two operands, an index occurs twice in one of them or in
        the result, or the result has one that they have not.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> q, k = jnp.ones((2, 5, 3, 8)), jnp.ones((2, 7, 3, 8))
      >>> mpjax.einsum("bqhd,bkhd->bhqk", q, k, recipe=mpjax.current_scaling()).shape
      (2, 3, 5, 7)
    """
    lhs, rhs = check_operand("lhs", lhs), check_operand("rhs", rhs)
    if not isinstance(subscripts, str):
        raise wrong("subscripts", "is a string", subscripts, "pass 'ij,jk->ik' say")
    lhs_indices, rhs_indices, out_indices = _parse(subscripts, lhs.ndim, rhs.ndim)
    sizes = dict(zip(rhs_indices, rhs.shape, strict=True))
    lhs, lhs_indices = _sum_out(lhs, lhs_indices, rhs_indices + out_indices, sizes)
    sizes = dict(zip(lhs_indices, lhs.shape, strict=True))
    summed, rhs_indices = _sum_out(rhs, rhs_indices, lhs_indices + out_indices, sizes)
    if quantized_rhs is not None and summed.shape != rhs.shape:
        raise ValueError(
            f"quantized_rhs serves no {subscripts!r}, which first reduces the second "
            "operand; leave it out."
        )
    shared = [c for c in lhs_indices if c in rhs_indices]
    batch = [c for c in shared if c in out_indices]
    contracted = [c for c in shared if c not in out_indices]
    free = [c for c in lhs_indices + rhs_indices if c not in shared]
    order = [(batch + free).index(c) for c in out_indices]
    contracting, batching = (
        ([lhs_indices.index(c) for c in axes], [rhs_indices.index(c) for c in axes])
        for axes in (contracted, batch)
    )
    product = scaled_dot_general(
        lhs,
        summed,
        (contracting, batching),
        precision,
        preferred_element_type,
        recipe=recipe,
        scales=scales,
        quantized_rhs=quantized_rhs,
        out_sharding=_permuted(out_sharding, np.argsort(order).tolist()),
    )
    return lax.transpose(product, order)


def _parse(subscripts: str, *ndims: int) -> tuple[list[str], list[str], list[str]]:
    """The indices of both operands and of the result, without dots."""
    inputs, arrow, out = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(
            "einsum under a recipe has two operands, each with scales of its own, got "
            f"{subscripts!r}; contract more of them pair by pair."
        )
    spare = [c for c in string.ascii_letters if c not in subscripts]
    indices, dots = [], ""
    for term, ndim in zip(terms, ndims, strict=True):
        missing = ndim - len(term.replace("...", ""))
        if missing < 0 or (missing and "..." not in term):
            raise ValueError(
                f"einsum {subscripts!r} has a term {term!r} for an operand of {ndim} "
                "axes."
            )
        filled = "".join(spare[len(spare) - missing :])
        dots = max(dots, filled, key=len)
        indices.append(term.replace("...", filled))
        if len(set(indices[-1])) < ndim:
            raise ValueError(
                f"einsum under a recipe takes no diagonal, got {term!r}; take it with "
                "jnp.einsum first."
            )
    if not arrow:
        both = indices[0] + indices[1]
        once = {c for c in both if both.count(c) == 1}
        out = dots + "".join(sorted(once - set(dots)))
    result = out.replace("...", dots)
    if len(set(result)) < len(result) or not set(result) <= {*indices[0], *indices[1]}:
        raise ValueError(
            "The result of an einsum has indices of its operands, each of them once, "
            f"got {out!r} in {subscripts!r}."
        )
    return list(indices[0]), list(indices[1]), list(result)


def _sum_out(
    x: Array, indices: list[str], kept: list[str], sizes: dict[str, int]
) -> tuple[Array, list[str]]:
    """Sums over axes that nothing else has; drops those of size 1 that broadcast."""
    alone = [c for c in indices if c not in kept]
    broadcast = [
        c
        for c, size in zip(indices, x.shape, strict=True)
        if size == 1 and sizes.get(c, 1) > 1
    ]
    dropped = [c for c in indices if c in (*alone, *broadcast)]
    if dropped:
        x = jnp.sum(x, axis=tuple(indices.index(c) for c in dropped))
    return x, [c for c in indices if c not in dropped]


def _permuted(
    sharding: NamedSharding | PartitionSpec | None, order: list[int]
) -> NamedSharding | PartitionSpec | None:
    """The sharding of an array whose axes are taken in this order."""
    if sharding is None:
        return None
    if not isinstance(sharding, NamedSharding | PartitionSpec):
        raise wrong(
            "out_sharding",
            "is a NamedSharding or a PartitionSpec",
            sharding,
            "pass jax.P(...), one name or None for each axis of the result",
        )
    named = isinstance(sharding, NamedSharding)
    spec = sharding.spec if named else sharding
    spec = (*spec, *[None] * (len(order) - len(spec)))
    spec = PartitionSpec(*(spec[i] for i in order))
    return NamedSharding(sharding.mesh, spec) if named else spec
