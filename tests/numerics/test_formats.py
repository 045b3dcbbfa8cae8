"""The table of formats agrees with ``ml_dtypes``."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

import mpjax
from mpjax._numerics import formats

FORMATS = list(formats._FORMATS)


def dtype(name):
    return reference.dtype(name)


@pytest.mark.parametrize("name", FORMATS)
def test_table_agrees_with_ml_dtypes(name):
    fmt = mpjax.format_info(name)
    assert fmt.dtype == dtype(name)
    if name.startswith("int"):
        info = ml_dtypes.iinfo(fmt.dtype)
        assert (fmt.max, fmt.min) == (info.max, info.min)
        assert fmt.smallest_subnormal == 1
        return
    info = ml_dtypes.finfo(fmt.dtype)
    assert fmt.max == float(info.max)
    assert fmt.min == float(info.min)
    assert fmt.mantissa == info.nmant
    assert fmt.smallest_normal == float(info.smallest_normal)
    if name != "float8_e8m0fnu":
        assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.max_exponent == math.floor(math.log2(fmt.max))
    both = np.array([np.inf, np.nan]).astype(fmt.dtype).astype(np.float32)
    assert fmt.has_inf == np.isinf(both[0])
    assert fmt.has_nan == np.isnan(both[1])


def test_a_dtype_outside_the_table_is_named():
    with pytest.raises(TypeError, match="float32 is no low-precision format"):
        mpjax.format_info(jnp.float32)
