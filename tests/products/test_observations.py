"""What calls that share scales observe is their maximum, wherever they share them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax._layers.multiplier import Multiplier

RECIPE = mpjax.delayed_scaling(history_length=16)
SCALES, W = jnp.zeros(3), 3 * jnp.ones((4, 4))
# Of amax 1 to 6, and the gradient of each output is ten times that.
X = jnp.arange(1.0, 7.0)[:, None, None] * jnp.ones((6, 2, 4))


def dot_general(x, w, scales):
    dims = (((1,), (0,)), ((), ()))
    return mpjax.scaled_dot_general(x, w, dims, recipe=RECIPE, scales=scales)


def convolution(x, w, scales):
    x, w = x[:, :, None], w.T[:, :, None]
    y = mpjax.scaled_conv_general_dilated(
        x, w, (1,), "SAME", recipe=RECIPE, scales=scales
    )
    return y[:, :, 0]


def einsum(x, w, scales):
    return mpjax.einsum("ij,jk->ki", x, w, recipe=RECIPE, scales=scales).T


def split(product):
    """The product with the first half of its scales, and the second half."""

    def call(x, w, scales):
        now, later = mpjax.split_scales(scales)
        return product(x, w, now), later

    return call


dot = split(dot_general)


def layer(x, w, scales):
    """That is used twice, the second time with half of the input."""
    held = {"kernel": scales}

    def read(name, weight=None):
        return dataclasses.replace(RECIPE.init(), scale=held[name])

    products = Multiplier("", RECIPE, 1, read, held.__setitem__, set())
    dims = (((1,), (0,)), ((), ()))
    y = products.dot_general(x, w, dims)
    return y + products.dot_general(x / 2, w, dims), held["kernel"]


PRODUCTS = {
    "dot": dot,
    "conv": split(convolution),
    "einsum": split(einsum),
    "layer": layer,
}


@pytest.mark.parametrize("product", [dot_general, convolution, einsum])
@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        (None, ValueError, "takes scales=state.scale, got none"),
        (RECIPE.init(), TypeError, "got a ScalingState; pass state.scale"),
        (
            [0.0, 0.0, 0.0],
            TypeError,
            r"float32 array, got \[0.0, .* of type list; pass",
        ),
        (jnp.zeros(3, jnp.bfloat16), TypeError, "got an array bfloat16"),
        (jnp.zeros(3, jnp.int32), TypeError, "got an array int32"),
        (jnp.zeros((2, 3)), ValueError, r"got \(2, 3\); a stack of layers"),
    ],
)
def test_scales_that_do_not_fit_are_refused(product, scales, error, message):
    with pytest.raises(error, match=message):
        product(X[0], W, scales)


def test_scales_go_with_a_recipe_that_has_a_use_for_them():
    with pytest.raises(ValueError, match=r"'current .* no use for scales; leave"):
        mpjax.einsum("ij,jk", X[0], W, recipe=mpjax.current_scaling(), scales=SCALES)
    for recipe in (mpjax.current_scaling, "current"):
        with pytest.raises(TypeError, match=r"recipe is what mpjax.current_scaling\("):
            mpjax.einsum("ij,jk", X[0], W, recipe=recipe)


@pytest.mark.parametrize("scales", [None, RECIPE.init(), [0.0] * 3, jnp.zeros(3, int)])
def test_what_is_no_scales_is_not_split(scales):
    with pytest.raises(TypeError, match=r"pass state\.scale"):
        mpjax.split_scales(scales)


def in_a_loop(product, x, w, scales):
    total = 0.0
    for example in x:
        y, scales = product(example, w, scales)
        total += jnp.sum(y**2)
    return total


def in_a_scan(product, x, w, scales):
    def step(carry, example):
        scales, total = carry
        y, scales = product(example, w, scales)
        return (scales, total + jnp.sum(y**2)), None

    return lax.scan(step, (scales, 0.0), x)[0][1]


def in_a_vmap(product, x, w, scales):
    y, _ = jax.vmap(product, (0, None, None), (0, None))(x, w, scales)
    return jnp.sum(y**2)


@pytest.mark.parametrize("product", [dot_general, convolution, einsum])
@pytest.mark.parametrize("together", [in_a_loop, in_a_scan, in_a_vmap])
def test_a_split_changes_no_value_and_observes_the_maximum(product, together):
    keys = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(keys[0], (5, 2, 4)), jax.random.normal(keys[1], (4, 4))
    scales = jnp.array([0.01, 0.02, 0.03])

    def unsplit(x, w, scales):
        return product(x, w, scales), scales

    def gradients(call):
        function = functools.partial(together, call)
        return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(x, w, scales)

    value, (x_grad, w_grad, seen) = gradients(split(product))
    expected, (x_expected, w_expected, _) = gradients(unsplit)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(x_grad, x_expected)
    np.testing.assert_array_equal(w_grad, w_expected)
    # The amaxes of each of the products alone.
    alone = [
        jax.jit(jax.grad(lambda s, one=one: jnp.sum(product(one, w, s) ** 2)))(scales)
        for one in x
    ]
    np.testing.assert_array_equal(seen[:2], np.max(alone, axis=0)[:2])
    np.testing.assert_allclose(seen[2], np.max(alone, axis=0)[2], rtol=1e-6)


def loss(product, x, w, scales):
    return jnp.sum(10 * x[0, 0] * product(x, w, scales)[0])


def observe(mapped):
    """The gradient with respect to shared scales, and to shared weights."""
    return jax.jit(jax.grad(lambda *args: jnp.sum(mapped(*args)), (2, 1)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_examples_of_vmap(name):
    each = functools.partial(loss, PRODUCTS[name])
    seen, w_grad = observe(jax.vmap(each, (0, None, None)))(X, W, SCALES)
    np.testing.assert_array_equal(seen, [6, 3, 60])
    one_by_one = sum(jax.jit(jax.grad(each, 1))(x, W, SCALES) for x in X)
    np.testing.assert_allclose(w_grad, one_by_one, rtol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_examples_of_nested_vmap(name):
    each = functools.partial(loss, PRODUCTS[name])
    x = X.reshape(2, 3, 2, 4)
    shared = jax.vmap(jax.vmap(each, (0, None, None)), (0, None, None))
    np.testing.assert_array_equal(observe(shared)(x, W, SCALES)[0], [6, 3, 60])
    # Shared by the examples of a model, not by the models of an ensemble.
    scales = jnp.zeros((2, 3))
    inner = jax.vmap(jax.vmap(each, (0, None, None)), (0, None, 0))
    outer = jax.vmap(jax.vmap(each, (0, None, 0)), (1, None, None))
    for mapped in (inner, outer):
        seen = observe(mapped)(x, W, scales)[0]
        expected = [[3, 3, 30], [6, 3, 60]]
        np.testing.assert_array_equal(seen, expected)


def test_an_ensemble_has_scales_of_its_own():
    each = functools.partial(loss, dot)
    seen, _ = observe(jax.vmap(each, (0, None, 0)))(X, W, jnp.zeros((6, 3)))
    np.testing.assert_array_equal(seen, [[i, 3, 10 * i] for i in range(1, 7)])
    seen, _ = observe(jax.vmap(each, (None, None, 0)))(X[1], W, jnp.zeros((6, 3)))
    np.testing.assert_array_equal(seen, [[2, 3, 20]] * 6)


def test_an_overflow_of_one_example_is_seen():
    x = X.at[2, 0, 1].set(jnp.inf)
    seen, _ = observe(jax.vmap(functools.partial(loss, dot), (0, None, None)))(
        x, W, SCALES
    )
    assert seen[0] == jnp.inf


def test_gradients_of_every_example():
    each = jax.grad(functools.partial(loss, dot), (1, 2))
    w_grads, seen = jax.jit(jax.vmap(each, (0, None, None)))(X, W, SCALES)
    for x, w_grad in zip(X, w_grads, strict=True):
        np.testing.assert_allclose(w_grad, each(x, W, SCALES)[0], rtol=1e-6)
    # One gradient with respect to one scale: it is the same for all of them.
    np.testing.assert_array_equal(seen, [[6, 3, 60]] * 6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_scan_within_vmap_and_vmap_within_scan(name):
    product = PRODUCTS[name]

    def scanned(x, w, scales):
        def step(carry, x):
            scales, total = carry
            y, scales = product(x, w, scales)
            return (scales, total + jnp.sum(10 * x[0, 0] * y)), None

        return lax.scan(step, (scales, 0.0), x)[0][1]

    within = jax.vmap(scanned, (0, None, None))
    x = X.reshape(2, 3, 2, 4)
    np.testing.assert_array_equal(observe(within)(x, W, SCALES)[0], [6, 3, 60])

    def mapped(xs, w, scales):
        def step(carry, x):
            scales, total = carry
            y, scales = jax.vmap(product, (0, None, None), (0, None))(x, w, scales)
            return (scales, total + jnp.sum(10 * x[:, :1, :1] * y)), None

        return lax.scan(step, (scales, 0.0), xs)[0][1]

    np.testing.assert_array_equal(observe(mapped)(x, W, SCALES)[0], [6, 3, 60])


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_inner_functions(wrap):
    inner = wrap(functools.partial(loss, dot))
    seen, _ = observe(jax.vmap(inner, (0, None, None)))(X, W, SCALES)
    np.testing.assert_array_equal(seen, [6, 3, 60])


@pytest.mark.parametrize("name", PRODUCTS)
def test_vmap_within_shard_map(name):
    each = functools.partial(loss, PRODUCTS[name])
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=(P(), P())
    )
    def gradients(x, w, scales):
        return observe(jax.vmap(each, (0, None, None)))(x, w, scales)

    seen, w_grad = jax.jit(gradients)(X, W, SCALES)
    np.testing.assert_array_equal(seen, [6, 3, 60])
    one_by_one = sum(jax.jit(jax.grad(each, 1))(x, W, SCALES) for x in X)
    np.testing.assert_allclose(w_grad, one_by_one, rtol=1e-6)


def test_shard_map_within_vmap():
    each = functools.partial(loss, dot)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d")
    )
    def sharded(x, w, scales):
        return each(x[0], w, scales)[None]

    mapped = jax.vmap(sharded, (0, None, None))
    seen, _ = observe(mapped)(X.reshape(3, 2, 2, 4), W, SCALES)
    np.testing.assert_array_equal(seen, [6, 3, 60])


def test_an_axis_of_explicit_sharding():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, P("d"))
        mapped = jax.vmap(functools.partial(loss, dot), (0, None, None))
        seen, _ = observe(mapped)(x, W, SCALES)
    np.testing.assert_array_equal(seen, [6, 3, 60])
