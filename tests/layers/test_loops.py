"""Layers in loops and branches: the carry keeps its dtype, the stream its 16 bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import loop_models
import numpy as np
import pytest
from flax import nnx
from front_ends import FRONT_ENDS
from helpers import normal
from jaxprs import dots
from loop_models import LIFTED, LOOPS, STACKED, STREAM, trace

import mpjax
import mpjax.linen

X = normal(7, 4, 8)
XS = normal(7, 5, 4, 8)
RESETS = jnp.arange(20).reshape(5, 4) % 3 == 0
POLICIES = ["float32", None, "mixed_float16", "c=f16"]


@pytest.fixture(autouse=True)
def promotion():
    # The models mix float32 arrays of their own with the stream.
    with jax.numpy_dtype_promotion("standard"):
        yield


def operands(jaxpr):
    return {name for dot in dots(jaxpr) for name in (dot.lhs.name, dot.rhs.name)}


def inner(policy):
    """The dtype of the products of layers that have this policy."""
    return "float16" if policy in ("mixed_float16", "c=f16") else "float32"


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("loop", STACKED)
def test_the_stream_of_layers_in_a_loop_is_of_16_bits(name, loop):
    jaxpr, out = trace(name, "blocks", [loop], "mixed_bfloat16", X)
    assert set(STREAM) == {"bfloat16"}
    assert operands(jaxpr) == {"bfloat16"}
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_every_loop_of_jax_and_flax_takes_a_layer_that_makes_float32(name):
    for loop in (*LOOPS, *LIFTED[name]):
        jaxpr, _ = trace(name, "shared", [loop], "mixed_bfloat16", X)
        assert operands(jaxpr) == {"bfloat16"}, loop
        carry = "float32" if "zeros" in loop else "bfloat16"
        assert set(STREAM) == {carry}, loop


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_rule_for_the_layers_of_a_loop(name, policy):
    rules = [mpjax.Rule("blocks(_.)?(/.*)?", policy), "mixed_bfloat16"]
    for loop in STACKED:
        jaxpr, out = trace(name, "blocks", [loop], rules, X)
        assert operands(jaxpr) == {"bfloat16", inner(policy)}, loop
        assert out.dtype == jnp.float32
    for loop in ("scan from zeros", "while", "cond", *LIFTED[name]):
        jaxpr, _ = trace(name, "shared", [loop], rules, X)
        assert operands(jaxpr) == {"bfloat16", inner(policy)}, loop


@pytest.mark.parametrize("policy", ["float32", None])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_layers_in_a_loop_compute_what_layers_in_python_do(name, policy):
    rules = [mpjax.Rule("blocks(_.)?(/.*)?", policy), "mixed_bfloat16"]
    outputs, params = [], {}
    for loop in ("python", "scan"):
        model = FRONT_ENDS[name](loop_models.model_of(name, "blocks", loop), rules, X)
        if loop == "python":
            params = model.params
        else:  # the same parameters, stacked
            model.params = stack(params, model.params)
        outputs.append(np.asarray(model.apply(X), np.float32))
    np.testing.assert_allclose(*outputs, rtol=2**-6, atol=2**-6)
    if name == "linen" and policy is not None:  # bodies with a carry, in both loops
        np.testing.assert_array_equal(*outputs)


def stack(params, like):
    """Parameters of layers in a list, as a scan has them; both by path."""
    tree: dict = {}
    for path in like:
        if path.startswith("blocks"):
            parts = [params[p] for p in sorted(params) if same_place(p, path)]
            value = jnp.stack(parts)
        else:
            value = params[path]
        node = tree
        *names, last = path.split("/")
        for part in names:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def same_place(path, stacked):
    tail = stacked.partition("/")[2]
    return path in {f"blocks_{i}/{tail}" for i in (0, 1)} | {
        f"blocks/{i}/{tail}" for i in (0, 1)
    }


CELLS = {
    "linen": [nn.GRUCell, nn.OptimizedLSTMCell, nn.LSTMCell, nn.SimpleCell, nn.MGUCell],
    "nnx": [nnx.GRUCell, nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.SimpleCell],
}


@pytest.mark.parametrize("kind", ["reset", "reset, decorated", "reset in jax"])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_carry_that_the_body_resets_keeps_its_dtype(name, kind):
    rules = ["mixed_bfloat16", "bfloat16"]
    rules += [[mpjax.Rule("(.*/)?cell(/.*)?", p), "mixed_bfloat16"] for p in POLICIES]
    for i, rule in enumerate(rules):
        for cell in CELLS[name][i % 2 :: 2]:
            dtype = ["float32", "bfloat16", "float16"][i % 3]
            carry = jax.ShapeDtypeStruct((4, 8), dtype)
            carry = (carry, carry) if "LSTM" in cell.__name__ else carry
            _, (new, logits) = trace(name, kind, [cell], rule, carry, XS, RESETS)
            assert {h.dtype.name for h in jax.tree.leaves(new)} == {dtype}, cell
            assert logits.dtype == (jnp.bfloat16 if i == 1 else jnp.float32)


def test_a_reset_carry_has_the_numbers_of_the_bare_model():
    bare = loop_models.LinenReset(nn.GRUCell)
    variables = jax.jit(bare.init)(loop_models.KEY, X, XS, RESETS)
    mixed = mpjax.linen.MixedPrecision(bare, "mixed_bfloat16")
    actual, expected = (
        jax.jit(model.apply)(variables, X, XS, RESETS) for model in (mixed, bare)
    )
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=0.05)


@pytest.mark.parametrize("policy", [*POLICIES, "mixed_bfloat16"])
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_cells_of_an_rnn_under_a_rule_of_their_own(name, policy):
    rules = [mpjax.Rule("(.*/)?cell(/.*)?", policy), "mixed_bfloat16"]
    for cell in CELLS[name][:2]:
        jaxpr, _ = trace(name, "cell", [cell], rules, XS)
        inside = "bfloat16" if policy == "mixed_bfloat16" else inner(policy)
        assert operands(jaxpr) == {"bfloat16", inside}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_recurrence_written_by_hand(name):
    jaxpr, out = trace(name, "by hand", [], "mixed_bfloat16", XS)
    assert operands(jaxpr) == {"bfloat16"}
    assert out.dtype == jnp.float32 and out.shape == (5, 4, 8)
