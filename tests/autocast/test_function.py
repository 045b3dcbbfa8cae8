"""The call of autocast: what it takes, what it returns, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jaxprs import dots

import mpjax

X, W = jnp.full((4, 8), 0.5), jnp.full((8, 8), 0.1)


def layer(x, w):
    return jnp.tanh(x @ w)


def test_results_have_the_structure_and_the_dtypes_of_the_function():
    def fn(x, w):
        h = x @ w
        return {
            "h": h,
            "low": h.astype(jnp.float16),
            "count": jnp.argmax(h),
            "none": None,
        }

    got = mpjax.autocast(fn)(X, W)
    assert jax.tree.map(lambda a: a.dtype.name, got) == {
        "h": "float32",
        "low": "float16",
        "count": "int32",
        "none": None,
    }
    got = mpjax.autocast(fn, output_dtype=jnp.bfloat16)(X, W)
    assert got["h"].dtype == got["low"].dtype == jnp.bfloat16
    assert got["count"].dtype == jnp.int32


def test_what_is_no_array_is_handed_on():
    def fn(x, w, activation, *, axis, flag=False):
        assert axis == -1 and flag is True
        return jnp.sum(activation(x @ w), axis=axis)

    got = mpjax.autocast(fn)(X, W, jnp.tanh, axis=-1, flag=True)
    np.testing.assert_allclose(got, jnp.sum(layer(X, W), -1), rtol=0.01)
    assert mpjax.autocast(lambda x: x * 2)(3.0) == 6.0
    # Arrays of NumPy are arrays of JAX in it.
    got = mpjax.autocast(layer)(np.asarray(X), np.asarray(W))
    np.testing.assert_allclose(got, layer(X, W), rtol=0.01)


def test_keys_and_other_dtypes_are_handed_through():
    def fn(key, x, eight):
        return jax.random.normal(key, (2,)), x * 2, eight

    key, eight = jax.random.key(0), jnp.ones(2, jnp.float8_e4m3fn)
    normal, twice, same = jax.jit(mpjax.autocast(fn))(key, jnp.arange(3), eight)
    np.testing.assert_array_equal(normal, jax.random.normal(key, (2,)))
    assert twice.dtype == jnp.int32 and same.dtype == eight.dtype


def test_it_closes_over_what_others_trace():
    def outer(w):
        return jnp.sum(mpjax.autocast(lambda x: x @ w)(X))

    gradient = jax.jit(jax.grad(outer))(W)
    np.testing.assert_allclose(gradient, jnp.full((8, 8), 2.0), rtol=0.01)
    assert {d.lhs.name for d in dots(jax.make_jaxpr(jax.grad(outer))(W))} == {
        "bfloat16"
    }


TRANSFORMS = {
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda x, w: jnp.sum(f(x, w))),
    "jvp": lambda f: lambda x, w: jax.jvp(lambda x: f(x, w), (x,), (x,))[1],
    "vmap": lambda f: lambda x, w: jax.vmap(f, (0, None))(x[:, None], w),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: (
        lambda x, w: lax.scan(lambda c, _: (f(c, w), None), x, None, 2)[0]
    ),
    "linearize": lambda f: lambda x, w: jax.linearize(lambda x: f(x, w), x)[1](x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_composes_in_any_order(name):
    transform = TRANSFORMS[name]
    outside = transform(mpjax.autocast(layer))
    inside = mpjax.autocast(transform(layer))
    wanted = transform(layer)(X, W)
    for fn in (outside, inside, mpjax.autocast(outside), jax.jit(inside)):
        assert jax.eval_shape(fn, X, W).dtype == jnp.float32
        np.testing.assert_allclose(fn(X, W), wanted, rtol=0.02)
        found = dots(jax.make_jaxpr(fn)(X, W))
        assert {dot.lhs.name for dot in found} == {"bfloat16"}


def test_applied_twice_it_is_applied_once():
    once = mpjax.autocast(layer)
    twice = mpjax.autocast(once)
    one, two = (str(jax.make_jaxpr(fn)(X, W)) for fn in (once, twice))
    assert one == two
    # The inner call has decided.
    inner = mpjax.autocast(mpjax.autocast(layer, jnp.float16))
    assert {d.lhs.name for d in dots(jax.make_jaxpr(inner)(X, W))} == {"float16"}


def test_products_that_the_function_has_decided_on_stay():
    def fn(x, w):
        exact = jnp.matmul(x, w, precision="highest")
        low = x.astype(jnp.float16) @ w.astype(jnp.float16)
        wide = jnp.matmul(x, w, preferred_element_type=jnp.bfloat16)
        return exact, low, wide

    found = dots(jax.make_jaxpr(mpjax.autocast(fn))(X, W))
    names = [(dot.lhs.name, dot.out.name) for dot in found]
    assert names == [
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
    ]


def test_it_keeps_the_name_and_the_text_of_the_function():
    assert mpjax.autocast(layer).__name__ == "layer"
    partial = mpjax.autocast(functools.partial(layer, w=W))
    np.testing.assert_allclose(partial(X), layer(X, W), rtol=0.01)


@pytest.mark.parametrize("level", ["O4", "o1", 1, None])
def test_a_level_is_one_of_four(level):
    with pytest.raises(ValueError, match="opt_level is one of 'O0', 'O1', 'O2', 'O3'"):
        mpjax.autocast(layer, opt_level=level)


@pytest.mark.parametrize(
    ("dtype", "error", "match"),
    [
        ("int8", TypeError, "dtype is a floating dtype, got int8"),
        (jnp.complex64, TypeError, "dtype is a floating dtype, got complex64"),
        (3, TypeError, "dtype is a dtype, got 3"),
        ("float8_e4m3fn", ValueError, "got float8_e4m3fn; 8 bits need scales"),
        ("float64", ValueError, "dtype is one of bfloat16, float16, float32"),
    ],
)
def test_a_dtype_that_makes_no_sense_is_refused(dtype, error, match):
    with pytest.raises(error, match=match):
        mpjax.autocast(layer, dtype)


@pytest.mark.parametrize("rules", ["bfloat16", 3, ["float32"], {".*": "float32"}])
def test_rules_are_rules(rules):
    with pytest.raises(TypeError, match=r"rules are an mpjax[.]Rule or a list"):
        mpjax.autocast(layer, rules=rules)


def test_what_an_nnx_module_writes_to_itself_is_not_lost():
    class Counted(nnx.Module):
        def __init__(self):
            self.kernel, self.count = nnx.Param(W), nnx.Variable(jnp.int32(0))

        def __call__(self, x, *, count):
            if count:
                self.count[...] += 1
            return x @ self.kernel[...]

    model = Counted()

    def loss(model, x, count):
        return jnp.sum(model(x, count=count))

    cast = mpjax.autocast(loss)
    gradient = nnx.grad(cast)(model, X, count=False)
    assert gradient["kernel"][...].dtype == jnp.float32
    for call in (cast, nnx.grad(cast), nnx.jit(cast, static_argnames="count")):
        with pytest.raises(ValueError, match="loss writes to its argument of type Cou"):
            call(model, X, count=True)

    graph, state = nnx.split(model)

    def split(state, x):
        model = nnx.merge(graph, state, copy=True)
        return loss(model, x, count=True), nnx.state(model)

    _, state = mpjax.autocast(split)(state, X)
    nnx.update(model, state)
    assert model.count[...] == 1


def test_what_is_no_array_is_not_returned():
    def fn(x):
        return {"y": x, "name": "a string"}

    with pytest.raises(
        TypeError, match=r"fn returns an object of type str \(\['name'\]"
    ):
        mpjax.autocast(fn)(X)
    with pytest.raises(TypeError, match="fn is a function, got 3"):
        mpjax.autocast(3)
