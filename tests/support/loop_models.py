"""Models that call their layers in loops and branches, in Linen and in NNX.

The layers make float32 arrays of their own: noise, a mask of dropped paths, zeros.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import mpjax.linen
import mpjax.nnx

KEY = jax.random.key(0)
STREAM = []  # dtypes with which a block is entered and left


def disturbed(x, y):
    """A residual step with a float32 mask and float32 noise."""
    keep = jax.random.bernoulli(KEY, 0.5, (len(x), 1)).astype(jnp.float32)
    return x + y * keep + 0.01 * jax.random.normal(KEY, x.shape)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        STREAM.append(x.dtype.name)
        return disturbed(x, nn.Dense(8)(nn.LayerNorm()(x)))


class LinenBody(nn.Module):
    """A block as ``nn.scan`` wants it."""

    @nn.compact
    def __call__(self, x, _):
        STREAM.append(x.dtype.name)
        return disturbed(x, nn.Dense(8)(nn.LayerNorm()(x))), None


class LinenBlocks(nn.Module):
    """Two blocks with parameters of their own, after one layer."""

    loop: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        if self.loop == "python":
            for i in range(2):
                x, _ = LinenBody(name=f"blocks_{i}")(x, None)
            return x
        body = LinenBody
        if self.loop == "remat in scan":
            body = nn.remat(LinenBody, prevent_cse=False)
        axes, split = {"params": 0}, {"params": True}
        scan = nn.scan(body, variable_axes=axes, split_rngs=split, length=2)
        return scan(name="blocks")(x, None)[0]


class LinenShared(nn.Module):
    """One block in a loop or a branch."""

    loop: str

    def setup(self):
        self.first, self.blocks = nn.Dense(8), LinenBlock()

    def __call__(self, x):
        x = self.first(x)
        if self.is_initializing():
            return self.blocks(x)
        lifted = {
            "nn.while_loop": lambda: nn.while_loop(
                lambda _, carry: carry[0] < 2,
                lambda model, carry: (carry[0] + 1, model.blocks(carry[1])),
                self,
                (0, x),
            )[1],
            "nn.cond": lambda: nn.cond(
                x[0, 0] > 0,
                lambda model, x: model.blocks(x),
                lambda model, x: x,
                self,
                x,
            ),
        }
        if self.loop in lifted:
            return lifted[self.loop]()
        return LOOPS[self.loop](lambda x: self.blocks(x), x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        STREAM.append(x.dtype.name)
        return disturbed(x, self.dense(self.norm(x)))


class NnxBlocks(nnx.Module):
    """Two blocks with parameters of their own, after one layer."""

    def __init__(self, loop, rngs):
        self.loop, self.first = loop, nnx.Linear(8, 8, rngs=rngs)
        if loop == "python":
            self.blocks: Any = nnx.List([NnxBlock(rngs) for _ in range(2)])
        else:
            keys = jax.random.split(KEY, 2)
            self.blocks = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(keys)

    def __call__(self, x):
        x = self.first(x)
        if self.loop == "python":
            for block in self.blocks:
                x = block(x)
            return x

        def step(x, block):
            return block(x)

        step = nnx.remat(step) if self.loop == "remat in scan" else step
        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.blocks)


class NnxShared(nnx.Module):
    """One block in a loop or a branch."""

    def __init__(self, loop, rngs):
        self.loop, self.first = loop, nnx.Linear(8, 8, rngs=rngs)
        self.blocks = NnxBlock(rngs)

    def __call__(self, x):
        x = self.first(x)
        lifted = {
            "nnx.while_loop": lambda: nnx.while_loop(
                lambda carry: carry[0] < 2,
                lambda carry: (carry[0] + 1, carry[1], carry[1](carry[2])),
                (0, self.blocks, x),
            )[2],
            "nnx.cond": lambda: nnx.cond(
                x[0, 0] > 0,
                lambda block, x: block(x),
                lambda block, x: x,
                self.blocks,
                x,
            ),
        }
        if self.loop in lifted:
            return lifted[self.loop]()
        return LOOPS[self.loop](lambda x: self.blocks(x), x)


def from_zeros(loop):
    """The loop, begun with the float32 zeros of an author who names no dtype."""
    return lambda fn, x: loop(fn, jnp.zeros(x.shape))


LOOPS = {
    "scan": lambda fn, x: jax.lax.scan(lambda x, _: (fn(x), None), x, length=2)[0],
    "while": lambda fn, x: jax.lax.while_loop(
        lambda carry: carry[0] < 2,
        lambda carry: (carry[0] + 1, fn(carry[1])),
        (0, x),
    )[1],
    "fori": lambda fn, x: jax.lax.fori_loop(0, 2, lambda i, x: fn(x), x),
    "cond": lambda fn, x: jax.lax.cond(x[0, 0] > 0, fn, lambda x: x, x),
    "switch": lambda fn, x: jax.lax.switch(1, [lambda x: x, fn], x),
    "checkpoint": lambda fn, x: jax.checkpoint(fn)(x),
}
LOOPS["scan from zeros"] = from_zeros(LOOPS["scan"])
LOOPS["while from zeros"] = from_zeros(LOOPS["while"])

STACKED = "python", "scan", "remat in scan"
LIFTED = {
    "linen": ("nn.while_loop", "nn.cond"),
    "nnx": ("nnx.while_loop", "nnx.cond"),
}


MODELS = {}  # by front end and name: a function of the model's fields


def model_of(front_end, name, *fields):
    """A model; one of NNX is given random numbers as well."""
    made = MODELS[front_end, name]
    return made(*fields) if front_end == "linen" else made(*fields, nnx.Rngs(0))


def trace(front_end, name, fields, rules, *inputs):
    """The jaxpr of a mixed model and its outputs' shapes; nothing is computed."""
    if front_end == "linen":
        model = mpjax.linen.MixedPrecision(model_of(front_end, name, *fields), rules)
        variables = jax.eval_shape(model.init, KEY, *inputs)
        STREAM.clear()
        run = jax.make_jaxpr(model.apply, return_shape=True)
        return run(variables, *inputs)
    model = nnx.eval_shape(lambda: model_of(front_end, name, *fields))
    graph, state = nnx.split(mpjax.nnx.mixed_precision(model, rules))
    STREAM.clear()

    def run(state, *inputs):
        return nnx.merge(graph, state)(*inputs)

    return jax.make_jaxpr(run, return_shape=True)(state, *inputs)


# Recurrent networks. Rows of ``xs`` are steps; ``resets`` begins some of them anew.


def restart(carry, reset):
    """Zeros of float32 where a carry is reset."""
    return jax.tree.map(
        lambda h: jnp.where(reset[:, None], jnp.zeros(h.shape), h), carry
    )


class LinenReset(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, carry, xs, resets):
        def step(cell, carry, step):
            x, reset = step
            return cell(restart(carry, reset), x)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        carry, ys = scan(self.cell(8, name="cell"), carry, (nn.Dense(8)(xs), resets))
        return carry, nn.Dense(2)(ys)


class NnxReset(nnx.Module):
    def __init__(self, cell, rngs):
        self.cell, self.first = cell(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, carry, xs, resets):
        def step(carry, step):
            x, reset = step
            return self.cell(restart(carry, reset), x)

        carry, ys = jax.lax.scan(step, carry, (self.first(xs), resets))
        return carry, self.last(ys)


class LinenResetByHand(LinenReset):
    """With a loop of JAX, whose body is no module."""

    @nn.compact
    def __call__(self, carry, xs, resets):
        xs, cell = nn.Dense(8)(xs), self.cell(8, name="cell")
        last = nn.Dense(2)
        if self.is_initializing():
            return carry, last(cell(carry, xs[0])[1])

        def step(carry, step):
            x, reset = step
            return cell(restart(carry, reset), x)

        carry, ys = jax.lax.scan(step, carry, (xs, resets))
        return carry, last(ys)


class NnxScannedStep(nnx.Module):
    """A network whose method is a loop, by a decorator."""

    def __init__(self, cell, rngs):
        self.cell = cell(8, 8, rngs=rngs)

    @nnx.scan(in_axes=(None, nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def __call__(self, carry, x, reset):
        return self.cell(restart(carry, reset), x)


class NnxDecorated(NnxReset):
    def __init__(self, cell, rngs):
        super().__init__(cell, rngs)
        self.scanned = NnxScannedStep(cell, rngs)

    def __call__(self, carry, xs, resets):
        carry, ys = self.scanned(carry, self.first(xs), resets)
        return carry, self.last(ys)


class LinenScannedStep(nn.Module):
    cell: type

    @functools.partial(
        nn.scan, variable_broadcast="params", split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry, x, reset):
        return self.cell(8, name="cell")(restart(carry, reset), x)


class LinenDecorated(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, carry, xs, resets):
        carry, ys = LinenScannedStep(self.cell)(carry, nn.Dense(8)(xs), resets)
        return carry, nn.Dense(2)(ys)


class LinenByHand(nn.Module):
    """The recurrence of a book, from zeros, with two layers."""

    def setup(self):
        self.of_input, self.of_state = nn.Dense(8), nn.Dense(8)

    def __call__(self, xs):
        h = jnp.zeros((xs.shape[1], 8))
        if self.is_initializing():
            return self.of_input(xs), self.of_state(h)
        return recurrence(self, h, xs)


class NnxByHand(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.of_input = nnx.Linear(8, 8, rngs=rngs)
        self.of_state = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, xs):
        return recurrence(self, jnp.zeros((xs.shape[1], 8)), xs)


def recurrence(layers, h, xs):
    """All states of a network of two layers."""

    def step(h, x):
        h = jnp.tanh(layers.of_input(x) + layers.of_state(h))
        return h, h

    return jax.lax.scan(step, h, xs)[1]


MODELS |= {
    ("linen", "blocks"): LinenBlocks,
    ("linen", "shared"): LinenShared,
    ("linen", "reset"): LinenReset,
    ("linen", "reset in jax"): LinenResetByHand,
    ("linen", "reset, decorated"): LinenDecorated,
    ("linen", "by hand"): LinenByHand,
    ("linen", "cell"): lambda cell: nn.Sequential(
        [nn.Dense(8), nn.RNN(cell(8, name="cell"))]
    ),
    ("nnx", "blocks"): NnxBlocks,
    ("nnx", "shared"): NnxShared,
    ("nnx", "reset"): NnxReset,
    ("nnx", "reset in jax"): NnxReset,
    ("nnx", "reset, decorated"): NnxDecorated,
    ("nnx", "by hand"): NnxByHand,
    ("nnx", "cell"): lambda cell, rngs: nnx.Sequential(
        nnx.Linear(8, 8, rngs=rngs), nnx.RNN(cell(8, 8, rngs=rngs))
    ),
}
