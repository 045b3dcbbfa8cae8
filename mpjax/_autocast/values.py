"""What a variable of a program holds, and in which dtypes."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import core

FLOAT32 = np.dtype(np.float32)
CASTABLE = frozenset(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))


def float_dtype(aval: Any) -> np.dtype | None:
    """The dtype of an array whose dtype autocast may change; None of all else."""
    if not isinstance(aval, ShapedArray):  # a reference, say
        return None
    return aval.dtype if aval.dtype in CASTABLE else None


class Kind(NamedTuple):
    """What is known of a value that enters or leaves a jaxpr.

    Attributes:
      dtype: in which it is; None: that of the program, which nobody changes.
      is_constant: made of constants and Python's numbers alone, which have no say in
        what others are cast to.
      numbers: the constants that it is made of, as far as they are known.
    """

    dtype: np.dtype | None
    is_constant: bool = False
    numbers: tuple[float, ...] = ()

    def join(self, other: "Kind") -> "Kind":
        """What is known of a value that is one of two."""
        return Kind(
            self.dtype if self.dtype == other.dtype else FLOAT32,
            self.is_constant and other.is_constant,
            tuple(sorted({*self.numbers, *other.numbers})),
        )


@dataclasses.dataclass(eq=False)
class Value:
    """What a variable of the program holds.

    Attributes:
      aval: its shape, and its dtype in the program.
      kind: its dtype here, and whether it is a constant.
      versions: the atoms that hold it, by dtype.
      move: how it is made of `source`; None: it is no move.
      source: what `move` moves.
      var: the input of the program that it is, if the caller makes its versions.
    """

    aval: Any
    kind: Kind
    versions: dict[np.dtype | None, Any] = dataclasses.field(default_factory=dict)
    move: core.JaxprEqn | None = None
    source: "Value | None" = None
    var: Any = None

    @property
    def dtype(self) -> np.dtype | None:
        """In which it is here; None: as in the program."""
        return self.kind.dtype

    @property
    def written(self) -> np.dtype | None:
        """In which it is in the program; None: not one that autocast changes."""
        return float_dtype(self.aval)


class Program(NamedTuple):
    """A jaxpr that has been written.

    Attributes:
      jaxpr: open or closed, as the one that it is made of.
      inputs: by inputs of that one, the dtypes in which each is asked for.
      outputs: what is known of the results.
    """

    jaxpr: Any
    inputs: tuple[tuple[np.dtype | None, ...], ...]
    outputs: tuple[Kind, ...]

    @property
    def asks_for_more(self) -> bool:
        """Whether it has more inputs than the one that it is made of."""
        return any(len(versions) > 1 for versions in self.inputs)
