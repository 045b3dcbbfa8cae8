"""What hardware will run for a program, known before it is rented.

The compilers come with ``pip install 'mpjax[lowering]'``, as plugins of JAX. These
complain, and do no harm, where there is no device: ``JAX_PLATFORMS=cpu`` silences them.
"""

from mpjax._hardware.targets import Target as Target
from mpjax._hardware.targets import get_target as get_target
from mpjax._inspection.census import Census as Census
from mpjax._inspection.census import census as census
from mpjax._inspection.findings import Finding as Finding
from mpjax._inspection.products import TracedProduct as TracedProduct
from mpjax._lowering.assertion import assert_native as assert_native
from mpjax._lowering.compiler import LoweringError as LoweringError
from mpjax._lowering.report import Memory as Memory
from mpjax._lowering.report import Report as Report
from mpjax._lowering.report import report as report
from mpjax._lowering.verdicts import LoweredProduct as LoweredProduct
