"""What hardware will run for a program, known before it is rented.

The compilers come with ``pip install 'mpjax[lowering]'``, as plugins of JAX. These
complain, and do no harm, where there is no device: ``JAX_PLATFORMS=cpu`` silences them.
"""

from mpjax._census import Census as Census
from mpjax._census import Finding as Finding
from mpjax._census import census as census
from mpjax._compile import LoweringError as LoweringError
from mpjax._lowered import LoweredProduct as LoweredProduct
from mpjax._lowering import Memory as Memory
from mpjax._lowering import Report as Report
from mpjax._lowering import report as report
from mpjax._native import assert_native as assert_native
from mpjax._products import Product as Product
from mpjax._targets import Target as Target
from mpjax._targets import get_target as get_target
