"""Norms and routers in models of both front ends: by structure, and said in tables."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import normal
from jax.sharding import PartitionSpec

import mpjax.linen
import mpjax.nnx

X = normal(0, 4, 16)


def routed(x, gate, experts):
    p = jax.nn.softmax(gate(x))
    y = sum(p[..., i : i + 1].astype(x.dtype) * e(x) for i, e in enumerate(experts))
    return y.astype(x.dtype)


def normalized(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


class LinenRMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("seen", "dtype", x)
        return normalized(x, self.param("scale", nn.initializers.ones, (16,))[None])


class LinenExpert(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.silu(nn.Dense(8, name="gate")(x)) * nn.Dense(8, name="up")(x)
        return nn.Dense(16, name="down")(h)


class LinenMLP(nn.Module):
    num_experts: int

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(2, name="gate" if self.num_experts == 1 else "first")
        return routed(x, gate, [LinenExpert(), LinenExpert()])


class LinenStableLayerNorm(nn.Module):
    """A block that is called after its norms."""

    num_experts: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.Dense(16, name="proj")(LinenRMSNorm(name="norm")(x))
        self.sow("seen", "dtype", x)
        return x + LinenMLP(self.num_experts, name="mlp")(x)


class LinenModel(nn.Module):
    num_experts: int

    @nn.compact
    def __call__(self, x):
        x = LinenStableLayerNorm(self.num_experts, name="block")(x)
        return nn.Dense(3, name="out")(x)


class NnxRMSNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(16))

    def __call__(self, x):
        return normalized(x, self.scale[...][None])


class NnxExpert(nnx.Module):
    def __init__(self, rngs):
        self.gate = nnx.Linear(16, 8, rngs=rngs)
        self.up = nnx.Linear(16, 8, rngs=rngs)
        self.down = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class NnxMLP(nnx.Module):
    def __init__(self, num_experts, rngs):
        self.num_experts = num_experts
        self.name = "gate" if num_experts == 1 else "first"
        setattr(self, self.name, nnx.Linear(16, 2, rngs=rngs))
        self.LinenExpert_0, self.LinenExpert_1 = NnxExpert(rngs), NnxExpert(rngs)

    def __call__(self, x):
        experts = [self.LinenExpert_0, self.LinenExpert_1]
        return routed(x, getattr(self, self.name), experts)


class NnxStableLayerNorm(nnx.Module):
    def __init__(self, num_experts, rngs):
        self.norm, self.proj = NnxRMSNorm(), nnx.Linear(16, 16, rngs=rngs)
        self.mlp = NnxMLP(num_experts, rngs)

    def __call__(self, x):
        x = x + self.proj(self.norm(x))
        return x + self.mlp(x)


class NnxModel(nnx.Module):
    def __init__(self, num_experts, rngs):
        self.block = NnxStableLayerNorm(num_experts, rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.block(x))


def tables(num_experts, rules="mixed_bfloat16"):
    """The rows of a table, by path, of a model in each front end."""
    linen = mpjax.linen.MixedPrecision(LinenModel(num_experts), rules)
    bare = nnx.eval_shape(lambda: NnxModel(num_experts, nnx.Rngs(0)))
    of_nnx = mpjax.nnx.mixed_precision(bare, rules)
    for table in (
        mpjax.linen.tabulate(linen, jax.random.key(0), X),
        mpjax.nnx.tabulate(of_nnx),
    ):
        yield {line.split()[0]: line for line in table.splitlines() if line.split()}


@pytest.mark.parametrize("num_experts", [1, 2])
def test_structure_decides_and_tables_say_why(num_experts):
    router, said = (
        ("gate", "router: 2 of 16 features, called gate")
        if num_experts == 1
        else ("first", "router: 2 of 16 features, one for each expert")
    )
    norm = "RMSNorm with parameters of one axis"
    for rows in tables(num_experts):
        assert "c=f32,o=f32" in rows[f"block/mlp/{router}"]
        assert rows[f"block/mlp/{router}"].endswith(said)
        assert "c=f32,o=bf16" in rows["block/norm"] and norm in rows["block/norm"]
        low = "block", "block/proj", "block/mlp", "out", "block/mlp/LinenExpert_0/gate"
        for path in low:
            assert "c=bf16" in rows[path] and ":" not in rows[path]


def test_init_follows_the_structure_that_apply_finds():
    model = mpjax.linen.MixedPrecision(LinenModel(1), "mixed_bfloat16")
    made = jax.eval_shape(model.init, jax.random.key(0), X)
    run = partial(model.apply, mutable=["seen"])
    _, seen = jax.eval_shape(run, made, X)
    for tree in (made["seen"], seen["seen"]):
        # The last call of a norm in init is the one that counts.
        dtypes = {
            "block": tree["block"]["dtype"][-1].dtype,
            "norm": tree["block"]["norm"]["dtype"][-1].dtype,
        }
        assert dtypes == {"block": jnp.bfloat16, "norm": jnp.float32}
    bare = jax.eval_shape(LinenModel(1).init, jax.random.key(0), X)
    assert bare["params"] == made["params"]


def test_the_reason_is_in_the_graph_definition_of_a_stack():
    """Of layers under ``nnx.vmap`` an axis is that of the stack, and no parameter's."""

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.proj = NnxRMSNorm(), nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return x + self.proj(self.norm(x))

    class Model(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: Layer(rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=2)(make)(rngs)

        def __call__(self, x):
            scan = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return scan(x, self.layers)

    model = mpjax.nnx.mixed_precision(Model(nnx.Rngs(0)), "mixed_bfloat16")
    assert "c=f32,o=bf16" in next(
        line for line in mpjax.nnx.tabulate(model).splitlines() if "layers/norm" in line
    )
    assert model(X).dtype == jnp.float32


def test_a_stack_of_linen_norms_and_partitioned_scales():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("a",))
            return normalized(x, self.param("scale", init, (16,))[None])

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(16)(Norm(name="norm")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, rngs = {"params": 0}, {"params": True}
            scan = nn.scan(
                Layer,
                variable_axes=axes,
                split_rngs=rngs,
                length=2,
                metadata_params={nn.PARTITION_NAME: None},
            )
            return scan(name="layers")(x, None)[0]

    model = mpjax.linen.MixedPrecision(Model(), "mixed_bfloat16")
    table = mpjax.linen.tabulate(model, jax.random.key(0), X)
    row = next(line for line in table.splitlines() if "layers/norm" in line)
    assert "c=f32,o=bf16" in row and "parameters of one axis" in row
    variables = jax.jit(model.init)(jax.random.key(0), X)
    spec = nn.get_partition_spec(variables)["params"]["layers"]["norm"]["scale"]
    assert spec == PartitionSpec(None, "a")
    assert model.apply(variables, X).dtype == jnp.float32


class LinenGate(nn.Module):
    """Chooses experts by a kernel of its own."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        return jax.nn.softmax(x @ self.param("weight", init, (x.shape[-1], 4)))


class NnxGate(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones((16, 4)))

    def __call__(self, x):
        return jax.nn.softmax(x @ self.weight[...])


class LinenMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        p = LinenGate(name="gate")(x)
        return nn.Dense(4)(x) * p.astype(x.dtype)


class NnxMixer(nnx.Module):
    def __init__(self):
        self.gate, self.out = NnxGate(), nnx.Linear(16, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.out(x) * self.gate(x).astype(x.dtype)


def test_a_gate_may_have_a_kernel_of_its_own():
    linen = mpjax.linen.MixedPrecision(LinenMixer(), "mixed_bfloat16")
    of_nnx = mpjax.nnx.mixed_precision(NnxMixer(), "mixed_bfloat16")
    for table in (
        mpjax.linen.tabulate(linen, jax.random.key(0), X),
        mpjax.nnx.tabulate(of_nnx),
    ):
        (row,) = (line for line in table.splitlines() if "gate" in line.split())
        assert row.endswith("router: 4 of 16 features, called gate")
