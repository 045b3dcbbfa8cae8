"""The update of an optimizer in one pass over memory."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding

from mpjax._checks import check_flag, check_transformation, whole_number, wrong
from mpjax._kernels.one_pass import OnePass, part_of
from mpjax._kernels.programs import Program
from mpjax._kernels.tiles import UnservedError
from mpjax._optimizers.rules import path_name
from mpjax._optimizers.shards import (
    called,
    check_shardings,
    local_shape,
    shardings_of,
)
from mpjax._typing import Array, ArrayTree
from mpjax._updates import Outermost, Replacement, is_update, with_updates

_SHOWN = 8


def fused(
    inner: optax.GradientTransformation,
    *,
    min_size: int = 2**16,
    shardings: ArrayTree = None,
    optional: bool = False,
    interpret: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Updates each large parameter and its state in one pass over memory on TPUs.

    XLA writes the blocks of 8-bit states and the halves of parameters out between
    passes. Here the update of ``inner`` is traced, and what it computes for a parameter
    becomes a kernel that reads the gradient, the parameter and its states once and
    writes them once, in place. On other platforms the traced update runs as it is.

    ``inner`` is any optimizer that computes one element at a time, but for numbers that
    are computed before, such as schedules, the norm of all gradients, or whether loss
    scaling skips the step; and for the blocks of `low_precision_state`. So are
    adam(w), lion, momentum, rmsprop and adagrad; Muon and Adafactor are not. A
    parameter has two axes or more, rows (the last axis but one) that are a multiple of
    32, and at least 128 columns, so has the part of it on each device, and blocks of
    states are along the rows, as they are by default. Smaller parameters are
    left to XLA.

    It goes around everything but ``mpjax.scaled``, around loss scaling as well:
    ``fused(dynamic_loss_scaling(low_precision_params(low_precision_state(tx))))``. The
    state is that of ``inner``. Updates are new values of the parameters, which
    `mpjax.apply_updates`, `TrainState` and ``mpjax.nnx.Optimizer`` put in their place,
    and optax refuses to add; ``optax.set_to_zero``, to freeze some, goes inside: around
    it parameters would be 0. On a TPU division, and the square root of infinity, may
    differ from XLA's in the last bit; the square root of infinity is NaN.

    Args:
      inner: an optimizer of optax.
      min_size: parameters of fewer elements are left to XLA.
      shardings: a tree like the parameters of their ``NamedSharding``, if they are
        spread over devices by a mesh whose axes are not explicit: a kernel cannot see
        it, and JAX refuses to compile it then. States are sharded as their parameter.
      optional: leave large parameters that cannot be served to XLA as well; `unfused`
        lists them.
      interpret: run kernels by operations of JAX on any platform, for tests.

    Returns:
      A transformation whose state is that of ``inner``, and whose ``update`` needs
      ``params``.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: from ``update``: ``params`` is missing, or a parameter of ``min_size``
        elements or more cannot be served, unless ``optional``.

    Example:
      >>> import jax.numpy as jnp, mpjax.optimizers, optax
      >>> params = {"w": jnp.ones((256, 256))}
      >>> tx = mpjax.optimizers.fused(mpjax.low_precision_state(optax.rmsprop(0.1)))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(f"{mpjax.apply_updates(params, updates)['w'].mean():.2f}")
      0.68
    """
    check_transformation(inner, lambda value: False)
    min_size = whole_number("min_size", min_size)
    optional = check_flag("optional", optional)
    interpret = check_flag("interpret", interpret)
    check_shardings(shardings)
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "fused makes new parameters from the old ones: call "
                "update(grads, opt_state, params)."
            )
        step = _Step(inner, updates, state, params, extra_args)
        plan = _Plan(step, min_size, shardings_of(params, shardings))
        if plan.reasons and not optional:
            shown = "; ".join(
                f"{k!r}: {v}" for k, v in [*plan.reasons.items()][:_SHOWN]
            )
            raise ValueError(
                f"An update in one pass cannot serve all parameters of {min_size} "
                f"elements or more: {shown}. Pass optional=True to leave them to XLA."
            )

        def by_kernels(*arrays):
            return plan.run(arrays, interpret)

        def by_xla(*arrays):
            results = core.jaxpr_as_fun(step.jaxpr)(*arrays)
            return [results[i] for i in plan.wanted]

        if interpret:
            results = by_kernels(*step.arrays)
        else:
            results = lax.platform_dependent(
                *step.arrays, tpu=by_kernels, default=by_xla
            )
        return plan.trees(results)

    return Outermost(inner.init, update)


def unfused(
    inner: optax.GradientTransformation,
    params: ArrayTree,
    *,
    min_size: int = 2**16,
    shardings: ArrayTree = None,
) -> dict[str, str]:
    """The large parameters that `fused` cannot serve, and why.

    Args:
      inner: the optimizer that is given to `fused`.
      params: arrays or ``jax.ShapeDtypeStruct``.
      min_size: as of `fused`.
      shardings: as of `fused`.

    Returns:
      A reason for each path of a parameter. Empty if all are updated in one pass.

    Raises:
      TypeError: an argument is of the wrong type.
      ValueError: ``shardings`` is another tree.

    Example:
      >>> import jax.numpy as jnp, mpjax.optimizers, optax
      >>> params = {"w": jnp.ones((256, 256)), "odd": jnp.ones((257, 256))}
      >>> mpjax.optimizers.unfused(optax.lion(1e-3), params)
      {'odd': 'its shape is (257, 256), and 257 rows are no multiple of 32'}
    """
    check_transformation(inner, lambda value: False)
    inner = optax.with_extra_args_support(inner)
    min_size = whole_number("min_size", min_size)
    check_shardings(shardings)
    for leaf in jax.tree.leaves(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise wrong("params", "are floating-point arrays or their types", leaf)
    found: dict[str, str] = {}

    def look(params):
        step = _Step(inner, params, inner.init(params), params, {})
        found.update(_Plan(step, min_size, shardings_of(params, shardings)).reasons)

    jax.eval_shape(look, params)
    return found


class _Step:
    """A traced update.

    Attributes:
      arrays: all arrays that it is given.
      params: a tree like the parameters, of their indices among the arrays.
      state: one like the state.
      gradients: indices of the gradients.
      jaxpr: makes of the arrays the updates, new parameters and the new state.
      results: those as trees of indices.
    """

    def __init__(self, inner, updates, state, params, extra_args):
        leaves, structure = jax.tree.flatten((params, state, updates, extra_args))
        is_array = [hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves]
        self.arrays = [x for x, is_one in zip(leaves, is_array, strict=True) if is_one]
        places = np.cumsum(is_array) - 1
        indices = [
            int(i) if is_one else None
            for i, is_one in zip(places, is_array, strict=True)
        ]
        self.params, self.state, gradients, _ = structure.unflatten(indices)
        self.gradients = jax.tree.leaves(gradients)

        def step(*arrays):
            given = iter(arrays)
            filled = [
                next(given) if is_one else x
                for x, is_one in zip(leaves, is_array, strict=True)
            ]
            params, state, updates, extra_args = structure.unflatten(filled)
            out, new_state = inner.update(updates, state, params, **extra_args)
            return out, with_updates(params, out), new_state

        self.jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*self.arrays)
        count = len(jax.tree.leaves(shapes))
        self.results = jax.tree.unflatten(jax.tree.structure(shapes), range(count))


class _Plan:
    """Which parameters are updated by kernels.

    Attributes:
      wanted: indices of what an update returns, among the results of the step.
      parts: a kernel for each parameter that is served, and how it is sharded.
      reasons: why a large parameter is not, by path.
    """

    def __init__(self, step: _Step, min_size: int, specs: list):
        self.step = step
        self.program = Program(step.jaxpr, "tpu")
        out, new, state = step.results
        self.nodes, self.structure = jax.tree.flatten(out, is_leaf=is_update)
        news = self.structure.flatten_up_to(new)
        olds = self.structure.flatten_up_to(step.params)
        donors = self._donors(new, state)
        groups = self._groups(jax.tree.leaves((new, state)))
        spread = dict(zip(jax.tree.leaves(step.params), specs, strict=True))
        paths = jax.tree_util.tree_leaves_with_path(step.params)
        names = {index: path_name(path) for path, index in paths}
        self.parts: list[tuple[OnePass, NamedSharding | None]] = []
        self.reasons: dict[str, str] = {}
        self.served: dict[int, int] = {}
        for place, (old, index) in enumerate(zip(olds, news, strict=True)):
            if not isinstance(old, int) or not isinstance(index, int):
                continue
            aval = step.jaxpr.in_avals[old]
            number: Any = self.program.outputs[index]
            is_made = self.program.is_array(number) and number in self.program.makers
            if math.prod(aval.shape) < min_size or not is_made:
                continue
            try:
                part = self._part(aval.shape, number, groups, donors)
                part.check_local(local_shape(aval.shape, spread[old]))
            except UnservedError as reason:
                self.reasons[names[old]] = str(reason)
                continue
            self.parts.append((part, spread[old]))
            self.served[place] = index
        leaves = [
            [self.served[place]] if place in self.served else jax.tree.leaves(node)
            for place, node in enumerate(self.nodes)
        ]
        self.wanted = [*itertools.chain(*leaves), *jax.tree.leaves(state)]

    def _donors(self, new: ArrayTree, state: ArrayTree) -> dict[int, int]:
        """Of each new parameter and state the input that it takes the place of."""
        donors: dict[int, int] = {}
        for old, made in ((self.step.params, new), (self.step.state, state)):
            if jax.tree.structure(old) == jax.tree.structure(made):
                for i, j in zip(
                    jax.tree.leaves(old), jax.tree.leaves(made), strict=True
                ):
                    number = self.program.outputs[j]
                    if isinstance(number, int):
                        donors[number] = self.program.inputs[i]
        return donors

    def _groups(self, results: list[int]) -> dict[int, list[int]]:
        """For each array that is made, those that are made of the same arrays."""
        program, inputs = self.program, set(self.program.inputs)
        parents: dict[int, int] = {}

        def root(number: int) -> int:
            while parents.setdefault(number, number) != number:
                number = parents[number]
            return number

        made = dict.fromkeys(program.outputs[i] for i in results)
        made = [n for n in made if program.is_array(n) and n in program.makers]
        for number in made:
            ops = program.needed([number], lambda n: not program.is_array(n))
            read = {a for op in ops for a in op.inputs if program.is_array(a)}
            for other in read & inputs:
                parents[root(other)] = root(number)
        groups: dict[int, list[int]] = {}
        for number in made:
            groups.setdefault(root(number), []).append(number)
        return {number: groups[root(number)] for number in made}

    def _part(self, shape, number: int, groups, donors) -> OnePass:
        if len(shape) < 2:
            raise UnservedError("it has one axis")
        program, step = self.program, self.step
        read = [*step.gradients, *jax.tree.leaves(step.params)]
        free = frozenset(program.inputs[i] for i in read if i is not None)
        outputs = groups[number]
        donated = [donors.get(n) for n in outputs]
        return part_of(program, outputs, donated, shape, free)

    def run(self, arrays, interpret: bool) -> list[Array]:
        """What is wanted, by kernels."""
        program = self.program
        known = dict(zip(program.inputs, arrays, strict=True))
        by_kernels = {n for part, _ in self.parts for n in part.outputs}
        outside = [n for n in (program.outputs[i] for i in self.wanted)]
        outside = [n for n in outside if n not in by_kernels]
        outside += [n for part, _ in self.parts for n in part.scalars]
        outside = list(dict.fromkeys(outside))
        values = dict(zip(outside, program.evaluate(outside, arrays), strict=True))
        for part, sharding in self.parts:
            scalars = [values[n] for n in part.scalars]
            given = [known.get(n, program.values.get(n)) for n in part.arrays]
            made = called(part, sharding, scalars, given, interpret)
            values.update(zip(part.outputs, made, strict=True))
        return [values[program.outputs[i]] for i in self.wanted]

    def trees(self, results) -> tuple[ArrayTree, ArrayTree]:
        """Updates and the new state, of what is wanted."""
        rest = iter(results)
        nodes = [
            Replacement.of(next(rest))
            if place in self.served
            else jax.tree.map(lambda _: next(rest), node)
            for place, node in enumerate(self.nodes)
        ]
        state = jax.tree.map(lambda _: next(rest), self.step.results[2])
        return self.structure.unflatten(nodes), state
