"""What a policy costs: wrapped models against the same models written by hand.

    python benchmarks/policies.py            # programs and tracing time, on the CPU
    python benchmarks/policies.py --targets tpu7x v5e

Each model is taken four ways, all of them bfloat16 with float32 parameters:

- by hand: every layer has ``dtype=bfloat16``, as Flax's documentation has it;
- with float32: by hand as well, but with float32 norms and a float32 softmax between
  bfloat16 products, which is what mpjax's named policies mean;
- mpjax: the bare model, wrapped;
- cast tree: the bare model, given parameters and inputs cast to bfloat16, as with jmp.

Of the compiled step (loss and gradient) the table has conversions and products on the
first target, and on each bytes accessed and, on a TPU, estimated cycles. "=" marks a
program that has the instructions, with their shapes and dtypes, of the model by hand
with float32, no more and no less. Tracing times are medians of interleaved rounds,
relative to the model by hand. ``--json`` enters all of it in ``results/policies.json``,
which the table of the README is made of.
"""

import collections
import dataclasses
import re
import statistics
import time

import _aot  # first: it sets what jax reads when imported
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

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes that a model is written with."""

    dtype: jnp.dtype | None = None
    float32: bool = False  # norms and softmax

    def read(self, param):
        return param if self.dtype is None else param.astype(self.dtype)

    def norm(self, norm, x):
        """Runs a norm, made by ``norm(dtype)``."""
        if not self.float32:
            return norm(self.dtype)(x)
        return norm(jnp.float32)(x.astype(jnp.float32)).astype(self.dtype)

    @property
    def attention(self):
        by_hand = {"attention_fn": _attention} if self.float32 else {}
        return {"dtype": self.dtype, **by_hand}


def _attention(q, k, v, mask, **kwargs):
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    logits = jnp.where(mask, logits, jnp.finfo(q.dtype).min).astype(jnp.float32)
    weights = jax.nn.softmax(logits).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Transformer(nn.Module):
    """A decoder with learned positions and a tied head."""

    width: int
    depth: int
    p: Precision = Precision()

    @nn.compact
    def __call__(self, tokens):
        p = self.p
        embed = nn.Embed(256, self.width, dtype=p.dtype)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width)
        )
        x = embed(tokens) + p.read(positions)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            y = p.norm(lambda dtype: nn.LayerNorm(dtype=dtype), x)
            x = x + nn.MultiHeadDotProductAttention(8, **p.attention)(y, mask=mask)
            y = p.norm(lambda dtype: nn.LayerNorm(dtype=dtype), x)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=p.dtype)(y))
            x = x + nn.Dense(self.width, dtype=p.dtype)(y)
        x = p.norm(lambda dtype: nn.LayerNorm(dtype=dtype), x)
        return embed.attend(x).astype(jnp.float32)


class ResNet(nn.Module):
    """Residual convolutions with group norms."""

    width: int
    depth: int
    p: Precision = Precision()

    @nn.compact
    def __call__(self, x):
        p = self.p
        x = nn.Conv(self.width, (3, 3), dtype=p.dtype)(x)
        for _ in range(self.depth):
            y = p.norm(lambda dtype: nn.GroupNorm(8, dtype=dtype), x)
            x = x + nn.Conv(self.width, (3, 3), dtype=p.dtype)(nn.silu(y))
        x = nn.max_pool(x, (4, 4), (4, 4)).reshape(len(x), -1)
        return nn.Dense(10, dtype=p.dtype)(x).astype(jnp.float32)


class NNXBlock(nnx.Module):
    """A block of ``NNXTransformer``."""

    def __init__(self, width: int, p: Precision, *, rngs: nnx.Rngs):
        norm = jnp.float32 if p.float32 else p.dtype
        self.p = p
        self.norms = nnx.List(nnx.LayerNorm(width, dtype=norm, rngs=rngs) for _ in "ab")
        self.attention = nnx.MultiHeadAttention(
            8, width, **p.attention, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 4 * width, dtype=p.dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=p.dtype, rngs=rngs)

    def __call__(self, x, mask):
        first, second = self.norms
        x = x + self.attention(self.p.norm(lambda _: first, x), mask=mask)
        y = self.p.norm(lambda _: second, x)
        return x + self.down(nnx.gelu(self.up(y)))


class NNXTransformer(nnx.Module):
    """``Transformer`` in NNX."""

    def __init__(self, width: int, depth: int, p: Precision = Precision(), *, rngs):
        norm = jnp.float32 if p.float32 else p.dtype
        self.p = p
        self.embed = nnx.Embed(256, width, dtype=p.dtype, rngs=rngs)
        positions = jax.random.normal(rngs.params(), (128, width))
        self.positions = nnx.Param(0.02 * positions)
        self.blocks = nnx.List(NNXBlock(width, p, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, dtype=norm, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.p.read(self.positions[...])
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        x = self.p.norm(lambda _: self.norm, x)
        return self.embed.attend(x).astype(jnp.float32)


def linen(cls, *args):
    """A maker of (params, forward) of a Linen model, by precision or wrapped."""

    def make(way, inputs):
        model = cls(*args, way) if isinstance(way, Precision) else cls(*args)
        if way == "mpjax":
            model = mpjax.linen.MixedPrecision(model, "mixed_bfloat16")
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
        return params, model.apply

    return make


def in_nnx(cls, *args):
    """The same of an NNX model."""

    def make(way, inputs):
        precision = way if isinstance(way, Precision) else Precision()
        model = nnx.eval_shape(lambda: cls(*args, precision, rngs=nnx.Rngs(0)))
        if way == "mpjax":
            model = mpjax.nnx.mixed_precision(model, "mixed_bfloat16")
        graph, params = nnx.split(model)
        return params, lambda params, x: nnx.merge(graph, params)(x)

    return make


TOKENS = jnp.zeros((8, 128), jnp.int32)
MODELS = {
    "Linen transformer": (linen(Transformer, 256, 2), TOKENS),
    "Linen CNN": (linen(ResNet, 32, 3), jnp.ones((8, 32, 32, 3))),
    "NNX transformer": (in_nnx(NNXTransformer, 256, 2), TOKENS),
}
WAYS = {
    "by hand": Precision(BF16),
    "with float32": Precision(BF16, float32=True),
    "mpjax": "mpjax",
    "cast tree": "cast tree",
}


def step_of(way, make, inputs):
    """Parameters and the loss and gradient of one way to train a model."""
    params, forward = make(way, inputs)

    def loss(params, inputs):
        if way == "cast tree":
            params, inputs = mpjax.cast_floating((params, inputs), BF16)
        return jnp.mean(forward(params, inputs) ** 2, dtype=jnp.float32)

    return params, jax.value_and_grad(loss)


def instructions(text: str) -> collections.Counter:
    """What a compiled program does: opcodes with shapes and dtypes, without names."""
    found = re.findall(r"= (\S+) ([a-z][\w-]*)\(", text)
    return collections.Counter((re.sub(r"{.*?}", "", s), op) for s, op in found)


def figures_of(program: _aot.Program, with_float32: collections.Counter) -> dict:
    """What a program does, and whether by the instructions of another."""
    found, count = instructions(program.text), collections.Counter()
    for (_, opcode), n in found.items():
        count[opcode] += n
    figures = {
        "converts": count["convert"],
        "dots_and_convolutions": count["dot"] + count["convolution"],
        "bytes": program.bytes,
        "same_as_with_float32": found == with_float32,
    }
    if program.target in _aot.TPUS:
        figures["cycles"] = program.cycles
    return figures


def tracing_times(steps, inputs, rounds: int) -> dict[str, float]:
    """Medians over rounds of the time to trace each step, relative to the first's."""
    times = collections.defaultdict(list)
    for _ in range(rounds):
        for way, (params, step) in steps.items():
            start = time.perf_counter()
            jax.make_jaxpr(lambda p, x, step=step: step(p, x))(params, inputs)
            times[way].append(time.perf_counter() - start)
    base = times["by hand"]
    return {
        way: statistics.median(a / b for a, b in zip(ts, base, strict=True))
        for way, ts in times.items()
    }


def main() -> None:
    parser = _results.parser(__doc__, "policies")
    parser.add_argument("--targets", nargs="*", default=["cpu", "tpu7x", "v5e"])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    table = Table("model", "way", title="A step in mixed_bfloat16")
    for column in ("tracing", "converts", "products"):
        table.add_column(column, justify="right")
    for target in args.targets:
        table.add_column(f"{target}\nMbytes", justify="right")
        if target in _aot.TPUS:
            table.add_column(f"{target}\nkcycles", justify="right")
    for name, (make, inputs) in MODELS.items():
        steps = {way: step_of(how, make, inputs) for way, how in WAYS.items()}
        tracing = tracing_times(steps, inputs, args.rounds)
        programs = {
            way: [_aot.compile_for(t, step, params, inputs) for t in args.targets]
            for way, (params, step) in steps.items()
        }
        base = [instructions(program.text) for program in programs["with float32"]]
        for way, compiled in programs.items():
            case = {"model": name, "way": way, "target": "tracing"}
            figures = {"tracing_ratio_to_by_hand": round(tracing[way], 3)}
            _results.save(args.json, case, figures, deterministic=False)
            cells = [f"{tracing[way]:.2f}"]
            for program, theirs in zip(compiled, base, strict=True):
                target, figures = program.target, figures_of(program, theirs)
                case = {"model": name, "way": way, "target": target}
                _results.save(
                    args.json, case, figures, deterministic=True, device=target
                )
                if len(cells) == 1:
                    counts = "converts", "dots_and_convolutions"
                    cells += [str(figures[count]) for count in counts]
                same = " =" if figures["same_as_with_float32"] else "  "
                cells.append(f"{figures['bytes'] / 1e6:.1f}{same}")
                if "cycles" in figures:
                    cells.append(f"{figures['cycles'] / 1e3:.0f}")
            table.add_row(name if way == "by hand" else "", way, *cells)
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
