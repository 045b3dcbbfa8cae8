"""What the update of an optimizer costs by how its state is stored.

    python benchmarks/optimizer_states.py                  # a weight of 8192 x 2048
    python benchmarks/optimizer_states.py --targets tpu7x h100 cpu
    python benchmarks/optimizer_states.py --time           # on this CPU, 1024 x 2048

AdamW alone, with its arguments donated, compiled ahead of time: bytes of training state
a parameter, bytes that the program reads and writes a parameter, estimated cycles for
1024 parameters on a TPU, and the ratio to float32. With ``--time`` the schemes run in
turn on this CPU, in one thread if ``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false``: the
median over rounds of processor time to that of float32, which others that use the
machine disturb less than the time of a clock.
"""

import argparse
import functools
import statistics
import time

import _aot  # first: it sets what jax reads when imported
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import mpjax

SHAPE = 8192, 2048


def schemes():
    """Optimizers by name, with the dtypes of parameters and gradients."""
    adamw = optax.adamw(1e-3)
    states = mpjax.low_precision_state
    params = mpjax.low_precision_params
    f32, bf16 = jnp.float32, jnp.bfloat16
    yield "float32", adamw, f32, f32
    yield "float32, bfloat16 moments", states(adamw, "bfloat16"), f32, f32
    yield "float32, bfloat16 moments", states(adamw, "bfloat16"), f32, bf16
    yield "float32, 8-bit moments", states(adamw, "8bit"), f32, f32
    yield "float32, 8-bit moments", states(adamw, "8bit"), f32, bf16
    for method in "float32", "split", "kahan", "stochastic":
        yield method, params(adamw, method), bf16, bf16
        for formats in "bfloat16", "8bit":
            name = f"{method}, {formats} moments"
            yield name, params(states(adamw, formats), method), bf16, bf16


def held(tree):
    """Bytes of a parameter."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in leaves) / (SHAPE[0] * SHAPE[1])


def times(only: str, rounds: int) -> None:
    """Prints processor time to that of float32, on this CPU."""
    shape = 1024, 2048
    runs = {}
    for name, tx, dtype, grad_dtype in schemes():
        if runs and only not in name:
            continue
        name = f"{name}, {jnp.dtype(grad_dtype).name} gradient"
        params = jnp.ones(shape, dtype)
        grads = jax.random.normal(jax.random.key(0), shape).astype(grad_dtype)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return mpjax.apply_updates(params, updates), state

        args = update(params, jax.jit(tx.init)(params), grads)
        runs[name] = [update, jax.block_until_ready(args), grads]
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run[1] = jax.block_until_ready(run[0](*run[1], run[2]))
            spent[name].append(time.process_time() - start)
    base, *_ = spent.values()
    table = Table("parameters", "ns", "to float32", title="AdamW on this CPU")
    for name, seconds in spent.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        nanoseconds = statistics.median(seconds) / (shape[0] * shape[1]) * 1e9
        table.add_row(name, f"{nanoseconds:.2f}", f"{ratio:.2f}")
    Console().print(table)


def main():
    """Prints a table for each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["tpu7x"])
    parser.add_argument("--only", default="", help="schemes with this in their name")
    parser.add_argument("--time", action="store_true", help="run on this CPU")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    if args.time:
        times(args.only, args.rounds)
        return
    count = SHAPE[0] * SHAPE[1]
    for target in args.targets:
        reason = _aot.missing(target) if target != "cpu" else None
        if reason:
            print(reason)
            continue
        table = Table(title=f"AdamW on {target}, a weight of {SHAPE[0]} x {SHAPE[1]}")
        columns = (
            "gradient",
            "state, B",
            "moved, B",
            "cycles / 1024",
            "to float32",
            "compile, s",
        )
        for column in ("parameters", *columns):
            table.add_column(column)
        base = None
        for name, tx, dtype, grad_dtype in schemes():
            if base is not None and args.only not in name:
                continue
            weight = jax.ShapeDtypeStruct(SHAPE, dtype)
            grads = jax.ShapeDtypeStruct(SHAPE, grad_dtype)
            state = jax.eval_shape(tx.init, weight)

            def update(params, state, grads, tx=tx):
                updates, state = tx.update(grads, state, params)
                return mpjax.apply_updates(params, updates), state

            start = time.perf_counter()
            made = _aot.compile_for(
                target, update, weight, state, grads, donate_argnums=(0, 1)
            )
            seconds = time.perf_counter() - start
            cost = made.cycles or made.bytes
            base = base or cost
            table.add_row(
                name,
                jnp.dtype(grad_dtype).name,
                f"{held((weight, state)):.2f}",
                f"{made.bytes / count:.1f}",
                f"{made.cycles / count * 1024:.2f}" if made.cycles else "",
                f"{cost / base:.3f}",
                f"{seconds:.0f}",
            )
        Console().print(table)


if __name__ == "__main__":
    main()
