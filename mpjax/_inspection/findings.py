"""What a census finds: one table of kinds, each with its detector and its remedy."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from mpjax._inspection import detectors, suggestions
from mpjax._inspection.facts import Facts
from mpjax._inspection.positions import angles, integers
from mpjax._inspection.promotions import promotions
from mpjax._inspection.reductions import reductions
from mpjax._inspection.rounding import rounded_logits, wide_gathers
from mpjax._inspection.steps import Step
from mpjax._policies.rule import Rule


@dataclasses.dataclass(frozen=True)
class FindingKind:
    """One thing that a census looks for.

    Attributes:
      name: what findings of it are called.
      meaning: what is found.
      detect: yields the index of each step of a program where it is found, and what
        happens there.
      remedy: what to do about it.
      edit: what to write at the line where it is; the remedy by default.
      rule: from the steps that have one cause to a rule that removes it, or None if it
        takes an edit.
    """

    name: str
    meaning: str
    detect: Callable[[Sequence[Step]], Iterator[tuple[int, str]]]
    remedy: str
    edit: str = ""
    rule: Callable[[Facts, Sequence[int]], Rule | None] = lambda facts, indices: None


_ALL = (
    FindingKind(
        "promotion",
        "A 16-bit value becomes float32 and stays so: into a product, into another "
        "module, or from layer to layer. Routers, recurrences that are cast back and "
        "the loss's own products are meant to.",
        promotions,
        "Cast the float32 operand down, or the result at once; parameters that a "
        "module reads itself follow its policy under MixedPrecision.",
        "cast the float32 operand, or the result, to the 16 bits of the other, "
        "y.astype(x.dtype)",
        suggestions.promotions,
    ),
    FindingKind(
        "dequantized",
        "Values of float8, int8 or int4 are cast up before their product.",
        detectors.dequantized,
        "Multiply the 8-bit values and apply their scales to the result, as "
        "mpjax.scaled_dot_general does.",
        "multiply by mpjax.scaled_dot_general, or multiply the 8-bit values with "
        "preferred_element_type=jnp.float32 and apply the scales to the result",
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
        "add up x.astype(jnp.float32), and cast the sum; of a gradient, broadcast or "
        "look up w.astype(jnp.float32), and cast the result",
        suggestions.reductions,
    ),
    FindingKind(
        "exponential",
        "exp or log is computed in 16 bits.",
        detectors.exponentials,
        "Cast to float32 before exp or log, and back after the softmax; of Flax's "
        "attention functions by force_fp32_for_softmax=True.",
        "compute exp, log or the softmax of x.astype(jnp.float32), and cast the result",
        suggestions.exponentials,
    ),
    FindingKind(
        "statistics",
        "A square root is computed in 16 bits, as of the variance in a norm or of the "
        "sum of squares of all gradients.",
        detectors.statistics,
        "Compute means, variances and their roots in float32; policies with a name do "
        "so for normalization layers. Cast gradients to float32 before they are "
        "clipped by their norm, as mpjax.dynamic_loss_scaling does.",
        "compute the mean, the variance or the norm of x.astype(jnp.float32), and cast "
        "what is divided by its root",
        suggestions.in_float32,
    ),
    FindingKind(
        "accumulation",
        "A product adds up in less than 32 bits. One of 16-bit operands with a 16-bit "
        "result does not: matrix units add in float32 and round once.",
        detectors.accumulations,
        "Ask for the sum: preferred_element_type=jnp.float32, or int32.",
        "multiply with preferred_element_type=jnp.float32, of integers jnp.int32, and "
        "leave out a precision of 16 bits",
    ),
    FindingKind(
        "round_trip",
        "A value is cast to a wider dtype and back at once.",
        detectors.round_trips,
        "Leave the value in its dtype: neither cast changes it.",
        "leave out both casts",
    ),
    FindingKind(
        "angles",
        "The sine or cosine of an angle that was rounded to 16 bits: of positions, "
        "times, coordinates or frequencies. In bfloat16 an angle of 1,000 is off by up "
        "to 2.",
        angles,
        "Keep angles in float32 until after sin and cos: a rule of float32 for a "
        "module with frequencies as parameters, Rule(cast_inputs=False) for times and "
        "coordinates.",
        "compute this in float32, of arguments that Rule(cast_inputs=False) leaves in "
        "float32, and cast the sine and the cosine",
        suggestions.angles,
    ),
    FindingKind(
        "integers",
        "Whole numbers are in 16 bits that are too large for them, above 256 in "
        "bfloat16 and 2,048 in float16: positions, indices, counts.",
        integers,
        "Keep them as integers, or in float32: jnp.arange(n, dtype=jnp.float32).",
        "keep whole numbers as integers or jnp.float32, and cast what is computed of "
        "them",
        suggestions.integers,
    ),
    FindingKind(
        "gather",
        "Devices gather in float32 what is only used in 16 bits, which takes twice the "
        "time.",
        wide_gathers,
        "Cast before the all-gather: lax.all_gather(w.astype(jnp.bfloat16), ...).",
        "gather w.astype(jnp.bfloat16), or the 16 bits that it is used in",
        suggestions.gathers,
    ),
    FindingKind(
        "logits",
        "Logits or log-probabilities that were computed in float32 are rounded to 16 "
        "bits.",
        rounded_logits,
        "Keep them in float32 until the loss is computed: a policy whose outputs are "
        "float32, or no cast.",
        "leave out the cast, and compute the loss in float32",
        suggestions.logits,
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
      rule: a rule that removes it, to stand before those of the model; None: no rule
        does.
      modules: the paths of the modules that the rule is for, as rules have them.
      edit: of what no rule removes, the line of the user's code and what to write
        there; "" if there is a rule.

    Example:
      >>> import jax, jax.numpy as jnp, mpjax.lowering
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
      >>> (finding,) = mpjax.lowering.census(jnp.exp, x).findings
      >>> finding.kind, finding.detail, finding.elements
      ('exponential', 'exp in bfloat16', 4096)
      >>> finding.remedy.partition(",")[0]
      'Cast to float32 before exp or log'
      >>> finding.rule, finding.edit.partition(",")[0]
      (None, 'compute exp')
    """

    kind: str
    path: str
    where: str
    backward: bool
    detail: str
    count: int
    elements: int
    paths: tuple[str, ...] = ()
    rule: Rule | None = None
    modules: tuple[str, ...] = ()
    edit: str = ""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return KINDS[self.kind].remedy


def suspicious_steps(program: Sequence[Step]) -> Iterator[tuple[int, str, str]]:
    """Yields the index of each suspicious step, its kind, and what happens there."""
    for kind in KINDS.values():
        for index, detail in kind.detect(program):
            yield index, kind.name, detail
