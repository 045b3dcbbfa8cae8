r"""Training with random faults, against the run in which those steps were never taken.

    python benchmarks/fault_schedules.py --schedules 100000
    python benchmarks/fault_schedules.py --schedules 2000 --front-ends nnx --devices 8

A schedule is a run of some steps, of which each has a fault or none: a NaN, an infinity
or a number that overflows, in an input, an activation or the gradient of a parameter,
in one microbatch of two and, with several devices, on one of them. Or in all, as a
number that overflows only in the sum. A model with batch statistics in float16 and fp8,
delayed scaling, kept weights, two microbatches, Adam, dynamic or static loss scaling
and an average of the parameters is trained with all schedules at once: a scan over
steps, a vmap over schedules.

Every schedule is then run again by the same compiled program, clean and without the
steps that were skipped. Parameters, moments, batch statistics, average, counter of
steps, histories, scales and kept weights have to be equal bit for bit, and finite. What
may differ is the state of the loss scale itself: the scale, and the counts of steps
that were skipped and were not. A dynamic scale falls with every overflow, so that the
second run is given the scales that the first one had; scales of gradients are compared
for a loss scale of 1.
"""

import argparse
import functools
import os
import time
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import mpjax
import mpjax.linen
import mpjax.nnx

# Where a fault is, what it adds, and whether to all microbatches of all devices.
# Numbers of gradients are in units of the loss scale, but for 2**127.
FAULTS = {
    "none": ("input", 0.0, False),
    **{
        f"{place}, {name}": (place, value, False)
        for place in ("input", "activation", "gradient", "gradient of activation")
        for name, value in (("NaN", np.nan), ("+inf", np.inf), ("-inf", -np.inf))
    },
    "input, above float16": ("input", 1e5, False),
    "activation, above float16": ("activation", 6e4, False),
    "gradient, above float16": ("gradient of activation", 1e5, False),
    "gradient, overflows when unscaled": ("unscaled", 2.0**127, False),
    "gradient, overflows in the sum of microbatches": ("gradient", 1.5e19, True),
    "gradient, overflows in the sum of devices": ("gradient", 0.7e19, True),
}
NAMES = [*FAULTS]
PLACES = ("input", "activation", "gradient", "gradient of activation", "unscaled")
MICROBATCHES, ROWS, WIDTH = 2, 3, 8  # rows of a microbatch on a device
RULE = mpjax.Rule(
    ".*", "mixed_float16", mpjax.delayed_scaling(history_length=2, keep_weights=True)
)


def optimizer(loss_scale):
    inner = optax.adam(1e-2)
    if loss_scale == "dynamic":
        return mpjax.dynamic_loss_scaling(inner, init_scale=2.0**6, growth_interval=3)
    return mpjax.static_loss_scaling(inner, loss_scale)


@jax.custom_vjp
def hurt(x, fault):
    """The same, whose gradient has a fault added."""
    return x


hurt.defvjp(
    lambda x, fault: (x, fault),
    lambda fault, grad: (grad + fault.astype(grad.dtype), jnp.zeros_like(fault)),
)


def hurt_parameter(x, fault, axis_name):
    """Of one device, of which all have a part of the gradient."""
    if axis_name is not None:
        x = jax.lax.pcast(x, axis_name, to="varying")
    return hurt(x, fault)


def faulty(x, faults):
    """An activation with faults of its rows, which float16 may overflow by."""
    act = faults["activation"].astype(x.dtype)[:, None]
    return hurt(x + act + act, faults["gradient of activation"][:, None])


class LinenNet(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, faults):
        x = faulty(nn.Dense(WIDTH)(x), faults)
        norm = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)
        return nn.Dense(WIDTH)(nn.relu(norm(x)))


class NnxNet(nnx.Module):
    def __init__(self, axis_name):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, axis_name=axis_name, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, faults):
        x = faulty(self.up(x), faults)
        return self.down(nnx.relu(self.norm(x)))


def loss_of(y, axis_name):
    loss = jnp.mean((y.astype(jnp.float32) - 0.5) ** 2)
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def with_input_faults(x, faults):
    return x + faults["input"][:, None]


def linen(loss_scale, axis_name):
    """The first state, and a step of it."""
    model = mpjax.linen.MixedPrecision(LinenNet(axis_name), RULE)
    like = mpjax.linen.MixedPrecision(LinenNet(), RULE)
    x, faults = jnp.ones((ROWS, WIDTH)), no_faults(ROWS)
    variables = jax.jit(like.init)(jax.random.key(0), x, faults)
    state = mpjax.TrainState.create(
        apply_fn=model.apply,
        tx=optimizer(loss_scale),
        ema=variables["params"],
        **variables,
    )

    def step(state, x, faults):
        def loss_fn(variables, stats, x, faults):
            params = variables["params"]
            first = params["Dense_0"]
            bias = hurt_parameter(first["bias"], faults["gradient"][0], axis_name)
            first = {**first, "bias": bias}
            given = {**variables, "params": {**params, "Dense_0": first}}
            x = with_input_faults(x, faults)
            y, new = state.apply_fn(
                {**given, "batch_stats": stats}, x, faults, mutable=["batch_stats"]
            )
            return loss_of(y, axis_name), (new["batch_stats"], None)

        of_all = mpjax.accumulate_gradients(loss_fn, MICROBATCHES, carry_argnum=1)
        grad_fn = mpjax.value_and_grad(of_all, state, has_aux=True)
        (_, (stats, _)), grads = grad_fn(state.variables, state.batch_stats, x, faults)

        def ema(params):
            return optax.incremental_update(params, state.ema, 0.25)

        return state.apply_gradients(grads=grads, batch_stats=stats, ema=ema)

    return state, step


def flax_nnx(loss_scale, axis_name):
    model = mpjax.nnx.mixed_precision(NnxNet(axis_name), RULE)
    mpjax.nnx.keep_weights(model)
    average = nnx.clone(model)
    mpjax.nnx.drop_weights(average)
    tx = optimizer(loss_scale)
    graph, modules = nnx.split((model, average))

    def pure(modules, optimizer):
        opt_state = nnx.as_pure(optimizer.opt_state)
        return nnx.as_pure(modules), opt_state, optimizer.step[...]

    def step(state, x, faults):
        def loss_fn(model, x, faults):
            bias = model.up.bias
            fault = faults["gradient"][0]
            bias.set_value(hurt_parameter(bias.get_value(), fault, axis_name))
            return loss_of(model(with_input_faults(x, faults), faults), axis_name)

        arrays, opt_state, count = state
        model, average = nnx.merge(graph, arrays)
        optimizer = mpjax.nnx.Optimizer(model, tx)
        jax.tree.map(
            lambda variable, x: variable.set_value(x),
            optimizer.opt_state,
            opt_state,
            is_leaf=functools.partial(_is, nnx.Variable),
        )
        optimizer.step[...] = count
        of_all = mpjax.accumulate_gradients(loss_fn, MICROBATCHES)
        _, grads = mpjax.nnx.value_and_grad(of_all, optimizer)(model, x, faults)
        optimizer.update(model, grads)
        with optimizer.if_applied(average):
            new, old = nnx.state(model, nnx.Param), nnx.state(average, nnx.Param)
            nnx.update(average, optax.incremental_update(new, old, 0.25))
        return pure(nnx.state((model, average)), optimizer)

    return pure(modules, mpjax.nnx.Optimizer(model, tx)), step


FRONT_ENDS = {"linen": linen, "nnx": flax_nnx}


def no_faults(rows):
    of_rows = {place: jnp.zeros(rows) for place in PLACES[:4]}
    return of_rows | {"gradient": jnp.zeros(MICROBATCHES)}


def faults_of(kind, at, devices, loss_scale):
    """Faults of all rows and microbatches of all devices.

    Args:
      kind: int32[], of `NAMES`.
      at: int32[], a row.
      devices: how many there are.
      loss_scale: f32[].
    """
    places = [PLACES.index(place) for place, _, _ in FAULTS.values()]
    place = jnp.array(places)[kind]
    value = jnp.array([value for _, value, _ in FAULTS.values()], jnp.float32)[kind]
    everywhere = jnp.array([all_ for _, _, all_ in FAULTS.values()])[kind]
    rows, microbatches = MICROBATCHES * ROWS * devices, MICROBATCHES * devices

    def within(name, count, value):
        here = (jnp.arange(count) == at % count) | everywhere
        return jnp.where(here & (place == PLACES.index(name)), value, 0.0)

    faults = {name: within(name, rows, value) for name in ("input", "activation")}
    name = "gradient of activation"
    faults[name] = within(name, rows, value)
    of_sum = within("gradient", microbatches, value * loss_scale)
    faults["gradient"] = of_sum + within("unscaled", microbatches, value)
    return faults


def scaling_of(state):
    is_one = functools.partial(_is, mpjax.LossScalingState)
    (found,) = filter(is_one, jax.tree.leaves(state, is_leaf=is_one))
    return found


def _is(kind, node):
    return isinstance(node, kind)


def replaced(state, kind, fn):
    is_one = functools.partial(_is, kind)
    return jax.tree.map(lambda x: fn(x) if is_one(x) else x, state, is_leaf=is_one)


def compared(state):
    """What two runs have in common: all but the state of the loss scale."""
    state = replaced(state, mpjax.LossScalingState, lambda s: s.inner_state)
    return replaced(state, mpjax.ScalingState, lambda s: s.recipe.rescale(s, 1.0))


def batches(steps, devices):
    rows = MICROBATCHES * ROWS * devices
    numbers = np.random.default_rng(0).normal(size=(steps, rows, WIDTH))
    return jnp.asarray(numbers, jnp.float32)


def program(front_end, loss_scale, devices, steps):
    """The first state and a compiled run of many schedules.

    The run takes, of each schedule and step, ``kinds``, ``places``, whether the step is
    taken at all, and a loss scale, 0 for that which the state has; it returns the last
    states, and of each step whether it was made and its loss scale.
    """
    axis_name = None if devices == 1 else "data"
    first, step = FRONT_ENDS[front_end](loss_scale, axis_name)

    def local(faults):
        if axis_name is None:
            return faults
        index = jax.lax.axis_index(axis_name)
        return jax.tree.map(lambda x: x.reshape(devices, -1)[index], faults)

    def one(kinds, places, taken, scales, xs):
        def body(state, of_step):
            kind, at, take, scale, x = of_step
            scale = jnp.where(scale > 0, scale, scaling_of(state).scale)
            given = replaced(
                state, mpjax.LossScalingState, lambda s: s._replace(scale=scale)
            )
            faults = local(faults_of(kind, at, devices, scale))
            new = step(given, x, faults)
            state = mpjax.select_tree(take, new, state)
            return state, (scaling_of(new).last_finite, scale)

        return jax.lax.scan(body, first, (kinds, places, taken, scales, xs))

    many = jax.vmap(one, (0, 0, 0, 0, None))
    if devices > 1:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((devices,), ("data",), axis_types=auto)
        specs = (*[P()] * 4, P(None, "data"))
        many = jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=P())
    return first, jax.jit(many), batches(steps, devices)


def schedules(count, steps, devices, seed):
    """Random kinds of faults and their places, int32[count, steps] each."""
    rng = np.random.default_rng(seed)
    known = len(NAMES) - (devices == 1)  # the last is that of devices
    kinds = rng.integers(1, known, (count, steps), np.int32)
    rate = rng.uniform(0, 0.7, (count, 1))
    kinds = np.where(rng.uniform(size=(count, steps)) < rate, kinds, 0)
    places = rng.integers(0, 2**16, (count, steps), np.int32)
    return kinds, places


def check(run, xs, kinds, places):
    """Runs schedules twice; how many of each kind were there, and how many skipped.

    Raises:
      AssertionError: a state is not finite, or is not that of the run without the steps
        that were skipped; or a step with a fault was made, or one without skipped.
    """
    own = np.zeros(kinds.shape, np.float32)
    taken = np.ones(kinds.shape, bool)
    with jax.numpy_dtype_promotion("standard"):  # of optax
        state, (made, scales) = jax.device_get(run(kinds, places, taken, own, xs))
        clean = np.where(made, kinds, 0)
        never, _ = jax.device_get(run(clean, places, made, scales, xs))
    np.testing.assert_array_equal(made, kinds == 0)
    np.testing.assert_array_equal(
        scaling_of(state).total_notfinite, (~made).sum(axis=1)
    )
    actual, expected = (jax.device_get(compared(tree)) for tree in (state, never))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name
        assert np.isfinite(np.asarray(x, np.float32)).all(), name
    skipped = Counter(kinds[~made].tolist())
    return {
        NAMES[k]: (n, skipped[k]) for k, n in Counter(kinds.ravel().tolist()).items()
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--front-ends", nargs="+", default=[*FRONT_ENDS])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--loss-scales", nargs="+", default=["dynamic", 2.0**-2], type=_loss_scale
    )
    args = parser.parse_args()
    cases = [
        (front_end, loss_scale, devices)
        for front_end in args.front_ends
        for loss_scale in args.loss_scales
        for devices in args.devices
    ]
    total, counts = 0, Counter()
    for i, (front_end, loss_scale, devices) in enumerate(cases):
        _, run, xs = program(front_end, loss_scale, devices, args.steps)
        start, done = time.perf_counter(), 0
        of_case = args.schedules // len(cases) + (i < args.schedules % len(cases))
        while done < of_case:
            seed = args.seed + total + done
            kinds, places = schedules(args.chunk, args.steps, devices, seed)
            for name, (n, skipped) in check(run, xs, kinds, places).items():
                counts[name, "steps"] += n
                counts[name, "skipped"] += skipped
            done += args.chunk
        total += done
        seconds = time.perf_counter() - start
        print(
            f"{front_end}, loss scale {loss_scale}, {devices} devices: {done} "
            f"schedules of {args.steps} steps in {seconds:.0f} s, equal and finite",
            flush=True,
        )
    print("\n| fault | steps | skipped |\n|---|---|---|")
    for name in NAMES:
        print(f"| {name} | {counts[name, 'steps']} | {counts[name, 'skipped']} |")
    print(f"| {total} schedules | | |")


def _loss_scale(text):
    return text if text == "dynamic" else float(text)


if __name__ == "__main__":
    main()
