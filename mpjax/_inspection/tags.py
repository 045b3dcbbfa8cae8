"""Numbers in name stacks, which compilers keep."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from jax.extend import core

from mpjax._inspection.primitives import MOVES, PRODUCTS, inner, is_jaxpr, name_of

TAG = re.compile(r"mpjax\.(\d+)(\.out)?")
_TAGS = re.compile(rf"(?:^|[/(]){TAG.pattern}(?=[/)]|$)")


def tag(jaxpr: Any) -> Any:
    """Numbers each product of a program, in the names that compilers keep.

    XLA carries the scope of an operation through its rewrites into the program that it
    emits. What only moves or casts the result of a product gets the number as well, in
    another form: if XLA merges a transpose with the product, the transpose's name is
    the one that stays.
    """
    return _tagged(jaxpr, itertools.count())


def _tagged(jaxpr: Any, numbers: Iterator[int]) -> Any:
    eqns: list[core.JaxprEqn] = []
    followers: dict[core.Var, int] = {}
    for eqn in inner(jaxpr).eqns:
        params = {key: _tagged_param(v, numbers) for key, v in eqn.params.items()}
        number, form = None, ""
        if name_of(eqn) in PRODUCTS:
            number = next(numbers)
        elif name_of(eqn) in MOVES and eqn.invars:
            number, form = _number(eqn.invars[0], followers), ".out"
        source = eqn.source_info
        if number is not None:
            stack = source.name_stack.extend(f"mpjax.{number}{form}")
            source = source.replace(name_stack=stack)
            followers |= dict.fromkeys(eqn.outvars, number)
        eqns.append(eqn.replace(params=params, source_info=source))
    new = inner(jaxpr).replace(eqns=eqns)
    return new if inner(jaxpr) is jaxpr else jaxpr.replace(jaxpr=new)


def _number(atom: Any, followers: dict[core.Var, int]) -> int | None:
    return None if isinstance(atom, core.Literal) else followers.get(atom)


def _tagged_param(value: Any, numbers: Iterator[int]) -> Any:
    if is_jaxpr(value):
        return _tagged(value, numbers)
    if isinstance(value, tuple | list):
        items = [_tagged_param(item, numbers) for item in value]
        is_named = hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)
    return value


def tag_of(op_name: str) -> tuple[int | None, bool]:
    """The number of a product in the name of a compiled operation.

    A transformation wraps the number itself if there is no scope around it.

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
