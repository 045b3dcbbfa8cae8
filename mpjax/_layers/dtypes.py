"""Whether a layer computes in a dtype, and the error of one that cannot."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._policies.policy import Policy
from mpjax._tree import widen
from mpjax._typing import ArrayTree


def says_dtype(value: Any) -> bool:
    """Whether an attribute ``dtype`` of this value says what its layer computes in.

    None does: the layer computes in the dtype of its inputs. Integers, complex dtypes
    and other things that are called ``dtype`` do not.

    Example:
      >>> says_dtype("bfloat16"), says_dtype(None), says_dtype("int32"), says_dtype(3)
      (True, True, False, False)
    """
    if not isinstance(value, str | type | np.dtype):
        return value is None
    try:
        return bool(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    except (TypeError, ValueError):  # some other string or class
        return False


def is_of_flax(definition: Any, api: str | None = None) -> bool:
    """Whether Flax defines this class or function.

    Args:
      definition: a class or a function.
      api: ``"linen"`` or ``"nnx"``; None: either.

    Example:
      >>> import flax.linen as nn
      >>> is_of_flax(nn.Dense), is_of_flax(nn.Dense, "nnx"), is_of_flax(str)
      (True, False, False)
    """
    module = getattr(definition, "__module__", None) or ""
    return module.startswith(f"flax.{api}" if api else ("flax.linen", "flax.nnx"))


_FREQUENCIES = re.compile(
    r"(\w+_)?(inv(erse)?_?freq(s|uency|uencies)?|freqs|frequencies|freq_bands"
    r"|timescales?)",
    re.IGNORECASE,
)


@functools.cache
def is_frequency(name: str) -> bool:
    """Whether a parameter of this name is multiplied with positions or times.

    The product is an angle, and its error in bfloat16 that of the position: a whole
    period from 256 on. Such parameters are read in the dtype that they are stored in.

    Example:
      >>> is_frequency("inv_freq"), is_frequency("rope_freqs"), is_frequency("kernel")
      (True, True, False)
    """
    return _FREQUENCIES.fullmatch(name) is not None


def perturb_wide(
    perturb: Callable[[ArrayTree], ArrayTree], value: ArrayTree
) -> ArrayTree:
    """Adds a perturbation to what flows through a model, in float32.

    So perturbations and their gradients are those of the bare model, and the result is
    no wider than the value.

    Args:
      perturb: adds it, or returns what it is given.
      value: a tree of arrays.

    Returns:
      The sum, in the dtypes of ``value``.
    """
    wide = widen(value)
    out = perturb(wide)
    if out is wide:
        return value
    return jax.tree.map(
        lambda new, old, w: new if w is old else new.astype(old.dtype), out, value, wide
    )


def any_complex(args: Iterable[Any]) -> bool:
    """Whether there is a complex array among the arguments of a method."""
    for arg in args:  # a loop, as each method of a model asks
        if getattr(getattr(arg, "dtype", None), "kind", "") == "c":
            return True
    return False


def complex_error(
    kind: type, path: str | None, policy: Policy, what: str
) -> ValueError:
    """The error for a layer that would drop imaginary parts.

    Args:
      kind: class of the layer.
      path: of the layer in the model; None: not known.
      policy: of the layer.
      what: is complex.
    """
    name = kind.__name__
    subject = f"A {name}" if path is None else f"Module {path!r} ({name})"
    rule = "Rule(path, None)" if path is None else f"Rule({path!r}, None)"
    hint = "; mpjax.nnx.tabulate shows its path" if path is None else ""
    return ValueError(
        f"{subject} has a complex {what} and cannot compute in "
        f"{policy.compute_dtype.name}. To leave it alone, put mpjax.{rule} before the "
        f"rule that matches it{hint}."
    )
