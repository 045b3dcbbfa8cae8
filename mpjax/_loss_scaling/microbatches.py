"""Gradients of a large batch, taken of one microbatch after the other."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._checks import check_callable, whole_number
from mpjax._loss_scaling.sums import Sums
from mpjax._mesh import first_axis_parts, varying_axes
from mpjax._tree import is_numeric, widen
from mpjax._typing import Array, ArrayLike, ArrayTree


def accumulate_gradients(
    loss_fn: Callable[..., Any],
    steps: int,
    *,
    carry_argnum: int | None = None,
    reduction: str = "mean",
) -> "Microbatches":
    """A loss of a large batch whose gradient is taken microbatch by microbatch.

    It stands in the place of ``loss_fn``, and what is differentiated and updated stays
    as it was::

        loss_fn = mpjax.accumulate_gradients(loss_fn, steps=8)
        loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables, batch)
        state = state.apply_gradients(grads=grads)

    The microbatches are the iterations of one ``jax.lax.scan``, which adds up their
    gradients in float32, so that memory is that of one of them. There is one check of
    the sum, one decision and one step of the optimizer; amaxes of delayed scaling are
    merged by maximum. (``optax.MultiSteps`` makes a step of several calls instead.)

    Of a mean, each microbatch is differentiated as its part of the mean of all, so that
    gradients within the model are as large as those of the large batch.

    All arguments that are not differentiated are split: arrays along their first axis,
    of which microbatch ``i`` has the rows ``i, i + steps, ...``, so that each device of
    a sharded batch has its part of every microbatch; a typed PRNG key into a key for
    each. Scalars, leaves that are no arrays, and modules of NNX are the same for all;
    what a module keeps, of batches or keys, goes on from one microbatch to the next.
    What else is to be whole in every microbatch is closed over.

    ``jax.value_and_grad`` of it is right as well, at the cost of a second forward pass;
    an optimizer that scales no loss may be wrapped in `static_loss_scaling`, by 1.

    Args:
      loss_fn: a function that returns a loss, or a loss and something else.
      steps: the number of microbatches.
      carry_argnum: the position of an argument that is handed on and not split: batch
        statistics, say. ``loss_fn`` then returns ``(loss, (new, aux))``, and ``new`` is
        that argument for the microbatch after.
      reduction: "mean": of losses that are means over a batch; "sum": of losses that
        are sums.

    Returns:
      A function of the arguments of ``loss_fn``. Its loss is float32[], and ``aux`` is
      that of all microbatches, stacked along a new first axis; with ``carry_argnum`` a
      pair of the last ``new`` and that. Gradients of 16-bit parameters are in float32.

    Raises:
      TypeError: ``loss_fn`` is no function, or ``steps`` no whole number.
      ValueError: ``steps`` is below 1, or ``reduction`` another word. Later, when it is
        called: a batch cannot be split, or what is handed on changes its dtype.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> loss_of_all = mpjax.accumulate_gradients(loss_fn, steps=2)
      >>> w, x = jnp.ones(2), jnp.arange(8.0).reshape(4, 2)
      >>> opt_state = mpjax.static_loss_scaling(optax.sgd(0.1), 1.0).init(w)
      >>> print(*mpjax.value_and_grad(loss_of_all, opt_state)(w, x))
      69.0 [62. 76.]
    """
    check_callable("loss_fn", loss_fn)
    if isinstance(loss_fn, Microbatches):
        raise TypeError(
            "loss_fn is the loss of one microbatch, got what accumulate_gradients has "
            "made; multiply its steps instead."
        )
    steps = whole_number("steps", steps)
    if steps < 1:
        raise ValueError(f"steps is at least 1, got {steps}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is "mean" or "sum", got {reduction!r}.')
    if carry_argnum is not None:
        carry_argnum = whole_number("carry_argnum", carry_argnum)
        if carry_argnum < 0:
            raise ValueError(f"carry_argnum is not negative, got {carry_argnum}.")
    return Microbatches(loss_fn, steps, carry_argnum, reduction)


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """What `accumulate_gradients` returns."""

    loss_fn: Callable[..., Any]
    steps: int
    carry_argnum: int | None
    reduction: str

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.loss_fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        split = self.split(args, kwargs, {0})  # the first are the parameters
        has_aux = False

        @jax.checkpoint
        def step(carry, batch):
            nonlocal has_aux
            args, kwargs = split.join(batch, carry)
            out = self.loss_fn(*args, **kwargs)
            has_aux = isinstance(out, tuple)
            loss, aux = out if has_aux else (out, None)
            carry, aux = self.handed_on(carry, aux)
            return carry, (self.part(loss), aux)

        carry, (losses, aux) = lax.scan(step, self.carried(args), split.batches)
        loss = jnp.sum(losses)
        if self.carry_argnum is not None:
            return loss, (carry, aux)
        return (loss, aux) if has_aux else loss

    def split(self, args, kwargs, whole) -> "Split":
        """The arguments of every microbatch.

        Args:
          args: of the loss.
          kwargs: of the loss.
          whole: positions that are not split.
        """
        whole = {*whole, self.carry_argnum}
        given = [None if i in whole else arg for i, arg in enumerate(args)], kwargs
        leaves, structure = jax.tree.flatten(given)
        kinds = [_is_split(leaf) for leaf in leaves]
        batches = [
            _rows(leaf, self.steps) if kind else None
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        same = [
            None if kind else leaf for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        wholes = {i: arg for i, arg in enumerate(args) if i in whole}
        return Split(batches, same, structure, wholes, self.carry_argnum)

    def carried(self, args) -> Any:
        """What the first microbatch is handed."""
        if self.carry_argnum is None:
            return None
        if self.carry_argnum >= len(args):
            raise ValueError(
                f"carry_argnum={self.carry_argnum} is the position of an argument, got "
                f"{len(args)} positional arguments."
            )
        return jax.tree.map(
            lambda x: jnp.asarray(x) if is_numeric(x) else x, args[self.carry_argnum]
        )

    def handed_on(self, carry: Any, aux: Any) -> tuple[Any, Any]:
        """What the next microbatch is handed, and the rest of ``aux``."""
        if self.carry_argnum is None:
            return carry, aux
        if not (isinstance(aux, tuple) and len(aux) == 2):
            raise TypeError(
                "With carry_argnum the loss function returns (loss, (new, aux)), in "
                "which new takes the place of the argument, got "
                f"{type(aux).__name__} for (new, aux)."
            )
        new, aux = aux
        check_like(carry, new, "carry_argnum")
        return new, aux

    def part(self, loss: ArrayLike) -> Array:
        """What the loss of one microbatch adds to that of all."""
        wide = widen(jnp.asarray(loss))
        return wide / self.steps if self.reduction == "mean" else wide

    def gradient(self, grad_fn: Callable, argnums: int | Sequence[int]) -> Callable:
        """The gradient of all microbatches, from that of one.

        Args:
          grad_fn: returns ``(grads, (loss, aux))`` of one microbatch.
          argnums: of ``grad_fn``.
        """
        several = not isinstance(argnums, int)
        positions = [argnums] if isinstance(argnums, int) else [*argnums]

        def accumulated(*args, **kwargs):
            places = [place % len(args) for place in positions]
            if self.carry_argnum in places:
                raise ValueError(
                    f"carry_argnum={self.carry_argnum} is an argument to differentiate "
                    f"with respect to, got argnums={argnums!r}; hand on another."
                )
            split = self.split(args, kwargs, places)
            sums = Sums.like([args[place] for place in places])

            def step(carry, batch):
                totals, handed = carry
                args, kwargs = split.join(batch, handed)
                grads, (loss, aux) = grad_fn(*args, **kwargs)
                handed, aux = self.handed_on(handed, aux)
                grads = [*grads] if several else [grads]
                return (sums.add(totals, grads), handed), (loss, aux)

            carry = sums.zeros, self.carried(args)
            (totals, handed), (losses, aux) = lax.scan(step, carry, split.batches)
            grads = sums.tree(totals)
            if self.carry_argnum is not None:
                aux = handed, aux
            grads = tuple(grads) if several else grads[0]
            return grads, (jnp.sum(losses), aux)

        return accumulated


def loss_and_part(loss_fn: Callable) -> tuple[Callable, Callable]:
    """The loss of one batch, and what that adds to the loss of all."""
    if isinstance(loss_fn, Microbatches):
        return loss_fn.loss_fn, loss_fn.part
    return loss_fn, lambda loss: loss


@dataclasses.dataclass(frozen=True)
class Split:
    """Arguments of microbatches.

    Attributes:
      batches: leaves with a first axis of microbatches; None for those that are whole.
      same: leaves that are the same for all; None for the others.
      structure: of the arguments that have these leaves.
      wholes: arguments that are not split, by position.
      carry_argnum: the position of the one that is handed on.
    """

    batches: list[Any]
    same: list[Any]
    structure: Any
    wholes: dict[int, Any]
    carry_argnum: int | None

    def join(self, batch: list[Any], handed: Any) -> tuple[tuple, dict[str, Any]]:
        """Arguments of one microbatch."""
        leaves = [
            same if part is None else part
            for part, same in zip(batch, self.same, strict=True)
        ]
        args, kwargs = self.structure.unflatten(leaves)
        for i, whole in self.wholes.items():
            args[i] = handed if i == self.carry_argnum else whole
        return tuple(args), kwargs


def _is_split(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return False
    return np.ndim(leaf) > 0 or not is_numeric(leaf)


def _rows(leaf: Any, steps: int) -> Any:
    """A leaf with the microbatches along its first axis."""
    if np.ndim(leaf) == 0:
        return jax.random.split(leaf, steps)
    if leaf.shape == (2,) and leaf.dtype == np.uint32:
        raise ValueError(
            "A batch is split along its first axis, got uint32[2], which may be a PRNG "
            "key of the old kind: make keys with jax.random.key(seed)."
        )
    rows = leaf.shape[0]
    if rows % steps:
        raise ValueError(
            f"A batch is split into {steps} microbatches of one size, got an array "
            f"{leaf.dtype}{list(leaf.shape)}, whose first axis has {rows} rows: choose "
            f"a divisor of {rows}. Close over what is not to be split."
        )
    leaf = jnp.asarray(leaf)
    parts = first_axis_parts(leaf)
    if rows // steps % parts:
        raise ValueError(
            f"Each device has a part of each of the {steps} microbatches, got an array "
            f"{leaf.dtype}{list(leaf.shape)}, whose {rows} rows are on {parts} devices "
            f"of a mesh with explicit axes: choose a divisor of {rows // parts}."
        )
    leaf = leaf.reshape(rows // steps, steps, *leaf.shape[1:])
    return jnp.moveaxis(leaf, 1, 0)


def check_like(old: ArrayTree, new: ArrayTree, name: str) -> None:
    """Raises a TypeError unless what is handed on keeps shapes and dtypes.

    In a shard_map, also if it was the same on all devices and is no longer.
    """

    def where(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    if jax.tree.structure(old) != jax.tree.structure(new):
        raise TypeError(
            f"What {name} hands on keeps its structure, got "
            f"{jax.tree.structure(new)} for {jax.tree.structure(old)}."
        )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
    ):
        if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise TypeError(
                f"What {name} hands on keeps shapes and dtypes, got {jax.typeof(b)} "
                f"for {jax.typeof(a)} at {where(path)!r}: cast it in the loss function."
            )
        axes = sorted(varying_axes(b) - varying_axes(a), key=str)
        if axes:
            raise TypeError(
                f"What {name} hands on is the same on all devices of the axes {axes}, "
                f"got another on each at {where(path)!r}: average it in the loss "
                "function, by lax.pmean or the axis_name of nn.BatchNorm."
            )
