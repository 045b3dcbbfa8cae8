"""One model and its train step in both front ends, as functions of arrays.

A BatchNorm and a Dense layer in float16 with delayed fp8, dynamic loss scaling and an
average of the parameters. All that a step changes is one tree.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.nnx

ROWS, FEATURES, OUTPUTS = 32, 16, 24
# Axes of the mesh over which the kernel and the bias are sharded.
LAYOUTS = {
    "data parallel": None,
    "FSDP": (("data", None), ("data",)),
    "tensor parallel": ((None, "model"), ("model",)),
}
# What becomes of each step of `batches`: the scale is halved, kept or doubled.
FAULTS = (None, "overflow", None, "nan", None, "inf", None, None)
SCALES = 2.0 ** np.array([10, 9, 9, 9, 10, 10, 10, 11])
FINITE = np.array([fault is None for fault in FAULTS])
STEPS = np.cumsum(FINITE)


def rule(**options):
    recipe = mpjax.delayed_scaling(history_length=4, **options)
    return mpjax.Rule(".*", "mixed_float16", recipe)


def transformation(**options):
    inner = optax.sgd(0.1, momentum=0.9)  # no clipping, which hides factors
    return mpjax.dynamic_loss_scaling(
        inner, init_scale=2.0**10, growth_interval=2, **options
    )


def batches(row=13):
    """The batches of a run; of those with a fault one row is bad."""
    rng = np.random.default_rng(0)
    for fault in FAULTS:
        x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
        y = rng.normal(size=(ROWS, OUTPUTS)).astype(np.float32)
        bad = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
        if fault == "overflow":  # of float16, in the gradient of the outputs
            y[row] = 1e6
        elif fault is not None:
            x[row] = bad[fault]
        yield x, y


def squared(out, y):
    return jnp.mean((out.astype(jnp.float32) - y) ** 2)


class LinenNet(nn.Module):
    layout: tuple | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        inits = [nn.initializers.lecun_normal(), nn.initializers.zeros]
        if self.layout is not None:
            pairs = zip(inits, self.layout, strict=True)
            inits = [nn.with_partitioning(init, names) for init, names in pairs]
        x = nn.BatchNorm(False, momentum=0.5, axis_name=self.axis_name)(x)
        return nn.Dense(OUTPUTS, kernel_init=inits[0], bias_init=inits[1])(x)


class LinenProgram:
    """`mpjax.TrainState`.

    Args:
      layout: of `LAYOUTS`.
      axis_name: of a ``shard_map`` over the batch.
      microbatches: of a step.
      options: of the recipe.
    """

    def __init__(self, layout=None, axis_name=None, microbatches=None, **options):
        self.layout, self.microbatches = layout, microbatches
        self.axis_name = axis_name
        self.rule, self.tx = rule(**options), transformation()
        net = LinenNet(layout, axis_name)
        self.model = mpjax.linen.MixedPrecision(net, self.rule)

    def mesh_of_create(self, mesh):
        """The mesh around `create`: Flax's boxes assert on one of explicit axes."""
        return jax.sharding.Mesh(mesh.devices, mesh.axis_names)

    def create(self):
        """The state before the first step."""
        x = jnp.zeros((ROWS, FEATURES))
        variables = self.model.init(jax.random.key(0), x)
        ema = jax.tree.map(jnp.copy, variables["params"])
        return mpjax.TrainState.create(
            apply_fn=self.model.apply, tx=self.tx, ema=ema, **variables
        )

    def specs(self, shapes):
        """The PartitionSpec of each array of a state."""
        return nn.get_partition_spec(shapes)

    def step(self, state, x, y):
        """The state after a step, and the loss."""

        def loss_fn(variables, stats, x, y):
            variables = {**variables, "batch_stats": stats}
            out, new = state.apply_fn(variables, x, mutable=["batch_stats"])
            return squared(out, y), (new["batch_stats"], ())

        if self.microbatches is not None:
            loss_fn = mpjax.accumulate_gradients(
                loss_fn, self.microbatches, carry_argnum=1
            )
        grad_fn = mpjax.value_and_grad(
            loss_fn, state, has_aux=True, axis_name=self.axis_name
        )
        (loss, (stats, _)), grads = grad_fn(state.variables, state.batch_stats, x, y)

        def ema(params):
            return optax.incremental_update(params, state.ema, 0.25)

        return state.apply_gradients(grads=grads, batch_stats=stats, ema=ema), loss

    def decisions(self, state):
        """The loss scale, whether the last step was made, steps made."""
        return state.loss_scale, state.last_step_finite, state.step

    def params(self, state):
        """Parameters, statistics and averages, as a list of arrays."""
        return jax.tree.leaves((state.params, state.batch_stats, state.ema))

    def history(self, state):
        """The amaxes of the Dense layer."""
        return state.scaling["Dense_0"]["kernel_scaling"].history


class NnxNet(nnx.Module):
    def __init__(self, layout, axis_name, rngs):
        inits = [nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()]
        if layout is not None:
            pairs = zip(inits, layout, strict=True)
            inits = [nnx.with_partitioning(init, names) for init, names in pairs]
        options = {"kernel_init": inits[0], "bias_init": inits[1]}
        self.norm = nnx.BatchNorm(
            FEATURES, momentum=0.5, axis_name=axis_name, rngs=rngs
        )
        self.dense = nnx.Linear(FEATURES, OUTPUTS, **options, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(x))


class NnxProgram:
    """`mpjax.nnx.Optimizer`; see `LinenProgram`."""

    def __init__(self, layout=None, axis_name=None, microbatches=None, **options):
        self.layout, self.microbatches = layout, microbatches
        self.axis_name = axis_name
        self.rule, self.tx = rule(**options), transformation()
        self.graph: Any = None

    def mesh_of_create(self, mesh):
        return mesh

    def create(self):
        net = NnxNet(self.layout, self.axis_name, nnx.Rngs(0))
        model = mpjax.nnx.mixed_precision(net, self.rule)
        ema = nnx.clone(model)
        optimizer = mpjax.nnx.Optimizer(model, self.tx)
        self.graph, state = nnx.split((model, optimizer, ema))
        return state

    def specs(self, shapes):
        return nnx.get_partition_spec(shapes)

    def step(self, state, x, y):
        model, optimizer, ema = nnx.merge(self.graph, state)

        def loss_fn(model, x, y):
            return squared(model(x), y)

        if self.microbatches is not None:
            loss_fn = mpjax.accumulate_gradients(loss_fn, self.microbatches)
        grad_fn = mpjax.nnx.value_and_grad(loss_fn, optimizer, axis_name=self.axis_name)
        loss, grads = grad_fn(model, x, y)
        optimizer.update(model, grads)
        with optimizer.if_applied(ema):
            new, old = nnx.state(model, nnx.Param), nnx.state(ema, nnx.Param)
            nnx.update(ema, optax.incremental_update(new, old, 0.25))
        return nnx.state((model, optimizer, ema)), loss

    def _merged(self, state):
        return nnx.merge(self.graph, state)

    def decisions(self, state):
        _, optimizer, _ = self._merged(state)
        return optimizer.loss_scale, optimizer.last_step_finite, optimizer.step[...]

    def params(self, state):
        model, _, ema = self._merged(state)
        kinds = nnx.Any(nnx.Param, nnx.BatchStat)
        return jax.tree.leaves((nnx.state(model, kinds), nnx.state(ema, nnx.Param)))

    def history(self, state):
        model, _, _ = self._merged(state)
        return model.dense.kernel_scaling.get_value().history


PROGRAMS = {"linen": LinenProgram, "nnx": NnxProgram}


def run(program, step, state, put=lambda x: x):
    """The decisions of a run, a row for each step, and the state after it."""
    decisions = []
    for x, y in batches():
        state, _ = step(state, put(x), put(y))
        decisions.append([np.asarray(x) for x in program.decisions(state)])
    return np.array(decisions, np.float32), state


@functools.cache
def on_one_device(front_end, microbatches=None, calibrated=False):
    """What a run on one device decides, and its arrays before and after it."""
    program = PROGRAMS[front_end](microbatches=microbatches, calibrated=calibrated)
    state = jax.jit(program.create)()
    before = [np.asarray(x) for x in program.params(state)]
    decisions, state = run(program, jax.jit(program.step), state)
    np.testing.assert_array_equal(decisions, np.stack([SCALES, FINITE, STEPS], 1))
    after = [np.asarray(x) for x in program.params(state)]
    return decisions, before, after, np.asarray(program.history(state))


def assert_same_run(expected, program, decisions, state, rounding):
    """The decisions of a run on one device, and its parameters within rounding.

    Args:
      expected: of `on_one_device`.
      program: that has run.
      decisions: of the run.
      state: after it.
      rounding: largest difference, relative to how far an array has come.
    """
    decided, before, after, history = expected
    np.testing.assert_array_equal(decisions, decided)
    for x, old, new in zip(program.params(state), before, after, strict=True):
        distance = np.linalg.norm(new - old)
        assert distance > 0
        assert np.linalg.norm(np.asarray(x) - new) <= rounding * distance
    # Amaxes are of rounded values, and numbers in between are divided by other scales.
    np.testing.assert_allclose(
        program.history(state), history, rtol=max(rounding, 1e-3)
    )
