"""Layers of Flax that multiply, as NNX and as Linen have them, and an input's shape."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from nnx_models import rngs


class AttendLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(24, 32, name="embed").attend(x)


class AttendNnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(24, 32, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(x)


def of_nnx(kind, *args, **kwargs):
    return lambda: kind(*args, rngs=rngs(), **kwargs)


MASK = jnp.ones((3, 16, 12)).at[0].set(0)
# Without an entry for NNX where the layer of Linen is of interest alone.
LAYERS = {
    "Dense": (of_nnx(nnx.Linear, 32, 24), nn.Dense(24), (3, 32)),
    "Dense without bias": (None, nn.Dense(24, use_bias=False), (32,)),
    "DenseGeneral": (
        of_nnx(nnx.LinearGeneral, (4, 8), (4, 6), axis=(-2, -1)),
        nn.DenseGeneral((4, 6), axis=(-2, -1)),
        (3, 4, 8),
    ),
    "DenseGeneral with batch": (
        of_nnx(nnx.LinearGeneral, 8, 6, batch_axis={0: 3}),
        nn.DenseGeneral(6, batch_dims=(0,)),
        (3, 5, 8),
    ),
    "Einsum": (
        of_nnx(nnx.Einsum, "bsd,ndh->bnsh", (4, 8, 6), (4, 6)),
        nn.Einsum((4, 8, 6), "bsd,ndh->bnsh"),
        (3, 5, 8),
    ),
    "Einsum with dots": (
        of_nnx(nnx.Einsum, "...d,dh->...h", (8, 6)),
        nn.Einsum((8, 6), "...d,dh->...h", False),
        (3, 5, 8),
    ),
    "Einsum with dots and bias": (None, nn.Einsum((8, 6), "...d,dh->...h"), (3, 5, 8)),
    "Einsum to the front": (None, nn.Einsum((8, 6), "...d,dh->h...", False), (3, 5, 8)),
    "Conv": (
        of_nnx(nnx.Conv, 16, 12, (3, 3)),
        nn.Conv(12, (3, 3)),
        (2, 8, 8, 16),
    ),
    "Conv circular": (
        of_nnx(nnx.Conv, 16, 12, 3, 2, padding="CIRCULAR", kernel_dilation=2),
        nn.Conv(12, (3,), 2, "CIRCULAR", kernel_dilation=2),
        (8, 16),
    ),
    "Conv in groups": (
        of_nnx(nnx.Conv, 16, 12, 3, feature_group_count=4),
        nn.Conv(12, (3,), feature_group_count=4),
        (2, 3, 8, 16),
    ),
    "ConvTranspose": (
        of_nnx(nnx.ConvTranspose, 16, 12, (3, 4), (2, 1)),
        nn.ConvTranspose(12, (3, 4), (2, 1)),
        (2, 8, 8, 16),
    ),
    "ConvTranspose valid": (None, nn.ConvTranspose(12, (2,), (3,), "VALID"), (8, 16)),
    "ConvTranspose of a gradient": (
        of_nnx(
            nnx.ConvTranspose,
            *(16, 12, (3, 2), (2, 3)),
            transpose_kernel=True,
            use_bias=False,
        ),
        nn.ConvTranspose(12, (3, 2), (2, 3), transpose_kernel=True, use_bias=False),
        (2, 3, 8, 5, 16),
    ),
    "ConvTranspose dilated": (
        None,
        nn.ConvTranspose(12, (3,), padding=[(2, 1)], kernel_dilation=(2,)),
        (2, 8, 16),
    ),
    "ConvTranspose padded": (None, nn.ConvTranspose(12, 3, (2,), 1), (2, 8, 16)),
    "ConvTranspose masked": (
        of_nnx(
            nnx.ConvTranspose,
            *(16, 12, 3),
            padding=1,
            mask=MASK.astype(jnp.bfloat16),
        ),
        nn.ConvTranspose(12, 3, padding=1, mask=MASK),
        (2, 8, 16),
    ),
    "ConvTranspose masked, same": (
        None,
        nn.ConvTranspose(12, (3,), mask=MASK),
        (2, 8, 16),
    ),
    "attend": (of_nnx(AttendNnx), AttendLinen(), (3, 32)),
    "attention": (
        of_nnx(nnx.MultiHeadAttention, 4, 16, decode=False),
        nn.MultiHeadDotProductAttention(4),
        (2, 5, 16),
    ),
}
PAIRED = [name for name, (of_nnx, *_) in LAYERS.items() if of_nnx]
