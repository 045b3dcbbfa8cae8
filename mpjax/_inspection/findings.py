"""What a census finds: kinds and remedies."""

import dataclasses
from typing import Literal, TypeAlias

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


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is probably not meant.

    Attributes:
      kind: "promotion": a 16-bit stream becomes float32 and stays so, into a product or
        out of the module, or is multiplied with it, except by a router: a product of
        fewer numbers, which end in a softmax or a choice; "dequantized": float8, int8
        or int4 values are cast up before a product; "reduction": a sum in 16 bits, a
        segment's and one carried by a scan too; "exponential": exp or log in 16 bits;
        "statistics": a root of a mean in 16 bits, as in a norm; "accumulation": a
        product that adds up in less than 32 bits; "round trip": a cast to a wider
        dtype and back at once. A product of 16-bit operands with a 16-bit result is
        none of these: matrix units add in float32 and round once.
      path: the modules and scopes around it.
      where: "file:line in function" of the user's code.
      backward: whether it belongs to a backward pass.
      detail: what happens there.
      count: how many are alike.
      elements: of the largest array concerned.
    """

    kind: Kind
    path: str
    where: str
    backward: bool
    detail: str
    count: int
    elements: int

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES[self.kind]
