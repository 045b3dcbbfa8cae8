"""Whether a layer computes in a dtype, and the errors of those that cannot."""

import flax.linen as nn

from mpjax._policies.policy import Policy


def complex_error(module: nn.Module, path: str, policy: Policy, what: str):
    """The error for a layer that would drop imaginary parts."""
    return ValueError(
        f"Module {path!r} ({type(module).__name__}) has a complex {what} and cannot "
        f"compute in {policy.compute_dtype.name}. To leave it alone, put "
        f"mpjax.Rule({path!r}, None) before the rule that matches it."
    )
