"""What the update of an optimizer costs by how its state is stored.

    python benchmarks/optimizer_states.py                  # a weight of 8192 x 2048
    python benchmarks/optimizer_states.py --targets tpu7x h100 cpu

AdamW alone, with its arguments donated, compiled ahead of time: bytes of training state
a parameter, bytes that the program reads and writes a parameter, estimated cycles for
1024 parameters on a TPU, temporary memory, and the ratios to float32.
"""

import argparse
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


def main():
    """Prints a table for each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["tpu7x"])
    parser.add_argument("--only", default="", help="schemes with this in their name")
    args = parser.parse_args()
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
