"""The attributes that a bound Linen module has while it runs under its rule."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from mpjax._layers.dtypes import (
    any_complex,
    complex_error,
    is_of_flax,
    perturb_wide,
    says_dtype,
)
from mpjax._layers.multiplier import Multiplier, unserved_attention
from mpjax._linen.attention import attention_replacement
from mpjax._linen.parameters import Param
from mpjax._linen.recipes import replacement_method, replacements_for
from mpjax._linen.sums import summing_method
from mpjax._policies.lookup import Decision
from mpjax._policies.policy import Policy, spelled_like
from mpjax._products.xla_cpu import conv_general_dilated


def classes(module: nn.Module) -> tuple[Any, ...]:
    """The class of a module, and the classes of those among its attributes."""
    names = [field.name for field in dataclasses.fields(module)]
    fields = [vars(module).get(name) for name in names if name != "parent"]
    return type(module), *map(classes, modules_in(fields))


def modules_in(value: Any) -> Iterator[nn.Module]:
    """Those in an attribute; not as a pytree, which sorts the keys of a dict."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
        yield from itertools.chain.from_iterable(map(modules_in, items))


def overrides(
    module: nn.Module,
    path: str,
    decision: Decision,
    products: Multiplier | None,
    method: str,
) -> dict[str, Any]:
    """The attributes that a bound module has while one of its methods runs.

    Args:
      module: bound, at the present level of transformations.
      path: of the module in the model.
      decision: what the module follows.
      products: of the module under the recipe of the rule.
      method: the name of the method.

    Raises:
      ValueError: the module is one of NNX, which no Linen rule reaches, or multiplies
        in a way that takes no recipe.
    """
    policy, replaced = decision.policy, {}
    own, kind = vars(module), type(module)
    if _is_nnx(kind):
        raise ValueError(
            f"Module {path!r} ({kind.__name__}) is an NNX module, which a rule for "
            "Linen does not reach. Make it of mpjax.nnx.mixed_precision(model, ...), "
            f"and put mpjax.Rule({path!r}, None) first to leave it alone here."
        )
    computes_in_a_dtype = _computes_in_a_dtype(module)
    if computes_in_a_dtype:
        given = own.get("dtype", getattr(kind, "dtype", None))
        replaced["dtype"] = spelled_like(given, policy.compute_dtype)
    if _uses_stock_conv(module):
        replaced["conv_general_dilated"] = conv_general_dilated
    if kind is nn.Embed and method != "setup":
        # Others that read the table find it cast; its own methods cast it themselves.
        replaced["embedding"] = nn.unbox(module.get_variable("params", "embedding"))
    if products is not None:
        replaced |= replacements_for(module, products)
    if policy.compute_dtype.itemsize == 2 or decision.attention:
        function = own.get("attention_fn")
        attention = attention_replacement(
            function, products if decision.attention else None
        )
        if attention is not None:
            replaced["attention_fn"] = attention
        elif decision.attention and function is not None:
            raise unserved_attention(path, kind)
    # Flax's own layers cast what they read where that is cheapest, except in setup.
    casts_itself = method != "setup" and is_of_flax(kind, "linen")
    replaced["param"] = Param(module, path, policy, computes_in_a_dtype, casts_itself)
    replaced["perturb"] = partial(_perturb, module)
    return replaced


def method_under_rule(
    module: nn.Module, products: Multiplier | None, policy: Policy, name: str, method
):
    """A method of a bound module, or what replaces it under its rule."""
    if products is not None:
        method = replacement_method(module, name, products, method)
    if getattr(type(module), name, None) is nn.SimpleCell.__call__:
        return partial(_simple_cell, policy, method)
    return summing_method(module, policy, name, method)


def _perturb(module: nn.Module, name: str, value: Any, *args, **kwargs):
    perturb = type(module).perturb
    return perturb_wide(lambda v: perturb(module, name, v, *args, **kwargs), value)


def check_real(
    module: nn.Module, path: str, policy: Policy, method: str, args, kwargs
) -> None:
    """Raises where a layer of Flax would drop the imaginary part of an argument."""
    if any_complex((*args, *kwargs.values())):
        function = getattr(type(module), method, None)
        if is_of_flax(function, "linen") and _computes_in_a_dtype(module):
            raise complex_error(type(module), path, policy, "argument")


@functools.cache
def _is_nnx(kind: type) -> bool:
    return any(is_of_flax(base, "nnx") for base in kind.__mro__)


def _computes_in_a_dtype(module: nn.Module) -> bool:
    """Whether a field of a module, or its class, says what it computes in."""
    return says_dtype(vars(module).get("dtype", getattr(type(module), "dtype", "none")))


def _uses_stock_conv(module: nn.Module) -> bool:
    own = vars(module)
    return "conv_general_dilated" in type(module).__dataclass_fields__ and (
        own["conv_general_dilated"] is None
        and own.get("conv_general_dilated_cls") is None
    )


def _simple_cell(policy: Policy, method, carry, inputs):
    # The cell answers in its compute dtype; a scan wants the dtype of its first carry.
    new, out = method(policy.cast_to_compute(carry), inputs)
    return new.astype(carry.dtype), out
