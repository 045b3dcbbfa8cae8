"""Parameters: kept as they are, shown in the compute dtype inside of methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal
from nnx_models import MLP, Tied, rngs

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.nnx import mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)


class Writes(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3), tag="a")
        self.tables = nnx.data([nnx.Param(jnp.ones((2, 2)))])

    def double(self):
        self.weight[...] = 2 * self.weight[...]

    def restore(self):
        weight = self.weight
        weight[...] = jnp.full(3, 1 + 2**-20)
        assert weight[...].dtype == BF16 and weight.tag == "a"
        weight.set_value(weight.get_raw_value() + jnp.full(3, 2**-20))
        weight.set_metadata(tag="b")
        nnx.update(self, nnx.state(self))

    def keep_another(self):
        self.weight = nnx.Param(2 * self.weight[...])

    def keep(self):
        self.same, self.weight = self.weight, self.weight
        self.new = nnx.Param(jnp.ones(3))
        self.passed = nnx.jit(lambda weight: weight)(self.weight)

    def transformed(self, x):
        scale = nnx.vmap(lambda w, x: w * x, in_axes=(None, 0))
        _, y = jax.lax.scan(lambda c, w: (c, w[...] * x), 0, self.weight)
        return scale(self.weight, x), y, self.weight.T, jnp.tanh(self.weight)


def test_masters_are_never_rounded_from_inside():
    mixed = mixed_precision(Writes(), "mixed_bfloat16")
    for method in mixed.double, mixed.keep_another:
        with pytest.raises(
            TypeError, match="bfloat16 value to a parameter kept in float32"
        ):
            method()
    weight = mixed.weight
    mixed.keep()
    assert mixed.same is mixed.weight is weight
    assert type(mixed.new) is type(mixed.passed) is nnx.Param
    assert mixed.new[...].dtype == mixed.passed[...].dtype == F32
    del mixed.same, mixed.new, mixed.passed
    mixed.restore()
    assert mixed.weight[...].dtype == F32 and mixed.weight.tag == "b"
    np.testing.assert_allclose(mixed.weight[...], 1 + 2**-19, rtol=1e-7)
    before = nnx.state(mixed)
    outputs = mixed_precision(mixed, "p=f32,c=bf16").transformed(jnp.ones(3))
    assert {a.dtype for a in outputs} == {BF16}
    assert jax.tree.structure(nnx.state(mixed)) == jax.tree.structure(before)


def test_param_dtype():
    bare = MLP(rngs())
    bare.count, bare.scale = nnx.Param(jnp.arange(3)), nnx.Param(1.0)
    mixed = mixed_precision(bare, [mpjax.Rule("head", "float32"), "bfloat16"])
    assert mixed.scale.get_value() == 1.0 and "MLP" in mpjax.nnx.tabulate(mixed)
    del mixed.scale
    dtypes = jax.tree.map(lambda a: a.dtype.name, nnx.to_pure_dict(nnx.state(mixed)))
    assert dtypes["linear"] == {"kernel": "bfloat16", "bias": "bfloat16"}
    assert dtypes["head"] == {"kernel": "float32", "bias": "float32"}
    assert dtypes["shift"] == "bfloat16" and dtypes["count"] == "int32"
    assert dtypes["norm"]["mean"] == "float32"
    assert {a.dtype for a in jax.tree.leaves(nnx.state(bare, nnx.BatchStat))} == {F32}
    grads = nnx.grad(lambda model, x: jnp.mean(model(x).astype(F32)), argnums=0)
    del bare.count, bare.scale
    mixed = mixed_precision(bare, "bfloat16")
    assert {a.dtype for a in jax.tree.leaves(grads(mixed, normal(7, 4, 8)))} == {BF16}


def test_shared_modules_stay_shared():
    bare = Tied(None, rngs())
    mixed = mixed_precision(bare, "mixed_bfloat16")
    assert mixed.same is mixed.embed
    assert mixed.embed.embedding is mixed.same.embedding
    assert mixed.embed.embedding[...] is bare.embed.embedding[...]


class TiedByHand(nnx.Module):
    def __init__(self):
        self.a = self.b = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        kept = self.a
        assert self.a is self.b is kept and isinstance(kept, nnx.Param)

        @jax.jit
        def scale(x):  # at another level of tracing
            assert self.a is self.b is not kept
            return x * self.a * self.b

        y = scale(x)
        kept[...] = jnp.full(3, 2.0)
        assert self.a is self.b and self.b[0] == 2 and self.b.dtype == BF16
        nnx.update(self, nnx.state(self))
        return y + self.a


def test_tied_parameters_are_one_inside_of_methods():
    mixed = mixed_precision(TiedByHand(), "mixed_bfloat16")
    np.testing.assert_array_equal(mixed(jnp.ones(3)), jnp.full(3, 3.0))
    other = mixed_precision(mixed, "mixed_float16")
    assert mixed.a is mixed.b is not other.a and mixed.a[0] == 2


def test_references():
    class Model(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(3), ref=True)

        def __call__(self, x):
            return x * self.weight

    mixed = mixed_precision(Model(), "p=bf16,c=f16")
    assert mixed.weight[...].dtype == BF16
    assert nnx.jit(lambda model, x: model(x))(mixed, jnp.ones(3)).dtype == jnp.float16
