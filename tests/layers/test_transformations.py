"""Transformations without a carry change no dtype, and loops get theirs back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import normal

import mpjax
import mpjax.linen
import mpjax.nnx

X = normal(7, 4, 8)
BIG = [mpjax.Rule("blk(/.*)?", "float32"), "mixed_bfloat16"]
PLACES = jnp.linspace(0, 1, 32).reshape(4, 8)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


WAYS = {
    "plain": lambda fn: fn,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "map": lambda fn: lambda x: jax.lax.map(fn, x),
    "grad": lambda fn: (
        lambda x: jax.value_and_grad(
            lambda x: (fn(x).astype(jnp.float32).sum(), fn(x)), has_aux=True
        )(x)[0][1]
    ),
}


def mixing(kind, layer, x):
    """What blocks make of their input."""
    if kind == "dense":
        return layer(x)
    if kind == "large":
        return x * jnp.float32(1e5)
    return layer(x) + PLACES[: x.shape[0]] if x.ndim > 1 else layer(x) + PLACES[0]


class LinenBlk(nn.Module):
    kind: str = "dense"

    @nn.compact
    def __call__(self, x):
        return mixing(self.kind, nn.Dense(8), x)


class LinenNet(nn.Module):
    kind: str
    way: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        lifted = {"nn.remat": nn.remat, "nn.jit": nn.jit}
        block = lifted.get(self.way, lambda kind: kind)(LinenBlk)(self.kind, name="blk")
        if self.is_initializing() or self.way not in WAYS:
            y = block(x)
        else:
            y = WAYS[self.way](lambda x: block(x))(x)
        SEEN.append(y.dtype.name)
        return y


class NnxBlk(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind, self.layer = kind, nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return mixing(self.kind, self.layer, x)


class NnxNet(nnx.Module):
    def __init__(self, kind, way, rngs):
        self.first, self.blk = nnx.Linear(8, 8, rngs=rngs), NnxBlk(kind, rngs)
        self.way = way

    def __call__(self, x):
        lifted = {
            "nnx.remat": nnx.remat(lambda blk, x: blk(x)),
            "nnx.jit": nnx.jit(lambda blk, x: blk(x)),
        }
        if self.way in lifted:
            y = lifted[self.way](self.blk, self.first(x))
        else:
            y = WAYS[self.way](lambda x: self.blk(x))(self.first(x))
        SEEN.append(y.dtype.name)
        return y


SEEN: list[str] = []


def run(net, rules, *inputs):
    """The shapes of a model's results; ``net`` takes random numbers if it is NNX."""
    if isinstance(net, nn.Module):
        model = mpjax.linen.MixedPrecision(net, rules)
        variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        SEEN.clear()
        return jax.eval_shape(model.apply, variables, *inputs)
    graph, state = nnx.split(
        mpjax.nnx.mixed_precision(nnx.eval_shape(lambda: net(nnx.Rngs(0))), rules)
    )
    SEEN.clear()
    return jax.eval_shape(lambda s: nnx.merge(graph, s)(*inputs), state)


@pytest.mark.parametrize("kind", ["dense", "large", "table"])
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_transformations_without_a_carry_leave_every_dtype_as_it_is(name, kind):
    lifted = ["nn.remat", "nn.jit"] if name == "linen" else ["nnx.remat", "nnx.jit"]
    half = [mpjax.Rule("blk(/.*)?", "float32"), "mixed_float16"]
    for rules, expected in ((BIG, "float32"), (half, "float32"), (BIG[1], None)):
        found = {}
        for way in (*lifted, *WAYS):
            if name == "linen":
                run(LinenNet(kind, way), rules, X)
            else:
                run(functools.partial(NnxNet, kind, way), rules, X)
            found[way] = frozenset(SEEN)
        assert set(found.values()) == {found["plain"]}, found
        assert expected is None or found["plain"] == {expected}


# ---- Loops: what the loop has handed to its body decides ----


def scan(fn, init, xs=None):
    return jax.lax.scan(lambda h, e: (fn(h, e), None), init, xs, length=2)[0]


# A loop around a cell of two arguments, with a 16-bit stream and float32 zeros of its
# shape, and the dtype that comes out of it.
LOOPED = {
    "float32 sum": (
        lambda cell, x, wide: scan(lambda h, _: cell(h, x), wide),
        "float32",
    ),
    "float32 sum, while": (
        lambda cell, x, wide: jax.lax.while_loop(
            lambda carry: carry[0] < 2,
            lambda carry: (carry[0] + 1, cell(carry[1], x)),
            (0, wide),
        )[1],
        "float32",
    ),
    "reset": (
        lambda cell, x, wide: scan(
            lambda h, e: cell(h * jnp.float32(0.5), e), x, jnp.stack([wide, wide])
        ),
        "bfloat16",
    ),
    "table first": (
        lambda cell, x, wide: scan(lambda h, e: cell(e, h), x, jnp.stack([wide, wide])),
        "bfloat16",
    ),
    "table first, checkpoint": (
        lambda cell, x, wide: scan(
            lambda h, e: jax.checkpoint(cell)(e, h), x, jnp.stack([wide, wide])
        ),
        "bfloat16",
    ),
    "two carries": (
        lambda cell, x, wide: scan(
            lambda carry, _: (cell(*carry), cell(carry[1], carry[1])), (wide, x)
        )[1],
        "bfloat16",
    ),
    "a branch of no arguments": (
        lambda cell, x, wide: jax.lax.cond(
            x[0, 0] > 0, lambda: cell(wide, x), lambda: x
        ),
        "bfloat16",
    ),
}


def through(case, cell, x):
    out = LOOPED[case][0](cell, x, jnp.zeros(x.shape, jnp.float32))
    SEEN.append(out.dtype.name)
    return out


def sum_of(kind, layer, h, x):
    if kind == "wide":
        return h + layer(x).astype(jnp.float32)
    return (h.astype(x.dtype) + layer(x)).astype(jnp.bfloat16)


class LinenSum(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, h, x):
        return sum_of(self.kind, nn.Dense(8), h, x)


class LinenLooped(nn.Module):
    kind: str
    case: str

    @nn.compact
    def __call__(self, x, z):
        x, cell = nn.Dense(8)(x), LinenSum(self.kind)
        if self.is_initializing():
            return cell(x, x)
        return through(self.case, lambda h, x: cell(h, x), x)


class NnxSum(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind, self.layer = kind, nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, h, x):
        return sum_of(self.kind, self.layer, h, x)


class NnxLooped(nnx.Module):
    def __init__(self, kind, case, rngs):
        self.case, self.first = case, nnx.Linear(8, 8, rngs=rngs)
        self.cell = NnxSum(kind, rngs)

    def __call__(self, x, z):
        return through(self.case, lambda h, x: self.cell(h, x), self.first(x))


@pytest.mark.parametrize("kind", ["wide", "narrow"])
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_carry_has_the_dtype_with_which_the_loop_began(name, kind):
    for case, (_, expected) in LOOPED.items():
        if name == "linen":
            net = LinenLooped(kind, case)
        else:
            net = functools.partial(NnxLooped, kind, case)
        run(net, "mixed_bfloat16", X, X)
        assert set(SEEN) == {expected}, case


class LinenScannedSum(nn.Module):
    """A float32 sum in ``nn.scan``, of a model whose arguments have its shape."""

    @nn.compact
    def __call__(self, x, z):
        def step(cell, h, _):
            return cell(h, x), None

        scan = nn.scan(
            step, variable_broadcast="params", split_rngs={"params": False}, length=2
        )
        out, _ = scan(LinenSum("wide"), jnp.zeros(x.shape, jnp.float32), None)
        SEEN.append(out.dtype.name)
        return out


def test_a_float32_sum_in_a_scan_of_linen():
    run(LinenScannedSum(), "mixed_bfloat16", X, X)
    assert SEEN == ["float32"]
