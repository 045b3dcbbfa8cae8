"""Shows what every target would run for a language model's train step.

    python examples/what_will_it_run.py --policy mixed_bfloat16 mixed_float8

No accelerator is needed: the step is compiled for each of them on this machine. The
compilers come with `pip install 'mpjax[lowering]'` on Linux x86-64. Nothing is trained
and no array is made; the model is given as shapes. It is small, and of few tokens:
passes over its weights cost more cycles than its products save in fp8.
`benchmarks/fp8.py` has a step where they do not.
"""

import argparse
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax
import tqdm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.linen
import mpjax.lowering

# The plugins that came with the compilers need not look for devices here.
jax.config.update("jax_platforms", "cpu")

TARGETS = ["cpu", "v4", "v5e", "v5p", "v6e", "v7x", "a100", "h100", "b200"]
BATCH, LENGTH, VOCABULARY = 16, 128, 1024
UNITS = ["float8", "bfloat16", "float16", "tf32", "float32"]


class Block(nn.Module):
    """Attention, then a perceptron, each added to what came in."""

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        x += nn.MultiHeadDotProductAttention(num_heads=8)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class Transformer(nn.Module):
    """Predicts the next token. Its layers are scanned: one is compiled."""

    width: int = 256
    depth: int = 12

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, self.width)
        shape = 1, LENGTH, self.width
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = embed(tokens) + positions
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.depth,
        )
        x, _ = blocks()(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x))


def train_step(policy: str, width: int):
    """A train step of the model under a policy, and the shapes of its arguments."""
    model = mpjax.linen.MixedPrecision(Transformer(width), policy)
    optimizer = optax.adamw(3e-4)

    def step(params, opt_state, tokens):
        def loss_fn(params):
            logits: Any = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    inputs = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    opt_state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)), (params, opt_state, tokens)


def shares(report: mpjax.lowering.Report) -> dict[str, float]:
    """The share of each kind of matrix unit in the operations."""
    result = dict.fromkeys(UNITS, 0.0)
    for unit, flops in report.flops_by_unit().items():
        kind = "float8" if unit.startswith("float8") else unit
        result[kind] = result.get(kind, 0.0) + flops / report.flops
    return {unit: share for unit, share in result.items() if share}


def table(reports: list) -> Table:
    """One row for each target and policy."""
    found = dict.fromkeys([*UNITS, *(unit for _, r in reports for unit in shares(r))])
    units = [unit for unit in found if any(unit in shares(r) for _, r in reports)]
    columns = "target", "policy", "native", *units, "memory", "Mcycles"
    result = Table(title="A train step, compiled ahead of time: operations by unit")
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for policy, report in reports:
        memory, share = report.memory, shares(report)
        used = memory.argument + memory.output + memory.temporary - memory.aliased
        result.add_row(
            report.target,
            policy,
            f"{report.native_share:.1%}",
            *(f"{share[unit]:.1%}" if unit in share else "-" for unit in units),
            f"{used / 1e9:.2f} GB",
            "-" if report.cycles is None else f"{report.cycles / 1e6:.2f}",
        )
    return result


def plot(reports: list, path: str) -> None:
    """Draws the operations by matrix unit and, if there are TPUs, estimated cycles.

    Each target has a bar for each policy, in the order of the command line.
    """
    targets = list(dict.fromkeys(report.target for _, report in reports))
    policies = list(dict.fromkeys(policy for policy, _ in reports))
    width = 0.8 / len(policies)
    places = [
        targets.index(report.target) + (policies.index(policy) + 0.5) * width - 0.4
        for policy, report in reports
    ]
    timed = any(report.cycles is not None for _, report in reports)
    size = max(6.0, 0.5 * len(places) + 1.5), 7.5 if timed else 4.0
    figure = Figure(figsize=size, layout="constrained")
    top, *bottom = figure.subplots(1 + timed, squeeze=False)[:, 0]
    top.set(ylabel="operations, %", title="What matrix units multiply")
    title = "Estimate of the TPU compiler, in the colour of most operations"
    for axes in bottom:
        axes.set(ylabel="million cycles", title=title)
        axes.margins(y=0.1)
    for axes in (top, *bottom):
        axes.set_xticks(range(len(targets)), targets)
        axes.tick_params(axis="x", length=0, pad=16)
        axes.set_xticks(places, [brief(p) for p, _ in reports], minor=True, fontsize=8)
        axes.tick_params(axis="x", which="minor", length=0, pad=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(-0.5, len(targets) - 0.5)
    tab10 = matplotlib.colormaps["tab10"](range(len(UNITS)))
    colors = dict(zip(UNITS, tab10, strict=True))
    legend = {}
    for place, (_, report) in zip(places, reports, strict=True):
        start, parts = 0.0, shares(report)
        style: dict[str, Any] = {"width": 0.92 * width}
        for unit, share in parts.items():
            style["color"] = colors.get(unit, "gray")
            legend[unit] = top.bar(place, 100 * share, bottom=start, **style)
            start += 100 * share
        if report.cycles is None:
            continue
        style["color"] = colors.get(max(parts, key=lambda unit: parts[unit]), "gray")
        for axes in bottom:
            bar = axes.bar(place, report.cycles / 1e6, **style)
            axes.bar_label(bar, fmt="%.3g", fontsize=8)
    for axes in bottom:
        for report in {r.target: r for _, r in reports if r.cycles is None}.values():
            place = targets.index(report.target), 0.02
            style = {"ha": "center", "color": "gray", "fontsize": 8}
            axes.text(
                *place, "no estimate", transform=axes.get_xaxis_transform(), **style
            )
    units = [unit for unit in UNITS if unit in legend]
    units += [unit for unit in legend if unit not in UNITS]
    handles = [legend[unit] for unit in units]
    figure.legend(handles, units, loc="outside upper center", ncols=len(units))
    figure.savefig(path, dpi=150)


def brief(policy: str) -> str:
    """A policy's name below a bar, such as "bf16"."""
    return policy.removeprefix("mixed_").replace("bfloat", "bf").replace("float", "fp")


def main(args=None) -> list:
    """Compiles for the targets asked for, and shows a table and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--policy", nargs="+", default=["mixed_bfloat16", "mixed_float8"]
    )
    parser.add_argument("--target", nargs="+", default=TARGETS)
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--plot", default="what_will_it_run.png")
    parser.add_argument("--verbose", action="store_true", help="every product of each")
    args = parser.parse_args(args)

    reports = []
    for target in tqdm.tqdm(args.target):
        for policy in args.policy:
            step, shapes = train_step(policy, args.width)
            start = time.perf_counter()
            report = mpjax.lowering.report(step, *shapes, target=target)
            reports.append((policy, report))
            if args.verbose:
                tqdm.tqdm.write(f"{policy}, {time.perf_counter() - start:.0f} s")
                tqdm.tqdm.write(str(report))
    Console(width=120).print(table(reports))
    plot(reports, args.plot)
    print(f"Plot of operations and cycles: {args.plot}")
    return reports


if __name__ == "__main__":
    main()
