"""The peak memory of a train step by how parameters and the optimizer's state are kept.

    python benchmarks/optimizer_memory.py                       # tpu7x
    python benchmarks/optimizer_memory.py --targets tpu7x h100 cpu

A transformer of 100 million parameters, with its layers stacked and given as shapes,
computes in bfloat16 on 64 tokens, so that the training state is what counts. A step has
the loss, the gradient, AdamW and new parameters, and its arguments are donated.
Compiled ahead of time; what the compiler plans is bytes a parameter: arguments, which
the results take the place of, and temporary memory beside, which holds the gradient.
"update" is the optimizer alone, with the gradient among the arguments.
"""

import argparse
import re
from typing import Any

import _aot  # first: it sets what jax reads when imported
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.optimizers

WIDTH, DEPTH, HEADS, VOCABULARY, LENGTH = 768, 12, 12, 20480, 64
SHAPES = {
    "embed": (VOCABULARY, WIDTH),
    "layers": {
        "qkv": (DEPTH, WIDTH, 3 * WIDTH),
        "out": (DEPTH, WIDTH, WIDTH),
        "up": (DEPTH, WIDTH, 4 * WIDTH),
        "down": (DEPTH, 4 * WIDTH, WIDTH),
    },
}


def schemes():
    """The dtype of parameters and the optimizer, by name."""
    adamw = optax.adamw(1e-3)
    states, params = mpjax.low_precision_state, mpjax.low_precision_params
    f32, bf16 = jnp.float32, jnp.bfloat16
    yield "float32", f32, adamw
    yield "float32, 8bit", f32, states(adamw)
    yield "split, 8bit", bf16, params(states(adamw), "split")
    yield "stochastic, 8bit", bf16, params(states(adamw), "stochastic")
    fused = mpjax.optimizers.fused
    yield "float32, 8bit, one pass", f32, fused(states(adamw))
    for method in "split", "stochastic":
        yield f"{method}, 8bit, one pass", bf16, fused(params(states(adamw), method))


def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of a pre-norm transformer without scales, in bfloat16."""

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def layer(x, weights):
        weights = mpjax.cast_floating(weights, jnp.bfloat16)
        heads = (norm(x) @ weights["qkv"]).reshape(LENGTH, 3, HEADS, -1)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(heads, 1, 0), is_causal=True)
        x = x + y.reshape(LENGTH, WIDTH) @ weights["out"]
        hidden = jax.nn.relu(norm(x) @ weights["up"])
        return x + hidden @ weights["down"], None

    embed = params["embed"].astype(jnp.bfloat16)
    x, _ = jax.lax.scan(layer, embed[tokens[:-1]], params["layers"])
    logits = (norm(x) @ embed.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()


def programs(dtype: Any, tx: Any):
    """Functions with their last argument, and the shapes of the first two."""
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    state = jax.eval_shape(tx.init, params)
    tokens = jax.ShapeDtypeStruct((LENGTH + 1,), jnp.int32)

    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state

    def step(params, state, tokens):
        return update(params, state, jax.grad(loss_of)(params, tokens))

    return {"update": (update, params), "step": (step, tokens)}, params, state


def main() -> None:
    """Prints a table for each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["tpu7x"])
    parser.add_argument("--only", default="", help="programs: update or step")
    parser.add_argument("--schemes", default="", help="a regular expression of schemes")
    args = parser.parse_args()
    for target in args.targets:
        reason = _aot.missing(target) if target != "cpu" else None
        if reason:
            print(reason)
            continue
        table = Table(title=f"AdamW on {target}, bytes a parameter")
        columns = "program", "state", "temporary", "peak", "to float32"
        for column in ("parameters, moments", *columns):
            table.add_column(column)
        bases: dict[str, float] = {}
        for name, dtype, tx in schemes():
            is_tpu = target.startswith(("v", "tpu"))
            if not re.search(args.schemes, name) or ("pass" in name and not is_tpu):
                continue
            found, params, state = programs(dtype, tx)
            count = sum(x.size for x in jax.tree.leaves(params))
            held = sum(
                x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state))
            )
            for kind, (fn, last) in found.items():
                if args.only not in kind:
                    continue
                donated = (0, 1, 2) if kind == "update" else (0, 1)
                made = _aot.compile_for(
                    target, fn, params, state, last, donate_argnums=donated
                )
                base = bases.setdefault(kind, made.peak)
                table.add_row(
                    name,
                    kind,
                    f"{held / count:.2f}",
                    f"{made.memory['temp'] / count:.2f}",
                    f"{made.peak / count:.2f}",
                    f"{made.peak / base:.3f}",
                )
                print(target, name, kind, f"{made.peak / count:.2f}", flush=True)
        Console().print(table)


if __name__ == "__main__":
    main()
