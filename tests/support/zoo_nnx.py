"""Models of NNX as their authors write them: in float32, with nothing said of dtypes.

Each entry of `MODELS` is a class, whose argument is `nnx.Rngs`, and shapes of inputs.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from zoo_language import rotate, sinusoids
from zoo_linen import IMAGES, TIMES, TOKENS, floats

F32 = jnp.float32


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(784, 128, rngs=rngs)])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = x + nnx.relu(self.norm(self.conv(x)))
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    def __init__(self, rngs, turns=False):
        self.norms = nnx.List([nnx.LayerNorm(64, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)
        self.turns = turns

    def __call__(self, x):
        y = self.norms[0](x)
        if self.turns:
            y = rotate(y.reshape(*y.shape[:2], 4, 16)).reshape(y.shape)
        x = x + self.attention(y)
        y = nnx.gelu(self.up(self.norms[1](x)), approximate=False)
        return x + self.down(y)


class GPT(nnx.Module):
    turns = False

    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 64, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, self.turns) for _ in range(2)])
        self.norm = nnx.RMSNorm(64, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x if self.turns else x + sinusoids(x)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Rotary(GPT):
    turns = True


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 64, (8, 8), (8, 8), rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((1, 16, 64)))
        self.block = Block(rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], -1, 64) + self.positions[...]
        return self.head(self.block(x).mean(1))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(32, 32, rngs=rngs))
        self.head = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.rnn(self.embed(tokens)))


class SSM(nnx.Module):
    """A recurrence in float32, on purpose."""

    def __init__(self, rngs):
        self.inwards = nnx.Linear(32, 32, rngs=rngs)
        self.outwards = nnx.Linear(32, 10, rngs=rngs)
        self.mix = nnx.Param(jnp.eye(32))
        self.decay = nnx.Param(jnp.zeros(32))

    def __call__(self, x):
        u = nnx.silu(self.inwards(x)).astype(F32).swapaxes(0, 1)
        decay = jax.nn.sigmoid(self.decay[...].astype(F32))
        mix = self.mix[...].astype(F32)

        def advance(state, now):
            state = decay * (state @ mix) + now
            return state, state

        start = jnp.zeros(u.shape[1:], F32)
        y = lax.scan(advance, start, u)[1].swapaxes(0, 1)
        return self.outwards(y.astype(x.dtype))


class MoE(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.router = nnx.Linear(32, 4, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jnp.zeros((4, 32, 64)))
        self.down = nnx.Param(jnp.zeros((4, 64, 32)))
        self.head = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        gates = jax.nn.softmax(self.router(x).astype(F32))
        weight, chosen = lax.top_k(gates, 2)
        share = (jax.nn.one_hot(chosen, 4) * weight[..., None]).sum(-2)
        y = jax.nn.silu(jnp.einsum("bsd,edf->besf", x, self.up[...]))
        y = jnp.einsum("besf,efd->besd", y, self.down[...])
        y = (y * share.astype(x.dtype).swapaxes(1, 2)[..., None]).sum(1)
        return self.head(x + y)


class Denoiser(nnx.Module):
    def __init__(self, rngs):
        self.time = nnx.Linear(32, 16, rngs=rngs)
        self.inwards = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(16, num_groups=4, rngs=rngs)
        self.outwards = nnx.Conv(16, 3, (3, 3), rngs=rngs)

    def __call__(self, x, times):
        angles = times.astype(F32)[:, None] * 0.001 ** jnp.linspace(0, 1, 16)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        t = self.time(waves.astype(x.dtype))
        y = nnx.silu(self.norm(self.inwards(x))) + t[:, None, None]
        return self.outwards(y)


MODELS = {
    "mlp": (MLP, floats(128, 784)),
    "resnet": (ResNet, IMAGES),
    "gpt": (GPT, TOKENS),
    "rotary": (Rotary, TOKENS),
    "vit": (ViT, IMAGES),
    "recurrent": (Recurrent, TOKENS),
    "ssm": (SSM, floats(16, 128, 32)),
    "moe": (MoE, TOKENS),
    "denoiser": (Denoiser, IMAGES, TIMES),
}
