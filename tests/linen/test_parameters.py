"""Parameters: as they are stored, drawn and read, and the dtypes that name theirs."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxprs import dots
from linen_models import X

import mpjax
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)


def test_a_dtype_in_the_model_gives_way_and_integers_stay():
    class Model(nn.Module):
        dtype: jnp.dtype = jnp.float32
        token_dtype: jnp.dtype = jnp.int32

        @nn.compact
        def __call__(self, x, mask, key):
            assert mask.dtype == jnp.bool_ and self.token_dtype == jnp.int32
            noise = jax.random.normal(key, x.shape, self.dtype)
            return nn.Dense(4, dtype=self.dtype)(jnp.where(mask, x, noise))

    model = MixedPrecision(Model(), "c=f16")
    y, _ = model.init_with_output(KEY, X, X > 0, jax.random.key(3))
    assert y.dtype == jnp.float16


def test_a_dtype_passed_on_to_an_initializer_is_the_parameters():
    class Model(nn.Module):
        dtype: jnp.dtype = jnp.float32

        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.normal(), (8, 4), self.dtype)
            return x @ kernel

    wrapped = MixedPrecision(Model(), "mixed_bfloat16")
    assert_trees_equal(wrapped.init(KEY, X), Model().init(KEY, X))


def test_checkpoints_and_sharded_parameters():
    def kernel_init(key, shape, dtype):
        return nn.initializers.lecun_normal()(key, shape, dtype)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(kernel_init, (None, "model"))
            x = x + self.param("pos", nn.with_partitioning(normal_init, ("model",)), 8)
            return nn.Dense(8, kernel_init=init)(x)

    def normal_init(key, size):
        return jax.random.normal(key, (1, 1, size))[:, :, :]

    bare, model = Model(), MixedPrecision(Model(), "bfloat16")
    boxed = model.init(KEY, X)
    assert isinstance(boxed["params"]["Dense_0"]["kernel"], nn.Partitioned)
    assert nn.get_partition_spec(boxed) == nn.get_partition_spec(bare.init(KEY, X))
    variables = nn.unbox(boxed)
    data = flax.serialization.to_bytes(variables)
    assert_trees_equal(flax.serialization.from_bytes(variables, data), variables)

    mesh = Mesh(np.array(jax.devices()), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    kernel = jax.device_put(variables["params"]["Dense_0"]["kernel"], sharding)
    sharded = jax.tree.map(lambda x: x, variables)
    sharded["params"]["Dense_0"]["kernel"] = kernel
    y = jax.jit(model.apply)(sharded, X)
    np.testing.assert_array_equal(y, model.apply(variables, X))


@pytest.mark.parametrize(
    "dtype", [None, "float32", jnp.float32, np.dtype(np.float32), np.float32]
)
def test_a_dtype_keeps_its_kind(dtype):
    class Model(nn.Module):
        dtype: object

        @nn.compact
        def __call__(self, x):
            kinds.append(self.dtype)
            return x * self.param("w", nn.initializers.normal(), (8,), self.dtype)

    kinds = []
    bare, model = Model(dtype or jnp.float32), MixedPrecision(Model(dtype), "c=bf16")
    variables = bare.init(KEY, X[0, 0])
    assert_trees_equal(model.init(KEY, X[0, 0]), variables)
    given, served = kinds
    assert served == BF16
    for kind in (str, np.dtype):
        assert isinstance(served, kind) == isinstance(given, kind)
    if not isinstance(given, str | np.dtype):
        assert served(0.5).dtype == BF16


def test_a_dtype_of_the_class_is_a_dtype():
    class Model(nn.Module):
        dtype = jnp.float32  # no field: no annotation

        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.normal(), (1, 8, 4), self.dtype)
            return jnp.matmul(x.astype(self.dtype), kernel)

    model = MixedPrecision(Model(), "mixed_bfloat16")
    variables = Model().init(KEY, X)
    assert_trees_equal(model.init(KEY, X), variables)
    jaxpr = jax.make_jaxpr(model.apply)(variables, X)
    assert {(d.lhs, d.rhs) for d in dots(jaxpr)} == {(BF16, BF16)}
    assert Model.dtype is jnp.float32


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "p=bf16,c=f32"])
def test_initializers_draw_as_in_the_bare_model(policy):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = x * self.param("w", nn.initializers.normal(), (1, 1, 8), x.dtype)
            narrow = nn.Dense(8, param_dtype=jnp.bfloat16, name="narrow")
            return narrow(x.astype(narrow.param_dtype))

    stored = mpjax.get_policy(policy).param_dtype
    expected = mpjax.cast_floating(Model().init(KEY, X), stored)
    with jax.numpy_dtype_promotion("standard"):
        assert_trees_equal(MixedPrecision(Model(), policy).init(KEY, X), expected)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "c=f16"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_simple_cell_keeps_the_dtype_of_its_carry(policy, residual):
    bare = nn.RNN(nn.SimpleCell(8, residual=residual))
    variables = bare.init(KEY, X)
    model = MixedPrecision(bare, policy)
    low = mpjax.get_policy(policy)
    assert_trees_equal(model.init(KEY, X), low.cast_to_param(variables))
    y = model.apply(variables, X)
    assert y.dtype == low.output_dtype
    expected = bare.apply(variables, X)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)
    found = dots(jax.make_jaxpr(model.apply)(variables, X))
    assert {d.lhs for d in found} == {low.compute_dtype}
