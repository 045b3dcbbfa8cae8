"""Runs models of other authors under ``mixed_bfloat16``, beside float32.

    pip install ".[examples]"
    pip install --no-deps -r benchmarks/models-requirements.txt
    python benchmarks/models.py            # or: ... models.py gemma NanoMoE
    python benchmarks/models.py --json     # into results/models.json, for the README

Python 3.12; about six minutes of one core, most of it compiling.

For each model of ``_zoo.py``, with the same variables and inputs: how many of its
products (matrix products and convolutions, forward, and forward and backward) have two
bfloat16 operands, how much of their arithmetic that is, how far outputs and gradients
are from float32, and whether ``init`` gives the same parameters. "cast" is the same
model with its parameters and floating inputs cast to bfloat16 and nothing else, which
is what one writes without a library. "autocast", with ``--autocast``, is the bare model
under ``mpjax.autocast`` and no policy.

Parameters are the model's initial ones plus noise of 0.02, so that what is zero at
first takes part. The loss is the product of the outputs with fixed random numbers. An
error is |y - y32| / |y32| over all outputs, or over the gradients of all parameters.
XLA is set to round where the program says so.
"""

import dataclasses
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("USE_TF", "0")  # transformers, if tensorflow is there for gemma
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import _results
import jax
import jax.numpy as jnp
import numpy as np
from _zoo import MODELS, Model
from flax import linen as nn
from flax import nnx
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.lowering import TracedProduct, census

POLICY = "mixed_bfloat16"
# CanViT asserts that its coordinates are float32.
RULES = {"CanViT": mpjax.Rule(".*", POLICY, cast_inputs=False)}

COMPILER_OPTIONS = {
    "xla_allow_excess_precision": False,
    "xla_backend_optimization_level": 0,  # compiling is most of the time here
    # A fault of the CPU compiler: NaN from convolutions in bfloat16.
    "xla_cpu_experimental_ynn_fusion_type": "",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as a function of its parameters and the arrays among its arguments."""

    run: Callable[[Any, Any], Any]
    params: Any  # the initial ones
    arrays: Any

    def outputs(self, params, arrays) -> list[jax.Array]:
        """The floating outputs, in float32."""
        leaves = jax.tree.leaves(self.run(params, arrays))
        return [y.astype(jnp.float32) for y in leaves if _is_floating(y)]

    def loss(self, params, arrays):
        """The outputs, projected on fixed random numbers."""
        outputs = self.outputs(params, arrays)
        keys = jax.random.split(jax.random.key(1), len(outputs))
        terms = [
            y * jax.random.normal(k, y.shape)
            for y, k in zip(outputs, keys, strict=True)
        ]
        return sum(map(jnp.sum, terms)), outputs


@dataclasses.dataclass(frozen=True)
class Result:
    """What one way to run a model gave."""

    outputs: np.ndarray
    grads: np.ndarray
    forward: tuple[TracedProduct, ...]
    both: tuple[TracedProduct, ...]


def linen_program(module: nn.Module, policy, args, kwargs) -> Program:
    """A Linen model in training: it may write its batch statistics."""
    rngs = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout"))}
    if policy is not None:
        module = mpjax.linen.MixedPrecision(module, policy)
    variables = _compile(lambda: module.init(rngs, *args, **kwargs))
    params = variables.pop("params")
    mutable = [name for name in variables if name != "intermediates"]
    arrays, rebuild = _split(args, kwargs)

    def run(params, arrays):
        args, kwargs = rebuild(arrays)
        tree = {"params": params, **variables}
        return module.apply(tree, *args, rngs=rngs, mutable=mutable, **kwargs)[0]

    return Program(run, params, arrays)


def nnx_program(module: nnx.Module, policy, args, kwargs) -> Program:
    """An NNX model; its mixed twin takes the parameters of the bare one."""
    if policy is not None:
        module = mpjax.nnx.mixed_precision(module, policy)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    arrays, rebuild = _split(args, kwargs)

    def run(params, arrays):
        args, kwargs = rebuild(arrays)
        return nnx.merge(graph, params, rest, copy=True)(*args, **kwargs)

    return Program(run, params, arrays)


def measure(program: Program) -> Result:
    """Traces, compiles and runs a program and its gradient."""
    args = program.params, program.arrays
    grad = jax.grad(program.loss, has_aux=True, allow_int=True)
    grads, outputs = _compile(grad, *args)
    return Result(
        _vector(outputs),
        _vector([g for g in jax.tree.leaves(grads) if _is_floating(g)]),
        census(program.outputs, *args, platform="cpu").products,
        census(grad, *args, platform="cpu").products,
    )


def programs(model: Model, autocast: bool) -> tuple[dict[str, Program], bool]:
    """A model in float32, under the policy, and with parameters and inputs cast.

    Args:
      model: of the zoo.
      autocast: also under ``mpjax.autocast``.

    Returns:
      Them; whether that under the policy has the initial parameters of the first.
    """
    module, args, kwargs = model.build()
    make: Any = linen_program if isinstance(module, nn.Module) else nnx_program
    bare = make(module, None, args, kwargs)
    mixed = make(module, RULES.get(model.name, POLICY), args, kwargs)
    same = jax.tree.map(np.array_equal, _arrays(bare.params), _arrays(mixed.params))
    params = _perturb(bare.params)
    cast = dataclasses.replace(
        bare,
        params=mpjax.cast_floating(params, jnp.bfloat16),
        arrays=mpjax.cast_floating(bare.arrays, jnp.bfloat16),
    )
    bare = dataclasses.replace(bare, params=params)
    mixed = dataclasses.replace(mixed, params=params)
    ways = {"bare": bare, "mixed": mixed, "cast": cast}
    if autocast:
        run = mpjax.autocast(bare.run)
        ways["autocast"] = dataclasses.replace(bare, run=run)
    return ways, all(jax.tree.leaves(same))


def _arrays(params):
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    return jax.tree.map(np.asarray, pure)


def _compile(fn, *args):
    return jax.jit(fn).lower(*args).compile(compiler_options=COMPILER_OPTIONS)(*args)


def _split(args, kwargs):
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def rebuild(arrays):
        arrays = iter(arrays)
        return tree.unflatten(
            next(arrays) if own else leaf
            for own, leaf in zip(is_array, leaves, strict=True)
        )

    return [leaf for own, leaf in zip(is_array, leaves, strict=True) if own], rebuild


def _perturb(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten(
        leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if _is_floating(leaf)
        else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    )


def _is_floating(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _vector(leaves) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


def _error(values: np.ndarray, reference: np.ndarray) -> float:
    error = np.linalg.norm(values - reference) / np.linalg.norm(reference)
    return float(f"{error:.3g}")


def _is_low(product: TracedProduct) -> bool:
    return product.operands == "bfloat16"


def _share(found: tuple[TracedProduct, ...]) -> float:
    low = sum(p.flops for p in found if _is_low(p))
    return round(low / max(sum(p.flops for p in found), 1), 4)


def run(
    model: Model, autocast: bool = False
) -> tuple[dict[str, Result], dict[str, BaseException], bool]:
    """Runs a model in all ways.

    Args:
      model: of the zoo.
      autocast: also under ``mpjax.autocast``.

    Returns:
      The results and what was raised instead, by way; whether the initial parameters
      are the same.
    """
    pool = ThreadPoolExecutor(1)  # a future holds whatever a model raises
    made = pool.submit(programs, model, autocast)
    if error := made.exception():
        return {}, {"mixed": error}, False
    ways, same_init = made.result()
    futures = {way: pool.submit(measure, program) for way, program in ways.items()}
    errors = {way: e for way, future in futures.items() if (e := future.exception())}
    results = {way: futures[way].result() for way in ways if way not in errors}
    return results, errors, same_init


def figures_of(result: Result, bare: Result) -> dict[str, Any]:
    """Products with bfloat16 operands, by number and FLOPs; errors against float32."""
    return {
        "forward_bfloat16": sum(map(_is_low, result.forward)),
        "forward_products": len(result.forward),
        "both_bfloat16": sum(map(_is_low, result.both)),
        "both_products": len(result.both),
        "both_flops_share": _share(result.both),
        "output_error": _error(result.outputs, bare.outputs),
        "gradient_error": _error(result.grads, bare.grads),
    }


def _cells(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['forward_bfloat16']}/{figures['forward_products']}",
        f"{figures['both_bfloat16']}/{figures['both_products']}",
        f"{figures['both_flops_share']:.1%}",
        f"{figures['output_error']:.1e}",
        f"{figures['gradient_error']:.1e}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the number of models that failed under the policy."""
    parser = _results.parser(__doc__, "models")
    parser.add_argument("names", nargs="*", help="packages or models; default: all")
    parser.add_argument("--autocast", action="store_true", help="under autocast too")
    args = parser.parse_args(argv)
    names = set(args.names)
    models = [m for m in MODELS if not names or {m.package, m.name} & names]
    table = Table(title=f"{POLICY}: products in bfloat16, and error against float32")
    table.add_column("model", no_wrap=True)
    for column in ("forward", "+ backward", "FLOPs", "outputs", "gradients", "init"):
        table.add_column(column, justify="right", no_wrap=True)
    save = functools.partial(_results.save, args.json)
    notes, failed = [], 0
    for model in track(models, console=Console(stderr=True), transient=True):
        results, errors, same_init = run(model, args.autocast)
        for way, label in (
            ("mixed", f"{model.package} {model.name}"),
            ("cast", "  cast"),
            ("autocast", "  autocast"),
        ):
            cells, figures = ["error"], {"raises": way in errors}
            if way in results and "bare" in results:
                figures |= figures_of(results[way], results["bare"])
                cells = _cells(figures)
            ran = way in results or way in errors
            if not ran and way == "autocast":
                continue
            if ran and not isinstance(errors.get(way), ImportError):
                case = {"package": model.package, "model": model.name, "way": way}
                about = {"features": model.features}
                save(case, figures, deterministic=False, notes=about)
            if way == "mixed" and way in results:
                cells.append("same" if same_init else "[red]other[/red]")
            table.add_row(label, *cells, style=None if way == "mixed" else "dim")
        failed += "mixed" in errors
        notes += [(model.name, f"{way}: {errors[way]!r}") for way in errors]
        found = results["mixed"].both if "mixed" in results else ()
        outside = [p for p in found if not _is_low(p)]
        counts = Counter(f"{p.lhs} x {p.rhs} at {p.where}" for p in outside)
        notes += [(model.name, f"{n} of {p}") for p, n in counts.most_common()]
    console = Console()
    console.width = max(console.width, 128)
    console.print(table)
    console.print("Errors, and products that are not of two bfloat16 operands:")
    for name, note in notes:
        console.print(f"  [bold]{name}[/bold] {escape(note)}", soft_wrap=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
