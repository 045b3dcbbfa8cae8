"""Every test runs on eight simulated CPU devices and under strict promotion.

What one test has compiled the next finds in a folder of the process, which goes with
it: no folder is shared, for what is half written cannot be read.

LLVM optimizes little unless XLA_FLAGS says otherwise: most of the time of a test is
compilation, and its optimizations double that. XLA's own passes are as they are, and so
are the instructions: not at 0, where no product and sum become one.
"""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=1 "
    + os.environ.get("XLA_FLAGS", "")  # what is said twice counts the second time
    + " --xla_force_host_platform_device_count=8"
)

import annotations
import jax
import pytest

annotations.install()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
COMPILED = tempfile.TemporaryDirectory(prefix="mpjax-compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(params=["linen", "nnx"])
def front_end(request):
    """A class of trainers, one for each front end: see ``support/front_ends.py``."""
    from front_ends import FRONT_ENDS

    return FRONT_ENDS[request.param]


@pytest.fixture(scope="module", autouse=True)
def memory_is_bounded():
    """What a process has compiled is let go where it takes more than 4 GB."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > 4e9:
            jax.clear_caches()
