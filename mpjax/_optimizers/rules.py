"""Which arrays of an optimizer's state are stored in few bits."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mpjax._checks import check_flag, whole_number, wrong
from mpjax._numerics.scales import Block
from mpjax._optimizers.codes import CODES, FOR_SECOND_MOMENTS, Rounding
from mpjax._typing import ArrayTree

_BLOCK = 256
_SECOND_MOMENTS = "nu|nu_max|exp_avg_sq|sum_of_squares|v"
_FIRST_MOMENTS = "mu|trace|exp_avg|m"


@dataclasses.dataclass(frozen=True)
class StateRule:
    """Says how arrays of an optimizer's state are stored.

    Attributes:
      field: regular expression that the name of the field in the state must match:
        ``"mu"`` and ``"nu"`` of Adam, ``"trace"`` of momentum.
      format: ``"bfloat16"``, ``"float16"``; in blocks of at most 256 elements that
        share a scale ``"float8_e4m3fn"``, ``"float8_e5m2"``, ``"int8"``, and
        ``"log8"``, a logarithmic code for numbers that are not negative. None: as the
        optimizer has them.
      path: regular expression that the path of the parameter must match, names joined
        by "/".
      rounding: ``"stochastic"``, or to ``"nearest"``, under which an average that
        changes by less than half a step, as second moments do, never changes.
      min_size: arrays of fewer elements stay as the optimizer has them.
      optional: allow the rule to match nothing.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a regular expression, the format or the rounding is none; or the
        format cannot hold the second moments that the field names.

    Example:
      >>> import mpjax
      >>> print(mpjax.StateRule("nu", "log8").rounding)
      stochastic
    """

    field: str
    format: str | None
    path: str = dataclasses.field(default=".*", kw_only=True)
    rounding: Rounding = dataclasses.field(default="stochastic", kw_only=True)
    min_size: int = dataclasses.field(default=4096, kw_only=True)
    optional: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        for name in ("field", "path"):
            pattern = getattr(self, name)
            if not isinstance(pattern, str):
                raise wrong(name, "is a regular expression", pattern, "pass a string")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{name} is a regular expression, got {pattern!r}: {error}."
                ) from error
        if self.format is not None and self.format not in CODES:
            raise ValueError(
                f"The format of a state is one of {', '.join(CODES)} or None, got "
                f"{self.format!r}."
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f'rounding is "nearest" or "stochastic", got {self.rounding!r}.'
            )
        object.__setattr__(self, "min_size", whole_number("min_size", self.min_size))
        object.__setattr__(self, "optional", check_flag("optional", self.optional))

    def matches(self, place: "Place") -> bool:
        """Whether it says how an array is stored."""
        return bool(
            re.fullmatch(self.field, place.field)
            and re.fullmatch(self.path, place.path)
        )


Formats: TypeAlias = str | StateRule | Sequence[StateRule]


def _moments(first: str, second: str) -> tuple[StateRule, ...]:
    rounding = "nearest" if first == "bfloat16" else "stochastic"
    return (
        StateRule(_SECOND_MOMENTS, second, optional=True),
        StateRule(_FIRST_MOMENTS, first, rounding=rounding, optional=True),
    )


# What the name of a set of rules stands for.
PRESETS = {
    "bfloat16": _moments("bfloat16", "bfloat16"),
    "8bit": _moments("float8_e4m3fn", "log8"),
}


def read_formats(formats: Formats) -> tuple[StateRule, ...]:
    """The rules that a user has given.

    Raises:
      TypeError: an entry is no rule.
      ValueError: there is no preset of the name, or no rule.
    """
    if isinstance(formats, str):
        if formats not in PRESETS:
            raise ValueError(
                f"The presets of formats are {', '.join(PRESETS)}, got {formats!r}; "
                "or pass rules, mpjax.StateRule(field, format)."
            )
        return PRESETS[formats]
    given = (formats,) if isinstance(formats, StateRule) else formats
    if not isinstance(given, Sequence) or not all(
        isinstance(rule, StateRule) for rule in given
    ):
        raise wrong(
            "formats", "is a preset or rules", formats, "pass mpjax.StateRule(...)"
        )
    if not given:
        raise ValueError("formats has at least one rule, got none.")
    return tuple(given)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of a state is.

    Attributes:
      field: the name of the field, as "mu".
      path: that of the parameter, names joined by "/".
      param: the parameter that it is shaped like.
    """

    field: str
    path: str
    param: Any


def places(state: ArrayTree, params: ArrayTree) -> Iterator[Place | None]:
    """For each leaf of a state its place, or None if it is no parameter's.

    A leaf belongs to a parameter whose path its own ends in, and whose shape it has.
    """
    own = {
        tuple(map(_name, path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield _place(tuple(map(_name, path)), path, leaf, own)


def _place(names: tuple, path: tuple, leaf: Any, own: dict) -> Place | None:
    for start in range(len(names) + 1):
        param = own.get(names[start:])
        if param is None or not _is_float(leaf) or not _is_float(param):
            continue
        if np.shape(leaf) != np.shape(param):
            continue
        fields = [n for n, k in zip(names[:start], path, strict=False) if _is_field(k)]
        field = str(fields[-1]) if fields else ""
        return Place(field, path_name(path[start:]), param)
    return None


def rule_for(place: Place, rules: Sequence[StateRule]) -> StateRule | None:
    """The first rule that matches, unless it leaves the array alone.

    Raises:
      ValueError: its format would make second moments zero.
    """
    rule = next((rule for rule in rules if rule.matches(place)), None)
    if rule is None or rule.format is None or np.size(place.param) < rule.min_size:
        return None
    if is_second_moment(place) and rule.format not in FOR_SECOND_MOMENTS:
        raise ValueError(
            f"{rule.format} cannot hold the second moments {place.field!r}: those of "
            "small gradients would be 0, and are divided by. Take one of "
            f"{', '.join(FOR_SECOND_MOMENTS)}."
        )
    return rule


def is_second_moment(place: Place) -> bool:
    """Whether an array is one that an optimizer divides by."""
    return re.fullmatch(_SECOND_MOMENTS, place.field) is not None


def block_of(param: Any) -> Block:
    """Blocks of at most 256 elements along one axis, none across a shard.

    Along the last axis but one, where there is room, since a reduction over lanes is
    the most expensive one on a TPU.
    """
    shape = np.shape(param)
    if not shape:
        return ()
    order = [*reversed(range(len(shape) - 1)), len(shape) - 1]
    sizes = {axis: _block_size(param, axis) for axis in order}
    axis = next((a for a in order if sizes[a] >= 64), max(order, key=sizes.__getitem__))
    return tuple(sizes[axis] if i == axis else 1 for i in range(len(shape)))


def _block_size(param: Any, axis: int) -> int:
    """The largest divisor of the part of an axis that a device has, up to 256."""
    size = np.shape(param)[axis]
    size //= _shards(param, axis)
    return next(block for block in range(min(size, _BLOCK), 0, -1) if size % block == 0)


def _shards(param: Any, axis: int) -> int:
    sharding = getattr(param, "sharding", None)
    if isinstance(param, jax.core.Tracer):
        sharding = jax.typeof(param).sharding
    if not isinstance(sharding, NamedSharding) or axis >= len(sharding.spec):
        return 1
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))


def _is_float(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _is_field(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey | jax.tree_util.DictKey)


def path_name(path: tuple) -> str:
    """The names of a path, joined by "/"."""
    return "/".join(str(_name(key)) for key in path)


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
