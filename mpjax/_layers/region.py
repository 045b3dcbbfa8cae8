"""The module whose method runs, and how its results leave it."""

import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax

from mpjax._layers.loops import arrays_of_loop
from mpjax._layers.results import (
    Given,
    Opaque,
    at_border,
    carried,
    inside_region,
    of_model,
)
from mpjax._policies.policy import Policy

# The policy of the module whose method runs; None outside of models. JAX has it in the
# key of its caches of traced functions, and each thread has its own.
running_policy = jax.make_user_context(None)

# By the id of a result that was rounded on its way out, as a stream is: that result and
# what it was before. It is forgotten with the result.
Rounded: TypeAlias = dict[int, tuple[weakref.ref, jax.Array]]


class RunningMethod(NamedTuple):
    """The method of a module that runs.

    Attributes:
      module: the module, or what tells it from others.
      trace: in which it runs.
      frame: the `frame_id` of its call.
      rounded: what modules have returned in its trace, as of `rounded_within`.
    """

    module: Any
    trace: Any
    frame: int
    rounded: Rounded


def loop_between(outer: RunningMethod | None, trace: Any) -> Sequence | None:
    """What a loop or a branch in the method around a module has handed to its body.

    Args:
      outer: the method around the module; None: there is none.
      trace: in which the module runs.

    Returns:
      As `arrays_of_loop`; None if the module does not run in a loop.
    """
    if outer is None or outer.trace == trace:
        return None
    return arrays_of_loop(outer.frame)


def rounded_within(outer: RunningMethod | None, trace: Any) -> Rounded:
    """Where a module finds results that were rounded, and leaves its own.

    If a module returns such a result as it is, and its policy ends there, what leaves
    it is what the result was before.

    Args:
      outer: the method around the module; None: there is none.
      trace: in which the module runs.
    """
    return {} if outer is None or outer.trace != trace else outer.rounded


running_method: ContextVar[RunningMethod | None] = ContextVar(
    "mpjax_method", default=None
)


@dataclass(frozen=True, slots=True)
class Exit:
    """How the results of a method leave a module for the one around it.

    Attributes:
      policy: of the module; None: it is left alone.
      around: the policy of the module around it; None: that has none, or there is none.
      outer: the method of the module around it; None: there is none.
      handed: by the loop in whose body the module around it calls it; None: by none.
      rounded: as of `rounded_within`.
      cast_outputs: whether the rule of the module lets results be cast.
      is_new: whether a result is new, unless a loop needs it to be a carry: of Flax's
        own layers, and of methods that a module calls on itself.
    """

    policy: Policy | None
    around: Policy | None
    outer: RunningMethod | None
    handed: Sequence[jax.Array] | None
    rounded: Rounded
    cast_outputs: bool
    is_new: bool

    def cast(self, result: Any, given: Given, opaque: Opaque) -> Any:
        """The result, each part of it in the dtype in which it leaves.

        Args:
          result: a pytree.
          given: positional and named arguments, before they were cast.
          opaque: says which nodes are no arrays to a front end, whatever is in them.

        Raises:
          NoPytreeError: a result that is to be cast is no pytree.
        """
        if result is None:
            return None
        policy, casts, in_loop = self.policy, self.cast_outputs, False
        if self.handed is not None:
            in_loop, given = True, carried(given, self.handed, opaque)
        if policy is None:
            if self.around is None or not in_loop:
                return result
            return at_border(result, given, None, True, True, opaque)
        if policy == self.around:
            if not in_loop and (self.is_new or not casts):
                return result
            new = inside_region(result, given, in_loop, casts, opaque)
            if new is not result and not in_loop:
                self._note_rounded(result, new, opaque)
            return new
        if self.rounded and casts and not in_loop:
            result = jax.tree.map(self._before_rounding, result, is_leaf=opaque)
        if self.outer is None:
            if not casts:
                return result
            dtype = policy.output_dtype
            if self.is_new:  # of a cell, or nn.RNN, the carry comes first
                return at_border(result, given, dtype, True, False, opaque)
            return of_model(result, given, dtype, opaque)
        if not in_loop and not casts:
            return result
        dtype = policy.output_dtype if casts else None
        may_be_stream = in_loop and casts and not self.is_new
        return at_border(result, given, dtype, in_loop, may_be_stream, opaque)

    def _note_rounded(self, result: Any, new: Any, opaque: Opaque) -> None:
        leaves = (jax.tree.leaves(tree, is_leaf=opaque) for tree in (result, new))
        for before, after in zip(*leaves, strict=True):
            if before is not after:
                forget = partial(self._forget, id(after))
                self.rounded[id(after)] = weakref.ref(after, forget), before

    def _forget(self, key: int, _: Any) -> None:
        self.rounded.pop(key, None)

    def _before_rounding(self, leaf: Any) -> Any:
        return self.rounded[id(leaf)][1] if id(leaf) in self.rounded else leaf
