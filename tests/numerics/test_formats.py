"""The table of formats agrees with ``ml_dtypes``."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

import mpjax
from mpjax import numerics
from mpjax._lowering.matrix_units import dtype_of_hlo
from mpjax._numerics import formats
from mpjax._printing.text import short_dtypes

FORMATS = list(formats.FORMATS)


def dtype(name):
    return reference.dtype(name)


@pytest.mark.parametrize("name", FORMATS)
def test_table_agrees_with_ml_dtypes(name):
    fmt = numerics.format_info(name)
    assert fmt.dtype == dtype(name)
    assert fmt.is_integer == name.startswith("int")
    if fmt.is_integer:
        info = ml_dtypes.iinfo(fmt.dtype)
        assert (fmt.bits, fmt.max, fmt.min) == (info.bits, info.max, info.min)
        assert fmt.smallest_subnormal == 1
        assert fmt.has_zero
        return
    info = ml_dtypes.finfo(fmt.dtype)
    assert fmt.bits == info.bits
    assert fmt.max == float(info.max)
    assert fmt.min == float(info.min)
    assert fmt.mantissa == info.nmant
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.has_zero == (name != "float8_e8m0fnu")
    if fmt.has_zero:
        assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.max_exponent == math.floor(math.log2(fmt.max))
    if fmt.is_float8:
        code = np.uint8(0x80).view(fmt.dtype)
        assert fmt.negative_zero_is_nan == np.isnan(code.astype(np.float32))
    both = np.array([np.inf, np.nan]).astype(fmt.dtype).astype(np.float32)
    assert fmt.has_inf == np.isinf(both[0])
    assert fmt.has_nan == np.isnan(both[1])


@pytest.mark.parametrize("name", formats.WIDE_FORMATS)
def test_the_rows_of_wide_formats_agree_with_numpy(name):
    fmt, info = formats.find_format(name), np.finfo(name)
    assert fmt.dtype == name
    assert (fmt.bits, fmt.mantissa, fmt.max) == (info.bits, info.nmant, info.max)
    assert fmt.smallest_subnormal == info.smallest_subnormal
    assert formats.find_format("complex64") is None


@pytest.mark.parametrize("name", FORMATS)
def test_xla_calls_a_format_by_its_name_of_hlo(name):
    fmt = numerics.format_info(name)
    if not fmt.has_arrays:
        # jax 0.12 makes such arrays, and cannot compute with them.
        with pytest.raises(jax.errors.JaxRuntimeError):
            jnp.zeros(3, fmt.dtype).astype(jnp.float32)
        fmt = numerics.format_info(fmt.stored_as)
    text = jax.jit(lambda x: x).lower(jnp.zeros(3, fmt.dtype)).as_text("hlo")
    assert f" {fmt.hlo_name}[3]" in text


def test_names_in_policies_and_tables():
    names = {
        "float64": ("f64", "f64"),
        "bfloat16": ("bf16", "bf16"),
        "float8_e4m3fn": ("f8_e4m3fn", "e4m3fn"),
        "float6_e2m3fn": ("f6_e2m3fn", "e2m3fn"),
        "int8": ("int8", "int8"),
    }
    for name, expected in names.items():
        fmt = formats.find_format(name)
        assert (fmt.short_name, fmt.brief_name) == expected


def test_a_format_is_one_row(monkeypatch):
    """A format that the table does not have serves everywhere once it has a row."""
    with pytest.raises(TypeError, match="int2 is no low-precision format"):
        mpjax.current_scaling("int2")
    row = formats._integer("int2", 2)
    monkeypatch.setitem(formats.FORMATS, "int2", row)
    x = jnp.array([[-9.0, -1.2, -0.5, 0.4, 0.6, 9.0]])
    # int2 holds -2, -1, 0 and 1.
    cast = mpjax.numerics.saturating_cast(x, "int2")
    assert cast.dtype == row.dtype
    np.testing.assert_array_equal(
        cast.astype(jnp.float32), [[-2.0, -1.0, 0.0, 0.0, 1.0, 1.0]]
    )
    quantized = mpjax.quantize(x, "int2", block=(1, 2))
    np.testing.assert_array_equal(quantized.scale, [[9.0, 0.5, 9.0]])
    np.testing.assert_array_equal(
        mpjax.dequantize(quantized), [[-9.0, 0.0, -0.5, 0.5, 0.0, 9.0]]
    )
    recipe = mpjax.current_scaling("int2", "int2")
    assert str(recipe) == "current int2/int2/int2"
    assert not recipe.is_supported("h100")[0]
    out = mpjax.einsum("ij,jk->ik", x, jnp.eye(6), recipe=recipe)
    np.testing.assert_array_equal(out, [[-16.0, 0.0, 0.0, 0.0, 0.0, 16.0]])
    assert dtype_of_hlo("s2") == "int2"


def test_a_float8_is_one_row(monkeypatch):
    row = formats.FORMATS["float8_e3m4"]
    monkeypatch.delitem(formats.FORMATS, "float8_e3m4")
    with pytest.raises(ValueError, match="Unknown dtype 'f8_e3m4'"):
        mpjax.get_policy("p=f32,c=f8_e3m4")
    with pytest.raises(TypeError, match="float8_e3m4 is no low-precision format"):
        mpjax.CurrentScaling("float8_e3m4")
    assert short_dtypes("float8_e3m4 x int8") == "float8_e3m4 x int8"
    assert dtype_of_hlo("f8e3m4") is None

    changed = dataclasses.replace(row, fnuz="float8_e4m3fnuz")
    monkeypatch.setitem(formats.FORMATS, "float8_e3m4", changed)
    policy = mpjax.get_policy("p=f32,c=f8_e3m4")
    assert policy.compute_dtype == row.dtype
    assert str(policy) == "p=f32,c=f8_e3m4,o=f8_e3m4"
    assert short_dtypes("float8_e3m4 x int8") == "e3m4 x int8"
    assert dtype_of_hlo("f8e3m4") == "float8_e3m4"
    recipe = mpjax.current_scaling("float8_e3m4")
    assert recipe.fnuz().lhs.dtype == "float8_e4m3fnuz"
    x = jnp.linspace(0.1, 15.5, 12).reshape(3, 4)
    out = mpjax.einsum("ij,jk->ik", x, jnp.eye(4), recipe=recipe)
    np.testing.assert_array_equal(out, reference.round_nearest(x, "float8_e3m4"))


def test_a_dtype_outside_the_table_is_named():
    with pytest.raises(TypeError, match="float32 is no low-precision format"):
        numerics.format_info(jnp.float32)
