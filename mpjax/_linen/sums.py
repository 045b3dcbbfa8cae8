"""Layers of Linen whose parameters get gradients that are summed up in float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from mpjax._layers.sums import EMBEDS, WITH_BIAS, add_bias, bias_is_last, is_wide
from mpjax._policies.policy import Policy
from mpjax._typing import Array


def summing_method(module: nn.Module, policy: Policy, name: str, method: Callable):
    """A method of a bound module, or one whose gradients are summed up in float32."""
    if policy.compute_dtype.itemsize != 2 or name != "__call__":
        return method
    function = type(module).__call__
    if function in EMBEDS:
        return partial(_embed, module, policy, method)
    if function in WITH_BIAS and getattr(module, "use_bias", False):
        return partial(_with_bias, module, policy, method)
    return method


def _embed(module: Any, policy: Policy, method: Callable, inputs: Array) -> Array:
    table = module.embedding
    if not is_wide(table, policy):
        return method(inputs)
    rows = _with_attribute(module, "dtype", table.dtype, method, inputs)
    return rows.astype(policy.compute_dtype)


def _with_bias(module: nn.Module, policy: Policy, method: Callable, *args, **kwargs):
    bias = nn.unbox(module.get_variable("params", "bias"))
    if module.is_initializing() or not (is_wide(bias, policy) and bias_is_last(module)):
        return method(*args, **kwargs)
    out = _with_attribute(module, "use_bias", False, method, *args, **kwargs)
    return add_bias(out, bias)


def _with_attribute(module, name: str, value: Any, method, *args, **kwargs):
    own = vars(module)
    before = own[name]
    own[name] = value
    try:
        return method(*args, **kwargs)
    finally:
        own[name] = before
