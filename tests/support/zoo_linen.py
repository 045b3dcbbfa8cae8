"""Models of Linen as their authors write them: in float32, with nothing said of dtypes.

Each entry of `MODELS` makes a model and the shapes of its inputs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from zoo_language import (
    BERT,
    GPT,
    AttentionByHand,
    Block,
    EncoderDecoder,
    Llama,
    MoELM,
    Recurrent,
    RMSNorm,
    ScannedLM,
    Seq2Seq,
    rotate_half,
    sinusoids,
)

F32 = jnp.float32


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (256, 128):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(64, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        x = nn.relu(norm()(nn.Conv(32, (3, 3), use_bias=False)(x)))
        for width in (32, 64):
            strides = (width // 32,) * 2
            y = nn.relu(norm()(nn.Conv(width, (3, 3), strides, use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(width, (1, 1), strides, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """With layer scale, a parameter that is broadcast over all positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(48, (4, 4), (4, 4))(x))
        for _ in range(2):
            y = nn.Conv(48, (7, 7), feature_group_count=48)(x)
            y = nn.Dense(192)(nn.LayerNorm()(y))
            y = nn.Dense(48)(nn.gelu(y, approximate=False))
            x = x + y
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.swish(nn.Conv(32, (3, 3))(x))
        gate = nn.swish(nn.Dense(8)(x.mean((1, 2), keepdims=True)))
        x = x * nn.sigmoid(nn.Dense(32)(gate))
        return nn.Dense(10)(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skips = []
        for width in (16, 32):
            x = nn.swish(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
            skips.append(x)
            x = nn.Conv(width, (3, 3), (2, 2))(x)
        for width in (32, 16):
            x = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            x = jnp.concatenate([x, skips.pop()], -1)
            x = nn.swish(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
        return nn.Conv(3, (1, 1))(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, 64)
        token = self.param("cls", nn.initializers.zeros, (1, 1, 64))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("pos", nn.initializers.normal(), (1, x.shape[1], 64))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (4, 4), (4, 4))(x).reshape(x.shape[0], -1, 64)
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(32)(y)))
            x = x + y.swapaxes(1, 2)
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


class SSM(nn.Module):
    """A selective recurrence in float32, on purpose."""

    @nn.compact
    def __call__(self, x):
        states = 8
        u = nn.silu(nn.Dense(32)(x))
        step = nn.softplus(nn.Dense(32)(u)).astype(F32)
        b, c = jnp.split(nn.Dense(2 * states)(u).astype(F32), 2, -1)
        log_a = self.param("log_a", nn.initializers.zeros, (32, states))
        a = -jnp.exp(log_a.astype(F32))
        decay = jnp.exp(step[..., None] * a)
        drive = (step * u.astype(F32))[..., None] * b[:, :, None]

        def advance(state, now):
            decay, drive, c = now
            state = decay * state + drive
            return state, jnp.einsum("bdn,bn->bd", state, c)

        start = jnp.zeros((x.shape[0], 32, states), F32)
        over_time = jax.tree.map(lambda v: v.swapaxes(0, 1), (decay, drive, c))
        _, y = lax.scan(advance, start, over_time)
        y = y.swapaxes(0, 1).astype(x.dtype)
        return nn.Dense(10)(y * nn.silu(nn.Dense(32)(x)))


class LinearRecurrence(nn.Module):
    """By an associative scan, in float32 on purpose."""

    @nn.compact
    def __call__(self, x):
        gate = nn.sigmoid(nn.Dense(32)(x)).astype(F32)
        value = nn.Dense(32)(x).astype(F32) * (1 - gate)

        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, y = lax.associative_scan(combine, (gate, value), axis=1)
        return nn.Dense(10)(y.astype(x.dtype))


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(128)(x))
        mean = nn.Dense(16)(hidden)
        spread = nn.softplus(nn.Dense(16)(hidden))
        noise = jax.random.normal(jax.random.key(0), mean.shape, mean.dtype)
        hidden = nn.relu(nn.Dense(128)(mean + spread * noise))
        return nn.Dense(x.shape[-1])(hidden)


class GAN(nn.Module):
    @nn.compact
    def __call__(self, z):
        x = nn.Dense(4 * 4 * 32)(z).reshape(-1, 4, 4, 32)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.relu(nn.ConvTranspose(16, (4, 4), (2, 2))(x))
        x = jnp.tanh(nn.ConvTranspose(3, (4, 4), (2, 2))(x))
        x = nn.leaky_relu(nn.Conv(16, (4, 4), (2, 2))(x), 0.2)
        x = nn.leaky_relu(nn.Conv(32, (4, 4), (2, 2))(x), 0.2)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))


class Diffusion(nn.Module):
    """Times are whole numbers; their sines are made in float32."""

    @nn.compact
    def __call__(self, x, times):
        rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(32, dtype=F32) / 32)
        angles = times.astype(F32)[:, None] * rates
        t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).astype(x.dtype)
        t = nn.Dense(64)(nn.silu(nn.Dense(64)(t)))
        x = nn.Conv(32, (3, 3))(x)
        for _ in range(2):
            y = nn.Conv(32, (3, 3))(nn.silu(nn.GroupNorm(8)(x)))
            scale, shift = jnp.split(nn.Dense(64)(nn.silu(t))[:, None, None], 2, -1)
            y = nn.GroupNorm(8)(y) * (1 + scale) + shift
            x = x + nn.Conv(32, (3, 3))(nn.silu(y))
        return nn.Conv(3, (3, 3))(x)


class DiT(nn.Module):
    @nn.compact
    def __call__(self, x, times):
        x = nn.Dense(64)(x)
        x = x + sinusoids(x)
        rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(32, dtype=F32) / 32)
        angles = times.astype(F32)[:, None] * rates
        t = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).astype(x.dtype)
        t = nn.silu(nn.Dense(64)(t))
        for _ in range(2):
            shift, scale, gate = jnp.split(nn.Dense(192)(t)[:, None], 3, -1)
            y = nn.LayerNorm(use_bias=False, use_scale=False)(x)
            y = y * (1 + scale) + shift
            x = x + gate * nn.MultiHeadDotProductAttention(4)(y)
        return nn.Dense(8)(x)


class CLIP(nn.Module):
    """A temperature that is learned; similarities are a product of the model's own."""

    @nn.compact
    def __call__(self, x, tokens):
        image = nn.Dense(32)(nn.relu(nn.Dense(64)(x)))
        text = nn.Dense(32)(nn.Embed(128, 32)(tokens).mean(1))

        def unit(v):
            length = jnp.linalg.norm(v.astype(F32), axis=-1, keepdims=True)
            return v / length.astype(v.dtype)

        scale = self.param("scale", nn.initializers.constant(2.7), ())
        similar = unit(image) @ unit(text).T
        return similar.astype(F32) * jnp.exp(scale.astype(F32))


class GraphNet(nn.Module):
    """Messages are summed in float32."""

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        x = nn.Dense(32)(nodes)
        for _ in range(2):
            messages = nn.relu(nn.Dense(32)(x[senders]))
            total = jax.ops.segment_sum(
                messages.astype(F32), receivers, num_segments=x.shape[0]
            )
            x = nn.relu(x + nn.Dense(32)(total.astype(x.dtype)))
        return nn.Dense(4)(x)


class PointNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        x = nn.relu(nn.Dense(128)(x)).max(1)
        return nn.Dense(10)(x)


class Recommender(nn.Module):
    @nn.compact
    def __call__(self, users, items):
        u, i = nn.Embed(1000, 32)(users), nn.Embed(5000, 32)(items)
        x = jnp.concatenate([u * i, u, i], -1)
        return nn.Dense(1)(nn.relu(nn.Dense(64)(x)))


class Policy(nn.Module):
    """An actor and a critic."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(64)(x))
        return nn.Dense(6)(x), nn.Dense(1)(x)


class WaveNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, total = nn.Conv(16, (1,))(x), 0
        for dilation in (1, 2, 4):
            y = nn.Conv(32, (2,), kernel_dilation=dilation, padding="CAUSAL")(x)
            value, gate = jnp.split(y, 2, -1)
            y = jnp.tanh(value) * nn.sigmoid(gate)
            total = total + nn.Conv(16, (1,))(y)
            x = x + nn.Conv(16, (1,))(y)
        return nn.Conv(8, (1,))(nn.relu(total))


class Siren(nn.Module):
    """Sines of hidden layers."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = jnp.sin(nn.Dense(64)(x))
        return nn.Dense(3)(x)


IMAGES = floats(64, 32, 32, 3)
TOKENS = ints(16, 128)
TIMES = ints(64)

MODELS = {
    "mlp": (MLP(), floats(128, 784)),
    "cnn": (CNN(), IMAGES),
    "resnet": (ResNet(), IMAGES),
    "convnext": (ConvNeXt(), IMAGES),
    "squeeze_excite": (SqueezeExcite(), IMAGES),
    "unet": (UNet(), IMAGES),
    "gpt": (GPT(), TOKENS),
    "gpt_dropout": (GPT((("dropout", 0.1),)), TOKENS),
    "gpt_rms": (GPT((("norm", nn.RMSNorm),)), TOKENS),
    "gpt_own_norm": (GPT((("norm", RMSNorm),)), TOKENS),
    "gpt_quick_gelu": (GPT((("activation", "quick"),)), TOKENS),
    "gpt_mish": (GPT((("activation", "mish"),)), TOKENS),
    "bert": (BERT(), TOKENS),
    "encoder_decoder": (EncoderDecoder(), TOKENS, TOKENS),
    "llama": (Llama(), TOKENS),
    "llama_half": (Llama(rotate_half), TOKENS),
    "scanned": (ScannedLM(), TOKENS),
    "scanned_remat": (ScannedLM(remat=True), TOKENS),
    "vit": (ViT(), IMAGES),
    "mixer": (Mixer(), IMAGES),
    "lstm": (Recurrent(), TOKENS),
    "gru": (Recurrent(nn.GRUCell), TOKENS),
    "rnn": (Recurrent(nn.SimpleCell), TOKENS),
    "seq2seq": (Seq2Seq(), TOKENS, TOKENS),
    "ssm": (SSM(), floats(16, 128, 32)),
    "linear_recurrence": (LinearRecurrence(), floats(16, 128, 32)),
    "moe": (MoELM(), TOKENS),
    "vae": (VAE(), floats(128, 784)),
    "gan": (GAN(), floats(64, 100)),
    "diffusion": (Diffusion(), IMAGES, TIMES),
    "dit": (DiT(), floats(64, 64, 8), TIMES),
    "clip": (CLIP(), floats(64, 128), ints(64, 16)),
    "graph": (GraphNet(), floats(500, 16), ints(2000), ints(2000)),
    "point_cloud": (PointNet(), floats(32, 1024, 3)),
    "recommender": (Recommender(), ints(1024), ints(1024)),
    "actor_critic": (Policy(), floats(256, 17)),
    "wavenet": (WaveNet(), floats(8, 1024, 1)),
    "siren": (Siren(), floats(1024, 2)),
    "attention_by_hand": (AttentionByHand(), floats(16, 64, 32)),
}
