"""Trains a small transformer on Python's documentation, in 8, 16 and 32 bits.

    python examples/train_lm.py --policy mixed_float16 --steps 1000
    python examples/train_lm.py --policy mixed_bfloat16 mixed_float8 --recipe delayed mx
    python examples/train_lm.py --policy --optimizer-state 8bit split-8bit

Mixed precision takes the lines of `train` that mention mpjax, whatever the policy and
the recipe. The model is an ordinary Flax model, the optimizer an
ordinary optax optimizer. A float32 run from the same seed, with the same batches in the
same order, stands beside the others.
"""

import argparse
import dataclasses
import functools
import pathlib
import pydoc_data.topics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.linen

RECIPES = {
    "current": mpjax.current_scaling(),
    "delayed": mpjax.delayed_scaling(history_length=16),
    "per_channel": mpjax.per_channel_scaling(),
    "block": mpjax.block_scaling(),
    "mx": mpjax.mx_scaling(),
}
# Moments in few bits, and parameters in bfloat16 as well.
STATES = {
    "bfloat16": lambda tx: mpjax.low_precision_state(tx, "bfloat16"),
    "8bit": lambda tx: mpjax.low_precision_state(tx, "8bit"),
    "split-8bit": lambda tx: mpjax.low_precision_params(STATES["8bit"](tx), "split"),
    "kahan-8bit": lambda tx: mpjax.low_precision_params(STATES["8bit"](tx), "kahan"),
    "stochastic-8bit": lambda tx: mpjax.low_precision_params(
        STATES["8bit"](tx), "stochastic"
    ),
}
BATCH, LENGTH = 16, 64
SMOOTH = 50  # steps over which the losses of the plot and of the table are averaged


class Block(nn.Module):
    """Attention, then a perceptron, each added to what came in."""

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


class Transformer(nn.Module):
    """Predicts the next byte of a text. It knows nothing of mixed precision."""

    width: int = 128
    depth: int = 3

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(256, self.width)
        shape = 1, LENGTH, self.width
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = embed(tokens) + positions
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            x = Block()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


@dataclasses.dataclass
class Run:
    """What a training run leaves for the table and the plot, each a number a step."""

    name: str
    losses: list[float] = dataclasses.field(default_factory=list)
    scales: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    skipped: int = 0
    bytes: float = 0.0  # of parameters and the optimizer's state, a parameter

    @property
    def final_loss(self):
        """The mean of the last losses."""
        return np.mean(self.losses[-SMOOTH:])


def train(name: str, rules, steps: int, seed: int, state: str | None = None) -> Run:
    """Trains from scratch under a policy or rules, with a state of `STATES`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95)
    )

    # The lines; two are in `train_step`. Only float16 needs the loss scale, and the
    # others do not mind: multiplying by a power of two is exact. It may grow every 50
    # steps, where 2000 are usual, for the plot to show what it does. A recipe with a
    # state has it in the variables.
    model = mpjax.linen.MixedPrecision(Transformer(), rules)
    optimizer = STATES[state](optimizer) if state else optimizer
    optimizer = mpjax.dynamic_loss_scaling(optimizer, growth_interval=50)
    optimizer = mpjax.scaled(optimizer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(variables, opt_state, tokens):
        def loss_fn(variables):
            logits: Any = model.apply(variables, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(variables)
        updates, opt_state = optimizer.update(grads, opt_state, variables)
        return mpjax.apply_updates(variables, updates), opt_state, loss

    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    variables = model.init(jax.random.key(seed), tokens)
    opt_state = optimizer.init(variables)
    run = Run(name)
    params = jax.tree.leaves(variables["params"])
    held = sum(x.nbytes for x in jax.tree.leaves((variables, opt_state)))
    run.bytes = held / sum(x.size for x in params)
    progress = tqdm.tqdm(batches(steps, seed), name, steps)
    for tokens in progress:
        start = time.perf_counter()
        run.scales.append(float(mpjax.loss_scale(opt_state)))
        variables, opt_state, loss = train_step(variables, opt_state, tokens)
        run.losses.append(float(loss))
        run.seconds.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{loss:.3f}", scale=f"{run.scales[-1]:g}")
    run.skipped = int(mpjax.skipped_steps(opt_state))
    return run


def batches(steps: int, seed: int):
    """Random pieces of the text, int32[BATCH, LENGTH + 1], a byte a token."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(len(tokens) - LENGTH, size=(BATCH, 1))
        yield tokens[starts + np.arange(LENGTH + 1)]


def table(runs: list[Run]) -> Table:
    """The runs, compared with those in float32 and in bfloat16."""
    bases = [run for run in runs if run.name in ("float32", "mixed_bfloat16")]
    result = Table(title=f"Mean loss of the last {SMOOTH} steps, nats a byte")
    result.add_column("policy", overflow="fold")
    short = {"float32": "to f32", "mixed_bfloat16": "to bf16"}
    comparisons = [short[base.name] for base in bases]
    sizes = ["bytes"] if len({run.bytes for run in runs}) > 1 else []
    for column in "loss", *comparisons, *sizes, "tokens/s", "skipped", "scale":
        result.add_column(column, no_wrap=True)
    for run in runs:
        result.add_row(
            run.name,
            f"{run.final_loss:.4f}",
            *(f"{run.final_loss / base.final_loss - 1:+.2%}" for base in bases),
            *(f"{run.bytes:.2f}" for _ in sizes),
            f"{BATCH * LENGTH / np.median(run.seconds):,.0f}",
            f"{run.skipped}",
            f"2**{np.log2(run.scales[-1]):g}",
        )
    return result


def plot(runs: list[Run], path: str) -> None:
    """Draws loss and loss scale against the step."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for index, run in enumerate(runs):
        window = min(SMOOTH, len(run.losses))
        smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
        style = {"label": run.name, "linewidth": 1.5 if index else 5, "alpha": 0.7}
        top.plot(np.arange(len(smooth)) + window, smooth, **style)
        bottom.step(range(1, len(run.scales) + 1), run.scales, where="post", **style)
    top.set(ylabel=f"loss, mean of {SMOOTH} steps", title="Python's documentation")
    top.legend()
    bottom.set(ylabel="loss scale", xlabel="step")
    bottom.set_yscale("log", base=2)
    figure.savefig(path, dpi=150)


def main(args=None) -> list[Run]:
    """Trains under the policies asked for, and in float32."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--policy",
        nargs="*",
        default=["mixed_bfloat16", "mixed_float16"],
        help="one or more policies, as mixed_float8 or p=f32,c=bf16,o=f32",
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=RECIPES,
        default=["current"],
        help="how mixed_float8 scales; a run for each",
    )
    parser.add_argument(
        "--optimizer-state",
        nargs="+",
        choices=STATES,
        default=[],
        help="moments in few bits, and parameters in bfloat16; a run for each",
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="train_lm.png", help="where the plot goes")
    args = parser.parse_args(args)
    if args.steps < 1:
        parser.error(f"--steps is at least 1, got {args.steps}")
    pathlib.Path(args.plot).touch()  # rather than to fail when all is done
    every: dict[str, str | mpjax.Rule] = {"float32": "float32"}
    for policy in args.policy:
        if policy == "mixed_float8":
            for recipe in args.recipe:
                every[f"{policy} {recipe}"] = mpjax.Rule(".*", policy, RECIPES[recipe])
        else:
            mpjax.get_policy(policy)  # a misspelled one raises here, not later
            every[policy] = policy

    states = {}
    for state in args.optimizer_state:
        params = "f32" if state in ("bfloat16", "8bit") else "bf16"
        every[state] = f"p={params},c=bf16,o=f32"
        states[state] = state

    model = mpjax.linen.MixedPrecision(Transformer(), [*every.values()][-1])
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    print(mpjax.linen.tabulate(model, jax.random.key(0), tokens))

    runs = [
        train(name, rules, args.steps, args.seed, states.get(name))
        for name, rules in every.items()
    ]
    Console().print(table(runs))
    plot(runs, args.plot)
    print(f"Plot of loss and loss scale: {args.plot}")
    return runs


if __name__ == "__main__":
    main()
