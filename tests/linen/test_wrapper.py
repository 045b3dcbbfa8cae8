"""``mpjax.linen``: unmodified Linen models under a policy."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal
from jaxprs import count_converts, dots
from linen_models import (
    MODELS,
    RNGS,
    Block,
    Compact,
    Head,
    Jitted,
    OwnParams,
    ResidualCNN,
    Scanned,
    SetupStyle,
    Tied,
    X,
)

import mpjax
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)


def run(model, variables, x=X):
    """Outputs in float32 and the updated statistics."""
    mutable = ["batch_stats"]
    y, stats = model.apply(
        variables, x, rngs={"dropout": jax.random.key(2)}, mutable=mutable
    )
    return y.astype(jnp.float32), stats


def gradient(model, variables):
    def loss(params):
        y, _ = run(model, {**variables, "params": params})
        return jnp.mean(y**2)

    return jax.grad(loss)(variables["params"])


@pytest.fixture(autouse=True)
def promotion(request):
    # Flax's own cells mix their float32 carry with 16-bit gates.
    name = request.node.callspec.id if hasattr(request.node, "callspec") else ""
    with jax.numpy_dtype_promotion("standard" if "Recurrent" in name else "strict"):
        yield


@functools.cache
def initial_variables(cls):
    """Of the bare model, of it wrapped, and of it stored in bfloat16; compiled once."""
    models = cls(), *(MixedPrecision(cls(), p) for p in ("mixed_bfloat16", "bfloat16"))
    return jax.jit(lambda *args: [model.init(*args) for model in models])(RNGS, X)


@pytest.mark.parametrize("cls", MODELS)
def test_same_variables_as_the_bare_model(cls):
    variables, wrapped, half = initial_variables(cls)
    assert_trees_equal(wrapped, variables)
    assert_trees_equal(half["params"], mpjax.cast_floating(variables["params"], BF16))
    assert_trees_equal(half.get("batch_stats", {}), variables.get("batch_stats", {}))


@pytest.mark.parametrize("cls", MODELS)
def test_same_numbers_and_dots_as_the_model_written_by_hand(cls):
    variables, *_ = initial_variables(cls)
    by_hand, wrapped = cls(BF16), MixedPrecision(cls(), "mixed_bfloat16")
    expected, actual = (jax.jit(functools.partial(run, m)) for m in (by_hand, wrapped))
    assert_trees_equal(actual(variables), expected(variables))

    jaxpr = jax.make_jaxpr(functools.partial(gradient, wrapped))(variables)
    by_hand_jaxpr = jax.make_jaxpr(functools.partial(gradient, by_hand))(variables)
    found = dots(jaxpr)
    assert found
    assert all((d.lhs, d.rhs) == (BF16, BF16) for d in found)
    assert len(found) == len(dots(by_hand_jaxpr))
    assert count_converts(jaxpr) <= count_converts(by_hand_jaxpr)


@pytest.mark.parametrize("cls", [Compact, ResidualCNN, Scanned])
def test_program_costs_no_more_than_by_hand(cls):
    variables, *_ = initial_variables(cls)
    costs = []
    for model in (cls(BF16), MixedPrecision(cls(), "mixed_bfloat16")):
        # By hand, gradients of biases are summed up in bfloat16, from fewer bytes.
        values, step = (
            jax.jit(functools.partial(function, model)).lower(variables).compile()
            for function in (run, gradient)
        )
        text = step.as_text()
        bytes_accessed = values.cost_analysis()["bytes accessed"]
        costs.append((bytes_accessed, text.count(" convert("), text.count(" dot(")))
    by_hand, wrapped = costs
    assert all(ours <= theirs for ours, theirs in zip(wrapped, by_hand, strict=True))


@pytest.mark.parametrize("cls", [Compact, ResidualCNN, OwnParams])
def test_float32_policy_is_the_bare_model(cls):
    variables, *_ = initial_variables(cls)
    actual = run(MixedPrecision(cls(), "float32"), variables)
    assert_trees_equal(actual, run(cls(), variables))


def test_residual_stream_stays_in_16_bits():
    seen = {}

    def watch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if context.module.scope is not None and isinstance(y, jax.Array):
            seen["/".join(context.module.path)] = y.dtype
        return y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + self.param("pos_embedding", nn.initializers.normal(), x.shape)
            for _ in range(2):
                x = Block()(x)[0]
                x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return nn.Dense(4)(x)

    model = MixedPrecision(Model(), "mixed_bfloat16")
    variables = model.init(KEY, X)
    # Entered first, hence wrapped around nothing but the method: it sees layers bare.
    with nn.intercept_methods(watch):
        y = model.apply(variables, X)
    assert y.dtype == jnp.float32
    stream = {p: d for p, d in seen.items() if p and "Norm" not in p}
    assert len(stream) > 10
    assert set(stream.values()) == {BF16}


def test_methods_of_the_model_are_methods_of_the_wrapper():
    model = MixedPrecision(SetupStyle(), "c=bf16")
    variables = model.init(KEY, X)
    bare = SetupStyle(BF16).bind(variables).encode(X.astype(BF16))
    for y in (
        model.apply(variables, X, method="encode"),
        model.apply(variables, X, method=SetupStyle.encode),
        model.apply(variables, X, method=model.encode),
        model.apply(variables, X, method=lambda m, x: m.encode(x)),
        model.bind(variables).encode(X),
    ):
        np.testing.assert_array_equal(y, bare)
        assert y.dtype == BF16
    with pytest.raises(AttributeError):
        model.decode(X)


@pytest.mark.parametrize("cls", [Compact, Jitted, Tied])
def test_a_policy_applied_twice_is_applied_once(cls):
    once = MixedPrecision(cls(), "mixed_bfloat16")
    twice = MixedPrecision(once, "mixed_bfloat16")
    variables = once.init(KEY, X)
    assert_trees_equal(twice.init(KEY, X), variables)
    assert twice == once
    assert_trees_equal(run(twice, variables), run(once, variables))


def test_vmap_over_models_and_flax_tabulate():
    model = MixedPrecision(ResidualCNN(), "mixed_bfloat16")
    keys = jax.random.split(KEY, 3)
    stacked = jax.vmap(lambda key: model.init(key, X))(keys)
    y, _ = jax.vmap(lambda v: run(model, v))(stacked)
    first, _ = run(model, jax.tree.map(lambda x: x[0], stacked))
    np.testing.assert_allclose(y[0], first, rtol=2**-7, atol=2**-7)
    assert "Total Parameters: 1,467" in model.tabulate(KEY, X)


def test_the_bare_module_is_left_as_it_was():
    model = Compact()
    before = repr(model)
    wrapped = MixedPrecision(model, "mixed_bfloat16")
    variables = wrapped.init(KEY, X)
    assert repr(model) == before
    assert {d.lhs for d in dots(jax.make_jaxpr(model.apply)(variables, X))} == {
        np.dtype(np.float32)
    }
    with pytest.raises(ZeroDivisionError):
        wrapped.apply(variables, X, method=lambda m, x: m(x) / (1 // 0))
    np.testing.assert_array_equal(
        model.apply(variables, X), Compact().apply(variables, X)
    )


class Base(nn.Module):
    features: int = 8

    def setup(self):
        self.dense = nn.Dense(self.features)
        self.shift = self.param("shift", nn.initializers.normal(), (8,))

    @property
    def twice(self):
        return 2 * self.features

    @staticmethod
    def prepare(x):
        return x + 1

    def encode(self, x):
        return self.dense(x)


class Derived(Base):
    def encode(self, x):
        return 2 * super().encode(x)

    def __call__(self, x):
        return self.encode(x) + self.shift[None, None]


def test_the_wrapper_has_all_that_the_module_has():
    model = MixedPrecision(Derived(), "c=bf16")
    variables = model.init(KEY, X)
    for wrapper in (model, model.bind(variables)):
        assert (wrapper.features, wrapper.twice, wrapper.prepare(3)) == (8, 16, 4)
        assert not hasattr(wrapper, "decode")
    bound = model.bind(variables)
    assert bound.shift.dtype == BF16
    with pytest.raises(AttributeError, match="method=lambda"):
        operator.attrgetter("dense")(bound)
    one = Base().bind(variables).encode(X)
    for method, expected in (
        (Base.encode, one),
        ("encode", 2 * one),
        (Derived.encode, 2 * one),
        (lambda m, x: m.dense(x), one),
        (
            lambda m, x: m.encode(m.encode(x)),
            2 * Base().bind(variables).encode(2 * one),
        ),
    ):
        y = model.apply(variables, X, method=method)
        assert y.dtype == BF16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)


def test_intermediates_are_captured_once():
    for capture in (True, lambda module, name: True):
        states = []
        for model in (Head(), MixedPrecision(Head(), "float32")):
            variables = model.init(KEY, X)
            _, state = model.apply(
                variables, X, capture_intermediates=capture, mutable=["intermediates"]
            )
            states.append(state)
        assert_trees_equal(*states)
