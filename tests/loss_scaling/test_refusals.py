"""What cannot work is refused where it is written."""

import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import mpjax


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"init_scale": 0.0}, "init_scale"),
        ({"init_scale": -2.0}, "init_scale"),
        ({"init_scale": np.inf}, "init_scale"),
        ({"init_scale": np.nan}, "init_scale"),
        ({"init_scale": 2.0**200}, "init_scale"),
        ({"init_scale": 0.5, "min_scale": 1.0}, "between min_scale=1.0"),
        ({"init_scale": 64.0, "max_scale": 32.0}, "max_scale=32.0"),
        ({"init_scale": jnp.ones(2)}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor must be a number above 1, got 1.0"),
        ({"growth_factor": 1 + 1e-9}, "growth_factor"),  # 1 in float32
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"growth_factor": np.inf}, "growth_factor"),
        ({"backoff_factor": 0.0}, "backoff_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"backoff_factor": -0.5}, "backoff_factor"),
        ({"backoff_factor": np.nan}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval must be between 1"),
        ({"growth_interval": 2**31}, "growth_interval"),
        ({"hysteresis": 0}, "hysteresis"),
        ({"hysteresis": -1}, "hysteresis"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"min_scale": 1e-40}, "min_scale"),
        ({"min_scale": 8.0, "max_scale": 4.0}, "max_scale must be a number at least"),
        ({"max_scale": np.inf}, "max_scale"),
    ],
)
def test_numbers_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        mpjax.dynamic_loss_scaling(optax.sgd(0.1), **kwargs)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, 1e-42])
def test_static_scale_out_of_range(scale):
    with pytest.raises(ValueError, match="scale must be a number at least"):
        mpjax.static_loss_scaling(optax.sgd(0.1), scale)


@pytest.mark.parametrize("name", ["growth_interval", "hysteresis"])
@pytest.mark.parametrize("value", [2.0, "3", None])
def test_counts_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} is a whole number"):
        mpjax.dynamic_loss_scaling(optax.sgd(0.1), **{name: value})


@pytest.mark.parametrize("inner", [optax.adam, None, 0.1, "sgd"])
def test_inner_is_a_transformation(inner):
    for wrap in (
        mpjax.dynamic_loss_scaling,
        lambda tx: mpjax.static_loss_scaling(tx, 2),
    ):
        with pytest.raises(TypeError, match="inner must be a gradient transformation"):
            wrap(inner)
