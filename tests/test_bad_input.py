"""Every public function takes junk with a result, or with an error of mpjax's own."""

import pathlib
import warnings

import jax
import pytest
from public_calls import (
    CALLS,
    DELAYED,
    JUNK,
    LIKE_LAX,
    OF_OTHERS,
    RAISES_ITSELF,
    call,
)

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx
import mpjax.optimizers

ROOT = str(pathlib.Path(mpjax.__file__).parent)
ARGUMENTS = [
    (fn, name) for fn, valid in CALLS.items() for name in valid if name not in OF_OTHERS
]
# What is written by hand, or has no arguments that could be wrong.
WITHOUT_A_CALL = {
    "LossScalingState",
    "LowPrecisionArray",
    "LowPrecisionParamsState",
    "LowPrecisionState",
    "QArray",
    "ScalingState",
    "ScalingStat",
    "TrainState",
    "accumulate_gradients",
    "value_and_grad",
    "MixedPrecision",
    "Format",
    "report",
    "assert_native",
    "LoweringError",
    "Census",
    "Finding",
    "LoweredProduct",
    "Memory",
    "Report",
    "Target",
    "TracedProduct",
}


def is_ours(error):
    """Whether mpjax has raised it itself, and not what it has called."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_code.co_filename.startswith(ROOT)


def check(fn, name, kind):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(fn, CALLS[fn] | {name: JUNK[kind]})
    except (ValueError, TypeError) as error:
        where = f"{fn.__qualname__}({name}={kind})"
        assert type(error) in (ValueError, TypeError), where
        assert is_ours(error) or fn in LIKE_LAX, where
        assert len(str(error)) > 20, where


def test_every_public_function_has_a_valid_call():
    doors = mpjax.linen, mpjax.nnx, mpjax.numerics, mpjax.lowering, mpjax.optimizers
    for door in (mpjax, *doors):
        for name in set(door.__all__) - WITHOUT_A_CALL:
            assert getattr(door, name) in CALLS, name
    for fn, valid in CALLS.items():
        call(fn, valid)


@pytest.mark.parametrize("kind", sorted(JUNK))
def test_junk_has_a_result_or_an_error_that_says_what_is_wrong(kind):
    for fn, name in ARGUMENTS:
        if (fn, name, kind) not in RAISES_ITSELF:
            check(fn, name, kind)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        *[(mpjax.Rule, name) for name in ("optional", "cast_inputs", "attention")],
        *[(mpjax.Recipe, name) for name in ("calibrated", "keep_weights")],
        (mpjax.BlockScaling, "square"),
        (mpjax.delayed_scaling, "keep_weights"),
        (mpjax.calibrate, "has_aux"),
    ],
)
def test_a_flag_is_a_flag(fn, name):
    for kind, junk in JUNK.items():
        if kind != "a flag":
            with pytest.raises(
                TypeError, match=r"is a flag, got .*; pass True or False"
            ):
                call(fn, CALLS[fn] | {name: junk})


@pytest.mark.parametrize("value", [1j, 1, True, ("a", 2), object(), float("nan")])
def test_an_axis_name_is_a_name(value):
    for fn in (mpjax.dynamic_loss_scaling, mpjax.static_loss_scaling):
        with pytest.raises(TypeError, match="axis_name is the name of an axis"):
            call(fn, CALLS[fn] | {"axis_name": value})


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), -(2**40)])
def test_a_loss_scale_is_finite_and_not_negative(value):
    for fn in (DELAYED.init, DELAYED.update, DELAYED.rescale):
        with pytest.raises(ValueError, match="loss_scale is finite and not negative"):
            call(fn, CALLS[fn] | {"loss_scale": value})


def test_numbers_of_python_are_arrays():
    scaled = mpjax.numerics.quantize_with_scale(0.5, 0.25, "int8")
    assert scaled == 2 and scaled.dtype == "int8"
    assert mpjax.numerics.block_amax(-1.5) == 1.5
    assert mpjax.dequantize(mpjax.quantize(1.0, "int8")) == 1.0
    assert mpjax.numerics.saturating_cast(1e9, "float8_e4m3fn") == 448
    gradient = jax.grad(lambda x: mpjax.numerics.round_to_format(x, "float8_e4m3fn"))
    assert gradient(0.3) == 1.0
