"""Products and train steps of which compilers are asked."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

import mpjax
import mpjax.lowering

Struct = jax.ShapeDtypeStruct
E4M3, E5M2, INT8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
E2M1, E8M0 = jnp.float4_e2m1fn, jnp.float8_e8m0fnu
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SIZE = 512


def dot(lhs, rhs, out=F32, precision=None):
    return lax.dot_general(
        lhs,
        rhs,
        (((lhs.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=out,
    )


def on_the_fly(x, w, scale):
    own = jnp.max(jnp.abs(x)).astype(F32) / 448
    q = jnp.clip(x.astype(F32) / own, -448, 448).astype(E4M3)
    return (dot(q, w) * (own * scale)).astype(BF16)


def dequantize_first(lhs, rhs, s, t):
    lhs, rhs = lhs.astype(BF16) * s.astype(BF16), rhs.astype(BF16) * t.astype(BF16)
    return dot(lhs, rhs, BF16)


def rows_first(lhs, rhs, s, t):
    return dequantize_first(lhs, rhs, s[:, None], t[None, :])


def matrix(dtype, *shape):
    return Struct(shape or (SIZE, SIZE), dtype)


SCALE, SCALES = Struct((), F32), Struct((SIZE,), F32)
PAIR = (matrix(E4M3), matrix(E4M3))
# Name of a cell of the tables -> function and arguments.
PRODUCTS = {
    "e4m3": (dot, *PAIR),
    "e5m2": (dot, matrix(E5M2), matrix(E5M2)),
    "e4m3 x e5m2": (dot, matrix(E4M3), matrix(E5M2)),
    "int8": (functools.partial(dot, out=jnp.int32), matrix(INT8), matrix(INT8)),
    "dequantize": (dequantize_first, *PAIR, SCALE, SCALE),
    "scale after": (lambda a, b, s, t: dot(a, b) * (s * t), *PAIR, SCALE, SCALE),
    "on the fly": (on_the_fly, matrix(BF16), matrix(E4M3), SCALE),
    "rows after": (
        lambda a, b, s, t: dot(a, b) * (s[:, None] * t[None, :]),
        *PAIR,
        SCALES,
        SCALES,
    ),
    "rows before": (rows_first, *PAIR, SCALES, SCALES),
    "bf16": (functools.partial(dot, out=BF16), matrix(BF16), matrix(BF16)),
    "f16": (dot, matrix(F16), matrix(F16)),
    "f32": (dot, matrix(F32), matrix(F32)),
    "f32 highest": (
        functools.partial(dot, precision="highest"),
        matrix(F32),
        matrix(F32),
    ),
}


def scaled_matmul(a, b, s, t):
    return jax.nn.scaled_matmul(a, b, s, t, preferred_element_type=F32)


def scaled_dot(a, b, s, t):
    """Contracts the last axis of both, which alone has a unit for nvfp4."""
    return lax.scaled_dot(
        a,
        b,
        lhs_scale=s,
        rhs_scale=t,
        dimension_numbers=(((2,), (2,)), ((0,), (0,))),
        preferred_element_type=F32,
    )


def scaled_dot_general(mode, *scale):
    config = jax.nn.get_scaled_dot_general_config(mode, *scale)
    numbers = (((2,), (2,)), ((0,), (0,)))
    return functools.partial(
        jax.nn.scaled_dot_general,
        dimension_numbers=numbers,
        preferred_element_type=F32,
        configs=[config] * 3,
    )


BLOCKS = {
    "scaled_matmul mxfp8": (
        scaled_matmul,
        *[matrix(E4M3, 1, 512, 512)] * 2,
        *[matrix(E8M0, 1, 512, 16)] * 2,
    ),
    "scaled_matmul nvfp4": (
        scaled_matmul,
        *[matrix(E2M1, 1, 512, 512)] * 2,
        *[matrix(E4M3, 1, 512, 32)] * 2,
    ),
    "scaled_dot_general mxfp8": (
        scaled_dot_general("mxfp8"),
        *[matrix(BF16, 1, 512, 512)] * 2,
    ),
    "scaled_dot_general nvfp4": (
        scaled_dot_general("nvfp4", jnp.float32(1)),
        *[matrix(BF16, 1, 512, 512)] * 2,
    ),
}
SCALED_DOTS = {
    "mxfp8": (
        scaled_dot,
        *[matrix(E4M3, 1, 512, 512)] * 2,
        matrix(E8M0, 1, 512, 16),
        matrix(E8M0, 1, 512, 16),
    ),
    "nvfp4": (
        scaled_dot,
        *[matrix(E2M1, 1, 512, 512)] * 2,
        matrix(E4M3, 1, 512, 32),
        matrix(E4M3, 1, 512, 32),
    ),
}


def report(products, target, **options):
    """Compiles several products as one program; a row each, by name."""
    args = [product[1:] for product in products.values()]

    def program(*args):
        results = []
        for (name, (fn, *_)), own in zip(products.items(), args, strict=True):
            with jax.named_scope(name.replace(" ", "_")):
                results.append(fn(*own))
        return results

    made = mpjax.lowering.report(program, *args, target=target, **options)
    names = {name.replace(" ", "_"): name for name in products}
    rows = {names[row.traced.path.split("/")[0]]: row for row in made.products}
    assert rows.keys() == products.keys()
    return rows, made


def fp8(policy="mixed_bfloat16"):
    return [mpjax.Rule(".*", policy, mpjax.current_scaling())]


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden), None


class Stack(nn.Module):
    """Scanned and rematerialized layers."""

    width: int = 128
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(self.width)(x, None)
        return nn.Dense(self.width)(x)


def train_step(model, inputs):
    """A step of SGD with momentum and its arguments as shapes."""
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def step(params, opt_state, inputs):
        def loss(params):
            return jnp.mean(model.apply(params, inputs).astype(F32) ** 2)

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return step, (params, jax.eval_shape(optimizer.init, params), inputs)
