"""Numbers in name stacks, which compilers keep."""

import itertools
import re
from typing import Any

from jax.extend import core

from mpjax._inspection.primitives import MOVES, PRODUCTS, _is_jaxpr, inner

_TAG = re.compile(r"mpjax\.(\d+)(\.out)?")
_TAGS = re.compile(rf"(?:^|[/(]){_TAG.pattern}(?=[/)]|$)")


def tag(jaxpr: Any) -> Any:
    """Numbers each product of a program, in the names that compilers keep.

    XLA carries the scope of an operation through its rewrites into the program that it
    emits. What only moves or casts the result of a product gets the number as well, in
    another form: a transpose that is merged with the product leaves its own name on it.
    """
    return _tagged(jaxpr, itertools.count())


def _tagged(jaxpr, numbers):
    eqns, followers = [], {}
    for eqn in inner(jaxpr).eqns:
        params = {key: _tagged_param(v, numbers) for key, v in eqn.params.items()}
        number, form = None, ""
        if eqn.primitive.name in PRODUCTS:
            number = next(numbers)
        elif eqn.primitive.name in MOVES and eqn.invars:
            number, form = followers.get(_key(eqn.invars[0])), ".out"
        source = eqn.source_info
        if number is not None:
            stack = source.name_stack.extend(f"mpjax.{number}{form}")
            source = source.replace(name_stack=stack)
            followers |= {_key(var): number for var in eqn.outvars}
        eqns.append(eqn.replace(params=params, source_info=source))
    new = inner(jaxpr).replace(eqns=eqns)
    return new if inner(jaxpr) is jaxpr else jaxpr.replace(jaxpr=new)


def _key(atom):
    return None if isinstance(atom, core.Literal) else atom


def _tagged_param(value, numbers):
    if _is_jaxpr(value):
        return _tagged(value, numbers)
    if isinstance(value, tuple | list):
        items = [_tagged_param(item, numbers) for item in value]
        is_named = hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)
    return value


def tag_of(op_name: str) -> tuple[int | None, bool]:
    """The number of a product in the name of a compiled operation.

    Without a scope around it a transformation wraps the number itself.

    Returns:
      The number, and whether the operation is the product or what it was rewritten to,
      not what only moves or casts its result.

    Example:
      >>> tag_of("jit(step)/Dense_0/mpjax.3/dot_general")
      (3, True)
      >>> tag_of("jit(f)/jvp(mpjax.4.out)/transpose")
      (4, False)
    """
    found = _TAGS.findall(op_name)
    return (int(found[-1][0]), not found[-1][1]) if found else (None, False)
