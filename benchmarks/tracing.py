"""How long a wrapped model takes to trace, against the bare one.

    python benchmarks/tracing.py
    python benchmarks/tracing.py --against ../other    # beside another checkout

Loss and gradient of a transformer of six layers, in Linen and NNX: bare, in bfloat16
and in fp8. "first" is traced after JAX's caches were cleared, as in a process that has
traced nothing yet, "again" with what the trace before left there. A figure is the least
processor time of all rounds, in which the cases take turns.

With ``--against`` the mpjax of this checkout and that of the other are imported by
processes of their own, which take turns as well; figures are those of here, and their
ratios to those of there. ``--json`` enters the figures in ``results/tracing.json``.
"""

import gc
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or plugins look for their devices

import _results
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.linen
import mpjax.nnx

HERE = pathlib.Path(__file__).parents[1]
LAYERS, WIDTH, HEADS = 6, 256, 8
X = jax.ShapeDtypeStruct((4, 128, WIDTH), jnp.float32)
RECIPES = {
    "current": mpjax.current_scaling(),
    "delayed": mpjax.delayed_scaling(),
    "per channel": mpjax.per_channel_scaling(),
}
RULES = {"bare": None, "bf16": "mixed_bfloat16"} | {
    name: mpjax.Rule(".*", "mixed_bfloat16", recipe) for name, recipe in RECIPES.items()
}


class Transformer(nn.Module):
    """Pre-norm layers."""

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH)(y)
        return x


class NNXBlock(nnx.Module):
    """A layer of ``NNXTransformer``."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NNXTransformer(nnx.Module):
    """The same in NNX."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = nnx.List(NNXBlock(rngs=rngs) for _ in range(LAYERS))

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def linen(rule):
    """Loss and gradient of the Linen model, and the shapes of its arguments."""
    model = Transformer()
    if rule is not None:
        model = mpjax.linen.MixedPrecision(model, rule)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), X))
    params = variables.pop("params")

    def loss(params, others, x):
        y: Any = model.apply({"params": params, **others}, x)
        return jnp.mean(y**2)

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, variables, X)


def in_nnx(rule):
    """Loss and gradient of the NNX model, and the shapes of its arguments."""
    model = nnx.eval_shape(lambda: NNXTransformer(rngs=nnx.Rngs(0)))
    if rule is not None:
        model = mpjax.nnx.mixed_precision(model, rule)
    trained = nnx.Any(nnx.Param, mpjax.nnx.ScalingStat)
    graph, variables, others = nnx.split(model, trained, ...)

    def loss(variables, others, x):
        return jnp.mean(nnx.merge(graph, variables, others, copy=True)(x) ** 2)

    return jax.value_and_grad(loss), (variables, others, X)


def traced(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by front end, rule and whether JAX had traced it before."""
    cases = {
        (front_end, name): make(rule)
        for front_end, make in (("Linen", linen), ("NNX", in_nnx))
        for name, rule in RULES.items()
    }
    least = {front_end: {name: {} for name in RULES} for front_end, _ in cases}
    for _ in range(rounds):
        for (front_end, name), (fn, arguments) in cases.items():
            jax.clear_caches()
            for state in "first", "again":
                gc.collect()
                start = time.process_time()
                jax.make_jaxpr(lambda *args, fn=fn: fn(*args))(*arguments)
                taken = time.process_time() - start
                before = least[front_end][name].get(state, taken)
                least[front_end][name][state] = min(before, taken)
    return least


def in_process(checkout: pathlib.Path, rounds: int):
    """What `traced` returns in a process that imports the mpjax of a checkout."""
    run = subprocess.run(
        [sys.executable, __file__, "--worker", "--rounds", str(rounds)],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    if not pathlib.Path(found["mpjax"]).is_relative_to(checkout):
        raise ImportError(f"mpjax was to be that of {checkout}, got {found['mpjax']}")
    return found["seconds"]


def least_of(runs):
    """The least of several results of `traced`."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: least_of([run[key] for run in runs]) for key in first}
    return min(runs)


def main() -> None:
    parser = _results.parser(__doc__, "tracing")
    parser.add_argument("--against", type=pathlib.Path, metavar="CHECKOUT")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="in each process")
    parser.add_argument("--worker", action="store_true", help="print JSON alone")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"mpjax": mpjax.__file__, "seconds": traced(args.rounds)}))
        return
    checkouts = [HERE]
    if args.against is not None:
        checkouts.append(args.against.resolve())
        if not (checkouts[1] / "mpjax" / "__init__.py").exists():
            parser.error(f"--against is a folder that has mpjax/, got {args.against}")
        if args.json is not None:
            parser.error("--json is for this checkout alone; leave out --against")
    runs = [
        [in_process(checkout, args.rounds) for checkout in checkouts]
        for _ in range(args.processes)
    ]
    here, *there = map(least_of, zip(*runs, strict=True))
    table = Table("", "", title=f"Seconds to trace, jax {jax.__version__}")
    for state in "first", "again":
        for column in (state, "x bare", *(["x there"] if there else [])):
            table.add_column(column, justify="right")
    for front_end, rules in here.items():
        for name, states in rules.items():
            cells = []
            for state, seconds in states.items():
                bare = seconds / rules["bare"][state]
                cells += [f"{seconds:.3f}", f"{bare:.2f}"]
                for other in there:
                    cells.append(f"{seconds / other[front_end][name][state]:.3f}")
                case = {"front_end": front_end, "rule": name, "trace": state}
                figures = {"processor_seconds": round(seconds, 4)}
                figures["ratio_to_bare"] = round(bare, 3)
                _results.save(args.json, case, figures, deterministic=False)
            table.add_row(front_end, name, *cells)
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
