"""Sums in few bits are found by the most values that can meet in one element."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import half
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import mpjax.linen
import mpjax.lowering
import mpjax.nnx

Struct = jax.ShapeDtypeStruct
BF16, F16, F32, E4M3 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn


def sums(fn, *args):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = mpjax.lowering.census(fn, *args).findings
    return [f.detail for f in found if f.kind == "reduction"]


def gradient(fn, **options):
    return jax.grad(lambda *args: jnp.sum(fn(*args), dtype=F32), **options)


def stalls(dtype, terms):
    """Whether equal values, added one by one, stop adding up before all are in."""
    total, one = np.zeros((), dtype), np.ones((), dtype)
    for _ in range(terms):
        total = (total + one).astype(dtype)
    return float(total) < terms


@pytest.mark.parametrize(("dtype", "longest"), [(BF16, 256), (F16, 2048)])
def test_a_gradient_is_found_from_where_its_sum_can_stall(dtype, longest):
    for terms in (longest, longest + 1):
        x, bias = Struct((terms, 4), dtype), Struct((4,), dtype)
        found = sums(gradient(jnp.add, argnums=1), x, bias)
        expected = [f"reduce_sum in {jnp.dtype(dtype)} of {terms} terms"]
        assert found == (expected if stalls(dtype, terms) else [])


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_the_bias_of_a_small_batch_is_none(front_end):
    x = Struct((8, 16), F32)
    if front_end == "linen":
        model = mpjax.linen.MixedPrecision(nn.Dense(16), "mixed_bfloat16")
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        made = mpjax.lowering.census(gradient(model.apply), params, x)
    else:
        layer = nnx.eval_shape(lambda: nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
        layer = mpjax.nnx.mixed_precision(layer, "mixed_bfloat16")
        step = nnx.grad(lambda layer, x: jnp.sum(layer(x)))
        made = mpjax.lowering.census(step, layer, x)
    assert made.findings == ()


def lookup(table, rows):
    return table[rows]


def chosen(logits, labels):
    return logits[jnp.arange(len(labels)), labels]


def along(logits, labels):
    return jnp.take_along_axis(logits, labels[:, None], -1)


@pytest.mark.parametrize("vocabulary", [1_000, 50_000])
def test_a_table_is_judged_by_all_look_ups(vocabulary):
    rows = Struct((8, 512), jnp.int32)
    found = sums(gradient(lookup), half(vocabulary, 8), rows)
    assert found == ["scatter-add in bfloat16 of up to 4096 terms"]


@pytest.mark.parametrize("fn", [chosen, along])
def test_one_entry_of_each_row_meets_no_other(fn):
    assert sums(gradient(fn), half(4096, 16), Struct((4096,), jnp.int32)) == []


def test_updates_that_are_said_to_be_unique_do_not_meet():
    def scatter(x, rows, unique):
        into = jnp.zeros((4096, 8), BF16)
        return into.at[rows].add(x, unique_indices=unique)

    args = half(2048, 8), Struct((2048,), jnp.int32)
    assert sums(lambda *args: scatter(*args, True), *args) == []
    assert len(sums(lambda *args: scatter(*args, False), *args)) == 1


MESH = AbstractMesh((8,), ("d",), axis_types=(AxisType.Auto,))


def on_devices(fn, out):
    specs = {"in_specs": PartitionSpec("d"), "out_specs": out}
    return jax.shard_map(fn, mesh=MESH, **specs)


@pytest.mark.parametrize("dtype", [BF16, F16, E4M3])
@pytest.mark.parametrize(
    ("name", "fn", "out"),
    [
        ("psum", lambda x: lax.psum(x, "d"), PartitionSpec()),
        (
            "reduce_scatter",
            lambda x: lax.psum_scatter(x, "d", tiled=True),
            PartitionSpec("d"),
        ),
    ],
)
def test_sums_over_devices(dtype, name, fn, out):
    (found,) = sums(on_devices(fn, out), Struct((64, 64), dtype))
    assert found.startswith(name)
    assert found.endswith(f"in {jnp.dtype(dtype)} over 8 devices")
    assert sums(on_devices(fn, out), Struct((64, 64), F32)) == []


def test_a_sum_over_devices_that_a_gradient_makes_is_none():
    """Of eight gradients in bfloat16 nothing is lost that they had."""

    def loss(w, x):
        def own(w, x):
            return lax.psum(jnp.sum(x @ w.astype(BF16), dtype=F32), "d")

        specs = (PartitionSpec(), PartitionSpec("d"))
        out = PartitionSpec()
        return jax.shard_map(own, mesh=MESH, in_specs=specs, out_specs=out)(w, x)

    assert sums(jax.grad(loss), Struct((64, 64), F32), half(64, 64)) == []


def test_a_loop_that_does_not_say_how_long_it_runs():
    def add(x, steps):
        start = jnp.zeros((64,), BF16)
        return lax.fori_loop(0, steps, lambda i, total: total + x[i], start)

    found = sums(add, half(64, 64), Struct((), jnp.int32))
    assert found == ["sum in bfloat16 over the steps of a loop"]


def test_sums_in_float8():
    (found,) = sums(jnp.sum, Struct((64, 64), E4M3))
    assert found == "reduce_sum in float8_e4m3fn of 4096 terms"


@pytest.mark.parametrize(
    "fn",
    [
        jnp.sum,
        jnp.mean,
        lambda x: x.max(0),
        lambda x: jnp.sum(x.astype(F32), 0).astype(BF16),
        lambda x: lax.reduce_window(
            x, np.zeros((), BF16), lax.add, (2, 2), (2, 2), "VALID"
        ),
    ],
    ids=["sum", "mean", "max", "float32", "pool"],
)
def test_sums_that_are_right(fn):
    assert sums(gradient(fn), half(4096, 64)) == []


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_norm_of_gradients(dtype):
    tree = {"a": Struct((64, 64), dtype), "b": Struct((64,), dtype)}
    found = mpjax.lowering.census(optax.tree.norm, tree).findings
    assert [f.kind for f in found] == ([] if dtype == F32 else ["statistics"])


def test_layers_of_a_library_are_one_cause():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (16, 32, 8):
                x = nn.relu(nn.Dense(width, dtype=BF16)(x))
            return x

    x = half(1024, 8)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(Model().init, jax.random.key(0), x)
        made = mpjax.lowering.census(gradient(Model().apply), params, x)
    (found,) = made.findings
    assert (found.kind, found.backward, found.count) == ("reduction", True, 3)
    assert found.paths == tuple(f"Model/Dense_{i}" for i in (2, 1, 0))
    assert found.path == "Model/Dense_1"  # the largest
