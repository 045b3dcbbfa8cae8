"""What a program computes, and what hardware will run for it, without the hardware.

The compilers come with ``pip install 'mpjax[lowering]'``, as plugins of JAX. Without a
device these warn when JAX starts, which is harmless; ``JAX_PLATFORMS=cpu`` silences it.
"""

from mpjax._hardware.targets import Target, get_target
from mpjax._inspection.census import Census, census
from mpjax._inspection.findings import Finding
from mpjax._inspection.products import TracedProduct
from mpjax._lowering.compiler import LoweringError
from mpjax._lowering.pipeline import assert_native, report
from mpjax._lowering.report import Memory, Report
from mpjax._lowering.verdicts import LoweredProduct

__all__ = [
    "Census",
    "Finding",
    "LoweredProduct",
    "LoweringError",
    "Memory",
    "Report",
    "Target",
    "TracedProduct",
    "assert_native",
    "census",
    "get_target",
    "report",
]
