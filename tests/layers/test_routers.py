"""Which layers of both front ends are routers, and which only look like one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mpjax.linen
import mpjax.nnx

X = jnp.ones((4, 16))


@dataclasses.dataclass(frozen=True)
class Config:
    num_experts: int = 8


# Of each module its class and layers: their names and features, or modules in it.
ATTENTION = ("Attention", {"lora_a": 8, "k_proj": 8, "lora_b": 16})
EXPERT = ("SwiGLU", {"gate": 8, "down": 16})
MODEL = {
    "attention": ATTENTION,
    "moe": ("SparseMoeBlock", {"gate": 8, "expert_0": EXPERT}),
    "routing": ("RoutingTransformer", {"mlp": 16, "inner": ("MLP", {"up": 16})}),
    "token_router": ("MoELayer", {"gating": 4, "up": 16, "experts_0": EXPERT}),
    "router": ("MLP", {"hidden": 16, "net": ("Head", {"scores": 8})}),
}
ROUTERS = {
    "moe/gate",
    "token_router/gating",
    "router",
    "router/hidden",
    "router/net",
    "router/net/scores",
}


def run(layers, x):
    out = x
    for layer in layers:
        y = layer(x).astype(x.dtype)
        out = out + jnp.pad(y, ((0, 0), (0, 16 - y.shape[-1])))
    return out


def make_linen(cls, parts, name):
    class Module(nn.Module):
        config: Config = Config()

        @nn.compact
        def __call__(self, x):
            layers = [
                nn.Dense(part, name=name)
                if isinstance(part, int)
                else make_linen(*part, name)
                for name, part in parts.items()
            ]
            return run(layers, x)

    Module.__name__ = cls
    return Module(name=name)


def make_nnx(cls, parts):
    class Module(nnx.Module):
        def __init__(self):
            self.config = Config()
            for name, part in parts.items():
                layer = (
                    nnx.Linear(16, part, rngs=nnx.Rngs(0))
                    if isinstance(part, int)
                    else make_nnx(*part)
                )
                setattr(self, name, layer)

        def __call__(self, x):
            return run([getattr(self, name) for name in parts], x)

    Module.__name__ = cls
    return Module()


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_router_is_no_layer_that_only_looks_like_one(front_end):
    if front_end == "linen":
        bare = make_linen("Model", MODEL, None)
        model = mpjax.linen.MixedPrecision(bare, "mixed_bfloat16")
        table = mpjax.linen.tabulate(model, jax.random.key(0), X)
    else:
        bare = nnx.eval_shape(lambda: make_nnx("Model", MODEL))
        table = mpjax.nnx.tabulate(mpjax.nnx.mixed_precision(bare, "mixed_bfloat16"))
    lines = [line.split() for line in table.splitlines() if "router" in line]
    found = {line[0] for line in lines if any("c=f32" in part for part in line)}
    assert found == ROUTERS


class LinenAdaLayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(use_scale=False, use_bias=False)(x) * nn.Dense(16)(x)


class LinenMoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        router = self.param("router", nn.initializers.lecun_normal(), (16, 16))
        return LinenAdaLayerNorm(name="ada")(x @ router)


class NnxAdaLayerNorm(nnx.Module):
    def __init__(self):
        self.norm = nnx.LayerNorm(16, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(16, 16, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x) * self.dense(x)


class NnxMoE(nnx.Module):
    def __init__(self):
        self.router = nnx.Param(jnp.ones((16, 16)))
        self.ada = NnxAdaLayerNorm()

    def __call__(self, x):
        return self.ada(x @ self.router[...])


@pytest.mark.parametrize("rules", ["mixed_bfloat16", "float32"])
def test_a_table_notes_what_no_role_reaches(rules):
    linen = mpjax.linen.MixedPrecision(LinenMoE(), rules)
    for table in (
        mpjax.linen.tabulate(linen, jax.random.key(0), X),
        mpjax.nnx.tabulate(mpjax.nnx.mixed_precision(NnxMoE(), rules)),
    ):
        is_noted = rules != "float32"
        router, ada = (
            next(line for line in table.splitlines() if kind in line)
            for kind in ("MoE", "AdaLayerNorm")
        )
        assert router.endswith("parameter router in 16 bits") == is_noted
        assert ada.endswith("a norm by name only") == is_noted
