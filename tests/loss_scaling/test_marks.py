"""The mark of a loss that is not finite outlives what is done to gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax._loss_scaling.marks import has_bad_loss, mark_bad_loss

SHAPES = [(4,), (9,), (4, 2), (3, 5, 7), (16, 16), (2, 1, 2)]
SMALL = [(), (1,), (3, 1)]
HALVES = [jnp.bfloat16, jnp.float16]


def marked(shape, loss=np.nan, dtype=jnp.float32):
    return mark_bad_loss([jnp.ones(shape, dtype)], jnp.float32(loss))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in (jnp.float32, *HALVES)]
    + [(shape, jnp.float32) for shape in SMALL],
)
def test_every_array_is_marked_and_only_by_a_loss_that_is_not_finite(shape, dtype):
    for loss in (np.nan, np.inf, -np.inf):
        assert has_bad_loss(marked(shape, loss, dtype))
        assert not np.isfinite(np.sum(np.float32(marked(shape, loss, dtype)[0])))
    (same,) = marked(shape, 1.0, dtype)
    np.testing.assert_array_equal(same, np.ones(shape, dtype))
    assert not has_bad_loss([same])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_overflows_do_not_look_like_the_mark(bad):
    for shape in SHAPES + SMALL:
        ones = jnp.ones(shape)
        assert not has_bad_loss([ones * bad])
        assert not has_bad_loss([ones.at[(0,) * len(shape)].set(bad)])
        assert not has_bad_loss([ones * bad - jnp.inf])


def test_one_element_of_another_kind_is_no_mark():
    (mark,) = marked((8,))
    for place, kind in enumerate(np.asarray(mark)):
        other = np.inf if np.isfinite(kind) else 1.0
        assert not has_bad_loss([mark.at[place].set(other)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_it_outlives_casts_sums_and_means(shape, dtype):
    (mark,) = marked(shape)
    cast = mark.astype(dtype).astype(jnp.float32)
    assert has_bad_loss([cast])
    assert has_bad_loss([jnp.ones(shape) - 3 + cast])
    assert has_bad_loss([jnp.mean(jnp.stack([cast, jnp.ones(shape), mark]), 0)])
    assert not has_bad_loss([cast + jnp.full(shape, jnp.nan)])  # an overflow as well


def test_a_sum_over_devices_in_16_bits():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def summed(losses):
        (mark,) = mark_bad_loss([jnp.ones((3, 5))], losses[0])
        total = lax.pmean(mark.astype(jnp.bfloat16), "d").astype(jnp.float32)
        return has_bad_loss([total]), total

    for check_vma in (True, False):
        run = jax.jit(
            jax.shard_map(
                summed, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=check_vma
            )
        )
        assert run(jnp.ones(8).at[5].set(jnp.nan))[0]
        found, total = run(jnp.ones(8))
        assert not found
        np.testing.assert_array_equal(total, 1.0)


def loss_fn(params, x):
    y = sum(jnp.sum(p) for p in jax.tree.leaves(params))
    return y * jnp.sum(x)


PARAMS = {"w": jnp.ones((4, 4)), "v": jnp.ones((5,)), "b": jnp.ones(2)}


def scale_after(change, params, bad):
    tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))

    @jax.jit
    def step(x):
        opt_state = tx.init(params)
        _, grads = mpjax.value_and_grad(loss_fn, opt_state)(PARAMS, x)
        _, opt_state = tx.update(change(grads), opt_state, params)
        return opt_state

    opt_state = step(jnp.full(3, bad))
    assert not opt_state.last_finite
    return opt_state.scale


def frozen(grads):
    return grads | {"b": jnp.zeros_like(grads["b"])}


def in_bfloat16(grads):
    return mpjax.cast_floating(mpjax.cast_floating(grads, jnp.bfloat16), jnp.float32)


@pytest.mark.parametrize("name", PARAMS)
def test_an_optimizer_of_a_part_of_the_parameters(name):
    part = {name: PARAMS[name]}
    assert scale_after(lambda grads: {name: grads[name]}, part, np.nan) == 2.0**16
    # Of a loss that is finite, gradients that overflow.
    assert scale_after(lambda grads: {name: grads[name]}, part, 1e35) == 2.0**15


@pytest.mark.parametrize("change", [frozen, in_bfloat16])
def test_gradients_that_are_changed_before_the_optimizer(change):
    assert scale_after(change, PARAMS, np.nan) == 2.0**16
    assert scale_after(change, PARAMS, 1e35) == 2.0**15


def test_microbatches_one_of_which_is_bad():
    def mean_of(grads):
        fine = jax.tree.map(jnp.ones_like, grads)
        return jax.tree.map(lambda a, b: (a + b) / 2, fine, grads)

    assert scale_after(mean_of, PARAMS, np.nan) == 2.0**16


def test_marks_of_explicitly_sharded_gradients():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 12)), P("a", "b"))
        mark = jax.jit(mark_bad_loss)([x], jnp.float32(np.nan))
        assert jax.typeof(mark[0]).sharding.spec == P("a", "b")
        assert jax.jit(has_bad_loss)(mark)
        assert not jax.jit(has_bad_loss)([x])


def test_no_debugger_of_nans_stops_a_step_that_is_fine():
    with jax.debug_nans(True), jax.debug_infs(True):
        np.testing.assert_array_equal(marked((3, 5), 1.0)[0], 1.0)
        assert not has_bad_loss([jnp.ones((3, 5))])


def test_the_marks_are_fused_with_the_update(monkeypatch):
    def on_an_accelerator(*args, cpu, default):
        return default(*args)

    monkeypatch.setattr(lax, "platform_dependent", on_an_accelerator)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    tx = mpjax.dynamic_loss_scaling(inner)
    params = {"w": jnp.ones((16, 64)), "v": jnp.ones((64, 32)), "b": jnp.ones(32)}

    def loss_fn(params, x):
        return jnp.mean(
            (jnp.tanh(x @ params["w"]) @ params["v"] + params["b"][None]) ** 2
        )

    def cost(value_and_grad):
        def step(params, opt_state, x):
            _, grads = value_and_grad(params, opt_state, x)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        args = params, tx.init(params), jnp.ones((8, 16))
        compiled = jax.jit(step).lower(*args).compile()
        copies = len(re.findall(r" copy\(", compiled.as_text()))
        return copies, compiled.cost_analysis()["bytes accessed"]

    def without(params, opt_state, x):
        def scaled(params):
            loss = loss_fn(params, x)
            return mpjax.scale_loss(loss, opt_state), loss

        grads, loss = jax.grad(scaled, has_aux=True)(params)
        return loss, grads

    def with_marks(params, opt_state, x):
        return mpjax.value_and_grad(loss_fn, opt_state)(params, x)

    copies, accessed = cost(without)
    copies_marked, accessed_marked = cost(with_marks)
    assert copies_marked <= copies
    assert accessed_marked < accessed + params["w"].nbytes  # one pass more
