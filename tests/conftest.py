"""Every test runs on eight simulated CPU devices and under strict promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(params=["linen", "nnx"])
def front_end(request):
    """A class of trainers, one for each front end: see ``support/front_ends.py``."""
    from front_ends import FRONT_ENDS

    return FRONT_ENDS[request.param]
