"""Parameters of a bound Linen module, as its policy stores and reads them."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpjax._layers.dtypes import any_complex, complex_error, is_frequency
from mpjax._policies.policy import Policy, spelled_like


def is_dtype(value: Any, dtype: np.dtype) -> bool:
    """Whether a value means this dtype."""
    if not isinstance(value, str | type | np.dtype):
        return False
    try:
        return jnp.dtype(value) == dtype
    except (TypeError, ValueError):  # some other string or class
        return False


@dataclass(frozen=True, eq=False)
class Param:
    """``nn.Module.param`` of one bound module, under a policy.

    Attributes:
      module: the module.
      path: its path, for errors.
      policy: its policy.
      computes_in_a_dtype: whether its ``dtype`` says what it computes in.
      casts_itself: whether it casts the parameters that it reads.
    """

    module: nn.Module
    path: str
    policy: Policy
    computes_in_a_dtype: bool
    casts_itself: bool

    def __call__(self, name, init_fn, *init_args, **kwargs):
        def init(*args, **kwargs):
            args = map(self._drawn, args)
            kwargs = {key: self._drawn(arg) for key, arg in kwargs.items()}
            return self.policy.cast_to_param(init_fn(*args, **kwargs))

        # Of the class: another wrapper may have replaced ``param`` of the module.
        declare = type(self.module).param
        value = declare(self.module, name, init, *init_args, **kwargs)
        if self.computes_in_a_dtype and any_complex(jax.tree.leaves(value)):
            what = f"parameter {name!r}"
            raise complex_error(type(self.module), self.path, self.policy, what)
        if is_frequency(name):
            return value
        if self.casts_itself:  # but norms do not widen 16-bit parameters
            return jax.tree.map(self._widen, value)
        return self.policy.cast_to_compute(value)

    def _drawn(self, arg):
        """An argument of an initializer; the compute dtype is not one to draw in."""
        own, compute = vars(self.module).get("param_dtype"), self.policy.compute_dtype
        if not is_dtype(arg, compute) or is_dtype(own, compute):
            return arg
        wide = jnp.promote_types(self.policy.param_dtype, np.float32)
        return spelled_like(arg, wide)

    def _widen(self, value):
        narrow = value.dtype.itemsize < self.policy.compute_dtype.itemsize
        return self.policy.cast_to_compute(value) if narrow else value
