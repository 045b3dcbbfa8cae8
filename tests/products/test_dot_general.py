"""Every recipe against a numpy oracle of the definition, and the ways to call it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import dots, equations

from mpjax._numerics.qarray import quantize
from mpjax._products import multiply as product_module
from mpjax._products.dot_general import observed_dot_general, scaled_dot_general
from mpjax._recipes import named
from mpjax._recipes import recipe as recipes
from mpjax._recipes import scalings as scaling

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MATMUL = (((1,), (0,)), ((), ()))
RECIPES = {
    "current": named.current_scaling(),
    "current exact": named.current_scaling(power_of_two=False),
    "delayed": named.delayed_scaling(16),
    "delayed weights": named.current_scaling(delayed_weights=True),
    "channel": named.per_channel_scaling(),
    "block": named.block_scaling(size=16),
    "block exact": named.block_scaling(size=16, power_of_two=False),
    "mx": named.mx_scaling(),
    "mx floor": named.mx_scaling(rounding="floor"),
    "mx fp6": named.mx_scaling("float6_e2m3fn", "float6_e3m2fn"),
    "mx fp4": named.mx_scaling("float4_e2m1fn"),
    "fnuz": named.current_scaling().fnuz(),
    "int8": named.per_channel_scaling("int8", "int8"),
    "int8 and fp8": named.current_scaling("int8"),
}
SHAPES = {
    "dense": ((6, 40), (40, 24), MATMUL),
    "dense 3d": ((2, 3, 40), (40, 24), (((2,), (0,)), ((), ()))),
    "general": ((3, 4, 40), (40, 5, 4), (((1, 2), (2, 0)), ((), ()))),
    "attention": ((2, 5, 3, 40), (2, 7, 3, 40), (((3,), (3,)), ((0, 2), (0, 2)))),
}


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_gradients(recipe, dims, grad):
    """(lhs, rhs, scales) -> the product, and its gradients for a given cotangent."""

    def function(lhs, rhs, scales=None):
        def product(lhs, rhs, scales):
            return scaled_dot_general(lhs, rhs, dims, recipe=recipe, scales=scales)

        out, pull = jax.vjp(product, lhs, rhs, scales)
        return out, *pull(grad.astype(out.dtype))

    return function


def start(recipe):
    return recipe.init().scale if recipe.stateful else None


def fakes(recipe):
    def fake(scaling):
        def apply(x, product, contracted):
            if product not in recipe.quantized:
                return np.float64(x)
            block = scaling.block(x.shape, contracted)
            return reference.fake_quantize(
                x, scaling.dtype.name, block, scaling.rounding
            )

        return apply

    return {"lhs": fake(recipe.lhs), "rhs": fake(recipe.rhs), "grad": fake(recipe.grad)}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_product_and_gradients_equal_the_fake_quantized_oracle(name, shapes):
    recipe, (lhs, rhs, dims) = RECIPES[name], SHAPES[shapes]
    lhs, rhs = normal(0, *lhs), normal(1, *rhs)
    exact, _ = reference.dot_general(lhs, rhs, dims)
    grad = normal(2, *exact.shape)
    results = jax.jit(value_and_gradients(recipe, dims, grad))(lhs, rhs, start(recipe))
    expected = reference.dot_general_and_gradients(lhs, rhs, grad, dims, fakes(recipe))
    for actual, oracle in zip(results[:3], expected, strict=True):
        assert actual.dtype == jnp.float32 and actual.shape == oracle.shape
        # float32 sums of at most 40 terms
        np.testing.assert_allclose(
            actual, oracle, rtol=0, atol=np.abs(oracle).max() * 4e-6
        )


@pytest.mark.parametrize("name", ["current", "mx", "block"])
def test_where_sums_are_exact_the_product_is_bit_for_bit(name):
    """Small integers times powers of two: no rounding in the sums either."""
    recipe = RECIPES[name]
    rng = np.random.default_rng(0)
    lhs, rhs, grad = (
        jnp.asarray(rng.integers(-8, 9, shape) * 0.25, jnp.float32)
        for shape in ((6, 40), (40, 24), (6, 24))
    )
    results = jax.jit(value_and_gradients(recipe, MATMUL, grad))(lhs, rhs)
    expected = reference.dot_general_and_gradients(
        lhs, rhs, grad, MATMUL, fakes(recipe)
    )
    for actual, oracle in zip(results[:3], expected, strict=True):
        np.testing.assert_array_equal(actual, oracle.astype(np.float32))


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("mx fp4", "mx fp6")])
def test_it_is_close_to_float32(name):
    lhs, rhs, grad = normal(0, 64, 128), normal(1, 128, 64), normal(2, 64, 64)
    recipe = RECIPES[name]
    results = jax.jit(value_and_gradients(recipe, MATMUL, grad))(
        lhs, rhs, start(recipe)
    )
    out, lhs_grad, rhs_grad = results[:3]
    x, w, g = (np.float64(a) for a in (lhs, rhs, grad))
    assert reference.sqnr(x @ w, out) > 25 - 3 * (name == "mx floor")
    assert reference.sqnr(g @ w.T, lhs_grad) > 20
    assert reference.sqnr(x.T @ g, rhs_grad) > 20


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_operands_and_a_wider_result(dtype):
    recipe = named.current_scaling()
    lhs, rhs = normal(0, 6, 40, dtype=dtype), normal(1, 40, 24, dtype=dtype)
    out = scaled_dot_general(lhs, rhs, MATMUL, recipe=recipe)
    wide = scaled_dot_general(lhs, rhs, MATMUL, None, jnp.float32, recipe=recipe)
    assert out.dtype == dtype and wide.dtype == jnp.float32
    np.testing.assert_array_equal(out, wide.astype(dtype))
    grads = jax.eval_shape(
        jax.grad(
            lambda x, w: scaled_dot_general(
                x, w, MATMUL, None, jnp.float32, recipe=recipe
            ).sum(),
            argnums=(0, 1),
        ),
        lhs,
        rhs,
    )
    assert [g.dtype for g in grads] == [dtype, dtype]


def jaxpr_of_step(recipe, dtype=jnp.bfloat16):
    lhs, rhs = normal(0, 6, 64, dtype=dtype), normal(1, 64, 24, dtype=dtype)
    step = value_and_gradients(recipe, MATMUL, jnp.ones((6, 24), dtype))
    return jax.make_jaxpr(step)(lhs, rhs, start(recipe))


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "fnuz"])
def test_operands_reach_the_product_in_8_bits(name):
    """Each product has a form for TPUs, one on bf16 for CPUs, one that GPUs round."""
    recipe = RECIPES[name]
    found = dots(jaxpr_of_step(recipe), gpu_forms=True)
    lhs, rhs, grad = recipe.lhs.dtype, recipe.rhs.dtype, recipe.grad.dtype
    products = sorted([(lhs, rhs), (grad, rhs), (lhs, grad)], key=str)
    wide, rounded = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    for out in (wide, rounded):
        pairs = [(d.lhs, d.rhs) for d in found if d.out == out and d.lhs != rounded]
        assert sorted(pairs, key=str) == products
    assert [d.out for d in found if d.lhs == rounded] == [wide] * 3


def test_only_scales_of_two_to_the_k_follow_a_rounding():
    found = dots(
        jaxpr_of_step(named.current_scaling(power_of_two=False)), gpu_forms=True
    )
    assert {d.out for d in found} == {jnp.dtype(jnp.float32)}
    found = dots(jaxpr_of_step(named.current_scaling(), jnp.float32), gpu_forms=True)
    assert {d.out for d in found} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("rounding", ["up", "exact"])
def test_a_quantized_copy_says_whether_its_scale_is_two_to_the_k(rounding):
    lhs, rhs = (normal(i, 8, 8, dtype=jnp.bfloat16) for i in range(2))
    copy = quantize(rhs, E4M3, rounding=rounding)
    product = functools.partial(
        scaled_dot_general, dimension_numbers=MATMUL, recipe=named.current_scaling()
    )
    jaxpr = jax.make_jaxpr(lambda *args: product(*args, quantized_rhs=copy))(lhs, rhs)
    found = {d.out for d in dots(jaxpr, gpu_forms=True)}
    assert (jnp.dtype(jnp.bfloat16) in found) == (rounding == "up")


def test_a_result_has_16_bits_or_more():
    lhs, rhs = normal(0, 4, 8), normal(1, 8, 4)
    for dtype in (jnp.int32, E4M3):
        with pytest.raises(TypeError, match="a floating dtype of 16 bits or more, got"):
            scaled_dot_general(
                lhs, rhs, MATMUL, None, dtype, recipe=named.current_scaling()
            )


def test_integers_are_multiplied_as_integers():
    found = dots(jaxpr_of_step(RECIPES["int8"]))
    assert {(d.lhs, d.rhs, d.out) for d in found} == {
        (jnp.dtype("int8"), jnp.dtype("int8"), jnp.dtype("int32"))
    }


def test_microscaling_is_a_block_scaled_call_on_cuda_and_agrees_with_its_emulation():
    dims = (((3,), (1,)), ((0,), (0,)))  # batch, 2 x 3 free, 64 contracted
    recipe = named.mx_scaling()
    x, w = normal(0, 2, 2, 3, 64), normal(1, 2, 64, 5)
    step = jax.jit(value_and_gradients(recipe, dims, normal(2, 2, 2, 3, 5)))
    lowered = step.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "scaled_matmul" in lowered
    assert "scaled_matmul" not in step.lower(x, w).as_text()
    one, two = (
        quantize(a, E4M3, block=b, rounding="up", scale_dtype=jnp.float8_e8m0fnu)
        for a, b in ((x, (1, 1, 1, 32)), (w, (1, 32, 1)))
    )
    (lc, rc), (lb, rb) = dims
    values, scales, *_ = product_module._rows(one, lb, lc)
    others, other_scales, *_ = product_module._rows(two, rb, rc)
    # what a call of that name computes
    wide, other_wide = (
        reference.as_float64(v) * np.repeat(reference.as_float64(s), 32, axis=-1)
        for v, s in ((values, scales), (others, other_scales))
    )
    native = np.einsum("bmk,bnk->bmn", wide, other_wide)
    out, *_ = step(x, w)
    np.testing.assert_allclose(native.reshape(out.shape), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lhs", "rhs", "dims", "native"),
    [
        ((2, 32, 64), (64, 96), (((2,), (0,)), ((), ())), 3),
        ((2, 32, 64), (64, 3, 32), (((2,), (0,)), ((), ())), 3),
        ((2, 64, 64), (2, 64, 96), (((1, 0), (1, 0)), ((), ())), 3),
        ((2, 64, 64), (96, 64, 2), (((1, 0), (1, 2)), ((), ())), 2),
        ((2, 64, 3, 64), (2, 96, 3, 64), (((3,), (3,)), ((0, 2), (0, 2))), 3),
        ((2, 32, 40), (40, 96), (((2,), (0,)), ((), ())), 2),
    ],
)
def test_block_scaled_calls_serve_layers_with_several_axes(
    monkeypatch, lhs, rhs, dims, native
):
    calls = []

    def scaled_matmul(lhs, rhs, lhs_scale, rhs_scale):
        calls.append(lhs.shape)
        lhs, rhs = (
            x.astype(jnp.float32) * jnp.repeat(s.astype(jnp.float32), 32, axis=-1)
            for x, s in ((lhs, lhs_scale), (rhs, rhs_scale))
        )
        return jnp.einsum("bmk,bnk->bmn", lhs, rhs)

    def on_cuda(*args, default, cuda=None, cpu=None):
        return (cuda or cpu or default)(*args)

    lhs, rhs = normal(0, *lhs), normal(1, *rhs)
    grad = normal(2, *lax.dot_general(lhs, rhs, dims).shape)
    step = value_and_gradients(named.mx_scaling(), dims, grad)
    expected = step(lhs, rhs)[:3]
    monkeypatch.setattr(jax.nn, "scaled_matmul", scaled_matmul)
    monkeypatch.setattr(lax, "platform_dependent", on_cuda)
    for got, want in zip(step(lhs, rhs)[:3], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert len(calls) == native


@pytest.mark.parametrize(
    ("capability", "native"), [("9.0", False), ("8.6", False), ("10.0", True)]
)
def test_older_gpus_emulate_microscaling(monkeypatch, capability, native):
    """XLA has no fast form of a block-scaled call for them."""
    gpu = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert product_module._has_block_scaled_products() == native


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_no_other_products(platform):
    recipe = named.current_scaling()
    step = value_and_gradients(recipe, MATMUL, jnp.ones((6, 24)))
    x = jax.ShapeDtypeStruct((6, 64), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((64, 24), jnp.bfloat16)
    text = jax.jit(step).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    assert len(lines) == 3 and all("f8E" in line for line in lines)


@pytest.mark.parametrize("high", recipes.PRODUCTS)
def test_each_product_can_stay_in_high_precision(high):
    quantized = tuple(p for p in recipes.PRODUCTS if p != high)
    recipe = dataclasses.replace(named.per_channel_scaling(), quantized=quantized)
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    step = value_and_gradients(recipe, MATMUL, grad)
    results = jax.jit(step)(lhs, rhs)
    expected = reference.dot_general_and_gradients(
        lhs, rhs, grad, MATMUL, fakes(recipe)
    )
    for actual, oracle in zip(results[:3], expected, strict=True):
        np.testing.assert_allclose(
            actual, oracle, rtol=0, atol=np.abs(oracle).max() * 4e-6
        )
    found = dots(jax.make_jaxpr(step)(lhs, rhs))
    assert sum(d.lhs == jnp.float32 for d in found) == 1


def test_a_recipe_without_quantized_products_is_lax():
    recipe = dataclasses.replace(named.current_scaling(), quantized=())
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    results = value_and_gradients(recipe, MATMUL, grad)(lhs, rhs)
    out, pull = jax.vjp(lambda x, w: lax.dot_general(x, w, MATMUL), lhs, rhs)
    for actual, expected in zip(results[:3], (out, *pull(grad)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def residuals(recipe, *shapes):
    lhs, rhs = (normal(i, *s, dtype=jnp.bfloat16) for i, s in enumerate(shapes))
    product = functools.partial(
        scaled_dot_general, dimension_numbers=MATMUL, recipe=recipe
    )
    scales = start(recipe)
    pull = jax.eval_shape(
        lambda x, w: jax.vjp(lambda x, w: product(x, w, scales=scales), x, w)[1],
        lhs,
        rhs,
    )
    return jax.tree.leaves(pull)


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "block", "mx"])
def test_what_is_kept_for_the_backward_pass_has_8_bits(name):
    kept = [x for x in residuals(RECIPES[name], (64, 64), (64, 32)) if x.size > 1000]
    assert sorted(x.shape for x in kept) == [(64, 32), (64, 64)]
    assert all(x.dtype.itemsize == 1 for x in kept)


def test_nothing_is_quantized_twice_where_once_serves_both():
    def casts(name):
        outputs = (
            e.outvars[0].aval.dtype
            for e in equations(jaxpr_of_step(RECIPES[name]))
            if e.primitive.name == "convert_element_type"
        )
        return sum(dtype in (E4M3, E5M2) for dtype in outputs)

    assert casts("current") == casts("delayed") == 3
    assert casts("channel") == casts("mx") == 6
    assert casts("block") == 5  # the square blocks of the weight are reused


def test_a_block_is_never_reused_along_another_axis():
    """Along the other axis an outlier is in another block: both must be well scaled."""
    x = normal(0, 64, 64).at[0, 0].set(1e4)
    recipe = named.mx_scaling()
    step = jax.jit(value_and_gradients(recipe, MATMUL, normal(2, 64, 64)))
    _, _, rhs_grad, _ = step(x, normal(1, 64, 64))
    exact = np.float64(x).T @ np.float64(normal(2, 64, 64))
    assert reference.sqnr(exact[:, 1:], rhs_grad[:, 1:]) > 20


# ---------------------------------------------------------------- overflow, underflow


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize(
    "name", ["current", "delayed", "channel", "block", "mx fp4", "int8"]
)
def test_a_gradient_that_overflowed_stays_visible(name, bad):
    recipe = RECIPES[name]
    grad = normal(2, 6, 24).at[1, 3].set(bad)
    scales = start(recipe)
    if recipe.stateful:
        scales = recipe.update(recipe.init(), jnp.full(3, 5.0)).scale
    step = jax.jit(value_and_gradients(recipe, MATMUL, grad))
    _, lhs_grad, rhs_grad, seen = step(normal(0, 6, 40), normal(1, 40, 24), scales)
    assert not np.all(np.isfinite(lhs_grad)) and not np.all(np.isfinite(rhs_grad))
    if recipe.stateful:
        assert np.isinf(seen[2]) and np.all(np.isfinite(seen[:2]))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 3000.0, 1e30])
@pytest.mark.parametrize("name", ["current", "delayed", "channel", "mx"])
def test_the_first_step_is_scaled_to_what_it_sees(name, size):
    recipe = RECIPES[name]
    lhs, rhs = normal(0, 16, 64) * size, normal(1, 64, 24)
    out = jax.jit(scaled_dot_general, static_argnums=2, static_argnames="recipe")(
        lhs, rhs, MATMUL, recipe=recipe, scales=start(recipe)
    )
    assert reference.sqnr(np.float64(lhs) @ np.float64(rhs), out) > 25


def test_zeros_are_no_reason_for_nan():
    for name in ("current", "delayed", "mx", "int8"):
        recipe = RECIPES[name]
        step = jax.jit(value_and_gradients(recipe, MATMUL, jnp.zeros((6, 24))))
        results = step(jnp.zeros((6, 40)), jnp.zeros((40, 24)), start(recipe))
        assert all(np.all(r == 0) for r in results if r is not None)


# ------------------------------------------------------------------- delayed scaling


def test_observations_are_the_amaxes():
    recipe = named.delayed_scaling()
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    *_, seen = value_and_gradients(recipe, MATMUL, grad)(lhs, rhs, jnp.zeros(3))
    np.testing.assert_array_equal(seen, [np.abs(x).max() for x in (lhs, rhs, grad)])


def test_scales_of_the_state_are_used():
    recipe = named.delayed_scaling()
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    state = recipe.update(recipe.init(), jnp.array([1.0, 2.0, 0.5]))  # x saturates
    scales = state.scale
    results = jax.jit(value_and_gradients(recipe, MATMUL, grad))(lhs, rhs, scales)

    def fake(index, scaling):
        scale = np.full((1, 1), scales[index])
        return lambda x, *_: reference.fake_quantize(
            x, scaling.dtype.name, (-1, -1), scale=scale
        )

    tensors = {
        "lhs": fake(0, recipe.lhs),
        "rhs": fake(1, recipe.rhs),
        "grad": fake(2, recipe.grad),
    }
    expected = reference.dot_general_and_gradients(lhs, rhs, grad, MATMUL, tensors)
    for actual, oracle in zip(results[:3], expected, strict=True):
        np.testing.assert_allclose(
            actual, oracle, rtol=0, atol=np.abs(oracle).max() * 4e-6
        )


def test_an_overflow_in_one_step_is_over_in_the_next():
    recipe = named.delayed_scaling(1024)
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)

    @jax.jit
    def step(state, grad):
        function = value_and_gradients(recipe, MATMUL, grad)
        *results, seen = function(lhs, rhs, state.scale)
        return recipe.update(state, seen), results

    good = normal(2, 6, 24)
    state, before = step(recipe.init(), good)
    for bad in (jnp.inf, jnp.nan):
        state, spoiled = step(state, good.at[0, 0].set(bad))
        assert not np.all(np.isfinite(spoiled[1]))
    state, after = step(state, good)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_calls_in_a_row_observe_the_exact_maximum():
    recipe = named.delayed_scaling()
    rhs = normal(1, 40, 40)

    def loss(scales, x, observed):
        for _ in range(3):
            if observed:
                x, scales = observed_dot_general(x, rhs, scales, MATMUL, recipe=recipe)
            else:
                x = scaled_dot_general(x, rhs, MATMUL, recipe=recipe, scales=scales)
        return x.sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    exact = gradient(jnp.zeros(3), normal(0, 6, 40), True)
    summed = gradient(jnp.zeros(3), normal(0, 6, 40), False)
    assert exact[1] == np.abs(rhs).max()
    np.testing.assert_allclose(summed[1], 3 * np.abs(rhs).max(), rtol=1e-6)
    assert np.all(summed >= exact)


def test_scales_in_the_carry_of_a_scan_observe_the_maximum():
    recipe = named.delayed_scaling()
    xs, rhs = normal(0, 5, 6, 40), normal(1, 40, 8)

    def loss(scales):
        def body(scales, x):
            out, scales = observed_dot_general(x, rhs, scales, MATMUL, recipe=recipe)
            return scales, out.sum()

        return lax.scan(body, scales, xs)[1].sum()

    seen = jax.jit(jax.grad(loss))(jnp.zeros(3))
    np.testing.assert_array_equal(seen, [np.abs(xs).max(), np.abs(rhs).max(), 1.0])


def test_microbatches_merge_to_what_one_batch_observes():
    recipe = named.delayed_scaling()
    x, rhs = normal(0, 8, 40), normal(1, 40, 8)

    @jax.jit
    def observe(x):
        return jax.grad(
            lambda s: scaled_dot_general(x, rhs, MATMUL, recipe=recipe, scales=s).sum()
        )(jnp.zeros(3))

    parts = jnp.stack([observe(x[:4]), observe(x[4:])])
    np.testing.assert_array_equal(jnp.max(parts, axis=0), observe(x))


def test_a_step_of_the_loss_scale_saturates_no_gradient():
    recipe = named.delayed_scaling()
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)

    def step(state, coming):
        loss_scale = state.loss_scale
        function = value_and_gradients(recipe, MATMUL, grad * loss_scale)
        *_, rhs_grad, seen = function(lhs, rhs, state.scale)
        return recipe.update(state, seen, coming), rhs_grad / loss_scale

    state, first = step(recipe.init(2.0**8), 2.0**20)
    for loss_scale in (2.0**-3, 2.0**8, 2.0**8):
        state, again = step(state, loss_scale)
        np.testing.assert_array_equal(first, again)


def test_a_calibrated_recipe_waits_for_no_reduction():
    recipe = named.delayed_scaling()
    known = dataclasses.replace(recipe, calibrated=True)
    lhs, rhs, grad = normal(0, 6, 40), normal(1, 40, 24), normal(2, 6, 24)
    scales = recipe.update(recipe.init(), jnp.full(3, 3.0)).scale
    one = value_and_gradients(recipe, MATMUL, grad)(lhs, rhs, scales)
    two = value_and_gradients(known, MATMUL, grad)(lhs, rhs, scales)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # unknown scales are 1
    out, *_ = value_and_gradients(known, MATMUL, grad)(lhs, rhs, jnp.zeros(3))
    expected, *_ = value_and_gradients(known, MATMUL, grad)(lhs, rhs, jnp.ones(3))
    np.testing.assert_array_equal(out, expected)


# ---------------------------------------------------------------------- quantized_rhs


@pytest.mark.parametrize("name", ["current", "block"])
def test_a_quantized_copy_gives_the_same_and_the_gradient_goes_to_the_master(name):
    recipe = RECIPES[name]
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)
    block = recipe.rhs.block(rhs.shape, (0,))
    copy = quantize(rhs, recipe.rhs.dtype, block=block, rounding=recipe.rhs.rounding)

    def loss(rhs, copy):
        out = scaled_dot_general(lhs, rhs, MATMUL, recipe=recipe, quantized_rhs=copy)
        return jnp.sum(out * normal(2, 6, 24))

    results = jax.jit(jax.value_and_grad(loss))(rhs, copy)
    expected = jax.jit(jax.value_and_grad(loss))(rhs, None)
    jax.tree.map(np.testing.assert_array_equal, results, expected)


def test_a_quantized_copy_of_another_form_is_refused():
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)
    call = functools.partial(
        scaled_dot_general, lhs, rhs, MATMUL, recipe=named.per_channel_scaling()
    )
    with pytest.raises(ValueError, match="quantized_rhs serves the product"):
        call(quantized_rhs=quantize(rhs, E4M3, block=(-1, 1)))
    call = functools.partial(call, recipe=named.current_scaling())
    for copy in (quantize(rhs, E5M2), quantize(rhs[:8], E4M3)):
        with pytest.raises(ValueError, match="quantized_rhs serves the product"):
            call(quantized_rhs=copy)


def test_a_copy_made_within_the_loss_takes_no_gradient():
    lhs, rhs = normal(0, 6, 40), normal(1, 40, 24)
    recipe = named.current_scaling()

    def loss(rhs, quantized):
        copy = quantize(rhs, E4M3, rounding="up") if quantized else None
        out = scaled_dot_general(lhs, rhs, MATMUL, recipe=recipe, quantized_rhs=copy)
        return jnp.sum(out**2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_array_equal(grad(rhs, True), grad(rhs, False))


def test_copies_for_a_loop_are_made_of_weights_without_gradient():
    x, weights = normal(0, 4, 16), normal(1, 3, 16, 16)
    recipe = named.current_scaling()
    make = jax.vmap(functools.partial(quantize, dtype=E4M3, rounding="up"))

    def loss(weights, copies):
        def step(x, layer):
            rhs, copy = layer
            return scaled_dot_general(
                x, rhs, MATMUL, recipe=recipe, quantized_rhs=copy
            ), None

        copies = None if copies is None else copies(weights)
        return jnp.sum(jax.lax.scan(step, x, (weights, copies))[0])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    detached = grad(weights, lambda weights: make(jax.lax.stop_gradient(weights)))
    np.testing.assert_array_equal(detached, grad(weights, None))
    with pytest.raises(TypeError, match="a loop may ask for one"):
        grad(weights, make)


# -------------------------------------------------------------------- transformations


def test_vmap_scales_every_example_for_itself():
    recipe = named.current_scaling()
    xs, rhs = normal(0, 3, 6, 40), normal(1, 40, 24)
    xs = xs * jnp.array([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    product = functools.partial(
        scaled_dot_general, dimension_numbers=MATMUL, recipe=recipe
    )
    out = jax.jit(jax.vmap(product, (0, None)))(xs, rhs)
    for x, y in zip(xs, out, strict=True):
        np.testing.assert_allclose(y, product(x, rhs), rtol=1e-5)


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "mx"])
def test_scan_over_layers_equals_a_loop(name):
    recipe = RECIPES[name]
    x, layers = normal(0, 6, 40), normal(1, 3, 40, 40)
    scales = jnp.zeros((3, 3)) if recipe.stateful else None

    def layer(x, parameters):
        rhs, scales = parameters
        out = scaled_dot_general(x, rhs, MATMUL, recipe=recipe, scales=scales)
        return jnp.tanh(out), None

    def scanned(parameters):
        return lax.scan(layer, x, parameters)[0].sum()

    def looped(parameters):
        y = x
        for i in range(3):
            y, _ = layer(y, jax.tree.map(lambda p, i=i: p[i], parameters))
        return y.sum()

    one = jax.jit(jax.grad(scanned))((layers, scales))
    two = jax.jit(jax.grad(looped))((layers, scales))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, two)


def test_a_checkpoint_policy_can_keep_the_8_bit_copies():
    recipe = named.current_scaling()
    x, rhs = normal(0, 64, 64), normal(1, 64, 64)
    rhs = rhs.at[0, :2].set(jnp.array([448.0, 300.0]))  # IEEE rules would make them NaN

    def block(x, rhs):
        for _ in range(2):
            x = jnp.tanh(scaled_dot_general(x, rhs, MATMUL, recipe=recipe))
        return x.sum()

    policies = jax.checkpoint_policies
    saved, plain = (
        jax.checkpoint(block, policy=policy)
        for policy in (
            policies.save_only_these_names("mpjax_quantized"),
            policies.nothing_saveable,
        )
    )

    def kept(function):
        _, pull = jax.vjp(function, x, rhs)
        return [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.size > 1000]

    assert kept(saved).count(jnp.dtype(jnp.uint8)) == 4
    assert jnp.uint8 not in kept(plain)
    everything = jax.checkpoint(block, policy=policies.everything_saveable)
    for function in (saved, plain, everything):
        one = jax.jit(jax.grad(function, (0, 1)))(x, rhs)
        two = jax.jit(jax.grad(block, (0, 1)))(x, rhs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


def test_no_retrace_for_an_equal_recipe():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def step(x, recipe):
        traces.append(1)
        return scaled_dot_general(x, x, MATMUL, recipe=recipe)

    for dtype in (E4M3, "float8_e4m3fn", jnp.dtype(E4M3)):
        step(normal(0, 8, 8), named.current_scaling(dtype))
    assert len(traces) == 1


def test_forward_mode_says_that_it_is_not_to_be_had():
    product = functools.partial(
        scaled_dot_general, dimension_numbers=MATMUL, recipe=named.current_scaling()
    )
    x = normal(0, 8, 8)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(product, (x, x), (x, x))


# --------------------------------------------------------------------------- sharding


LINEAR = normal(2, 8, 16)


def linear_loss(recipe, x, w, scales, out_sharding=None):
    """Its output gradient does not depend on the product, so neither do amaxes."""
    out = scaled_dot_general(
        x, w, MATMUL, recipe=recipe, scales=scales, out_sharding=out_sharding
    )
    return out


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "block"])
@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [
        (P("d", None), P(None, None)),
        (P("d", None), P(None, "m")),
        (P("d", "m"), P("m", None)),
    ],
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_operands_give_what_one_device_gives(name, x_spec, w_spec, axis_type):
    recipe = RECIPES[name]
    x, w = normal(0, 8, 64), normal(1, 64, 16)
    scales = start(recipe)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axis_type,) * 2)
    contracted = axis_type == AxisType.Explicit and x_spec[1]
    out_sharding = NamedSharding(mesh, P("d", None)) if contracted else None

    def loss(x, w, scales, out_sharding=None):
        out = linear_loss(recipe, x, w, scales, out_sharding)
        return jnp.sum(out * out)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    expected = step(x, w, scales)
    with jax.set_mesh(mesh):
        sharded = step(
            jax.device_put(x, NamedSharding(mesh, x_spec)),
            jax.device_put(w, NamedSharding(mesh, w_spec)),
            scales,
            out_sharding,
        )
    for actual, oracle in zip(
        jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(actual, oracle, rtol=1e-5, atol=1e-4)


def test_blocks_across_explicit_shards_are_refused():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(0, 8, 64), NamedSharding(mesh, P(None, "d")))
        w = jax.device_put(normal(1, 64, 16), NamedSharding(mesh, P("d", None)))
        with pytest.raises(ValueError, match="lie within the shards of an axis"):
            scaled_dot_general(
                x,
                w,
                MATMUL,
                recipe=named.block_scaling(size=16),
                out_sharding=NamedSharding(mesh, P(None, None)),
            )


@pytest.mark.parametrize("name", ["current", "delayed", "channel", "block"])
@pytest.mark.parametrize("w_spec", [P(), P(None, "d")])
def test_shard_map_with_replicated_and_with_sharded_weights(name, w_spec):
    recipe = RECIPES[name]
    x, w, scales = normal(0, 8, 64), normal(1, 64, 16), start(recipe)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x_spec = P("d", None) if w_spec == P() else P()

    @jax.jit
    def step(x, w, scales):
        def loss(x, w, scales):
            @functools.partial(
                jax.shard_map, mesh=mesh, in_specs=(x_spec, w_spec, P()), out_specs=P()
            )
            def local(x, w, scales):
                out = scaled_dot_general(x, w, MATMUL, recipe=recipe, scales=scales)
                return lax.psum(jnp.sum(out), "d")

            return local(x, w, scales)

        return jax.grad(loss, (0, 1, 2))(x, w, scales)

    x_grad, w_grad, seen = step(x, w, scales)
    ones = np.ones((8, 16))
    assert reference.sqnr(ones @ np.float64(w).T, x_grad) > 25
    assert reference.sqnr(np.float64(x).T @ ones, w_grad) > 25
    if recipe.stateful:  # merged over devices by max
        np.testing.assert_array_equal(seen, [np.abs(x).max(), np.abs(w).max(), 1.0])


def test_gradients_inside_shard_map_with_replicated_weights():
    recipe = named.delayed_scaling()
    x, w = normal(0, 8, 64), normal(1, 64, 16)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=(P(), P())
    )
    def gradients(x, w, scales):
        def loss(w, scales):
            out = scaled_dot_general(x, w, MATMUL, recipe=recipe, scales=scales)
            return jnp.sum(out)

        return jax.grad(loss, (0, 1))(w, scales)

    w_grad, seen = gradients(x, w, jnp.zeros(3))
    assert reference.sqnr(np.float64(x).T @ np.ones((8, 16)), w_grad) > 25
    np.testing.assert_array_equal(seen, [np.abs(x).max(), np.abs(w).max(), 1.0])


# -------------------------------------------------------------------------- bad input


def test_operands_that_cannot_be_quantized_are_refused():
    recipe = named.current_scaling()
    x = normal(0, 8, 8)
    with pytest.raises(TypeError, match=r"lhs of a scaled product .* got int32"):
        scaled_dot_general(x.astype(jnp.int32), x, MATMUL, recipe=recipe)
    with pytest.raises(TypeError, match=r"rhs of a scaled product .* got a QArray"):
        scaled_dot_general(x, quantize(x, E4M3), MATMUL, recipe=recipe)
    with pytest.raises(
        TypeError, match=r"rhs of a scaled product .* got float8_e4m3fn"
    ):
        scaled_dot_general(x, x.astype(E4M3), MATMUL, recipe=recipe)
    with pytest.raises(TypeError, match="contracting dimensions"):
        scaled_dot_general(x, x[:4], MATMUL, recipe=recipe)


def test_scales_and_recipe_go_together():
    x = normal(0, 8, 8)
    with pytest.raises(ValueError, match=r"takes scales=state.scale"):
        scaled_dot_general(x, x, MATMUL, recipe=named.delayed_scaling())
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2, 3\)"):
        scaled_dot_general(
            x, x, MATMUL, recipe=named.delayed_scaling(), scales=jnp.zeros((2, 3))
        )
    assert scaling.CurrentScaling(E4M3) == named.current_scaling().lhs
