"""What leaves a model in the dtype in which it came, and what in the output dtype."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from helpers import normal

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax._layers.results import at_border, inside_region, of_model

BF16, F16, F32 = (jnp.dtype(d) for d in ("bfloat16", "float16", "float32"))
FP8 = jnp.dtype(jnp.float8_e4m3fn)
X = normal(7, 2, 8)
CACHES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]


def opaque(node):
    del node
    return False


def shape(*axes, dtype=F32):
    return jnp.zeros(axes, dtype)


def dtypes(tree):
    return jax.tree.map(lambda x: getattr(x, "dtype", x), tree)


def model_result(result, *args, output=F32, **kwargs):
    return dtypes(of_model(result, (args, kwargs), output, opaque))


def test_results_of_a_model_that_resemble_arguments_are_state():
    x, cache = shape(2, 8), shape(2, 6, 4, dtype=BF16)
    new, logits = shape(2, 6, 4), shape(2, 3, dtype=BF16)
    assert model_result((logits, new), x, cache) == (F32, BF16)
    assert model_result((new, logits), x, cache) == (BF16, F32)
    assert model_result([new, logits], x, cache=cache) == [BF16, F32]
    found = model_result({"y": logits, "cache": new}, x, cache=cache)
    assert found == {"y": F32, "cache": BF16}
    found = model_result({"y": logits, "h": [new, new]}, x, [cache, cache])
    assert found == {"y": F32, "h": [BF16, BF16]}
    state = {"h": shape(3, dtype=F16), "c": shape(3)}
    found = model_result((dict(state, h=shape(3)), logits), state, x)
    assert found == ({"h": F16, "c": F32}, F32)
    both = {"a": cache, "b": x}
    assert model_result({"a": new, "b": x}, both, 1.0) == {"a": BF16, "b": F32}
    batch = {"x": x, "cache": cache}
    found = model_result({"cache": new, "y": logits}, batch, None)
    assert found == {"cache": BF16, "y": F32}


def test_a_single_array_is_the_models_own():
    images = shape(2, 8, dtype=BF16)
    assert model_result(images, images, shape(2)) == F32
    assert model_result((images, images), images, True) == (F32, F32)


def test_what_a_model_reads_is_one_argument_however_many_options_it_has():
    images, y = shape(2, 8, dtype=BF16), shape(2, 3, dtype=BF16)
    keys = jax.random.key(0), jax.random.PRNGKey(0)
    mask, number = shape(2, dtype=jnp.bool_), shape(dtype=jnp.int32)
    options = None, *keys, mask, number, 3, {}, {"dropout": keys[0]}
    for option in options:
        assert model_result((images, y), images, option) == (F32, F32), option
        assert model_result((images, y), images, option=option) == (F32, F32)
        assert model_result((images, y), {"x": images}, option) == (F32, F32)
    # Tokens and a state are two, whichever comes first.
    tokens, token = shape(2, 5, dtype=jnp.int32), shape(dtype=jnp.int32)
    assert model_result((y, images), tokens, images) == (F32, BF16)
    assert model_result((images, y), images, tokens) == (BF16, F32)
    assert model_result((y, images), token, images) == (F32, BF16)


def test_state_in_a_single_argument_is_found_one_level_down():
    x, cache = shape(2, 8), shape(2, 6, 4, dtype=BF16)
    new, y = shape(2, 6, 4), shape(2, 3, dtype=BF16)
    tokens = shape(2, 8, dtype=jnp.int32)
    for first in (x, tokens):
        for batch in (
            {"x": first, "cache": cache},
            (first, cache),
            [first, cache],
            {"x": first, "more": {"cache": cache}},
        ):
            found = model_result({"y": y, "cache": new}, batch)
            assert found == {"y": F32, "cache": BF16}, batch
            assert model_result((y, new), batch, train=True) == (F32, BF16)
    carry = (shape(2, 4), shape(2, 4))
    low = jax.tree.map(lambda h: h.astype(BF16), carry)
    assert model_result((carry, y), (low, x)) == ((BF16, BF16), F32)
    assert model_result(carry, low) == (BF16, BF16)


def test_a_cache_that_grows_is_known_by_its_place_and_its_arrays():
    old, new = shape(2, 5, 4, dtype=BF16), shape(2, 6, 4)
    x = shape(2, 4)
    assert model_result((x, (new, new)), x, (old, old)) == (F32, (BF16, BF16))
    assert model_result((x, new), x, old, output=F16) == (F32, F16)
    longer = shape(3, 6, 4)
    assert model_result((x, (longer, longer)), x, (old, old), output=F16) == (
        F32,
        (F16, F16),
    )


def test_each_argument_comes_back_once():
    h = shape(3, dtype=BF16)
    found = model_result((shape(3), shape(3), shape(3)), shape(2), h, output=F32)
    assert found == (BF16, F32, F32) or found == (F32, BF16, F32)


def test_what_is_in_8_bits_or_no_float_is_not_cast():
    q, n = shape(3, dtype=FP8), shape(3, dtype=jnp.int8)
    given = (shape(2), q, n)
    assert model_result((shape(2, dtype=BF16), q, n), *given) == (F32, FP8, n.dtype)
    # Nor is what a model returns in more bits cast to eight.
    assert model_result((shape(5), shape(3, dtype=BF16)), *given) == (F32, F32)
    assert dtypes(mpjax.cast_floating((q, n, shape(1)), BF16)) == (FP8, n.dtype, BF16)


def test_inside_of_a_region_a_stream_is_narrowed_and_a_loop_gets_its_carry():
    low, wide = shape(2, 8, dtype=BF16), shape(2, 8)
    for result, given, in_python, in_loop in (
        (wide, (low,), BF16, BF16),
        (low, (wide,), BF16, F32),
        (wide, (shape(3), low), BF16, BF16),  # not its first argument
        (shape(2, 4), (low,), F32, F32),
        ((wide, wide), (low, wide), (BF16, F32), (BF16, F32)),
        ((wide, None), (low, None), (BF16, None), (BF16, None)),
        ({"y": wide, "aux": shape(1)}, (low,), {"y": BF16, "aux": F32}, ...),
        ((shape(1), wide), (low,), (F32, F32), ...),  # only the first of several
        ((wide, shape(2)), ((low, shape(2)),), (BF16, F32), ...),
    ):
        for loop in (False, True):
            found = inside_region(result, (given, {}), loop, True, opaque)
            expected = in_loop if loop and in_loop is not ... else in_python
            assert dtypes(found) == expected


def test_at_a_border_a_single_array_has_the_output_dtype_in_python():
    low, wide = shape(2, 8, dtype=BF16), shape(2, 8)

    def leaving(result, in_loop, output=F32):
        return dtypes(at_border(result, ((low,), {}), output, in_loop, in_loop, opaque))

    assert (leaving(wide, False), leaving(wide, True)) == (F32, BF16)
    assert leaving((wide, wide), False) == leaving((wide, wide), True) == (BF16, F32)
    assert leaving((wide, wide), False, F16) == (BF16, F16)


# ---- The same, of models ----


class LinenDecoder(nn.Module):
    """Writes keys to a cache and reads them."""

    casts: bool = True

    @nn.compact
    def __call__(self, x, cache, i):
        return decode(nn.Dense(8)(x), nn.Dense(4), cache, i, self.casts)


class NnxDecoder(nnx.Module):
    def __init__(self, casts=True):
        self.keys = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.out, self.casts = nnx.Linear(8, 4, rngs=nnx.Rngs(1)), casts

    def __call__(self, x, cache, i):
        return decode(self.keys(x), self.out, cache, i, self.casts)


def decode(key, out, cache, i, casts):
    written = key[:, None].astype(cache.dtype) if casts else key[:, None]
    cache = jax.lax.dynamic_update_slice(cache, written, (0, i, 0))
    return out(cache.astype(key.dtype).mean(1)), cache


def step_of(name, rules, cache, **fields):
    """A function of a cache and a step."""
    if name == "nnx":
        model = mpjax.nnx.mixed_precision(NnxDecoder(**fields), rules)
        return lambda cache, i: model(X, cache, i)[::-1]
    model = mpjax.linen.MixedPrecision(LinenDecoder(**fields), rules)
    keys, out = normal(1, 8, 8), normal(2, 8, 4)
    params = {
        "Dense_0": {"kernel": keys, "bias": jnp.zeros(8)},
        "Dense_1": {"kernel": out, "bias": jnp.zeros(4)},
    }
    return lambda cache, i: model.apply({"params": params}, X, cache, i)[::-1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_decode_loop_gets_its_cache_back(name, policy):
    for dtype in CACHES:
        cache = jnp.zeros((2, 3, 8), dtype)
        step = step_of(name, policy, cache)
        carry, logits = jax.eval_shape(
            lambda step=step, cache=cache: jax.lax.scan(step, cache, jnp.arange(3))
        )
        assert carry.dtype == dtype
        assert logits.dtype == mpjax.get_policy(policy).output_dtype


class LinenBatch(nn.Module):
    """Reads one argument, with state in it or not, and options."""

    @nn.compact
    def __call__(self, batch, option=None):
        return read_batch(nn.Dense(8), batch)


class NnxBatch(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, batch, option=None):
        return read_batch(self.layer, batch)


def read_batch(layer, batch):
    if not isinstance(batch, dict):
        return layer(batch), batch.mean()
    y = layer(batch["x"])
    return y[:, :4], batch["cache"].at[:, 0].set(y.astype(batch["cache"].dtype))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_options_do_not_turn_what_a_model_reads_into_state(name):
    if name == "nnx":
        run = mpjax.nnx.mixed_precision(NnxBatch(), "mixed_bfloat16")
    else:
        mixed = mpjax.linen.MixedPrecision(LinenBatch(), "mixed_bfloat16")
        params = {"Dense_0": {"kernel": normal(1, 8, 8), "bias": jnp.zeros(8)}}
        run = functools.partial(mixed.apply, {"params": params})
    low, cache = X.astype(BF16), jnp.zeros((2, 3, 8), BF16)
    for option in (None, jax.random.key(0), jnp.ones(2, bool)):
        assert dtypes(jax.eval_shape(run, low, option)) == (F32, F32)
        batch = {"x": low, "cache": cache}
        assert dtypes(jax.eval_shape(run, batch, option)) == (F32, BF16)


def test_a_cache_has_the_numbers_that_were_written():
    cache = jnp.zeros((2, 3, 8), BF16)
    step = step_of("linen", "mixed_bfloat16", cache)
    carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(3)))(cache)
    expected = np.asarray(X.astype(BF16) @ normal(1, 8, 8).astype(BF16), np.float32)
    actual = np.asarray(carry, np.float32)
    np.testing.assert_array_equal(actual, np.repeat(expected[:, None], 3, 1))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_float32_cache_takes_16_bit_keys_or_the_error_names_the_module(name):
    cache = jnp.zeros((2, 3, 8))
    step = step_of(name, "mixed_bfloat16", cache, casts=False)
    assert jax.eval_shape(step, cache, 0)[0].dtype == F32
    rule = mpjax.Rule(".*", "mixed_bfloat16", cast_inputs=False)
    step = step_of(name, rule, cache, casts=False)
    with pytest.raises(TypeError, match=r"Module '.*Decoder.* follows") as caught:
        jax.eval_shape(step, cache, 0)
    assert "dynamic_update_slice" in str(caught.value.__cause__)
    assert "mpjax.Rule('.*', 'float32')" in str(caught.value)


def test_cast_outputs_leaves_results_as_the_module_makes_them():
    cache = jnp.zeros((2, 3, 8), F16)
    for name in ("linen", "nnx"):
        rule = mpjax.Rule("", "mixed_bfloat16", cast_outputs=False)
        step = step_of(name, [rule, "mixed_bfloat16"], cache)
        assert dtypes(jax.eval_shape(step, cache, 0)) == (BF16, BF16)
    assert "cast_outputs=False" in str(rule)
    rules = mpjax.preset("mixed_bfloat16")
    assert all(rule.cast_outputs for rule in rules)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_cell_as_a_model_returns_its_carry_as_it_came_and_makes_the_rest(name):
    carry = X.astype(F16)
    for policy in ("mixed_bfloat16", "bfloat16"):
        if name == "linen":
            model = mpjax.linen.MixedPrecision(nn.GRUCell(8), policy)
            init = model.init_with_output
            (new, y), _ = jax.eval_shape(init, jax.random.key(0), carry, X)
        else:
            cell = nnx.GRUCell(8, 8, rngs=nnx.Rngs(0))
            model = mpjax.nnx.mixed_precision(cell, policy)
            new, y = jax.eval_shape(lambda model=model: model(carry, X))
        assert new.dtype == F16
        assert y.dtype == mpjax.get_policy(policy).output_dtype


class Widening(nn.Module):
    """Log-probabilities of float32, of the shape of their logits."""

    @nn.compact
    def __call__(self, x):
        return jax.nn.log_softmax(x.astype(F32))


class NnxWidening(nnx.Module):
    def __call__(self, x):
        return jax.nn.log_softmax(x.astype(F32))


class Nested(nn.Module):
    """Returns what the last of its modules returns, two levels down."""

    times: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.times):
            x = Widening()(x)
        return x, {"again": x}


class NnxNested(nnx.Module):
    def __init__(self, times):
        self.wide, self.times = NnxWidening(), times

    def __call__(self, x):
        for _ in range(self.times):
            x = self.wide(x)
        return x, {"again": x}


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_what_a_model_returns_as_it_came_from_its_last_module_is_not_rounded(name):
    params = {"layers_0": {"kernel": normal(1, 8, 8), "bias": jnp.zeros(8)}}
    logits = nn.Dense(8, dtype=BF16).apply({"params": params["layers_0"]}, X)
    once = jax.nn.log_softmax(logits.astype(F32))
    twice = jax.nn.log_softmax(once.astype(BF16).astype(F32))  # a stream between
    for times, expected in ((1, once), (2, twice)):
        if name == "linen":
            net = nn.Sequential([nn.Dense(8), Nested(times)])
            mixed = mpjax.linen.MixedPrecision(net, "mixed_bfloat16")
            out, more = mixed.apply({"params": params}, X)
        else:
            first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            first.kernel[...] = params["layers_0"]["kernel"]
            net = nnx.Sequential(first, NnxNested(times))
            out, more = mpjax.nnx.mixed_precision(net, "mixed_bfloat16")(X)
        for result in (out, more["again"]):
            assert result.dtype == F32
            np.testing.assert_array_equal(result, expected)


def test_a_module_that_is_to_widen_a_stream_says_so():
    seen = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Widening(name="wide")(nn.Dense(8)(x))
            seen.append(x.dtype)
            return x * 2

    rule = mpjax.Rule("wide", "mixed_bfloat16", cast_outputs=False)
    for rules in ([rule, "mixed_bfloat16"], "mixed_bfloat16"):
        mixed = mpjax.linen.MixedPrecision(Net(), rules)
        jax.eval_shape(mixed.init, jax.random.key(0), X)
    assert seen == [F32, BF16]


class Square(nn.Module):
    """A head as wide as its input."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.tanh(nn.Dense(8)(x)))


class NnxSquare(nnx.Module):
    def __init__(self):
        self.one = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.two = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.two(nnx.tanh(self.one(x)))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_float32_head_is_not_rounded_by_the_shape_of_its_output(name):
    rules = [mpjax.Rule("layers(_|/)1(/.*)?", "float32"), "mixed_bfloat16"]
    if name == "linen":
        model = mpjax.linen.MixedPrecision(
            nn.Sequential([nn.Dense(8), Square()]), rules
        )
        out, _ = model.init_with_output(jax.random.key(0), X)
    else:
        first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        model = mpjax.nnx.mixed_precision(nnx.Sequential(first, NnxSquare()), rules)
        out = model(X)
    out = np.asarray(out)
    assert out.dtype == F32
    assert (out != out.astype(BF16).astype(F32)).any()


def test_a_router_excepted_by_name_leaves_the_stream_alone():
    seen = []

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            p = jax.nn.softmax(nn.Dense(2, name="router")(x))
            seen.append(p.dtype)
            return sum(p[..., i : i + 1] * nn.Dense(8)(x) for i in range(2)), p.sum()

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y, balance = Experts(name="moe")(x)
            seen.append((x.dtype, y.dtype, balance.dtype))
            return x + y, balance

    class Net(nn.Module):
        scanned: bool

        @nn.compact
        def __call__(self, x):
            kind = Block
            if self.scanned:
                axes, split = {"params": 0}, {"params": True}
                kind = nn.scan(kind, variable_axes=axes, split_rngs=split, length=2)
            return kind(name="blocks")(nn.Dense(8)(x), None)

    for scanned in (False, True):
        model = mpjax.linen.MixedPrecision(Net(scanned), "mixed_bfloat16")
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(model.init, jax.random.key(0), X)
        assert set(seen) == {F32, (BF16, BF16, F32)}


# ---- Results that are no pytrees ----


@dataclasses.dataclass
class Hidden:
    y: jax.Array


@struct.dataclass
class Shown:
    y: jax.Array


class Pair(NamedTuple):
    y: jax.Array
    more: None = None


class Returns(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, x):
        return self.kind(nn.Dense(3)(x))


class NnxReturns(nnx.Module):
    def __init__(self, kind):
        self.kind, self.layer = kind, nnx.Linear(8, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.kind(self.layer(x))


def result_of(name, kind, rules):
    if name == "nnx":
        return mpjax.nnx.mixed_precision(NnxReturns(kind), rules)(X)
    model = mpjax.linen.MixedPrecision(Returns(kind), rules)
    return model.init_with_output(jax.random.key(0), X)[0]


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_a_result_that_is_no_pytree_is_an_error_where_it_would_be_cast(name):
    for kind in (Shown, Pair):
        assert result_of(name, kind, "mixed_bfloat16").y.dtype == F32
    with pytest.raises(TypeError, match="returns a Hidden, which is no pytree"):
        result_of(name, Hidden, "mixed_bfloat16")
    assert result_of(name, Hidden, "c=bf16").y.dtype == BF16
    rule = mpjax.Rule(".*", "mixed_bfloat16", cast_outputs=False)
    assert result_of(name, Hidden, rule).y.dtype == BF16
