"""A training step by the classes, against the same step by hand, and by plain Flax.

    python benchmarks/training_step.py                  # CPU and tpu7x
    python benchmarks/training_step.py --targets cpu --rounds 60
    python benchmarks/training_step.py --targets tpu7x --only NNX

Three loops in Linen: Flax's `TrainState` in float32, README's three lines, and
`mpjax.TrainState`. Two more, of a model with batch statistics whose parameters are
averaged; by hand these are kept by `select_tree`. In NNX, `value_and_grad` of what
`nnx.split` returns, `mpjax.nnx.Optimizer`, and Flax's optimizer in float32. Lines are
those of the loop, without those of the loss. On the CPU steps are timed in turn, and a
figure is the median over rounds of the ratio to the base; other targets compile ahead
of time (see _aot.py). "check_training" is a call of it between steps.
"""

import argparse
import functools
import inspect
import statistics
import time

import _aot  # first: it sets what jax reads when imported
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

import mpjax
import mpjax.linen
import mpjax.nnx

WIDTH, LAYERS, ROWS = 512, 4, 256
X = jnp.ones((ROWS, WIDTH))
INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
TX = mpjax.dynamic_loss_scaling(INNER)
POLICY = "mixed_float16"


class Mlp(nn.Module):
    statistics: bool = False

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            y = nn.relu(nn.Dense(4 * WIDTH)(x))
            if self.statistics:
                y = nn.BatchNorm(use_running_average=False)(y)
            x = x + nn.Dense(WIDTH)(y)
        return x


class NnxMlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        widths = WIDTH, 4 * WIDTH
        self.up = nnx.List(nnx.Linear(*widths, rngs=rngs) for _ in range(LAYERS))
        self.down = nnx.List(
            nnx.Linear(*widths[::-1], rngs=rngs) for _ in range(LAYERS)
        )

    def __call__(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nnx.relu(up(x)))
        return x


def loss_of(y):
    return jnp.mean((y - 0.5) ** 2)


PLAIN, MIXED = Mlp(), mpjax.linen.MixedPrecision(Mlp(), POLICY)
WITH_STATISTICS = mpjax.linen.MixedPrecision(Mlp(statistics=True), POLICY)


def of_params(params, x):
    return loss_of(MIXED.apply({"params": params}, x))


def of_plain(params, x):
    return loss_of(PLAIN.apply({"params": params}, x))


def of_variables(variables, x):
    return loss_of(MIXED.apply(variables, x))


def of_model(model, x):
    return loss_of(model(x))


def with_statistics(params, stats, x):
    variables = {"params": params, "batch_stats": stats}
    y, new = WITH_STATISTICS.apply(variables, x, mutable=["batch_stats"])
    return loss_of(y), new["batch_stats"]


# The loops. Their lines are counted.


def flax_step(state, x):
    loss, grads = jax.value_and_grad(of_plain)(state.params, x)
    return state.apply_gradients(grads=grads), loss


def readme_step(params, opt_state, x):
    loss, grads = mpjax.value_and_grad(of_params, opt_state)(params, x)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def mpjax_step(state, x):
    loss, grads = mpjax.value_and_grad(of_params, state)(state.params, x)
    return state.apply_gradients(grads=grads), loss


def by_hand_step(params, opt_state, stats, ema, step, x):
    grad_fn = mpjax.value_and_grad(with_statistics, opt_state, has_aux=True)
    (loss, new_stats), grads = grad_fn(params, stats, x)
    updates, opt_state = TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    new_ema = optax.incremental_update(params, ema, 0.01)
    made = mpjax.last_step_finite(opt_state)
    stats = mpjax.select_tree(made, new_stats, stats)
    ema = mpjax.select_tree(made, new_ema, ema)
    step = jnp.where(made, step + 1, step)
    return params, opt_state, stats, ema, step, loss


def mpjax_statistics_step(state, x):
    grad_fn = mpjax.value_and_grad(with_statistics, state, has_aux=True)
    (loss, stats), grads = grad_fn(state.params, state.batch_stats, x)
    return state.apply_gradients(
        grads=grads,
        batch_stats=stats,
        ema=lambda params: optax.incremental_update(params, state.ema, 0.01),
    ), loss


def flax_nnx_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(of_model)(model, x)
    optimizer.update(model, grads)
    return loss


def mpjax_nnx_step(model, optimizer, x):
    loss, grads = mpjax.nnx.value_and_grad(of_model, optimizer)(model, x)
    optimizer.update(model, grads)
    return loss


def nnx_by_hand_step(graph, params, opt_state, x):
    def loss_fn(params, x):
        return loss_of(nnx.merge(graph, params)(x))

    loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params, x)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def lines(function):
    """Lines of the body of a function."""
    return len(inspect.getsource(function).strip().splitlines()) - 1


def functional(step, model, optimizer):
    """A step of NNX as a function of arrays, for compilers."""
    graph, state = nnx.split((model, optimizer))

    def run(state, x):
        model, optimizer = nnx.merge(graph, state)
        loss = step(model, optimizer, x)
        return nnx.state((model, optimizer)), loss

    return run, (state, X)


def cases():
    """Groups of loops: the first of each is what the others are compared with."""
    params = jax.jit(MIXED.init)(jax.random.key(0), X)["params"]
    variables = jax.jit(WITH_STATISTICS.init)(jax.random.key(0), X)
    stats = variables["batch_stats"]
    create = mpjax.TrainState.create

    def mixed():
        return mpjax.nnx.mixed_precision(NnxMlp(), POLICY)

    graph, arrays = nnx.split(mixed())
    arrays, other, bare = nnx.as_pure(arrays), mixed(), NnxMlp()
    flax = train_state.TrainState.create(apply_fn=PLAIN.apply, params=params, tx=INNER)
    state = create(apply_fn=MIXED.apply, params=params, tx=TX)
    with_all = create(
        apply_fn=WITH_STATISTICS.apply, tx=TX, ema=variables["params"], **variables
    )
    by_hand = variables["params"], TX.init(variables["params"]), stats
    by_hand = *by_hand, variables["params"], jnp.zeros((), jnp.int32), X
    return {
        "Linen": {
            "README": (readme_step, readme_step, (params, TX.init(params), X)),
            "mpjax.TrainState": (mpjax_step, mpjax_step, (state, X)),
            "Flax, float32": (flax_step, flax_step, (flax, X)),
        },
        "Linen, batch statistics and average": {
            "by hand": (by_hand_step, by_hand_step, by_hand),
            "mpjax.TrainState": (
                mpjax_statistics_step,
                mpjax_statistics_step,
                (with_all, X),
            ),
        },
        "NNX": {
            "value_and_grad, of nnx.split": (
                nnx_by_hand_step,
                functools.partial(nnx_by_hand_step, graph),
                (arrays, TX.init(arrays), X),
            ),
            "mpjax.nnx.Optimizer": (
                mpjax_nnx_step,
                *functional(mpjax_nnx_step, other, mpjax.nnx.Optimizer(other, TX)),
            ),
            "Flax, float32": (
                flax_nnx_step,
                *functional(
                    flax_nnx_step, bare, nnx.Optimizer(bare, INNER, wrt=nnx.Param)
                ),
            ),
        },
    }


def seconds(compiled, args):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start


def timed(group, rounds):
    """Medians of ratios to the first, and the seconds of that."""
    programs = {
        name: (jax.jit(run).lower(*args).compile(), args)
        for name, (_, run, args) in group.items()
    }
    table = [
        {name: seconds(*program) for name, program in programs.items()}
        for _ in range(rounds + 2)
    ][2:]
    base = next(iter(programs))
    return {
        name: statistics.median(row[name] / row[base] for row in table)
        for name in programs
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="*", default=["cpu", "tpu7x"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="words of a group of loops")
    args = parser.parse_args()
    print("| loop | | lines | " + " | ".join(args.targets) + " |")
    print("|---|---|---" + "|---" * len(args.targets) + "|")
    for title, group in cases().items():
        if args.only not in title:
            continue
        columns = []
        for target in args.targets:
            if target == "cpu":
                columns.append(timed(group, args.rounds))
                continue
            cycles = {
                name: _aot.compile_for(target, run, *given).cycles
                for name, (_, run, given) in group.items()
            }
            base = next(iter(cycles.values()))
            columns.append({name: n / base for name, n in cycles.items()})
        for name, (loop, _, _) in group.items():
            figures = " | ".join(f"{column[name]:.3f}" for column in columns)
            print(f"| {title} | {name} | {lines(loop)} | {figures} |", flush=True)
    state = cases()["Linen"]["mpjax.TrainState"][2][0]
    mpjax.check_training(state)
    start = time.perf_counter()
    mpjax.check_training(state)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    took = 1000 * (time.perf_counter() - start)
    print(f"\ncheck_training of {count / 1e6:.1f} M parameters: {took:.1f} ms")


if __name__ == "__main__":
    main()
