r"""What dynamic loss scaling costs: one train step with it against the same without.

    python benchmarks/loss_scaling.py                     # CPU time and all targets
    python benchmarks/loss_scaling.py --targets cpu --rounds 60
    python benchmarks/loss_scaling.py --no-clip
    python benchmarks/loss_scaling.py --targets tpu7x --models mlp,transformer \
        --methods mpjax                                   # over all eight models

``--json`` enters the figures in ``results/loss_scaling.json``, which the tables of the
README are made of.

Beside mpjax stand Flax's DynamicScale, jmp (``pip install jmp``; left out if it is not
there) and optax.apply_if_finite under a constant scale, each as its documentation has
it. All compute in float16 with float32 parameters under AdamW, which clips by global
norm unless the options say otherwise.

On the CPU, steps are timed in turn; a figure is the median over rounds of the ratio to
the base in the same round, first of wall time, then of processor time, which other
processes disturb less. There are two bases: the plain step, and the plain step with its
gradients pinned row-major, which XLA by itself leaves transposed. For other targets
the programs are compiled ahead of time (see _aot.py): estimated cycles and bytes
accessed on TPUs; on GPUs, bytes that kernels read and write. A TPU compiler's choice of
what to keep in fast memory moves cycles and bytes of one model by several percent: see
the geometric mean over models.
"""

import argparse
import functools
import math
import statistics
import time

import _aot  # first: it sets what jax reads when imported
import _results
import flax.training.dynamic_scale
import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

import mpjax

try:
    import jmp  # pyright: ignore[reportMissingImports]
except ImportError:
    jmp = None


def mlp(width, hidden, layers, rows):
    """A residual MLP: parameters, batch and loss."""

    def init(key):
        def layer(key):
            up, down = jax.random.split(key)
            return {
                "up": jax.random.normal(up, (width, hidden)) * width**-0.5,
                "down": jax.random.normal(down, (hidden, width)) * hidden**-0.5,
            }

        return [layer(key) for key in jax.random.split(key, layers)]

    def loss(params, batch):
        x = batch.astype(jnp.float16)
        for p in jax.tree.map(lambda w: w.astype(jnp.float16), params):
            x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return jnp.mean((x.astype(jnp.float32) - 0.5 * batch) ** 2)

    return init, jax.ShapeDtypeStruct((rows, width), jnp.float32), loss


def transformer(width, heads, layers, vocab, sequences, length):
    """A decoder-only transformer with tied embeddings."""

    def init(key):
        def normal(key, *shape):
            return jax.random.normal(key, shape) * shape[0] ** -0.5

        def layer(key):
            k = jax.random.split(key, 4)
            return {
                "qkv": normal(k[0], width, 3, heads, width // heads),
                "out": normal(k[1], width, width),
                "up": normal(k[2], width, 4 * width),
                "down": normal(k[3], 4 * width, width),
                "scale": jnp.ones((2, width)),
            }

        embed, *keys = jax.random.split(key, layers + 1)
        return {
            "embed": 0.02 * jax.random.normal(embed, (vocab, width)),
            "layers": [layer(key) for key in keys],
        }

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
        return wide.astype(x.dtype) * scale

    def loss(params, tokens):
        params = jax.tree.map(lambda w: w.astype(jnp.float16), params)
        x = params["embed"][tokens]
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        for p in params["layers"]:
            q, k, v = jnp.einsum("btd,dchk->cbhtk", norm(x, p["scale"][0]), p["qkv"])
            scores = jnp.einsum("bhsk,bhtk->bhst", q, k).astype(jnp.float32)
            scores = jnp.where(causal, scores * q.shape[-1] ** -0.5, -jnp.inf)
            weights = jax.nn.softmax(scores).astype(v.dtype)
            mixed = jnp.einsum("bhst,bhtk->bshk", weights, v)
            x = x + mixed.reshape(x.shape) @ p["out"]
            x = x + jax.nn.relu(norm(x, p["scale"][1]) @ p["up"]) @ p["down"]
        logits = (x @ params["embed"].T).astype(jnp.float32)
        labels = jnp.roll(tokens, -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return init, jax.ShapeDtypeStruct((sequences, length), jnp.int32), loss


MODELS = {
    "mlp 512x2048, 4 layers": mlp(512, 2048, 4, 256),
    "mlp 768x3072, 2 layers": mlp(768, 3072, 2, 512),
    "mlp 1024x4096, 1 layer": mlp(1024, 4096, 1, 512),
    "mlp 2048x4096, 2 layers": mlp(2048, 4096, 2, 1024),
    "transformer 320, 4 layers": transformer(320, 5, 4, 4096, 2, 256),
    "transformer 512, 2 layers": transformer(512, 8, 2, 4096, 4, 256),
    "transformer 768, 2 layers": transformer(768, 12, 2, 8192, 4, 512),
    "transformer 1024, 1 layer": transformer(1024, 16, 1, 8192, 4, 512),
}


def plain(loss_fn, inner, pinned=False):
    def pin(g):
        return with_layout_constraint(g, Layout(tuple(range(g.ndim))))

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        grads = jax.tree.map(pin, grads) if pinned else grads
        updates, opt_state = inner.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return inner.init, step


def ours(loss_fn, inner):
    tx = mpjax.dynamic_loss_scaling(inner)

    def step(params, opt_state, batch):
        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx.init, step


def flax_dynamic_scale(loss_fn, inner):
    def init(params):
        scale = flax.training.dynamic_scale.DynamicScale()
        # As arrays, or the second step traces again.
        scale = scale.replace(fin_steps=jnp.int32(0), scale=jnp.float32(scale.scale))
        return inner.init(params), scale

    def step(params, state, batch):
        opt_state, scale = state
        scale, finite, loss, grads = scale.value_and_grad(loss_fn)(params, batch)
        updates, new_state = inner.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        keep = functools.partial(jnp.where, finite)
        params = jax.tree.map(keep, new_params, params)
        return params, (jax.tree.map(keep, new_state, opt_state), scale), loss

    return init, step


def jmp_select_tree(jmp, loss_fn, inner):
    # The scale goes in and out as arrays: its class cannot be lowered ahead of time.
    def init(params):
        return inner.init(params), (jnp.float32(2.0**16), jnp.int32(0))

    def step(params, state, batch):
        opt_state, (scale, counter) = state
        scale = jmp.DynamicLossScale(scale, counter)

        def scaled(params):
            loss = loss_fn(params, batch)
            return scale.scale(loss), loss

        grads, loss = jax.grad(scaled, has_aux=True)(params)
        grads = scale.unscale(grads)
        finite = jmp.all_finite(grads)
        updates, new_state = inner.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        params, opt_state = jmp.select_tree(
            finite, (new_params, new_state), (params, opt_state)
        )
        scale = scale.adjust(finite)
        return params, (opt_state, (scale.loss_scale, scale.counter)), loss

    return init, step


def apply_if_finite(loss_fn, inner):
    tx = optax.apply_if_finite(inner, 10**6)

    def step(params, opt_state, batch):
        def scaled(params):
            loss = loss_fn(params, batch)
            return loss * 2.0**16, loss

        grads, loss = jax.grad(scaled, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g / 2.0**16, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx.init, step


METHODS = {
    "no loss scaling": plain,
    "no loss scaling, pinned": functools.partial(plain, pinned=True),
    "mpjax": ours,
    "Flax DynamicScale": flax_dynamic_scale,
    "optax.apply_if_finite": apply_if_finite,
} | ({"jmp": functools.partial(jmp_select_tree, jmp)} if jmp else {})


def programs(target, model, methods, inner):
    """The compiled step of every method, with its parameters' and state's shapes."""
    init, batch, loss_fn = MODELS[model]
    params = jax.eval_shape(init, jax.random.key(0))
    for name, method in methods.items():
        if "pinned" in name and target != "cpu":
            continue
        init_state, step = method(loss_fn, inner)
        state = jax.eval_shape(init_state, params)
        yield (
            name,
            _aot.compile_for(target, step, params, state, batch, donate_argnums=(0, 1)),
            init_state,
        )


def time_on_cpu(model, methods, inner, rounds, save):
    """Prints and saves times of steps that run in turn."""
    init, batch, _ = MODELS[model]
    key = jax.random.key(1)
    batch = (
        jax.random.randint(key, batch.shape, 0, 4096)
        if batch.dtype == jnp.int32
        else jax.random.normal(key, batch.shape)
    )
    steps, trees, wall, processor = {}, {}, {}, {}
    for name, program, init_state in programs("cpu", model, methods, inner):
        params = init(jax.random.key(0))
        steps[name], wall[name], processor[name] = program.compiled, [], []
        trees[name] = (params, init_state(params))
    names = list(steps)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter(), time.process_time()
            *trees[name], _ = jax.block_until_ready(steps[name](*trees[name], batch))
            if turn > 1:
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    print(f"\n{model}: CPU    {'ms':>8}{'against plain':>16}{'against pinned':>17}")
    bases = {"plain": "no loss scaling", "pinned": "no loss scaling, pinned"}
    for name in names:
        ratios = {
            f"{clock}_ratio_to_{base}": ratio(taken[name], taken[of])
            for base, of in bases.items()
            for clock, taken in (("wall", wall), ("processor", processor))
        }
        milliseconds = 1e3 * statistics.median(wall[name])
        columns = "".join(f"{ratio:8.3f}" for ratio in ratios.values())
        print(f"  {name:26}{milliseconds:8.1f}{columns}", flush=True)
        figures = {"wall_milliseconds": milliseconds} | ratios
        case = {"target": "cpu", "model": model, "method": name}
        save(case, rounded(figures), deterministic=False)


def rounded(figures):
    return {name: round(figure, 4) for name, figure in figures.items()}


def ratio(taken, base):
    return statistics.median(a / b for a, b in zip(taken, base, strict=True))


def count_for(target, model, methods, inner, save):
    """Prints and saves cycles and bytes, and returns their ratios to the base."""
    print(f"\n{model}: {target}{'cycles':>16}{'ratio':>8}{'MB':>10}{'ratio':>8}")
    base, ratios = None, {}
    for name, program, _ in programs(target, model, methods, inner):
        base = base or program
        by_cycles = program.cycles / base.cycles if base.cycles else math.nan
        by_bytes = program.bytes / base.bytes
        ratios[name] = by_cycles, by_bytes
        print(
            f"  {name:24}{program.cycles:>12}{by_cycles:8.3f}"
            f"{program.bytes / 1e6:10.1f}{by_bytes:8.3f}",
            flush=True,
        )
        figures = {"bytes": program.bytes, "bytes_ratio_to_plain": by_bytes}
        if base.cycles:
            figures |= {"cycles": program.cycles, "cycles_ratio_to_plain": by_cycles}
        case = {"target": target, "model": model, "method": name}
        save(case, rounded(figures), deterministic=True, device=target)
    return ratios


def main():
    parser = _results.parser(__doc__, "loss_scaling")
    parser.add_argument("--targets", default="cpu,tpu7x,v5e,h100")
    parser.add_argument(
        "--models",
        default="mlp 512,mlp 1024,transformer 320",
        help="parts of names; mlp,transformer are all",
    )
    parser.add_argument("--methods", default="", help="parts of names; all by default")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    inner = optax.adamw(3e-4)
    if args.clip:
        inner = optax.chain(optax.clip_by_global_norm(1.0), inner)
    models = [m for m in MODELS if any(part in m for part in args.models.split(","))]
    parts = ["no loss scaling", *args.methods.split(",")]
    methods = {
        name: method
        for name, method in METHODS.items()
        if any(part in name for part in parts)
    }

    def save(case, figures, **how):
        _results.save(args.json, case | {"clip": args.clip}, figures, **how)

    for target in args.targets.split(","):
        if target != "cpu" and (problem := _aot.missing(target)):
            print(f"\n{target}: left out. {problem}")
            continue
        if target == "cpu":
            for model in models:
                time_on_cpu(model, methods, inner, args.rounds, save)
            continue
        counts = [count_for(target, model, methods, inner, save) for model in models]
        print(f"\n{target}, geometric mean of {len(models)} models: cycles, bytes")
        for name in counts[0]:
            columns = zip(*(ratios[name] for ratios in counts), strict=True)
            means = map(statistics.geometric_mean, columns)
            print(f"  {name:24}" + "".join(f"{mean:8.3f}" for mean in means))


if __name__ == "__main__":
    main()
