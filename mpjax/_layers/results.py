"""In which dtype each result of a module leaves it.

Most results are what the module makes, and have its policy's dtype. Some are what it
was given, changed: the carry of a loop, the stream of a residual network, a cache. Such
a result leaves in the dtype in which it came, since it will be given again.

Which results these are cannot be known, and is inferred from what a result and an
argument have in common, their structure and shapes, and from the place of the module.
There is a function for each of three places.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._tree import cast_floating, is_castable

Given: TypeAlias = tuple[tuple, Mapping[str, Any]]
Opaque: TypeAlias = Callable[[Any], bool]
_ARRAYS = jax.Array, np.ndarray


def inside_region(
    result: Any, given: Given, in_loop: bool, may_be_stream: bool, opaque: Opaque
) -> Any:
    """The result of a module whose policy is that of the module around it.

    The result, or else the first of several, is cast to the dtype of the first argument
    that it resembles: in Python to fewer bits only, so that a float32 array which the
    module has made does not widen the stream; in a loop of JAX to more bits as well.

    Args:
      result: a pytree.
      given: positional and named arguments, as the module got them.
      in_loop: whether the module runs in a loop or a branch of the module around it,
        whose types must agree.
      may_be_stream: whether a result that is a single array may be a carry.
      opaque: says which nodes are no arrays to a front end, whatever is in them.
    """
    if isinstance(result, _ARRAYS):
        first, dtype = _first(given), result.dtype
        if dtype.itemsize <= 2 and not in_loop:
            return result
        if isinstance(first, _ARRAYS) and (first.dtype, first.shape) == (
            dtype,
            result.shape,
        ):
            return result
    matches = _first_match(result, given, may_be_stream, opaque)
    return _cast(result, matches, None, in_loop, opaque) if matches else result


def at_border(
    result: Any,
    given: Given,
    output_dtype: np.dtype | None,
    in_loop: bool,
    may_be_stream: bool,
    opaque: Opaque,
) -> Any:
    """The result of a module whose policy is another than that of the module around it.

    The first of several results is cast as of `inside_region`, so that modules which
    take and return a carry compute the same in a loop of JAX and in one of Python. All
    else gets the output dtype.

    Args:
      result: a pytree.
      given: positional and named arguments, before they were cast.
      output_dtype: of the module; None: what is no carry stays as it is.
      in_loop: as of `inside_region`.
      may_be_stream: as of `inside_region`.
      opaque: as of `inside_region`.
    """
    matches = _first_match(result, given, may_be_stream, opaque)
    return _cast(result, matches, output_dtype, in_loop, opaque)


def of_model(result: Any, given: Given, output_dtype: np.dtype, opaque: Opaque) -> Any:
    """The result of a module that no other one has called.

    If it reads several arguments, or one of several parts, and returns several results,
    each of these that resembles an argument is state which goes through the model, and
    leaves in the dtype in which it came. All else, and a single array, gets the output
    dtype.

    Args:
      result: a pytree.
      given: positional and named arguments, before they were cast.
      output_dtype: of the module.
      opaque: as of `inside_region`.
    """
    matches = _all_matches(result, given, opaque)
    return _cast(result, matches, output_dtype, True, opaque)


def carried(given: Given, handed: Sequence[jax.Array], opaque: Opaque) -> Given:
    """The arguments of a module in a loop, as the loop has handed them to its body.

    The body may have widened the carry before it called the module, as a reset to
    float32 zeros does: an array that the body has made, and that is wider than the
    first one of its shape that the loop has handed to it, counts as that.

    Args:
      given: positional and named arguments of the module.
      handed: the arrays that the loop has given to its body, the carry first.
      opaque: as of `inside_region`.

    Returns:
      The arguments, the carry first, and what the loop has not handed last, the
      narrowest first.
    """
    places = {id(array): place for place, array in enumerate(handed)}
    last = len(handed)

    def as_handed(leaf):
        """A leaf and its place among what the loop has handed."""
        if opaque(leaf) or not (isinstance(leaf, _ARRAYS) and is_castable(leaf)):
            return leaf, last
        if id(leaf) in places:
            return leaf, places[id(leaf)]
        for place, array in enumerate(handed):
            if array.shape == leaf.shape and is_castable(array):
                if array.dtype.itemsize <= leaf.dtype.itemsize:
                    return array, place
                break
        return leaf, last

    found = []
    for argument in _in_order(given):
        leaves, tree = jax.tree.flatten(argument, is_leaf=opaque)
        pairs = [as_handed(leaf) for leaf in leaves]
        place = min((place for _, place in pairs), default=last)
        new = tree.unflatten(leaf for leaf, _ in pairs)
        found.append(((place, _bytes(leaves) if place == last else 0), new))
    found.sort(key=lambda pair: pair[0])
    return tuple(argument for _, argument in found), {}


def _bytes(leaves: list) -> int:
    """Of the widest floating array among leaves."""
    return max((leaf.dtype.itemsize for leaf in leaves if is_castable(leaf)), default=0)


# The names of an argument, or its place, and the argument.
_Named: TypeAlias = tuple[set, Any]
# Which argument a result resembles, by the place of the result; None: all of it.
_Matches: TypeAlias = dict[int | None, Any]


def _first(given: Given) -> Any:
    return next(_in_order(given), None)


def _in_order(given: Given) -> Iterator[Any]:
    yield from given[0]
    yield from given[1].values()


def _first_match(
    result: Any, given: Given, may_be_stream: bool, opaque: Opaque
) -> _Matches:
    parts: dict[int | None, Any] = {None: result}
    if isinstance(result, _ARRAYS):
        parts = parts if may_be_stream else {}
    else:
        children = dict(enumerate(_children(result, opaque)[1]))
        is_sequence = isinstance(result, tuple | list)
        parts |= dict(list(children.items())[:1]) if is_sequence else children
    for place, part in parts.items():
        for argument in _in_order(given):
            if _alike(part, argument, opaque):
                return {place: argument}
    return {}


def _all_matches(result: Any, given: Given, opaque: Opaque) -> _Matches:
    args, kwargs = given
    arguments: list[_Named] = [({i}, a) for i, a in enumerate(args)]
    arguments += [({name}, a) for name, a in kwargs.items()]
    read = _read_by_model(arguments, opaque)
    if len(read) == 1:  # a batch, maybe with state in it
        names, parts, _ = _children(read[0][1], opaque)
        arguments = list(zip(names, parts, strict=True))
        read = _read_by_model(arguments, opaque)
    if len(read) < 2 or isinstance(result, _ARRAYS):
        return {}
    for _, argument in arguments:
        if _alike(result, argument, opaque):
            return {None: argument}
    for _, argument in list(arguments):  # a cache under its name, in and out
        if isinstance(argument, Mapping):
            arguments += [({name}, value) for name, value in argument.items()]
    names, parts, _ = _children(result, opaque)
    matches: _Matches = {}
    for by_name in (True, False):
        for place, part in enumerate(parts):
            for known, argument in () if place in matches else arguments:
                same = not known.isdisjoint(names[place])
                if same == by_name and _alike(part, argument, opaque, grows=same):
                    matches[place] = argument
                    arguments = [a for a in arguments if a[1] is not argument]
                    break
    return matches


def _read_by_model(arguments: list[_Named], opaque: Opaque) -> list[_Named]:
    """Arguments with arrays of numbers, neither options, masks nor random keys.

    An integer alone is an option as well, unless it comes first, as a token does.
    """

    def is_read(leaf, may_be_integer):
        if opaque(leaf) or not isinstance(leaf, _ARRAYS):
            return False
        if leaf.dtype == np.uint32 and leaf.shape[-1:] == (2,):  # a random key
            return False
        is_integer = jnp.issubdtype(leaf.dtype, np.integer)
        return is_castable(leaf) or (is_integer and may_be_integer(leaf))

    return [
        (names, argument)
        for place, (names, argument) in enumerate(arguments)
        if any(
            is_read(leaf, lambda leaf, first=place == 0: first or leaf.ndim > 0)
            for leaf in jax.tree.leaves(argument, is_leaf=opaque)
        )
    ]


def _children(result: Any, opaque: Opaque) -> tuple[list[set], list[Any], Any]:
    """Names, values and structure of what a result consists of, one level down."""
    if opaque(result):
        return [], [], None
    pairs, tree = jax.tree_util.tree_flatten_with_path(
        result, is_leaf=lambda node: node is not result
    )
    names = [
        {place, *(getattr(key, at, None) for key in path for at in ("key", "name"))}
        for place, (path, _) in enumerate(pairs)
    ]
    return names, [child for _, child in pairs], tree


def _alike(part: Any, argument: Any, opaque: Opaque, grows: bool = False) -> bool:
    """Whether a part of a result may be an argument: the same structure and shapes.

    A cache that grows has another length in one axis; it is known by several arrays in
    the same place.
    """
    if isinstance(part, _ARRAYS) and isinstance(argument, _ARRAYS):
        return part.shape == argument.shape and _both_cast(part, argument)
    leaves, tree = jax.tree.flatten(part, is_leaf=opaque)
    others, other_tree = jax.tree.flatten(argument, is_leaf=opaque)
    if not leaves or tree != other_tree or opaque(part) or opaque(argument):
        return False
    grows = grows and len(leaves) > 1
    floating = False
    for leaf, other in zip(leaves, others, strict=True):
        if not (isinstance(leaf, _ARRAYS) and isinstance(other, _ARRAYS)):
            return False
        differ = sum(map(int.__ne__, leaf.shape, other.shape))
        if leaf.ndim != other.ndim or differ > grows:
            return False
        floating = floating or _both_cast(leaf, other)
    return floating


def _both_cast(leaf: Any, other: Any) -> bool:
    return is_castable(leaf) and is_castable(other)


def _cast(
    result: Any,
    matches: _Matches,
    output_dtype: np.dtype | None,
    both_ways: bool,
    opaque: Opaque,
) -> Any:
    def like(leaf, other):
        if not _both_cast(leaf, other):
            return made(leaf)
        dtype = jax.dtypes.canonicalize_dtype(other.dtype)
        plain = leaf.dtype if output_dtype is None else output_dtype
        keeps = both_ways or dtype.itemsize <= plain.itemsize
        return cast_floating(leaf, dtype if keeps else plain)

    def made(leaf):
        return leaf if output_dtype is None else cast_result(leaf, output_dtype, opaque)

    if None in matches:
        return jax.tree.map(like, result, matches[None], is_leaf=opaque)
    if not matches:
        return made(result)
    _, parts, tree = _children(result, opaque)
    return tree.unflatten(
        jax.tree.map(like, part, matches[place], is_leaf=opaque)
        if place in matches
        else made(part)
        for place, part in enumerate(parts)
    )


class NoPytreeError(TypeError):
    """A result hides its arrays from a cast."""


def cast_result(tree: Any, dtype: np.dtype, opaque: Opaque) -> Any:
    """Casts the arrays among results.

    Raises:
      NoPytreeError: a result is an object with arrays of another dtype in it, and no
        pytree.
    """

    def cast(leaf):
        if opaque(leaf):
            return leaf
        new = cast_floating(leaf, dtype)
        if new is leaf and _hides_arrays(leaf, dtype):
            raise NoPytreeError(type(leaf).__name__)
        return new

    return jax.tree.map(cast, tree, is_leaf=opaque)


def _hides_arrays(leaf: Any, dtype: np.dtype) -> bool:
    if isinstance(leaf, (*_ARRAYS, np.generic, type)) or inspect.isroutine(leaf):
        return False
    inside = jax.tree.leaves(list(getattr(leaf, "__dict__", {}).values()))
    return any(
        isinstance(x, _ARRAYS) and cast_floating(x, dtype) is not x for x in inside
    )
