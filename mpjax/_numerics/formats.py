"""One table of formats: every format is a row."""

import dataclasses
import math

import jax.numpy as jnp
import ml_dtypes

from mpjax._typing import DType


@dataclasses.dataclass(frozen=True)
class Format:
    """What a low-precision dtype can represent.

    A float is ``± 2^e (1 + f / 2^m)`` with ``m`` mantissa bits; below
    ``2^min_exponent`` the numbers are evenly spaced. A signed integer is the format
    that is evenly spaced everywhere.

    Attributes:
      name: the dtype's name.
      mantissa: stored bits of the significand, ``m``.
      min_exponent: exponent of the smallest normal number.
      max: the largest finite value.
      min: the least finite value.
      has_inf: whether there is a code for infinity.
      has_nan: whether there is a code for NaN.
    """

    name: str
    mantissa: int
    min_exponent: int
    max: float
    min: float
    has_inf: bool
    has_nan: bool

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype this is a description of."""
        return jnp.dtype(getattr(ml_dtypes, self.name, self.name))

    @property
    def max_exponent(self) -> int:
        """Exponent of ``max``; the ``emax`` of the OCP microscaling specification."""
        return math.frexp(self.max)[1] - 1

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full significand."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (self.min_exponent - self.mantissa)

    @property
    def is_float8(self) -> bool:
        """Whether it is a signed float of eight bits, an operand of a matrix unit."""
        return self.name.startswith(("float8_e5", "float8_e4", "float8_e3"))


def _row(name, mantissa, min_exponent, maximum, specials, minimum=None):
    minimum = -maximum if minimum is None else minimum
    return Format(
        name,
        mantissa,
        min_exponent,
        float(maximum),
        float(minimum),
        has_inf="inf" in specials,
        has_nan="nan" in specials,
    )


FORMATS = {
    row.name: row
    for row in (
        _row("float16", 10, -14, 65504, "inf nan"),
        _row("bfloat16", 7, -126, 2.0**127 * (2 - 2.0**-7), "inf nan"),
        _row("float8_e5m2", 2, -14, 57344, "inf nan"),
        _row("float8_e5m2fnuz", 2, -15, 57344, "nan"),
        _row("float8_e4m3", 3, -6, 240, "inf nan"),
        _row("float8_e4m3fn", 3, -6, 448, "nan"),
        _row("float8_e4m3fnuz", 3, -7, 240, "nan"),
        _row("float8_e4m3b11fnuz", 3, -10, 30, "nan"),
        _row("float8_e3m4", 4, -2, 15.5, "inf nan"),
        _row("float8_e8m0fnu", 0, -127, 2.0**127, "nan", minimum=2.0**-127),
        _row("float6_e2m3fn", 3, 0, 7.5, ""),
        _row("float6_e3m2fn", 2, -2, 28, ""),
        _row("float4_e2m1fn", 1, 0, 6, ""),
        _row("int8", 6, 6, 127, "", minimum=-128),
        _row("int4", 2, 2, 7, "", minimum=-8),
    )
}


def format_info(dtype: DType) -> Format:
    """Looks a low-precision dtype up in the table of formats.

    Args:
      dtype: float16, bfloat16, an fp8, fp6 or fp4 dtype, int8 or int4.

    Returns:
      The row of the table.

    Raises:
      TypeError: the dtype is not in the table.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> mpjax.format_info(jnp.float8_e4m3fn).max
      448.0
    """
    name = jnp.dtype(dtype).name
    if name not in FORMATS:
        raise TypeError(
            f"{name} is no low-precision format; choose one of {', '.join(FORMATS)}."
        )
    return FORMATS[name]
