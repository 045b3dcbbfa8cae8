"""Layers under a recipe, in both front ends: formats, numbers, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from front_ends import BF16, CURRENT, DELAYED, FRONT_ENDS, rule
from helpers import assert_trees_equal, normal
from jaxprs import dots
from layer_pairs import LAYERS

import mpjax

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
BASIC = ["Dense", "Conv", "attention"]


# Others of NNX are bit for bit Linen's: see nnx/test_agrees_with_linen.py.
CASES = [("linen", name) for name in LAYERS] + [("nnx", name) for name in BASIC]


@pytest.fixture(params=CASES, ids="-".join)
def layer(request):
    """Makes a trainer of the layer under rules; and an input."""
    front_end, name = request.param
    of_nnx, of_linen, shape = LAYERS[name]
    x = normal(0, *shape)

    def train(rules):
        module = of_linen if front_end == "linen" else of_nnx()
        return FRONT_ENDS[front_end](module, rules, x)

    return train, x


def test_a_recipe_that_quantizes_nothing_changes_nothing(layer):
    """What takes the place of a layer's products are the layer's own products."""
    train, x = layer
    recipe = dataclasses.replace(CURRENT, quantized=())
    plain, mixed = train("mixed_bfloat16"), train(rule(recipe, attention=True))
    assert_trees_equal(mixed.params, plain.params)
    # Axes of a product may come in another order, and with them those of its sums.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2**-6 * np.abs(b).max()
        ),
        (mixed.apply(x), mixed.gradients(x)[1]),
        (plain.apply(x), plain.gradients(x)[1]),
    )


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=str)
def test_every_product_of_a_layer_has_the_formats_of_its_recipe(layer, recipe):
    train, x = layer
    mixed, exact = train(rule(recipe, attention=True)), train("float32")
    assert_trees_equal(mixed.params, exact.params)
    assert bool(mixed.states) == recipe.stateful
    attends = "query/kernel" in mixed.params
    found = dots(mixed.trace_gradients(x))
    if any(dot.name == "conv_general_dilated" for dot in found):
        # A convolution is emulated, on the float32 values of the formats.
        assert {dot.lhs for dot in found} == {jnp.dtype(jnp.float32)}
    else:
        narrow = [dot[1:] for dot in found if dot.lhs.itemsize == 1]
        forward = narrow.count((E4M3, E4M3, jnp.float32))
        backward = [{dot[0], dot[1]} for dot in narrow].count({E4M3, E5M2})
        assert 1 <= forward < len(narrow) == forward + backward
        # The branch for processors without fp8 has as many, of bfloat16.
        assert len(found) == 2 * len(narrow) >= (36 if attends else 4)
    _, grads, observed = mixed.gradients(x)
    with jax.numpy_dtype_promotion("standard"):  # a mask of NNX is bfloat16
        _, exact_grads, _ = exact.gradients(x)
        expected = exact.apply(x)
    # The thresholds for a layer; behind attention stand five products.
    assert reference.sqnr(expected, mixed.apply(x)) > (15 if attends else 18)
    for path, expected in exact_grads.items():
        if not path.endswith("bias"):
            floor = 15 if attends else 17
            assert reference.sqnr(expected, grads[path]) > floor, path
    assert observed.keys() == mixed.states.keys()
    for seen in observed.values():
        assert np.all(np.isfinite(seen)) and np.all(seen > 0)


@pytest.mark.parametrize(
    ("model", "recipe", "match"),
    [
        ("conv", mpjax.mx_scaling(), "cannot be scaled by block"),
        ("norm", CURRENT, r"serves no product.*LayerNorm"),
        (
            "dense",
            mpjax.Rule(".*", "mixed_float8", CURRENT),
            r"serves no product.*min_size=128",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(front_end, model, recipe, match):
    rules = recipe if isinstance(recipe, mpjax.Rule) else rule(recipe)
    with pytest.raises(ValueError, match=match):
        front_end(model, rules, normal(0, 4, 16))


def test_the_name_of_a_policy_asks_for_no_product(front_end):
    assert not front_end("norm", "mixed_float8", normal(0, 4, 16)).states


def test_arguments_may_stay_as_they_are(front_end):
    """A time in bfloat16 would equal its neighbours."""
    x, time = normal(0, 4, 8), jnp.linspace(0.5, 1.0, 4)
    errors = []
    for cast in (False, True):
        rules = mpjax.Rule(".*", "mixed_bfloat16", cast_inputs=cast)
        trainer = front_end("timed", rules, x, time)
        found = dots(trainer.trace(x, time))
        assert [(dot.lhs, dot.rhs) for dot in found] == [(BF16, BF16)]
        shift = trainer.apply(x, time) - trainer.apply(x, 0 * time)
        errors.append(np.abs(shift - np.sin(1e3 * time)[:, None]).max())
    assert errors[0] < 0.03 < 0.3 < errors[1]


def test_mixed_float8_spares_ends_and_small_products(front_end):
    tokens = jnp.arange(4)
    trainer = front_end("language", "mixed_float8", tokens)
    found = dots(trainer.trace(tokens))
    assert [dot.lhs for dot in found] == [BF16, E4M3, BF16, BF16]


def test_small_products_stay_in_the_compute_dtype(front_end):
    x = normal(0, 4, 8)
    trainer = front_end("head", rule(CURRENT, min_size=8), x)
    found = dots(trainer.trace(x))
    assert [dot.lhs for dot in found] == [BF16, E4M3, BF16]


@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_a_second_derivative_is_refused(front_end, layer):
    x = normal(0, 4, 16)
    trainer = front_end(layer, rule(CURRENT), x)

    def loss_fn(x):
        return trainer.apply(x).sum()

    def penalty(x):
        return jnp.sum(jax.grad(loss_fn)(x) ** 2)

    jax.jit(jax.grad(jax.checkpoint(loss_fn)))(x)
    for second in (jax.grad(penalty), jax.hessian(loss_fn)):
        with pytest.raises(TypeError, match="differentiated once"):
            second(x)
