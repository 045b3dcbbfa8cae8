"""Attention under a policy: float32 softmax between 16-bit products."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal
from jaxprs import count_converts, dots, equations
from linen_models import RNGS, X
from nnx_models import Attention, inputs, loss_and_gradient, rngs

import mpjax
from mpjax.linen import MixedPrecision
from mpjax.nnx import mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)


def test_attention_with_dropout_sows_what_stock_attention_sows():
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    variables = layer.init(RNGS, X)
    rngs = {"dropout": jax.random.key(5)}
    y32 = layer.apply(variables, X, rngs=rngs)
    model = MixedPrecision(layer, "mixed_bfloat16")
    y, state = model.apply(
        variables, X, sow_weights=True, rngs=rngs, mutable=["intermediates"]
    )
    np.testing.assert_allclose(y, y32, atol=0.05)
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.shape == (2, 2, 6, 6)


class UsesAttention(nn.Module):
    """Calls the attention function that it is given as its author likes."""

    call: object
    attention_fn: object = nn.dot_product_attention

    @nn.compact
    def __call__(self, x, mask=None, bias=None):
        query = nn.DenseGeneral((2, 4))(x)
        return self.call(self.attention_fn, query, mask, bias).sum((-2, -1))


CAUSAL = nn.make_causal_mask(X[..., 0])
NEVER = jnp.where(
    jnp.arange(6)[None, None, :, None] > 0, 0.0, -1e9
)  # a bias; hides a whole row


@pytest.mark.parametrize(
    "call",
    [
        lambda attend, q, mask, bias: attend(q, q, q),
        lambda attend, q, mask, bias: attend(q, q, q, None, mask),
        lambda attend, q, mask, bias: attend(q, q, q, bias=bias, mask=mask),
        lambda attend, q, mask, bias: attend(q, q, q, precision="highest"),
    ],
)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_attention_takes_what_stock_attention_takes(call, policy):
    model = UsesAttention(call)
    bias = 4 * normal(7, 2, 2, 6, 6)
    variables = model.init(KEY, X, CAUSAL, bias)
    expected = model.apply(variables, X, CAUSAL, bias)
    wrapped = MixedPrecision(model, policy)
    actual = wrapped.apply(variables, X, CAUSAL, bias)
    np.testing.assert_allclose(actual, expected, atol=0.1)
    found = dots(jax.make_jaxpr(wrapped.apply)(variables, X, CAUSAL, bias))
    low = mpjax.get_policy(policy).compute_dtype
    assert {(d.lhs, d.rhs) for d in found} == {(low, low)}


def served_attention(function, rules):
    seen = []

    class Model(nn.Module):
        attention_fn: object

        @nn.compact
        def __call__(self, x):
            seen.append(self.attention_fn)
            return nn.Dense(8)(x)

    MixedPrecision(Model(function), rules).init(KEY, X)
    return seen[0]


def test_attention_has_the_parameters_of_stock_attention():
    stock = functools.partial(nn.dot_product_attention, precision="highest")
    fp8 = mpjax.Rule(".*", "c=bf16", mpjax.current_scaling(), attention=True)
    for function in (nn.dot_product_attention, stock):
        for rules in ("mixed_bfloat16", fp8):
            served = served_attention(function, rules)
            assert served is not function
            assert inspect.signature(served) == inspect.signature(function)
            assert served == served_attention(function, rules)


def test_a_bias_that_hides_a_row_leaves_no_nan_in_float16():
    model = UsesAttention(lambda attend, q, mask, bias: attend(q, q, q, bias))
    variables = model.init(KEY, X, None, NEVER)

    class Hides(nn.Module):
        @nn.compact
        def __call__(self, x):
            return UsesAttention(model.call, name="inner")(x, None, NEVER)

    y = MixedPrecision(Hides(), "mixed_float16").apply(
        {"params": {"inner": variables["params"]}}, X
    )
    np.testing.assert_allclose(y, model.apply(variables, X, None, NEVER), atol=0.05)


def test_products_of_the_users_own_do_attention():
    calls = []

    def einsum(*operands):
        calls.append([x.dtype for x in operands[1:]])
        return jnp.einsum(*operands)

    layer = nn.MultiHeadDotProductAttention(
        2,
        qk_attn_weights_einsum_cls=lambda: einsum,
        attn_weights_value_einsum_cls=lambda: einsum,
    )
    variables = layer.init(KEY, X)
    expected = layer.apply(variables, X)
    calls.clear()
    actual = MixedPrecision(layer, "mixed_bfloat16").apply(variables, X)
    np.testing.assert_allclose(actual, expected, atol=0.05)
    assert calls == [[BF16, BF16]] * 2
    fp8 = mpjax.Rule(".*", "mixed_bfloat16", mpjax.current_scaling(), attention=True)
    with pytest.raises(ValueError, match="attention products of its own"):
        MixedPrecision(layer, fp8).apply(variables, X)
    one = nn.MultiHeadDotProductAttention(2, qk_attn_weights_einsum_cls=lambda: einsum)
    with pytest.raises(ValueError, match="specified together"):
        MixedPrecision(one, "mixed_bfloat16").apply(variables, X)


@pytest.mark.parametrize("sub", [False, True])
def test_attention_with_keywords_multiplies_in_16_bits(sub):
    def own(query, key, value, mask=None, force_fp32_for_softmax=False):
        assert not force_fp32_for_softmax
        return nn.dot_product_attention(query, key, value, mask=mask)

    stock = functools.partial(nn.dot_product_attention, force_fp32_for_softmax=False)
    layer = nn.MultiHeadDotProductAttention(2, attention_fn=own if sub else stock)
    model = MixedPrecision(layer, "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(model.apply)(layer.init(KEY, X), X)
    assert {(d.lhs, d.rhs) for d in dots(jaxpr)} == {(BF16, BF16)}


F32 = jnp.dtype(jnp.float32)


def test_attention_costs_no_more_than_that_of_nnx():
    x = inputs("attention")
    hand = Attention(BF16, rngs())
    hand.attention.attention_fn = nnx.dot_product_attention
    mixed = mixed_precision(Attention(None, rngs()), "mixed_bfloat16")
    programs = []
    for model in hand, mixed:
        _, gradient, params = loss_and_gradient(model)
        with jax.numpy_dtype_promotion("standard"):
            programs.append(jax.jit(gradient).trace(params, x))
    hand, mixed = programs
    assert count_converts(mixed.jaxpr) <= count_converts(hand.jaxpr)
    assert len(dots(mixed.jaxpr)) == len(dots(hand.jaxpr))
    exps = [e for e in equations(mixed.jaxpr) if e.primitive.name == "exp"]
    assert exps and {e.invars[0].aval.dtype for e in exps} == {F32}


def test_decode_with_a_cache_is_the_whole_sequence():
    attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=rngs())
    attention.init_cache((2, 5, 8))
    attention = mixed_precision(attention, "mixed_bfloat16")
    x = normal(7, 2, 5, 8)
    whole = attention(x, mask=nnx.make_causal_mask(x[..., 0]), decode=False)
    step = nnx.jit(lambda attention, x: attention(x))
    for _ in range(2):  # with the cache from before, and with one of its own
        outputs = [step(attention, x[:, i : i + 1]) for i in range(5)]
        np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=2e-2)
        assert attention.cached_key[...].dtype == BF16
        attention.init_cache((2, 5, 8))
    assert attention.cached_value[...].dtype == BF16


@pytest.mark.parametrize("sow", [False, True])
def test_attention_dropout(sow):
    model = nnx.MultiHeadAttention(
        2, 8, dropout_rate=0.5, decode=False, deterministic=False, rngs=rngs()
    )
    x = normal(7, 2, 64, 8)
    outputs = []
    for rules in ("float32", "mixed_bfloat16"):
        mixed = mixed_precision(model, rules)
        run = nnx.capture(mixed, nnx.Intermediate)
        output, sown = run(x, sow_weights=sow)
        outputs.append(output)
        if sow:
            weights = sown["attention_weights"][0]
            np.testing.assert_allclose(weights.astype(F32).sum(-1), 1, rtol=1e-2)
    np.testing.assert_allclose(*outputs, atol=0.05)  # the same elements dropped
