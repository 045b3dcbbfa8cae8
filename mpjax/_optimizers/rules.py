"""Which arrays of an optimizer's state are stored in few bits."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax._checks import check_flag, whole_number, wrong
from mpjax._numerics.scales import Block
from mpjax._optimizers.codes import CODES, Rounding
from mpjax._typing import ArrayTree

_PARTS = 8  # of an axis: there are as many blocks, or more
Kind: TypeAlias = Literal["first", "second"]
# What the fields of the states of optimizers are, by the state's class and the field:
# averages of gradients, or averages of squares that are divided by. Averages of which
# an optimizer takes differences (of centered RMSprop), and all that is not here, are
# neither.
KINDS: dict[tuple[str, str], Kind] = {
    ("ScaleByAdamState", "mu"): "first",
    ("ScaleByAdamState", "nu"): "second",
    ("ScaleByAmsgradState", "mu"): "first",
    ("ScaleByAmsgradState", "nu"): "second",
    ("ScaleByBeliefState", "mu"): "first",
    ("ScaleByBeliefState", "nu"): "second",
    ("ScaleByAdemamixState", "m1"): "first",
    ("ScaleByAdemamixState", "m2"): "first",
    ("ScaleByAdemamixState", "nu"): "second",
    ("ScaleByAdanState", "m"): "first",
    ("ScaleByAdanState", "v"): "first",  # of differences of gradients
    ("ScaleByAdanState", "n"): "second",
    ("ScaleByLionState", "mu"): "first",
    ("ScaleBySM3State", "nu"): "first",
    ("ScaleByNovogradState", "mu"): "first",
    ("MuonState", "mu"): "first",
    ("SophiaState", "mu"): "first",
    ("TraceState", "trace"): "first",
    ("ScaleByRmsState", "nu"): "second",
    ("ScaleByRmsWithCountState", "nu"): "second",
    ("ScaleByRssState", "sum_of_squares"): "second",
    ("ScaleByAdaDeltaState", "e_g"): "second",
    ("ScaleByAdaDeltaState", "e_x"): "second",
    ("FactoredState", "v"): "second",
    ("EmaState", "ema"): "first",
    ("ScaleBySimplifiedAdEMAMixState", "m"): "first",
    ("ScaleBySimplifiedAdEMAMixState", "n"): "second",
    ("ProdigyState", "exp_avg"): "first",
    ("ProdigyState", "exp_avg_sq"): "second",
    ("DAdaptAdamWState", "exp_avg"): "first",
    ("DAdaptAdamWState", "exp_avg_sq"): "second",
    ("MomoState", "exp_avg"): "first",
    ("MomoAdamState", "exp_avg"): "first",
    ("MomoAdamState", "exp_avg_sq"): "second",
}


@dataclasses.dataclass(frozen=True)
class StateRule:
    """Says how arrays of an optimizer's state are stored.

    Attributes:
      field: regular expression that the name of the field in the state must match:
        ``"mu"`` and ``"nu"`` of Adam, ``"trace"`` of momentum.
      format: ``"bfloat16"``; for averages of gradients ``"float16"``, and in blocks
        that share a scale ``"float8_e4m3fn"``, ``"float8_e5m2"`` and ``"int8"``; for
        averages of squares ``"log8"``, a logarithmic code in blocks. None: as the
        optimizer has them.
      kind: ``"first"``, averages of gradients, or ``"second"``, averages of squares,
        which an optimizer divides by; known of optax's optimizers. None: any array that
        is shaped like the parameters.
      path: regular expression that the path of the parameter must match, names joined
        by "/".
      rounding: ``"stochastic"``, or to ``"nearest"``, under which an average that
        changes by less than half a step, as second moments do, never changes.
      min_size: arrays of fewer elements stay as the optimizer has them.
      block: the most elements that share a scale. They are smaller where an
        axis would have fewer than 8 blocks, so that none crosses a shard of an axis in
        8 parts; for more parts give fewer.
      optional: allow the rule to match nothing.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: a regular expression, the format, the kind or the rounding is none,
        or ``block`` no power of two.

    Example:
      >>> import mpjax
      >>> print(mpjax.StateRule("nu", "log8").rounding)
      stochastic
    """

    field: str
    format: str | None
    kind: Kind | None = dataclasses.field(default=None, kw_only=True)
    path: str = dataclasses.field(default=".*", kw_only=True)
    rounding: Rounding = dataclasses.field(default="stochastic", kw_only=True)
    min_size: int = dataclasses.field(default=4096, kw_only=True)
    block: int = dataclasses.field(default=128, kw_only=True)
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
        named = isinstance(self.format, str) and self.format in CODES
        if self.format is not None and not named:
            raise ValueError(
                f"The format of a state is one of {', '.join(CODES)} or None, got "
                f"{self.format!r}."
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f'rounding is "nearest" or "stochastic", got {self.rounding!r}.'
            )
        if self.kind not in (None, "first", "second"):
            raise ValueError(f'kind is "first", "second" or None, got {self.kind!r}.')
        block = whole_number("block", self.block)
        if block < 1 or block & (block - 1):
            raise ValueError(f"block is a power of two, got {block}.")
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "min_size", whole_number("min_size", self.min_size))
        object.__setattr__(self, "optional", check_flag("optional", self.optional))

    def matches(self, place: "Place") -> bool:
        """Whether it says how an array is stored."""
        of_kind = self.kind is None or self.kind == place.kind
        field, path = (
            re.fullmatch(pattern, name)
            for pattern, name in ((self.field, place.field), (self.path, place.path))
        )
        return of_kind and field is not None and path is not None


Formats: TypeAlias = str | StateRule | Sequence[StateRule]


def _moments(first: StateRule, second: StateRule) -> tuple[StateRule, ...]:
    return (
        dataclasses.replace(second, kind="second", optional=True),
        dataclasses.replace(first, kind="first", optional=True),
    )


# What the name of a set of rules stands for.
PRESETS = {
    "bfloat16": _moments(
        StateRule(".*", "bfloat16", rounding="nearest"), StateRule(".*", "bfloat16")
    ),
    "8bit": _moments(StateRule(".*", "float8_e5m2"), StateRule(".*", "log8")),
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
      kind: what is in the field, if it is known.
      path: that of the parameter, names joined by "/".
      param: the parameter that it is shaped like.
    """

    field: str
    kind: Kind | None
    path: str
    param: Any


def places(state: ArrayTree, params: ArrayTree) -> Iterator[Place | None]:
    """For each leaf of a state its place, or None if it is no parameter's.

    A leaf belongs to a parameter whose path its own ends in, and whose shape it has.
    Those of ``optax.flatten`` belong to all parameters, one after the other, and those
    of ``optax.lookahead`` to the fast ones.
    """
    params = params.fast if isinstance(params, optax.LookaheadParams) else params
    own = {
        tuple(map(_name, path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    size = sum(np.size(leaf) for leaf in own.values())
    own.setdefault((), jax.ShapeDtypeStruct((size,), jnp.float32))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield _place(state, path, leaf, own)


def _place(state: ArrayTree, path: tuple, leaf: Any, own: dict) -> Place | None:
    names = tuple(map(_name, path))
    for start in range(len(names) + 1):
        param = own.get(names[start:])
        if param is None or not _is_float(leaf) or not _is_float(param):
            continue
        if np.shape(leaf) != np.shape(param):
            continue
        owner, field = _field(state, path[:start])
        return Place(field, KINDS.get((owner, field)), path_name(path[start:]), param)
    return None


def _field(state: ArrayTree, path: tuple) -> tuple[str, str]:
    """The class of the last state on a path, and the name of its field."""
    found, node = ("", ""), state
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            found = type(node).__name__, key.name
        elif isinstance(key, jax.tree_util.DictKey) and not found[1]:
            found = "", str(key.key)
        node = _child(node, key)
    return found


def _child(node: Any, key: Any) -> Any:
    """What a node of a tree, of any registered class, has at a key."""
    pairs = jax.tree_util.tree_leaves_with_path(node, lambda x: x is not node)
    return next(child for (own,), child in pairs if own == key)


def rule_for(place: Place, rules: Sequence[StateRule]) -> StateRule | None:
    """The first rule that matches, unless it leaves the array alone.

    Raises:
      ValueError: its format cannot hold what the array has.
    """
    rule = next((rule for rule in rules if rule.matches(place)), None)
    if rule is None or rule.format is None or np.size(place.param) < rule.min_size:
        return None
    if place.kind == "second" and rule.format not in ("bfloat16", "log8"):
        raise ValueError(
            f"{rule.format} cannot hold the second moments {place.field!r}: those of "
            'small gradients would be 0, and are divided by. Take "bfloat16" or "log8".'
        )
    if place.kind == "first" and rule.format == "log8":
        raise ValueError(
            f"log8 has no negative numbers, and {place.field!r} are averages of "
            'gradients: take another format, "float8_e4m3fn" say.'
        )
    if place.kind is None and rule.format != "bfloat16":
        raise ValueError(
            f"What an optimizer does with {place.field!r} is not known, and "
            f"{rule.format} may lose signs or small numbers: take "
            '"bfloat16", or None to leave it as it is.'
        )
    return rule


def block_of(shape: tuple[int, ...], most: int) -> Block:
    """Blocks along one axis, the same however an array is sharded.

    Along the last axis but one, where there is room, since a reduction over lanes is
    the most expensive one on a TPU.
    """
    if not shape:
        return ()
    order = [*reversed(range(len(shape) - 1)), len(shape) - 1]
    sizes = {axis: _block_size(shape[axis], most) for axis in order}
    axis = next((a for a in order if sizes[a] >= 32), max(order, key=sizes.__getitem__))
    return tuple(sizes[axis] if i == axis else 1 for i in range(len(shape)))


def _block_size(size: int, most: int) -> int:
    """The largest power of two that divides an axis into 8 blocks or more."""
    block = most
    while block > 1 and (size % block or size // block < _PARTS):
        block //= 2
    return block


def _is_float(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def path_name(path: tuple) -> str:
    """The names of a path, joined by "/", without the insides of boxes."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # of a variable of NNX, or of metadata of Linen
    return "/".join(str(_name(key)) for key in path)


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
