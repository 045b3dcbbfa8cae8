"""Recipes in rules of ``mpjax.nnx``: layers that multiply in fp8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from front_ends import (
    BF16,
    CURRENT,
    DELAYED,
    WRT,
    amax,
    loss_and_gradients,
    rule,
    scales,
    weigh,
)
from helpers import normal
from jaxprs import dots, equations
from layer_pairs import LAYERS, PAIRED
from nnx_models import Foreign, RoutedBlock, rngs

import mpjax
import mpjax.nnx
from mpjax.nnx import mixed_precision

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
MATMUL = (((1,), (0,)), ((), ()))


SIZES = {"Dense": 24, "DenseGeneral": 24, "DenseGeneral with batch": 6, "Einsum": 8}
SIZES |= {"Einsum with dots": 6, "attend": 24, "attention": 16}


@pytest.mark.parametrize("name", PAIRED)
def test_the_size_of_a_product_is_known_before_it_runs(name):
    make, _, shape = LAYERS[name]
    bare, size = make(), SIZES.get(name, 12)
    model = mixed_precision(bare, rule(DELAYED, min_size=size))
    jaxpr = jax.make_jaxpr(nnx.merge(*nnx.split(model)))(normal(0, *shape))
    names = [eqn.primitive.name for eqn in equations(jaxpr)]
    # Of each product one that multiplies, and one that hands its scales on.
    found = sum(name.startswith("custom_vjp") for name in names)
    assert found == 2 * len(scales(model)) > 0
    with pytest.raises(ValueError, match=f"serves no product.*min_size={size + 1}"):
        mixed_precision(bare, rule(DELAYED, min_size=size + 1))


@pytest.mark.parametrize("stock", [None, jax.lax.dot_general])
def test_modules_of_other_authors_that_take_a_dot_general(stock):
    model = mixed_precision(Foreign(rngs(), stock), rule(DELAYED))
    x = normal(1, 4, 16)
    expected = mpjax.scaled_dot_general(
        x.astype(BF16), model.w[...].astype(BF16), MATMUL, recipe=CURRENT
    )
    np.testing.assert_array_equal(model(x), expected.astype(jnp.float32))
    assert model.dot_general is stock  # outside of methods
    _, grads = loss_and_gradients(model, x)
    assert np.all(scales(grads)["kernel"] > 0)


class Several(nnx.Module):
    """Parameters in a container, all of which one product multiplies with."""

    def __init__(self, make):
        self.w = make(nnx.Param(normal(0, 16, 16)), nnx.Param(4 * normal(1, 16, 16)))
        self.dot_general = jax.lax.dot_general

    def __call__(self, x):
        for key in (0, 1) if isinstance(self.w, list | nnx.List) else ("a", "b"):
            assert self.w[key].dtype == BF16
            x = self.dot_general(x, self.w[key][...], MATMUL)
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: nnx.List([a, b]),
        lambda a, b: nnx.data([a, b]),
        lambda a, b: nnx.Dict(a=a, b=b),
        lambda a, b: nnx.data({"a": a, "b": b}),
    ],
    ids=["List", "list", "Dict", "dict"],
)
def test_parameters_in_containers(make):
    model, x = mixed_precision(Several(make), rule(DELAYED)), normal(2, 4, 16)
    _, grads = loss_and_gradients(model, x)
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    seen = scales(grads)["kernel"]
    assert seen[1] == max(map(amax, weights)) and np.all(seen > 0)
    assert all(np.any(g) for g in jax.tree.leaves(nnx.state(grads, nnx.Param)))
    jaxpr = jax.make_jaxpr(nnx.merge(*nnx.split(model)))(x)
    assert [dot.lhs for dot in dots(jaxpr)].count(E4M3) == 2


def test_an_einsum_that_is_called_with_other_indices_has_one_state():
    make = functools.partial(nnx.Einsum, "bd,dh->bh", (16, 32), rngs=rngs())
    model, x = mixed_precision(make(), rule(DELAYED)), normal(0, 4, 32)

    def loss_fn(model):
        return weigh(model(x, "bh,dh->bd")) + weigh(model(9 * x[:, :16]))

    grads = nnx.grad(loss_fn, argnums=WRT)(model)
    expected = [max(amax(x), amax(9 * x[:, :16])), amax(model.kernel[...])]
    np.testing.assert_array_equal(scales(grads)["kernel"][:2], expected)
    # A layer that is too small by its own indices has no recipe with others either.
    small = mixed_precision(
        nnx.List([make(), nnx.Linear(32, 32, rngs=rngs())]), rule(DELAYED, min_size=17)
    )[0]
    jaxpr = jax.make_jaxpr(lambda x: small(x, "bh,dh->bd"))(x)
    assert [dot.lhs for dot in dots(jaxpr)] == [BF16]


def test_tabulate_shows_recipes_where_they_are_used():
    rules = [
        mpjax.Rule("mlp", "mixed_bfloat16"),
        mpjax.Rule(".*", "mixed_bfloat16", DELAYED, attention=True, min_size=16),
    ]
    model = mixed_precision(RoutedBlock(rngs()), rules)
    table = mpjax.nnx.tabulate(model).splitlines()
    served = [line.split()[0] for line in table if "delayed e4m3fn" in line]
    projections = [f"attention/{name}" for name in ("key", "out", "query", "value")]
    # Of another author's layer the size is found out only when it runs.
    assert served == ["attention", *projections, "foreign"]
    (router,) = [line for line in table if "router" in line]
    assert "c=f32,o=f32" in router  # the rules that the policy's name stands for


@pytest.mark.parametrize(
    ("make", "recipe", "match"),
    [
        (lambda r: nnx.Conv(8, 4, 3, rngs=r), mpjax.mx_scaling(), "by block"),
        (
            lambda r: nnx.ConvTranspose(8, 4, 3, rngs=r),
            mpjax.block_scaling(),
            "convolution, which cannot be scaled by block",
        ),
        (
            lambda r: nnx.ConvTranspose(8, 4, 3, padding="CIRCULAR", rngs=r),
            CURRENT,
            "has circular padding",
        ),
        (
            lambda r: nnx.Sequential(nnx.Linear(8, 4, dot_general=dot, rngs=r)),
            CURRENT,
            r"Module 'layers/0' \(Linear\) has a dot_general of its own",
        ),
        (
            lambda r: nnx.LinearGeneral(8, 4, dot_general_cls=lambda: dot, rngs=r),
            CURRENT,
            "has a dot_general of its own",
        ),
        (
            lambda r: nnx.Einsum("a,ab->b", (8, 4), einsum_op=dot, rngs=r),
            CURRENT,
            "has a einsum_op of its own",
        ),
        (
            lambda r: nnx.MultiHeadAttention(2, 8, attention_fn=dot, rngs=r),
            CURRENT,
            r"has an attention_fn of its own.*Leave attention=True out",
        ),
        (
            lambda r: nnx.LayerNorm(8, rngs=r),
            CURRENT,
            r"serves no product: .*LayerNorm",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_path(make, recipe, match):
    attention = "attention" in match
    rules = mpjax.Rule(".*", "p=f32,c=bf16", recipe, attention=attention)
    with pytest.raises(ValueError, match=match):
        mixed_precision(make(rngs()), rules)


def dot(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def test_a_convolution_under_a_recipe_takes_no_sharding():
    model = mixed_precision(nnx.Conv(8, 4, 3, rngs=rngs()), rule(CURRENT))
    with pytest.raises(ValueError, match="takes no out_sharding"):
        model(normal(0, 2, 8, 8), out_sharding=jax.sharding.PartitionSpec("x"))
