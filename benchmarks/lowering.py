"""How long reports take: wall and processor time of `mpjax.lowering.report`.

    python benchmarks/lowering.py
    python benchmarks/lowering.py --cases billion --targets v7x --quick

``--json`` enters the times in ``results/lowering.json``, which the table of the README
is made of.

The train steps of both examples; one of a transformer whose layers are scanned and
rematerialized, sharded over four devices of a tpu7x:2x2x1 or over four GPUs; and those
of transformers of a billion parameters, scanned and unrolled, given as shapes.
"""

import importlib
import os
import pathlib
import resource
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or plugins look for their devices

import _results
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

Struct = jax.ShapeDtypeStruct


class Layer(nn.Module):
    """A pre-norm layer of a transformer."""

    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        x += nn.MultiHeadDotProductAttention(num_heads=16)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class Transformer(nn.Module):
    """Layers of one width, scanned or one after the other."""

    width: int
    depth: int
    scan: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32_000, self.width)
        x, layer = embed(tokens), nn.remat(Layer) if self.remat else Layer
        if self.scan:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
        for _ in range(1 if self.scan else self.depth):
            x, _ = layer()(x, None)
        return embed.attend(nn.LayerNorm()(x))


def step_of(model, policy, optimizer, tokens, place=lambda x: x):
    """A train step of a language model and its arguments as shapes."""
    model = mpjax.linen.MixedPrecision(model, policy)

    def step(params, opt_state, tokens):
        def loss_fn(params):
            logits: Any = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    inputs = Struct((1, tokens.shape[1] - 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    params = jax.tree.map(place, params)
    opt_state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)), (params, opt_state, tokens)


def train_lm():
    """The step of examples/train_lm.py."""
    example = importlib.import_module("train_lm")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b2=0.95))
    tokens = Struct((example.BATCH, example.LENGTH + 1), jnp.int32)
    optimizer = mpjax.dynamic_loss_scaling(optimizer)
    return step_of(example.Transformer(), "mixed_float8", optimizer, tokens)


def train_digits():
    """A step of the network of examples/train_digits.py."""
    example = importlib.import_module("train_digits")
    model = nnx.eval_shape(lambda: example.ResNet(rngs=nnx.Rngs(0)))
    model = mpjax.nnx.mixed_precision(model, "mixed_float16")
    optimizer = nnx.eval_shape(
        lambda model: nnx.Optimizer(
            model, mpjax.dynamic_loss_scaling(optax.adamw(3e-3)), wrt=nnx.Param
        ),
        model,
    )

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss_fn(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                model(images), labels
            ).mean()

        optimizer.update(model, nnx.grad(loss_fn)(model))

    images = Struct((example.BATCH, 8, 8, 1), jnp.float32)
    return step, (model, optimizer, images, Struct((example.BATCH,), jnp.int32))


def sharded():
    """Scanned and rematerialized layers, over two axes of two devices each."""
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(x, *names):
        names = names or [None] * (x.ndim - 1) + ["model"] * (x.ndim > 1)
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return Struct(x.shape, x.dtype, sharding=sharding)

    model = Transformer(512, depth=8, remat=True)
    tokens = place(Struct((8, 257), jnp.int32), "data")
    return step_of(model, "mixed_float8", unscaled(optax.adamw(1e-3)), tokens, place)


def unscaled(optimizer):
    """Loss scaling by one, so that all steps are one function."""
    return mpjax.static_loss_scaling(optimizer, 1.0)


def billion(scan):
    """A thousand million parameters, none of which is made."""
    tokens = Struct((4, 513), jnp.int32)
    model = Transformer(2048, depth=20, scan=scan)
    return step_of(model, "mixed_float8", unscaled(optax.adamw(1e-3)), tokens)


CASES = {
    "train_lm": train_lm,
    "train_digits": train_digits,
    "sharded, nn.scan, nn.remat": sharded,
    "billion, scanned": lambda: billion(True),
    "billion, unrolled": lambda: billion(False),
}


def children() -> float:
    """Seconds of processor time of all compilers so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = _results.parser(__doc__, "lowering")
    parser.add_argument("--targets", nargs="+", default=["v7x", "h100"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="or parts")
    parser.add_argument("--quick", action="store_true", help="as of report")
    args = parser.parse_args()
    table = Table(title=f"Seconds for a report, jax {jax.__version__}")
    for column in ("case", "parameters", "target", "products", "native", "census"):
        table.add_column(column)
    for column in ("wall", "trace", "compiler", "load"):
        table.add_column(column, justify="right")
    for name in CASES:
        if not any(part in name for part in args.cases):
            continue
        step, arguments = CASES[name]()
        size = sum(x.size for x in jax.tree.leaves(arguments[0]))
        for target in args.targets:
            start = time.perf_counter()
            mpjax.lowering.census(step, *arguments)
            census = time.perf_counter() - start
            start = time.perf_counter(), time.process_time(), children()
            report = mpjax.lowering.report(
                step, *arguments, target=target, quick=args.quick
            )
            end = time.perf_counter(), time.process_time(), children()
            seconds = [b - a for a, b in zip(start, end, strict=True)]
            times = [f"{taken:.1f}" for taken in seconds]
            load = f"{os.getloadavg()[0]:.1f}"
            count, native = f"{len(report.products)}", f"{report.native_share:.1%}"
            row = name, f"{size:.2g}", target, count, native, f"{census:.1f}"
            table.add_row(*row, *times, load)
            print(*row, *times, load, sep=" | ", flush=True)
            case = {"case": name, "target": target, "quick": args.quick}
            clocks = "wall", "trace_processor", "compiler_processor"
            figures = {"parameters": size, "products": len(report.products)}
            figures |= {"native_share": round(report.native_share, 4)}
            figures |= {"census_seconds": round(census, 2)}
            figures |= {
                f"{clock}_seconds": round(taken, 2)
                for clock, taken in zip(clocks, seconds, strict=True)
            }
            _results.save(args.json, case, figures, deterministic=False)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
