"""What a train step in fp8 costs, against bfloat16 and against other libraries.

    python benchmarks/fp8.py --targets tpu7x             # estimated cycles
    python benchmarks/fp8.py --targets h100 b200         # library calls and kernels
    python benchmarks/fp8.py --targets cpu --rounds 30   # forward and backward, timed
    python benchmarks/fp8.py --layers 1 --targets tpu7x --ways "mpjax delayed" --json

qwix is left out if it is not there (``pip install qwix``). ``--json`` enters the
figures in ``results/fp8.json``, which the tables of the README are made of.

The step compiled ahead of time is loss (mean square of the outputs), gradients,
clipping by global norm, AdamW and the update of the scales, with donated arguments, of
pre-norm transformer layers: width 2048, 8192 hidden, 16 heads, 16 x 256 tokens unless
``--tokens`` says otherwise. Each has four Dense layers (queries, keys and values are
one), whose 12 products run in fp8; the six products of attention stay in bfloat16.
``--bias`` gives the layers biases.

Delayed scaling is timed as it runs after `calibrate`, but for the row "not calibrated".
"delayed weights" are scaled by their amaxes a step before; those "kept" the optimizer
leaves behind in 8 bits, with `keep_weights`. "exact" are scales that are no powers of
two.
"""

import collections
import dataclasses
import os
import re
import statistics
import time
from typing import Any

import _aot  # first: it sets what jax reads when imported
import _results
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.linen

try:
    import qwix  # pyright: ignore[reportMissingImports]
except ImportError:
    qwix = None

BF16 = jnp.bfloat16
_INSTRUCTION = r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)"
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


class Layer(nn.Module):
    """A pre-norm transformer layer; by hand if it has options."""

    heads: int
    hidden: int
    bias: bool
    options: dict

    @nn.compact
    def __call__(self, x):
        def norm(x):
            if not self.options:
                return nn.LayerNorm()(x)
            return nn.LayerNorm(dtype=jnp.float32)(x).astype(BF16)

        def dense(features, x):
            return nn.Dense(features, use_bias=self.bias, **self.options)(x)

        batch, length, width = x.shape
        shape = batch, length, self.heads, width // self.heads
        y = jnp.split(dense(3 * width, norm(x)), 3, axis=-1)
        x = x + dense(width, attention(*(y.reshape(shape) for y in y)).reshape(x.shape))
        return x + dense(width, nn.gelu(dense(self.hidden, norm(x))))


def attention(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Transformer(nn.Module):
    depth: int
    bias: bool
    options: dict = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = Layer(16, 8192, self.bias, self.options)(x)
        return x


class MLP(nn.Module):
    """Dense layers for the CPU."""

    depth: int
    options: dict = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = nn.Dense(1024, **self.options)(nn.gelu(x) if i else x)
        return x


def materialized(lhs, rhs, *args, **kwargs):
    """A product whose operands XLA has to write to memory first."""
    return lax.dot_general(*lax.optimization_barrier((lhs, rhs)), *args, **kwargs)


def with_rule(recipe):
    rule = mpjax.Rule(".*", "mixed_bfloat16", recipe)
    return lambda make: mpjax.linen.MixedPrecision(make({}), rule)


def by_hand(**options):
    return lambda make: make({"dtype": BF16, **options})


def with_qwix(qwix):
    rule = qwix.QtRule(
        module_path=".*Dense.*",
        weight_qtype=jnp.float8_e4m3fn,
        act_qtype=jnp.float8_e4m3fn,
        bwd_qtype=jnp.float8_e5m2,
    )
    provider = qwix.QtProvider([rule])
    return lambda make: qwix.quantize_model(make({"dtype": BF16}), provider)


def calibrated(recipe):
    return with_rule(dataclasses.replace(recipe, calibrated=True))


DELAYED_WEIGHTS = mpjax.delayed_weight_scaling
WAYS = {
    "bf16": with_rule(None),
    "bf16, operands materialized": by_hand(dot_general=materialized),
    "mpjax current": with_rule(mpjax.current_scaling()),
    "mpjax current, exact": with_rule(mpjax.current_scaling(rounding="exact")),
    "mpjax current, delayed weights": calibrated(DELAYED_WEIGHTS()),
    "mpjax current, weights kept": calibrated(DELAYED_WEIGHTS(keep_weights=True)),
    "mpjax delayed": calibrated(mpjax.delayed_scaling()),
    "mpjax delayed, weights kept": calibrated(mpjax.delayed_scaling(keep_weights=True)),
    "mpjax delayed, not calibrated": with_rule(mpjax.delayed_scaling()),
    "mpjax per channel": with_rule(mpjax.per_channel_scaling()),
    "Flax Fp8Direct": by_hand(dot_general_cls=nn.Fp8DirectDotGeneralOp),
} | ({"qwix": with_qwix(qwix)} if qwix else {})


def step_of(model, x):
    """A train step and its arguments."""
    others = dict(jax.eval_shape(model.init, jax.random.key(0), x))
    params = others.pop("params")

    def step(params, others, state, x):
        def loss_fn(params, others):
            y = model.apply({"params": params, **others}, x)
            return jnp.mean(y.astype(jnp.float32) ** 2)

        value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1))
        loss, (grads, seen) = value_and_grad(params, others)
        updates, state = OPTIMIZER.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if "scaling" in others:
            states = others["scaling"], seen["scaling"], None, params
            seen = {"scaling": mpjax.update_scaling(*states)}
        return params, seen, state, loss

    return step, (params, others, jax.eval_shape(OPTIMIZER.init, params), x)


def parts(program):
    """Cycles of kernels that multiply, of others that touch fp8 or amaxes, the rest."""
    bodies, name = collections.defaultdict(list), ""
    entry = ""
    for line in program.text.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*{$", line):
            name = header[2]
            entry = name if header[1] else entry
        bodies[name].append(line)

    def body(line, depth=4):
        called = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
        inner = [body(text, depth - 1) for c in called if depth for text in bodies[c]]
        return "\n".join([line, *inner])

    total = collections.Counter()
    for line in bodies[entry]:
        found = re.findall(r'"estimated_cycles":"(\d+)"', line)
        cycles = sum(n for n in map(int, found) if n < 2**62)
        text = body(line) if cycles else ""
        if re.search(r" (dot|convolution)\(", text):
            total["gemm"] += cycles
        elif re.search(r"\bf8e|\babs\(", text):
            total["quantize"] += cycles
        else:
            total["other"] += cycles
    return [total[kind] for kind in ("gemm", "quantize", "other")]


def fp8_products(program):
    """The number of products of fp8 operands, and of all."""
    types, narrow, count = {}, 0, 0
    for line in program.text.splitlines():
        if found := re.match(_INSTRUCTION, line):
            name, kind, opcode, rest = found.groups()
            types[name] = kind
            if opcode in ("dot", "convolution"):
                operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])[:2]
                narrow += all(types.get(o, "").startswith("f8") for o in operands)
                count += 1
            elif "__cublas$lt$matmul" in line or "__cublas$gemm" in line:
                narrow += "$f8" in line
                count += 1
    return narrow, count


def program_of(
    target: str,
    way: str,
    layers: int = 1,
    bias: bool = False,
    tokens: tuple[int, int] = (16, 256),
) -> _aot.Program:
    """A train step in one of `WAYS`, compiled ahead of time."""
    model = WAYS[way](lambda options: Transformer(layers, bias, options))
    step, args = step_of(model, jnp.zeros((*tokens, 2048), BF16))
    return _aot.compile_for(target, step, *args, donate_argnums=(0, 1, 2))


def case_of(target, way, layers=1, bias=False, tokens=(16, 256)) -> dict[str, Any]:
    """What identifies a program among the rows of ``results/fp8.json``."""
    tokens = "x".join(map(str, tokens))
    case = {"target": target, "way": way, "layers": layers}
    return case | {"bias": bias, "tokens": tokens}


def figures_of(program: _aot.Program, base: _aot.Program) -> dict[str, Any]:
    """What a program costs, also relative to that in bfloat16."""
    narrow, products = fp8_products(program)
    figures = {
        "bytes": program.bytes,
        "bytes_ratio_to_bf16": round(program.bytes / base.bytes, 4),
        "kernels": program.kernels,
        "fp8_products": narrow,
        "products": products,
    }
    if not program.cycles:
        return figures
    kinds = dict(zip(("multiply", "quantize", "other"), parts(program), strict=True))
    return {
        "cycles": program.cycles,
        "cycles_ratio_to_bf16": round(program.cycles / base.cycles, 4),
        **{f"{kind}_cycles": cycles for kind, cycles in kinds.items()},
        **figures,
    }


def compiled(target, ways, depths, bias, tokens, path):
    """A table of programs compiled ahead of time."""
    table = Table("", "layers", "cycles", "x bf16", title=target)
    for column in ("gemm", "quantize", "other", "fp8", "Mbytes", "x bf16", "kernels"):
        table.add_column(column, justify="right")
    for depth in depths:
        base = None
        for way in ways:
            which = target, way, depth, bias, tokens
            program = program_of(*which)
            base = base or program
            figures = figures_of(program, base)
            case = case_of(*which)
            _results.save(path, case, figures, deterministic=True, device=target)
            cycles = ["", "", "", "", ""]
            if "cycles" in figures:
                cycles = [f"{figures['cycles'] / 1e6:.3f}M"]
                cycles.append(f"{figures['cycles_ratio_to_bf16']:.3f}")
                kinds = "multiply", "quantize", "other"
                cycles += [f"{figures[f'{kind}_cycles'] / 1e6:.2f}" for kind in kinds]
            moved = f"{figures['bytes'] / 1e6:.0f}"
            ratio = f"{figures['bytes_ratio_to_bf16']:.3f}"
            narrow = f"{figures['fp8_products']}/{figures['products']}"
            row = way, str(depth), *cycles, narrow, moved, ratio
            table.add_row(*row, str(figures["kernels"]))
            print(*row, figures["kernels"], sep=" | ", flush=True)
    return table


def timed(ways, rounds, path):
    """Processor time of forward and backward on this CPU, ways in turn."""
    table = Table("", "layers", "processor", "wall", title=f"cpu {os.getloadavg()}")
    x = jax.random.normal(jax.random.key(1), (512, 1024), BF16)
    for depth in (1, 2):
        calls = {}
        for name in ways:
            model = WAYS[name](lambda o, d=depth: MLP(d, o))
            variables = dict(model.init(jax.random.key(0), x))
            params = variables.pop("params")

            def loss_fn(params, others, x, model=model):
                y = model.apply({"params": params, **others}, x)
                return jnp.mean(y.astype(jnp.float32) ** 2)

            gradient = jax.jit(jax.grad(loss_fn, argnums=(0, 1, 2)))
            arguments = params, variables, x
            if "scaling" in variables:  # time it with scales that are known
                _, seen, _ = gradient(*arguments)
                states = variables["scaling"], seen["scaling"], None, params
                arguments = params, {"scaling": mpjax.update_scaling(*states)}, x
            jax.block_until_ready(gradient(*arguments))
            calls[name] = gradient, arguments
        times = collections.defaultdict(list)
        for _ in range(rounds):
            for name, (gradient, arguments) in calls.items():
                start = time.process_time(), time.perf_counter()
                jax.block_until_ready(gradient(*arguments))
                end = time.process_time(), time.perf_counter()
                times[name].append([b - a for a, b in zip(start, end, strict=True)])
        medians = {
            name: [statistics.median(t) for t in zip(*ts, strict=True)]
            for name, ts in times.items()
        }
        base = medians["bf16"]
        for name, found in medians.items():
            ratios = [a / b for a, b in zip(found, base, strict=True)]
            table.add_row(name, str(depth), *(f"{ratio:.3f}" for ratio in ratios))
            figures = {
                "processor_seconds": round(found[0], 6),
                "processor_ratio_to_bf16": round(ratios[0], 4),
                "wall_seconds": round(found[1], 6),
                "wall_ratio_to_bf16": round(ratios[1], 4),
            }
            case = {"target": "cpu", "way": name, "layers": depth}
            _results.save(path, case, figures, deterministic=False)
    return table


def shape(text: str) -> tuple[int, int]:
    """A batch and a length, as in 16x256."""
    batch, length = map(int, text.split("x"))
    return batch, length


def main() -> None:
    parser = _results.parser(__doc__, "fp8")
    parser.add_argument("--targets", nargs="+", default=["tpu7x", "cpu"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--tokens", type=shape, default=(16, 256), metavar="16x256")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    ways = list(dict.fromkeys(["bf16", *args.ways]))  # the base comes first
    for target in args.targets:
        if target == "cpu":
            table = timed(ways, args.rounds, args.json)
        else:
            which = args.layers, args.bias, args.tokens, args.json
            table = compiled(target, ways, *which)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
