"""What a census finds: one table of kinds, each with its detector and its remedy."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from mpjax._inspection import detectors
from mpjax._inspection.positions import positions
from mpjax._inspection.promotions import promotions
from mpjax._inspection.reductions import reductions
from mpjax._inspection.steps import Step


@dataclasses.dataclass(frozen=True)
class FindingKind:
    """One thing that a census looks for.

    Attributes:
      name: what findings of it are called.
      meaning: what is found.
      detect: yields the index of each step of a program where it is found, and what
        happens there.
      remedy: what to do about it.
    """

    name: str
    meaning: str
    detect: Callable[[Sequence[Step]], Iterator[tuple[int, str]]]
    remedy: str


_ALL = (
    FindingKind(
        "promotion",
        "A 16-bit value becomes float32 and stays so: into a product, into another "
        "module, or from layer to layer. Routers, recurrences that are cast back and "
        "the loss's own products are meant to.",
        promotions,
        "Cast the float32 operand down, or the result at once; parameters that a "
        "module reads itself follow its policy under MixedPrecision.",
    ),
    FindingKind(
        "dequantized",
        "Values of float8, int8 or int4 are cast up before their product.",
        detectors.dequantized,
        "Multiply the 8-bit values and apply their scales to the result, as "
        "mpjax.scaled_dot_general does.",
    ),
    FindingKind(
        "reduction",
        "A sum adds up in 16 bits, and so many values can meet in one element that it "
        "stops growing: of an array, of updates, over a scan, over devices.",
        reductions,
        "Sum in float32: jnp.sum(x, dtype=jnp.float32), or x.astype(jnp.float32) "
        "before a scatter; unique_indices=True for updates that never meet. In a "
        "backward pass it is the gradient of what was broadcast or looked up: do that "
        "in float32, and cast the result.",
    ),
    FindingKind(
        "exponential",
        "exp or log is computed in 16 bits.",
        detectors.exponentials,
        "Cast to float32 before exp or log, and back after the softmax; of Flax's "
        "attention functions by force_fp32_for_softmax=True.",
    ),
    FindingKind(
        "statistics",
        "A square root is computed in 16 bits, as of the variance in a norm or of the "
        "sum of squares of all gradients.",
        detectors.statistics,
        "Compute means, variances and their roots in float32; policies with a name do "
        "so for normalization layers. Cast gradients to float32 before they are "
        "clipped by their norm, as mpjax.dynamic_loss_scaling does.",
    ),
    FindingKind(
        "accumulation",
        "A product adds up in less than 32 bits. One of 16-bit operands with a 16-bit "
        "result does not: matrix units add in float32 and round once.",
        detectors.accumulations,
        "Ask for the sum: preferred_element_type=jnp.float32, or int32.",
    ),
    FindingKind(
        "round_trip",
        "A value is cast to a wider dtype and back at once.",
        detectors.round_trips,
        "Leave the value in its dtype: neither cast changes it.",
    ),
    FindingKind(
        "positions",
        "Positions, times or frequencies are in 16 bits: before sin or cos, or as "
        "whole numbers too large for the format.",
        positions,
        "Keep them in float32 until after sin and cos: jnp.arange(n, "
        "dtype=jnp.float32), a rule of float32 for a module with frequencies as "
        "parameters, Rule(cast_inputs=False) for times and coordinates.",
    ),
)
KINDS: dict[str, FindingKind] = {kind.name: kind for kind in _ALL}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing in a program that is probably not meant.

    What has one cause is one finding, in the forward and in the backward pass: a line
    of the user's code, or layers of a stack that one line runs. Of several steps it
    describes the one with the largest array, of the forward pass if there is one.

    Attributes:
      kind: what it is, by the name in the table of kinds, which `docs/lowering.md`
        shows: "promotion", say.
      path: the modules and scopes around it.
      where: "file:line in function" of the user's code.
      backward: whether all of it belongs to a backward pass.
      detail: what happens there.
      count: how many steps of the program have this cause.
      elements: of the largest array concerned.
      paths: all paths where it is, `path` among them.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
      >>> (finding,) = mpjax.lowering.census(jnp.exp, x).findings
      >>> finding.kind, finding.detail, finding.elements
      ('exponential', 'exp in bfloat16', 4096)
      >>> finding.remedy.partition(",")[0]
      'Cast to float32 before exp or log'
    """

    kind: str
    path: str
    where: str
    backward: bool
    detail: str
    count: int
    elements: int
    paths: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return KINDS[self.kind].remedy


def suspicious_steps(program: Sequence[Step]) -> Iterator[tuple[int, str, str]]:
    """Yields the index of each suspicious step, its kind, and what happens there."""
    for kind in KINDS.values():
        for index, detail in kind.detect(program):
            yield index, kind.name, detail
