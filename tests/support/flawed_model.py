"""A model of Linen that is right, or wrong in one of three ways."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Struct = jax.ShapeDtypeStruct
BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn


class Block(nn.Module):
    careless: bool

    @nn.compact
    def __call__(self, x):
        norm = nn.LayerNorm(dtype=BF16, force_float32_reductions=not self.careless)
        hidden = nn.gelu(nn.Dense(64, dtype=BF16)(norm(x)))
        return x + nn.Dense(32, dtype=BF16)(hidden)


class Model(nn.Module):
    """Right, or wrong in one of three ways."""

    positions: object = BF16  # None: read as they are, in float32
    careless_norm: bool = False
    dequantize: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 32, dtype=BF16)(tokens)
        positions = self.param("positions", nn.initializers.zeros, (1, 8, 32))
        x = x + (positions.astype(self.positions) if self.positions else positions)
        for _ in range(2):
            x = Block(self.careless_norm)(x)
        if self.dequantize:
            kernel = self.param("kernel", nn.initializers.ones, (32, 32))
            with jax.named_scope("careless_dot"):
                w, q = (kernel * 4).astype(E4M3), (x / 2).astype(E4M3)
                x = (q.astype(BF16) * 2) @ (w.astype(BF16) / 4)
        return nn.Dense(16, dtype=BF16)(x).astype(F32)


def forward(model):
    tokens = Struct((4, 8), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        return model.apply, params, tokens
