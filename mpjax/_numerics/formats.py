"""One table of formats: every format is a row."""

import dataclasses
import math

import jax.numpy as jnp
import ml_dtypes

from mpjax._checks import check_dtype
from mpjax._typing import DType


@dataclasses.dataclass(frozen=True)
class Format:
    """What a dtype can represent, and what it is called.

    A float is ``± 2^e (1 + f / 2^m)`` with ``m`` mantissa bits; below
    ``2^min_exponent`` the numbers are evenly spaced. A signed integer is the format
    that is evenly spaced everywhere.

    Attributes:
      name: the dtype's name.
      bits: the bits of one element.
      mantissa: stored bits of the significand, ``m``.
      min_exponent: exponent of the smallest normal number.
      max: the largest finite value.
      min: the least finite value.
      has_inf: whether there is a code for infinity.
      has_nan: whether there is a code for NaN.
      has_zero: whether there is a code for zero. A format without one, such as
        float8_e8m0fnu, holds powers of two and serves as the dtype of scales only.
      negative_zero_is_nan: whether the code of -0 stands for NaN (the fnuz formats).
      is_integer: whether it is an integer format.
      stored_as: name of the format whose arrays hold its values: its own, or another
        where XLA has no arrays of it.
      fnuz: name of the format that takes its place on AMD's MI300; its own if there is
        none.
      has_mx_products: whether GPUs multiply blocks of 32 such elements that have
        float8_e8m0fnu scales (MXFP8).

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> fmt = mpjax.numerics.format_info(jnp.float8_e5m2)
      >>> fmt.bits, fmt.max, fmt.has_inf, fmt.short_name
      (8, 57344.0, True, 'f8_e5m2')

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
      OCP Microscaling Formats (MX) Specification v1.0, section 5.3.
      The float8 formats of https://github.com/jax-ml/ml_dtypes.
    """

    name: str
    bits: int
    mantissa: int
    min_exponent: int
    max: float
    min: float
    has_inf: bool
    has_nan: bool
    has_zero: bool
    negative_zero_is_nan: bool
    is_integer: bool
    stored_as: str
    fnuz: str
    has_mx_products: bool

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that this describes."""
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
        return self.bits == 8 and self.has_zero and not self.is_integer

    @property
    def is_wide(self) -> bool:
        """Whether it has the exponents of float32, subnormal ones too.

        On a CPU, arithmetic in float32 takes those numbers for zero.
        """
        return self.max_exponent == 127

    @property
    def has_arrays(self) -> bool:
        """Whether XLA has arrays of it."""
        return self.stored_as == self.name

    @property
    def short_name(self) -> str:
        """Its name in the string of a policy: ``"bf16"``, ``"f8_e4m3fn"``."""
        return self.name.replace("float", "f")

    @property
    def brief_name(self) -> str:
        """Its name in a table: ``"bf16"``, ``"e4m3fn"``."""
        return self.short_name.rpartition("_")[2]

    @property
    def hlo_name(self) -> str:
        """Its name in a program of XLA: ``"bf16"``, ``"f8e4m3fn"``, ``"s8"``."""
        return self.short_name.replace("_", "").replace("int", "s")


def _float(
    name: str,
    bits: int,
    mantissa: int,
    min_exponent: int,
    maximum: float,
    specials: str = "",
    *,
    minimum: float | None = None,
    stored_as: str = "",
    fnuz: str = "",
    mx: bool = False,
) -> Format:
    """A row; `specials` names the codes it has: inf, nan, and -0 as nan (nan-0)."""
    return Format(
        name,
        bits,
        mantissa,
        min_exponent,
        max=float(maximum),
        min=float(-maximum if minimum is None else minimum),
        has_inf="inf" in specials,
        has_nan="nan" in specials,
        has_zero=minimum is None,
        negative_zero_is_nan="nan-0" in specials,
        is_integer=False,
        stored_as=stored_as or name,
        fnuz=fnuz or name,
        has_mx_products=mx,
    )


def _integer(name: str, bits: int) -> Format:
    row = _float(name, bits, bits - 2, bits - 2, 2 ** (bits - 1) - 1)
    return dataclasses.replace(row, min=-float(2 ** (bits - 1)), is_integer=True)


_E4M3, _E5M2 = "float8_e4m3fn", "float8_e5m2"

FORMATS = {
    row.name: row
    for row in (
        _float("float16", 16, 10, -14, 65504, "inf nan"),
        _float("bfloat16", 16, 7, -126, 2.0**127 * (2 - 2.0**-7), "inf nan"),
        _float(_E5M2, 8, 2, -14, 57344, "inf nan", fnuz=f"{_E5M2}fnuz", mx=True),
        _float("float8_e5m2fnuz", 8, 2, -15, 57344, "nan-0"),
        _float("float8_e4m3", 8, 3, -6, 240, "inf nan"),
        _float(_E4M3, 8, 3, -6, 448, "nan", fnuz=f"{_E4M3}uz", mx=True),
        _float("float8_e4m3fnuz", 8, 3, -7, 240, "nan-0"),
        _float("float8_e4m3b11fnuz", 8, 3, -10, 30, "nan-0"),
        _float("float8_e3m4", 8, 4, -2, 15.5, "inf nan"),
        _float("float8_e8m0fnu", 8, 0, -127, 2.0**127, "nan", minimum=2.0**-127),
        _float("float6_e2m3fn", 6, 3, 0, 7.5, stored_as=_E4M3),
        _float("float6_e3m2fn", 6, 2, -2, 28, stored_as=_E4M3),
        _float("float4_e2m1fn", 4, 1, 0, 6),
        _integer("int8", 8),
        _integer("int4", 4),
    )
}
# Formats that nothing is scaled to; they have names in policies, tables and programs.
WIDE_FORMATS = {
    row.name: row
    for row in (
        _float("float64", 64, 52, -1022, 2.0**1023 * (2 - 2.0**-52), "inf nan"),
        _float("float32", 32, 23, -126, 2.0**127 * (2 - 2.0**-23), "inf nan"),
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
      >>> mpjax.numerics.format_info(jnp.float8_e4m3fn).max
      448.0
    """
    name = check_dtype("dtype", dtype).name
    if name not in FORMATS:
        raise TypeError(
            f"{name} is no low-precision format; choose one of {', '.join(FORMATS)}."
        )
    return FORMATS[name]


def all_formats() -> list[Format]:
    """The rows of both tables, the widest first."""
    return [*WIDE_FORMATS.values(), *FORMATS.values()]


def holds_scales(dtype: DType) -> bool:
    """Whether a dtype is one for scales alone, such as float8_e8m0fnu."""
    fmt = FORMATS.get(jnp.dtype(dtype).name)
    return fmt is not None and not fmt.has_zero


def find_format(name: str) -> Format | None:
    """The row of a dtype in one of the two tables, if it has one."""
    return FORMATS.get(name) or WIDE_FORMATS.get(name)
