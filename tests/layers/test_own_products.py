"""Products that modules write themselves, under the recipes of both front ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from front_ends import BF16, CURRENT, DELAYED, FRONT_ENDS, amax, rule
from helpers import assert_trees_equal, normal
from jax import lax
from jaxprs import dots

import mpjax
import mpjax.linen
import mpjax.nnx

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
LAST = (((1,), (0,)), ((), ()))
X = normal(0, 8, 16)


class LinenOwn(nn.Module):
    shapes: tuple
    function: object

    @nn.compact
    def __call__(self, x):
        shapes = dict(self.shapes)
        init = nn.initializers.normal(0.1)
        params = {name: self.param(name, init, shapes[name]) for name in shapes}
        return self.function(params, x)


class NnxOwn(nnx.Module):
    def __init__(self, shapes, function):
        self.names, self.function = tuple(name for name, _ in shapes), function
        for i, (name, shape) in enumerate(shapes):
            setattr(self, name, nnx.Param(0.1 * normal(i, *shape)))

    def __call__(self, x):
        return self.function({name: getattr(self, name)[...] for name in self.names}, x)


def make(front_end, shapes, function):
    shapes = tuple(shapes.items())
    return {"linen": LinenOwn, "nnx": NnxOwn}[front_end](shapes, function)


@pytest.fixture(params=["linen", "nnx"])
def train(request):
    """Makes a trainer of a module that multiplies by a function of its parameters."""

    def make_trainer(shapes, function, recipe, x=X, **options):
        module = make(request.param, shapes, function)
        rules = rule(recipe, own_products=True, **options)
        return FRONT_ENDS[request.param](module, rules, x)

    return make_trainer


W = {"w": (16, 32)}
FORMS = {
    "einsum": (W, lambda p, x: jnp.einsum("bd,df->bf", x, p["w"])),
    "dot": (W, lambda p, x: jnp.dot(x, p["w"])),
    "matmul": (W, lambda p, x: jnp.matmul(x, p["w"])),
    "tensordot": (W, lambda p, x: jnp.tensordot(x, p["w"], 1)),
    "operator": (W, lambda p, x: x @ p["w"]),
    "dot_general": (W, lambda p, x: lax.dot_general(x, p["w"], LAST)),
    "jitted": (W, lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x)),
    "vmapped": (W, lambda p, x: jax.vmap(lambda x: x @ p["w"])(x)),
    "first": ({"w": (32, 16)}, lambda p, x: (p["w"] @ x.T).T),
    "batched": (
        {"w": (4, 4, 8)},
        lambda p, x: jnp.einsum("bhd,hdf->bhf", x.reshape(8, 4, 4), p["w"]),
    ),
    "first_batched": (
        {"w": (4, 8, 4)},
        lambda p, x: jnp.einsum("hfd,bhd->hfb", p["w"], x.reshape(8, 4, 4)),
    ),
    "cast": (W, lambda p, x: x @ p["w"].astype(jnp.float32).astype(x.dtype)),
    "transposed": ({"w": (32, 16)}, lambda p, x: x @ p["w"].transpose()),
    "reshaped": ({"w": (16, 4, 8)}, lambda p, x: x @ p["w"].reshape(16, 32)),
    "sliced": ({"w": (2, 16, 32)}, lambda p, x: x @ p["w"][1]),
    "scaled": (W, lambda p, x: x @ (p["w"] * p["w"].dtype.type(0.5))),
    "joined": (
        {"q": (16, 8), "v": (16, 8)},
        lambda p, x: x @ jnp.concatenate([p["q"], p["v"]], 1),
    ),
    "convolution": (
        {"w": (3, 16, 8)},
        lambda p, x: lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_product_by_a_parameter_is_served(train, form):
    shapes, function = FORMS[form]
    trainer = train(shapes, function, CURRENT)
    exact = function(trainer.params, X)
    out = jax.jit(trainer.apply)(X)
    assert out.shape == exact.shape and out.dtype == jnp.float32
    assert 20 < reference.sqnr(exact, out) < 40  # of bfloat16 it would be 50
    if form != "convolution":  # which is emulated in float32
        found = dots(trainer.trace(X))
        assert {dot.lhs for dot in found} == {E4M3, BF16}  # and of other processors


def test_the_result_is_that_of_the_product_under_the_recipe(train):
    trainer = train(W, lambda p, x: x @ p["w"], CURRENT)
    x, w = X.astype(BF16), trainer.params["w"].astype(BF16)
    expected = mpjax.einsum("bd,df->bf", x, w, recipe=CURRENT).astype(jnp.float32)
    np.testing.assert_array_equal(jax.jit(trainer.apply)(X), expected)


def test_what_is_no_product_by_a_parameter_stays(train):
    shapes = {"w": (16, 32), "table": (8, 16)}

    def function(p, x):
        y = x + p["table"]
        scores = y @ y.T  # of activations
        wide = x.astype(jnp.float32) @ p["w"].astype(jnp.float32)  # on purpose
        inner = p["table"] @ p["w"]  # of parameters
        return (
            (scores @ inner).astype(jnp.float32)
            + wide
            + p["table"][0, 0].astype(jnp.float32)
        )

    trainer = train(shapes, function, CURRENT, optional=True)
    # Of the last, one operand is made of two parameters; and other processors do it
    # in 16 bits.
    expected = [BF16, jnp.dtype(jnp.float32), BF16, E4M3, BF16]
    found = [dot.lhs for dot in dots(trainer.trace(X))]
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_small_products_stay(train):
    trainer = train(W, lambda p, x: x @ p["w"], CURRENT, min_size=17, optional=True)
    assert [dot.lhs for dot in dots(trainer.trace(X))] == [BF16]


def test_delayed_scaling_has_a_state_for_each_parameter(train):
    shapes = {"up": (2, 16, 32), "down": (32, 16)}

    def function(p, x):
        return (jnp.tanh(x @ p["up"][0]) * (2 * x @ p["up"][1])) @ p["down"]

    trainer = train(shapes, function, DELAYED)
    assert set(trainer.states) == set(shapes)
    observed = trainer.step(X)
    up = trainer.params["up"]
    # Of two uses of one parameter the larger amax counts.
    expected = [2 * amax(X), amax(up)]
    np.testing.assert_array_equal(observed["up"][:2], expected)
    assert np.all(np.isfinite(observed["down"])) and np.all(observed["down"] > 0)
    trainer.step(X)
    assert trainer.traces == 1


def test_without_the_field_such_products_have_no_recipe(front_end):
    name = {v: k for k, v in FRONT_ENDS.items()}[front_end]
    module = make(name, W, FORMS["dot"][1])
    with pytest.raises(ValueError, match="own_products=True serves what modules"):
        front_end(module, rule(CURRENT), X)
    trainer = front_end(module, rule(CURRENT, optional=True), X)
    assert [dot.lhs for dot in dots(trainer.trace(X))] == [BF16]


@pytest.mark.parametrize(
    "loop",
    [
        lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=2)[0],
        lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x),
        lambda w, x: lax.while_loop(lambda c: c[0, 0] > 3, lambda c: c @ w, x),
        lambda w, x: jax.checkpoint(lambda x, w: x @ w)(x, w),
    ],
    ids=["scan", "cond", "while", "checkpoint"],
)
def test_a_product_inside_of_a_loop_is_refused(train, loop):
    with pytest.raises(ValueError, match=r"parameter 'w' inside of a .*own_products"):
        trainer = train({"w": (16, 16)}, lambda p, x: loop(p["w"], x), CURRENT)
        trainer.apply(X)


def mix(module, x):
    """Has a parameter of its own, layers, random keys, statistics and what it sows."""
    w = module.param("w", nn.initializers.normal(0.1), (16, 16))
    x = nn.Dense(16)(nn.Dropout(0.5, deterministic=False)(x @ w))
    module.sow("seen", "x", x)
    return nn.BatchNorm(use_running_average=False)(x)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return mix(self, x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0, "scaling": 0, "seen": 0}
        rngs = {"params": True, "dropout": True}
        scan = nn.scan(nn.remat(_Step), variable_axes=axes, split_rngs=rngs, length=2)
        return scan(name="layers")(x, None)[0]


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + mix(self, x), None


@pytest.mark.parametrize("module", [Mixed(), Scanned()], ids=["alone", "scanned"])
def test_what_else_a_linen_module_does_is_as_it_was(module):
    """A recipe that quantizes nothing changes nothing."""
    nothing = mpjax.Recipe(DELAYED.lhs, DELAYED.rhs, DELAYED.grad, quantized=())
    rules = rule(nothing, "float32", own_products=True)
    mixed = mpjax.linen.MixedPrecision(module, rules)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    init = jax.jit(lambda keys: (mixed.init(keys, X), module.init(keys, X)))
    made, bare = init(keys)
    scaling = made.pop("scaling")
    assert_trees_equal(made, bare)
    assert set(scaling.get("layers", scaling)) == {"w_scaling", "Dense_0"}

    def run(model, variables):
        del variables["seen"]
        keys = {"dropout": jax.random.key(2)}
        return model.apply(variables, X, rngs=keys, mutable=["batch_stats", "seen"])

    both = jax.jit(lambda bare, made: (run(module, bare), run(mixed, made)))
    expected, found = both(bare, {**made, "scaling": scaling})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        found,
        expected,
    )


def test_a_linen_module_with_a_module_from_outside_is_refused():
    class Decoder(nn.Module):
        embed: nn.Module

        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(0.1), (16, 16))
            return self.embed.attend(x @ w)

    class Model(nn.Module):
        def setup(self):
            self.embed = nn.Embed(20, 16)
            self.decoder = Decoder(self.embed)

        def __call__(self, tokens):
            return self.decoder(self.embed(tokens))

    tokens = jnp.arange(4)
    mixed = mpjax.linen.MixedPrecision(Model(), rule(CURRENT, own_products=True))
    with pytest.raises(ValueError, match=r"'decoder'.*from outside, 'embed'"):
        jax.eval_shape(mixed.init, jax.random.key(0), tokens)


def test_what_else_an_nnx_module_does_is_as_it_was():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(0.1 * normal(0, 16, 16))
            self.dense = nnx.Linear(16, 16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)

        def __call__(self, x):
            x = self.dense(self.drop(x @ self.w[...]))
            self.seen = nnx.Intermediate(x)
            return self.norm(x)

    nothing = mpjax.Recipe(DELAYED.lhs, DELAYED.rhs, DELAYED.grad, quantized=())
    rules = rule(nothing, "float32", own_products=True)
    bare = Model(nnx.Rngs(0))
    mixed = mpjax.nnx.mixed_precision(bare, rules)
    assert hasattr(mixed, "w_scaling") and hasattr(mixed.dense, "kernel_scaling")
    run = nnx.jit(lambda model, x: (model(x), model(x)))  # other keys each time
    for a, b in zip(run(mixed, X), run(bare, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    kinds = nnx.Any(nnx.BatchStat, nnx.RngCount, nnx.Intermediate)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        nnx.to_pure_dict(nnx.state(mixed, kinds)),
        nnx.to_pure_dict(nnx.state(bare, kinds)),
    )


def test_the_name_of_a_preset_serves_what_it_can(front_end):
    """A recipe of its own that serves nothing is an error, as everywhere."""
    x = normal(0, 4, 8)
    for rules in ("mixed_float8", mpjax.Rule(".*", "mixed_float8")):
        trainer = front_end("head", rules, x)
        assert {dot.lhs for dot in dots(trainer.trace(x))} == {BF16}
    table = (
        mpjax.linen.tabulate(trainer.model, jax.random.key(0), x)
        if front_end is FRONT_ENDS["linen"]
        else mpjax.nnx.tabulate(trainer.model)
    )
    assert "no product of min_size=128" in table
    with pytest.raises(ValueError, match=r"serves no product.*optional=True"):
        front_end("head", mpjax.Rule(".*", "mixed_float8", CURRENT), x)


def test_paths_below_a_linen_module_stay_those_of_the_model():
    """In its copy too, and inside of a transformation there."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(16, name="dense")(x), None

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(0.1), (16, 16))
            axes, rngs = {"params": 0}, {"params": True}
            scan = nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=2)
            x = scan(name="layers")(x @ w, None)[0]
            return nn.Dense(16, name="out")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="block")(x)

    rules = [
        mpjax.Rule("block/layers/dense", "c=f16,o=bf16"),
        mpjax.Rule("block/out", "c=f32,o=bf16"),
        rule(CURRENT, own_products=True),
    ]
    mixed = mpjax.linen.MixedPrecision(Model(), rules)
    variables = jax.eval_shape(mixed.init, jax.random.key(0), X)
    found = dots(jax.make_jaxpr(mixed.apply)(variables, X))
    f16, f32 = jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)
    assert [dot.lhs for dot in found] in (
        [E4M3, BF16, f16, f32],
        [BF16, E4M3, f16, f32],
    )


def test_the_field_needs_a_recipe():
    with pytest.raises(ValueError, match=r"own_products say which.*has none"):
        mpjax.Rule(".*", "mixed_bfloat16", own_products=True)
    assert mpjax.Rule(".*", "mixed_float8", own_products=True).own_products


def test_a_linen_table_says_why_a_product_was_refused():
    """An operand became float32, and the weight with it: nothing casts it back."""

    def function(p, x):
        wide = x.astype(jnp.float32) * jnp.ones((8, 1))
        out = jnp.einsum("bd,df->bf", wide, p["w"].astype(wide.dtype))
        return out + (x @ p["v"]).astype(out.dtype) if "v" in p else out

    rules = rule(CURRENT, own_products=True)
    module = LinenOwn((("w", (16, 32)), ("v", (16, 32))), function)
    mixed = mpjax.linen.MixedPrecision(module, rules)
    table = mpjax.linen.tabulate(mixed, jax.random.key(0), X)
    assert "w: operands float32 x float32" in table and "v:" not in table
    assert "current" in table
    rules = rule(CURRENT, own_products=True, min_size=3)  # seen by no other test
    module = LinenOwn((("w", (16, 32)),), function)
    with pytest.raises(ValueError, match=r"that of 'w' in '' has operands float32 x"):
        mixed = mpjax.linen.MixedPrecision(module, rules)
        jax.eval_shape(mixed.init, jax.random.key(0), X)
