"""What autocast costs: the time to trace and lower, and what a compiler makes of it.

    python benchmarks/autocast.py                  # times
    python benchmarks/autocast.py --target tpu7x   # compiled, beside casts by hand

A decoder in plain jax.numpy of 24 and of 96 layers: its loss, and loss and gradient,
bare and under ``mpjax.autocast``. A time is the least processor time of all rounds, in
which the cases take turns, with JAX's caches cleared before each; figures are the time
to trace, the time to lower, and the ratio of their sum to that of the bare function.

Compiled for a target, loss and gradient of two layers under autocast stand beside the
same with the casts written by hand: casts in the trace, bytes, and cycles on a TPU.
``--json`` enters the figures in ``results/autocast.json``.
"""

import functools
import gc
import sys
import time

import _aot
import _results
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import mpjax

WIDTH, HEADS, TOKENS = 256, 4, 128
NAMES = ("q", "k", "v", "o", "up", "down", "scale1", "scale2")


def shapes(layers: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The parameters of a decoder, f32."""
    square, wide = (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    sizes = (square,) * 4 + (wide, wide[::-1], (WIDTH,), (WIDTH,))
    layer = {
        name: jax.ShapeDtypeStruct(size, jnp.float32)
        for name, size in zip(NAMES, sizes, strict=True)
    }
    return [layer] * layers


def norm(x, scale):
    """f32[..., features] for a stream in float32."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) * scale


def decoder(params, x, cast=lambda x: x, wide=lambda x: x):
    """The loss; with ``cast`` and ``wide`` it has by hand what autocast would do."""
    mask = jnp.tril(jnp.ones((TOKENS, TOKENS), bool))
    for i, layer in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            w = {name: cast(layer[name]) for name in NAMES[:6]}
            h = cast(norm(x, layer["scale1"]))
            split = (*x.shape[:2], HEADS, WIDTH // HEADS)
            q, k, v = (jnp.reshape(h @ w[name], split) for name in "qkv")
            scores = jnp.einsum("bthd,bshd->bhts", q, k) * split[-1] ** -0.5
            scores = jnp.where(mask, scores, -1e9)
            weights = cast(jax.nn.softmax(wide(scores)))
            mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
            x = x + wide(jnp.reshape(mixed, x.shape) @ w["o"])
            h = cast(norm(x, layer["scale2"])) @ w["up"]
            x = x + wide(jax.nn.silu(h) @ w["down"])
    return jnp.mean(jnp.square(x))


def by_hand(params, x):
    """``decoder`` with the casts written down."""
    return decoder(
        params, x, lambda x: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.float32)
    )


def seconds(fn, *args) -> tuple[float, float]:
    """Processor time to trace and to lower."""
    jax.clear_caches()
    gc.collect()
    start = time.process_time()
    traced = jax.jit(fn).trace(*args)
    middle = time.process_time()
    traced.lower()
    return middle - start, time.process_time() - middle


def times(rounds: int, save) -> Table:
    """The table of times."""
    table = Table("layers", "", "bare, trace + lower", "autocast", "ratio")
    x = jax.ShapeDtypeStruct((2, TOKENS, WIDTH), jnp.float32)
    for layers in (24, 96):
        for kind in ("loss", "loss and gradient"):
            fns = {"bare": decoder, "autocast": mpjax.autocast(decoder)}
            if kind != "loss":
                fns = {name: jax.value_and_grad(fn) for name, fn in fns.items()}
            least = dict.fromkeys(fns, (float("inf"), 0.0))
            for _ in range(rounds):
                for name, fn in fns.items():
                    least[name] = min(
                        least[name], seconds(fn, shapes(layers), x), key=sum
                    )
            ratio = sum(least["autocast"]) / sum(least["bare"])
            cells = [f"{trace:.2f} + {lower:.2f} s" for trace, lower in least.values()]
            table.add_row(str(layers), kind, *cells, f"{ratio:.2f}")
            for name, (trace, lower) in least.items():
                figures = {
                    "trace_processor_seconds": trace,
                    "lower_processor_seconds": lower,
                    "ratio_to_bare": sum(least[name]) / sum(least["bare"]),
                }
                figures = {key: round(value, 3) for key, value in figures.items()}
                case = {"layers": layers, "kind": kind, "way": name}
                save(case, figures, deterministic=False)
    return table


def compiled(target: str, save) -> Table:
    """The table of compiled programs."""
    table = Table("", "casts in the trace", "bytes", "cycles", title=target)
    x = jax.ShapeDtypeStruct((8, TOKENS, WIDTH), jnp.float32)
    ways = {"bare": decoder, "by hand": by_hand, "autocast": mpjax.autocast(decoder)}
    for name, fn in ways.items():
        fn = jax.value_and_grad(fn)
        casts = str(jax.make_jaxpr(fn)(shapes(2), x)).count(" convert_element_type[")
        program = _aot.compile_for(target, fn, shapes(2), x)
        cycles = program.cycles if target in _aot.TPUS else None
        figures = {"casts": casts, "bytes": program.bytes, "cycles": cycles}
        case = {"target": target, "layers": 2, "way": name}
        save(case, figures, deterministic=True, device=target)
        table.add_row(name, *map(str, figures.values()))
    return table


def main(argv: list[str] | None = None) -> int:
    """Prints a table."""
    parser = _results.parser(__doc__, "autocast")
    parser.add_argument("--target", help=f"one of {', '.join(_aot.TPUS)}, or cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    save = functools.partial(_results.save, args.json)
    table = compiled(args.target, save) if args.target else times(args.rounds, save)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
