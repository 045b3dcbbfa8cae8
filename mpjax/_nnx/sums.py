"""Layers of NNX whose parameters get gradients that are summed up in float32."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from flax import nnx

from mpjax._layers.sums import EMBEDS, WITH_BIAS, add_bias, bias_is_last, is_wide
from mpjax._policies.policy import Policy

# A module, and what its method reads in place of some of its attributes.
shown_attributes: ContextVar[tuple[Any, dict[str, Any]]] = ContextVar(
    "mpjax_shown", default=(None, {})
)


def summing_method(function: Callable, policy: Policy, run: Callable) -> Callable:
    """What runs a method, or what does so with gradients summed up in float32.

    Args:
      function: the method of the bare class.
      policy: of the module.
      run: runs it, under a recipe or not.
    """
    if policy.compute_dtype.itemsize != 2:
        return run
    if function in EMBEDS:
        return functools.partial(_embed, policy, run)
    return functools.partial(_with_bias, policy, run) if function in WITH_BIAS else run


def _embed(policy: Policy, run: Callable, layer: Any, *args, **kwargs):
    table = vars(layer)["embedding"]
    if not is_wide(table.get_value(), policy):
        return run(layer, *args, **kwargs)
    shown = {"embedding": table, "dtype": table.get_value().dtype}
    rows = _showing(shown, run, layer, *args, **kwargs)
    return rows.astype(policy.compute_dtype)


def _with_bias(policy: Policy, run: Callable, layer: Any, *args, **kwargs):
    param = vars(layer).get("bias")
    bias = param.get_value() if isinstance(param, nnx.Variable) else None
    if bias is None or not (is_wide(bias, policy) and bias_is_last(layer)):
        return run(layer, *args, **kwargs)
    shown = {"bias": None, "use_bias": False}
    return add_bias(_showing(shown, run, layer, *args, **kwargs), bias)


def _showing(shown: dict[str, Any], run: Callable, layer: Any, *args, **kwargs):
    token = shown_attributes.set((layer, shown))
    try:
        return run(layer, *args, **kwargs)
    finally:
        shown_attributes.reset(token)
