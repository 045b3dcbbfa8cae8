"""Recipes in rules of ``mpjax.nnx``: layers that multiply in fp8."""

import copy
import dataclasses
import functools
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jaxprs import dots, equations

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.nnx import Scaling, mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
MATMUL = (((1,), (0,)), ((), ()))
CURRENT, DELAYED = mpjax.current_scaling(), mpjax.delayed_scaling(history_length=4)
WRT = nnx.DiffState(0, nnx.Any(nnx.Param, Scaling))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rngs():
    return nnx.Rngs(0, params=1)


def rule(recipe, **kwargs):
    return mpjax.Rule(".*", "mixed_bfloat16", recipe, **kwargs)


def scales(state):
    """What stands in place of the scales, as {path: [lhs, rhs, grad]}."""
    return {
        "/".join(map(str, path)).removesuffix("_scaling"): variable.get_value().scale
        for path, variable in nnx.to_flat_state(nnx.state(state, Scaling))
    }


def amax(x):
    """Of the bfloat16 numbers that a layer multiplies."""
    return jnp.abs(x.astype(BF16)).max().astype(jnp.float32)


def weigh(out):
    weights = jnp.linspace(-1, 1, out.size, dtype=out.dtype).reshape(out.shape)
    return jnp.sum(out * weights)


@nnx.jit
def loss_and_gradients(model, x):
    return nnx.value_and_grad(lambda model: weigh(model(x)), argnums=WRT)(model)


# ------------------------------------------------------- the layers, beside Linen's


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(24, 32, name="embed").attend(x)


class AttendNnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(24, 32, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(x)


MASK = jnp.ones((3, 16, 12), BF16).at[0].set(0)
LAYERS = {
    "Linear": (lambda **k: nnx.Linear(32, 24, **k), nn.Dense(24), (3, 32)),
    "LinearGeneral": (
        lambda **k: nnx.LinearGeneral((4, 8), (4, 6), axis=(-2, -1), **k),
        nn.DenseGeneral((4, 6), axis=(-2, -1)),
        (3, 4, 8),
    ),
    "LinearGeneral with batch": (
        lambda **k: nnx.LinearGeneral(8, 6, batch_axis={0: 3}, **k),
        nn.DenseGeneral(6, batch_dims=(0,)),
        (3, 5, 8),
    ),
    "Einsum": (
        lambda **k: nnx.Einsum("bsd,ndh->bnsh", (4, 8, 6), (4, 6), **k),
        nn.Einsum((4, 8, 6), "bsd,ndh->bnsh"),
        (3, 5, 8),
    ),
    "Einsum with dots": (
        lambda **k: nnx.Einsum("...d,dh->...h", (8, 6), **k),
        nn.Einsum((8, 6), "...d,dh->...h", False),
        (3, 5, 8),
    ),
    "Conv": (
        lambda **k: nnx.Conv(16, 12, (3, 3), **k),
        nn.Conv(12, (3, 3)),
        (2, 8, 8, 16),
    ),
    "Conv circular": (
        lambda **k: nnx.Conv(16, 12, 3, 2, padding="CIRCULAR", kernel_dilation=2, **k),
        nn.Conv(12, (3,), 2, "CIRCULAR", kernel_dilation=2),
        (8, 16),
    ),
    "Conv in groups": (
        lambda **k: nnx.Conv(16, 12, 3, feature_group_count=4, **k),
        nn.Conv(12, (3,), feature_group_count=4),
        (2, 3, 8, 16),
    ),
    "ConvTranspose": (
        lambda **k: nnx.ConvTranspose(16, 12, (3, 4), (2, 1), **k),
        nn.ConvTranspose(12, (3, 4), (2, 1)),
        (2, 8, 8, 16),
    ),
    "ConvTranspose of a gradient": (
        lambda **k: nnx.ConvTranspose(
            16, 12, (3, 2), (2, 3), transpose_kernel=True, use_bias=False, **k
        ),
        nn.ConvTranspose(12, (3, 2), (2, 3), transpose_kernel=True, use_bias=False),
        (2, 3, 8, 5, 16),
    ),
    "ConvTranspose masked": (
        lambda **k: nnx.ConvTranspose(16, 12, 3, padding=1, mask=MASK, **k),
        nn.ConvTranspose(12, 3, padding=1, mask=MASK.astype(jnp.float32)),
        (2, 8, 16),
    ),
    "attend": (AttendNnx, Attend(), (3, 32)),
    "attention": (
        lambda **k: nnx.MultiHeadAttention(4, 16, decode=False, **k),
        nn.MultiHeadDotProductAttention(4),
        (2, 5, 16),
    ),
}


@pytest.fixture(params=LAYERS)
def layers(request):
    make, linen, shape = LAYERS[request.param]
    return make(rngs=rngs()), linen, normal(0, *shape)


def test_the_numbers_are_those_of_linen(layers):
    bare, linen, x = layers
    model = mixed_precision(bare, rule(DELAYED, attention=True))
    wrapped = mpjax.linen.MixedPrecision(linen, rule(DELAYED, attention=True))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    scaling = wrapped.init(jax.random.key(0), x).get("scaling", {})

    def loss_fn(params, scaling):
        collections = {"params": params} | ({"scaling": scaling} if scaling else {})
        return weigh(wrapped.apply(collections, x))

    step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))
    loss, (expected, seen) = step(params, scaling)
    actual, grads = loss_and_gradients(model, x)
    assert actual == loss
    own = nnx.to_pure_dict(nnx.state(grads, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, own, expected)
    is_state = functools.partial(jax.tree.leaves, is_leaf=lambda s: hasattr(s, "scale"))
    seen = [state.scale for state in is_state(seen)]
    assert len(seen) == len(scales(grads)) == len(scales(model))
    for one, two in zip(scales(grads).values(), seen, strict=True):
        assert np.all(one > 0)
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=str)
def test_products_have_the_formats_of_the_recipe(layers, recipe):
    bare, _, x = layers
    model = mixed_precision(bare, rule(recipe, attention=True))
    graph, params = nnx.split(bare, nnx.Param, ...)[:2]
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(params)
    graph, state = nnx.split(model)
    run = jax.make_jaxpr(lambda s: loss_and_gradients(nnx.merge(graph, s), x))
    found = dots(run(state))
    if any(dot.name == "conv_general_dilated" for dot in found):
        # A convolution is emulated, on the float32 values of the formats.
        assert {dot.lhs for dot in found} == {jnp.dtype(jnp.float32)}
        return
    narrow = [dot[1:] for dot in found if dot.lhs.itemsize == 1]
    forward = narrow.count((E4M3, E4M3, jnp.float32))
    backward = [{dot[0], dot[1]} for dot in narrow].count({E4M3, E5M2})
    assert 1 <= forward <= len(narrow) == forward + backward
    # The branch for processors without fp8 has as many, of bfloat16.
    assert len(found) == 2 * len(narrow)
    assert len(found) >= (36 if isinstance(bare, nnx.MultiHeadAttention) else 4)


def test_a_recipe_that_quantizes_nothing_changes_nothing(layers):
    bare, _, x = layers
    recipe = dataclasses.replace(CURRENT, quantized=())
    expected = loss_and_gradients(mixed_precision(bare, "mixed_bfloat16"), x)
    mixed = mixed_precision(bare, rule(recipe, attention=True))
    # Axes of a product may come in another order, and with them those of its sums.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2**-6 * max(1, np.abs(b).max())
        ),
        loss_and_gradients(mixed, x),
        expected,
    )


SIZES = {"Linear": 24, "LinearGeneral": 24, "LinearGeneral with batch": 6, "Einsum": 8}
SIZES |= {"Einsum with dots": 6, "attend": 24, "attention": 16}


@pytest.mark.parametrize("name", LAYERS)
def test_the_size_of_a_product_is_known_before_it_runs(name):
    make, _, shape = LAYERS[name]
    bare, size = make(rngs=rngs()), SIZES.get(name, 12)
    model = mixed_precision(bare, rule(DELAYED, min_size=size))
    jaxpr = jax.make_jaxpr(nnx.merge(*nnx.split(model)))(normal(0, *shape))
    names = [eqn.primitive.name for eqn in equations(jaxpr)]
    # Of each product one that multiplies, and one that hands its scales on.
    found = sum(name.startswith("custom_vjp") for name in names)
    assert found == 2 * len(scales(model)) > 0
    with pytest.raises(ValueError, match=f"serves no product.*min_size={size + 1}"):
        mixed_precision(bare, rule(DELAYED, min_size=size + 1))


# ---------------------------------------------------------------- who uses a recipe


class Foreign(nnx.Module):
    """A layer of another author that can be told what to multiply with."""

    def __init__(self, rngs, dot_general=None):
        self.w = nnx.Param(normal(0, 16, 8))
        self.dot_general = dot_general

    def __call__(self, x):
        return (self.dot_general or jax.lax.dot_general)(x, self.w[...], MATMUL)


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


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.router = nnx.Linear(16, 4, rngs=rngs)
        self.foreign = Foreign(rngs)
        self.mlp = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        y = x + self.attention(self.norm(x))
        weight = self.router(y).mean().astype(x.dtype)
        return x + self.mlp(nnx.relu(self.foreign(y))) * weight


def test_tabulate_shows_recipes_where_they_are_used():
    rules = [
        mpjax.Rule("mlp", "mixed_bfloat16"),
        mpjax.Rule(".*", "mixed_bfloat16", DELAYED, attention=True, min_size=16),
    ]
    model = mixed_precision(Block(rngs()), rules)
    table = mpjax.nnx.tabulate(model).splitlines()
    served = [line.split()[0] for line in table if "delayed e4m3fn" in line]
    projections = [f"attention/{name}" for name in ("key", "out", "query", "value")]
    # Of another author's layer the size is found out only when it runs.
    assert served == ["attention", *projections, "foreign"]
    (router,) = [line for line in table if "router" in line]
    assert "c=f32,o=f32" in router  # the rules that the policy's name stands for


def test_mixed_float8_spares_ends_and_small_products():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(256, 128, rngs=rngs)
            self.up = nnx.Linear(128, 256, rngs=rngs)
            self.small = nnx.Linear(256, 64, rngs=rngs)
            self.head = nnx.Linear(64, 256, rngs=rngs)

        def __call__(self, x):
            return self.head(self.small(self.up(self.embed(x))))

    model = mixed_precision(Model(rngs()), "mixed_float8")
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, jnp.arange(4))
    assert [dot.lhs for dot in dots(jaxpr)] == [BF16, E4M3, BF16, BF16]


def test_entries_that_keep_their_inputs():
    class Times(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            seen.append(x.dtype)
            return self.linear(x)

    for cast in (True, False):
        seen = []
        mixed_precision(Times(rngs()), rule(CURRENT, cast_inputs=cast))(normal(0, 16))
        assert seen == [BF16 if cast else jnp.float32]


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
            "pads in circles",
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


# --------------------------------------------------------------- states as variables


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.linear(4 * self.linear(x))


class Stack(nnx.Module):
    """Blocks stacked by vmap and run by scan, or one by one."""

    def __init__(self, rngs, unrolled=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return Block(rngs)

        self.blocks, self.unrolled = make(rngs), unrolled

    def __call__(self, x):
        if self.unrolled:
            for i in range(3):
                graph, state = nnx.split(self.blocks)
                x = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))(x)
            return x
        run = nnx.remat(lambda x, block: block(x))
        return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


def test_stacked_layers_have_stacked_states():
    model = mixed_precision(Stack(rngs()), rule(DELAYED, attention=True))
    states = nnx.to_flat_state(nnx.state(model, Scaling))
    assert len(list(states)) == 8  # with those of layers whose kernels tell nothing
    for _, variable in states:
        assert variable.get_value().history.shape == (3, 3, 4)
        assert variable.get_value().loss_scale.shape == (3,)


def test_layers_of_a_scan_observe_what_they_do_one_by_one():
    model, unrolled = (
        mixed_precision(stack, mpjax.Rule(".*", "float32", DELAYED))
        for stack in (Stack(rngs()), Stack(rngs(), unrolled=True))
    )
    _, grads = loss_and_gradients(model, normal(2, 3, 16))
    _, expected = loss_and_gradients(unrolled, normal(2, 3, 16))
    seen, expected = scales(grads), scales(expected)
    assert len(seen) == 7
    for path in seen:  # a sum in another order may be rounded to the next fp8 number
        np.testing.assert_allclose(seen[path], expected[path], rtol=0.1)
    mpjax.nnx.update_scaling(model, grads)
    amaxes = jnp.abs(model.blocks.mlp.kernel[...]).max((1, 2))
    scale = scales(model)["blocks/mlp/kernel"]
    np.testing.assert_array_equal(scale[:, 1], 2.0 ** np.ceil(np.log2(amaxes / 448)))


class Again(nnx.Module):
    """One layer in all steps of a loop."""

    def __init__(self, axes):
        self.dense = nnx.Linear(16, 16, use_bias=False, rngs=rngs())
        self.axes = axes

    def __call__(self, x):
        axes = (self.axes, nnx.Carry)
        loop = nnx.scan(
            lambda dense, x: dense(x), in_axes=axes, out_axes=nnx.Carry, length=4
        )
        return loop(self.dense, x)


@pytest.mark.parametrize("carries", [False, True])
def test_steps_that_share_a_layer_observe_a_sum_unless_states_are_carried(carries):
    carried = nnx.StateAxes({Scaling: nnx.Carry, ...: None})
    model = mixed_precision(Again(carried if carries else None), rule(DELAYED))
    _, grads = loss_and_gradients(model, normal(2, 4, 16))
    top = amax(model.dense.kernel[...])
    seen = scales(grads)["dense/kernel"][1]
    np.testing.assert_array_equal(seen, (1 if carries else 4) * top)


def test_other_stacks():
    @nnx.split_rngs(splits=5)
    @nnx.vmap(out_axes=1)
    def columns(rngs):
        return nnx.Linear(8, 16, use_bias=False, rngs=rngs)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    @nnx.split_rngs(splits=5)
    @nnx.vmap
    def nested(rngs):
        return Foreign(rngs), nnx.Linear(8, 4, rngs=rngs)

    for make, shape in ((columns, (5, 3)), (nested, (2, 5, 3))):
        made = make(rngs())
        stack = nnx.List(made) if isinstance(made, tuple) else made
        model = mixed_precision(stack, rule(DELAYED))
        assert {seen.shape for seen in scales(model).values()} == {shape}


def observed(run, model, x):
    """What the layer of ``Twice`` observes when ``run`` runs it."""
    grads = nnx.jit(nnx.grad(lambda m: weigh(run(m, x)), argnums=WRT))(model)
    return scales(grads)["linear/kernel"]


def test_a_layer_called_twice_observes_the_maximum():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 4, 16)
    kernel, low = model.linear.kernel[...].astype(BF16), x.astype(BF16)
    between = 4 * mpjax.scaled_dot_general(low, kernel, MATMUL, recipe=CURRENT)
    expected = observed(lambda model, x: model(x), model, x)
    assert expected[0] == max(amax(x), amax(between)) and expected[1] == amax(kernel)

    def functional(model, x):
        return nnx.merge(*nnx.split(model))(x)

    ways = {
        "remat": nnx.remat(lambda model, x: model(x)),
        "jit": nnx.jit(lambda model, x: model(x)),
        "cond": lambda model, x: nnx.cond(
            True, lambda model, x: model(x), lambda model, x: x, model, x
        ),
        "split": functional,
    }
    for way, run in ways.items():
        np.testing.assert_array_equal(observed(run, model, x), expected, way)
    # A transformation of JAX cannot hand on what a constant of it observes.
    closed = observed(lambda model, x: jax.checkpoint(lambda x: model(x))(x), model, x)
    assert np.all(closed >= expected) and closed[1] == 2 * expected[1]


def test_the_steps_of_a_recurrent_cell_observe_the_maximum():
    x = jnp.concatenate([normal(0, 2, 6, 16), 50 * normal(1, 2, 1, 16)], 1)
    model = mixed_precision(nnx.RNN(nnx.GRUCell(16, 16, rngs=rngs())), rule(DELAYED))
    with jax.numpy_dtype_promotion("standard"):
        _, grads = loss_and_gradients(model, x)
    dense = scales(grads)["cell/dense_i/kernel"]
    assert dense[0] == amax(x)
    assert dense[1] == amax(model.cell.dense_i.kernel[...])


@pytest.mark.parametrize("kind", [nnx.WeightNorm, nnx.SpectralNorm])
def test_layers_whose_weights_are_normalized(kind):
    make = functools.partial(nnx.Linear, 16, 16, use_bias=False)
    kwargs = {"update_stats": True} if kind is nnx.SpectralNorm else {}
    model = mixed_precision(kind(make(rngs=rngs()), rngs=rngs()), rule(DELAYED))
    x = normal(0, 4, 16)
    grads = nnx.grad(lambda model: weigh(model(x, **kwargs)), argnums=WRT)(model)
    seen = scales(grads)["layer_instance/kernel"]
    assert seen[0] == amax(x) and seen[1] == amax(model.layer_instance.kernel[...])
    mpjax.nnx.update_scaling(model, grads)
    assert np.all(scales(model)["layer_instance/kernel"] > 0)


def test_a_norm_that_would_take_states_for_weights_is_refused():
    def make(**kwargs):
        linear = nnx.Linear(16, 16, use_bias=False, rngs=rngs())
        return nnx.WeightNorm(linear, rngs=rngs(), **kwargs)

    with pytest.raises(ValueError, match=r"Module '' .*variable_filter=nnx\.Param"):
        mixed_precision(make(variable_filter=...), rule(DELAYED))
    mixed_precision(make(variable_filter=nnx.Param), rule(DELAYED))(normal(0, 4, 16))
    mixed_precision(make(variable_filter=...), rule(CURRENT))(normal(0, 4, 16))


def test_examples_under_vmap_observe_one_maximum():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 4, 16)
    each = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))
    seen = observed(each, model, x[:, None])
    assert seen[1] == amax(model.linear.kernel[...])
    # Examples scale themselves until the first update, so the rest is only close.
    whole = observed(lambda model, x: model(x), model, x)
    np.testing.assert_allclose(seen, whole, rtol=0.1)


def test_jax_grad_of_split_states():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 4, 16)
    graph, params, scaling, rest = nnx.split(model, nnx.Param, Scaling, ...)

    @jax.jit
    def gradients(params, scaling, rest):
        def loss_fn(params, scaling):
            return weigh(nnx.merge(graph, params, scaling, rest)(x))

        return jax.grad(loss_fn, argnums=(0, 1))(params, scaling)

    grads, seen = gradients(params, scaling, rest)
    _, expected = loss_and_gradients(model, x)
    np.testing.assert_array_equal(
        scales(seen)["linear/kernel"], scales(expected)["linear/kernel"]
    )
    np.testing.assert_array_equal(
        grads["linear"]["kernel"][...], expected["linear"]["kernel"][...]
    )
    mpjax.nnx.update_scaling(model, seen)
    assert np.all(scales(model)["linear/kernel"] > 0)


def test_ensembles_under_vmap():
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Twice(rngs)))
    model, x = mixed_precision(make(rngs()), rule(DELAYED)), normal(0, 4, 16)

    @nnx.jit
    @nnx.vmap(in_axes=(0, None))
    def gradients(model, x):
        return nnx.grad(lambda model: weigh(model(x)), argnums=WRT)(model)

    seen = scales(gradients(model, x))["linear/kernel"]
    np.testing.assert_array_equal(seen[:, 1], jax.vmap(amax)(model.linear.kernel[...]))


def test_a_model_is_a_value():
    def make(recipe=DELAYED, **kwargs):
        return mixed_precision(Twice(rngs()), rule(recipe, **kwargs))

    model, x, traces = make(), normal(0, 4, 16), []
    graph, state = nnx.split(model)
    for other in (make(), nnx.clone(model), copy.deepcopy(model)):
        assert nnx.split(other)[0] == graph
        assert hash(nnx.split(other)[0]) == hash(graph)
    pickled = pickle.loads(pickle.dumps(model))
    assert type(pickled) is type(model)
    np.testing.assert_array_equal(pickled(x), nnx.merge(graph, state)(x))
    for other in (make(CURRENT), make(min_size=1), make(cast_inputs=False)):
        assert nnx.split(other)[0] != graph

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    for _ in range(2):
        for other in (make(), make(CURRENT), make(mpjax.mx_scaling())):
            run(other, x)
    assert len(traces) == 3


def test_a_second_call_keeps_states_of_the_same_recipe():
    model = mixed_precision(Twice(rngs()), rule(DELAYED))
    mpjax.nnx.update_scaling(model, loss_and_gradients(model, normal(0, 4, 16))[1])
    again = mixed_precision(model, rule(DELAYED))
    np.testing.assert_array_equal(*(scales(m)["linear/kernel"] for m in (model, again)))
    assert nnx.split(again)[0] == nnx.split(model)[0]
    alone = mixed_precision(model, [mpjax.Rule("linear", None), "mixed_bfloat16"])
    assert type(alone.linear) is type(model.linear)
    np.testing.assert_array_equal(*(scales(m)["linear/kernel"] for m in (model, alone)))
    other = mixed_precision(model, rule(mpjax.delayed_scaling(history_length=8)))
    assert other.linear.kernel_scaling.history.shape == (3, 8)
    assert not np.any(scales(other)["linear/kernel"])
    assert not scales(mixed_precision(model, "mixed_bfloat16"))


def test_abstract_models_have_abstract_states():
    abstract = nnx.eval_shape(lambda: Stack(rngs()))
    model = mixed_precision(abstract, rule(DELAYED))
    for _, variable in nnx.to_flat_state(nnx.state(model, Scaling)):
        assert isinstance(variable.get_value().scale, jax.ShapeDtypeStruct)
    inside = nnx.eval_shape(lambda: mixed_precision(Stack(rngs()), rule(DELAYED)))
    assert nnx.split(inside)[0] == nnx.split(model)[0]


# ------------------------------------------------------------------------- training


class Overflow(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x, factor):
        return self.linear(x).astype(jnp.float32) * factor


def make_step(traces):
    @nnx.jit
    def step(model, optimizer, x, factor=1.0):
        traces.append(1)

        def loss_fn(model):
            loss = jnp.mean(model(x, factor) ** 2)
            return mpjax.scale_loss(loss, optimizer.opt_state)

        grads = nnx.grad(loss_fn, argnums=WRT)(model)
        optimizer.update(model, grads)
        mpjax.nnx.update_scaling(model, grads, optimizer.opt_state)
        return grads

    return step


def trainer():
    model = mixed_precision(
        Overflow(rngs()),
        mpjax.Rule(".*", "mixed_float16", DELAYED, cast_inputs=False),
    )
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(0.01, 0.9), init_scale=2.0**4, growth_interval=2
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_loss_scaling_and_delayed_scaling_together():
    model, optimizer = trainer()
    x, traces = normal(0, 4, 16), []
    step, scaling = make_step(traces), model.linear.kernel_scaling
    for factor in (1.0, 1.0, 1.0, 1e30, 1.0, 1.0):
        before, loss_scale = scaling.get_value(), mpjax.loss_scale(optimizer.opt_state)
        kernel = model.linear.kernel[...]
        seen = scales(step(model, optimizer, x, jnp.float32(factor)))["linear/kernel"]
        after = scaling.get_value()
        assert after.loss_scale == mpjax.loss_scale(optimizer.opt_state)
        if factor == 1e30:
            assert not mpjax.last_step_finite(optimizer.opt_state)
            assert np.isinf(seen[2])
            np.testing.assert_array_equal(after.history, before.history)
            np.testing.assert_array_equal(model.linear.kernel[...], kernel)
            assert after.scale[2] == before.scale[2] * after.loss_scale / loss_scale
        elif before.loss_scale > 0:
            # What the history remembers is the gradient of the unscaled loss.
            entered = after.history[:, -1]
            np.testing.assert_array_equal(entered, seen / np.array([1, 1, loss_scale]))
    assert len(traces) == 1


def test_without_updates_scaling_is_current():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 4, 16)
    current = mixed_precision(Twice(rngs()), rule(CURRENT))
    for factor in (1, 30):
        loss, grads = loss_and_gradients(model, factor * x)
        expected, gradient = loss_and_gradients(current, factor * x)
        assert loss == expected
        np.testing.assert_array_equal(
            grads["linear"]["kernel"][...], gradient["linear"]["kernel"][...]
        )
    with pytest.raises(ValueError, match=r"lack that of 'linear/kernel_scaling'"):
        mpjax.nnx.update_scaling(model, nnx.grad(lambda m: weigh(m(x)))(model))
    mpjax.nnx.update_scaling(current, gradient)  # which has nothing to update


def test_microbatches_observe_what_one_batch_does():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 8, 16)

    @nnx.jit
    def observe(model, x):
        wrt = nnx.DiffState(0, Scaling)
        return nnx.grad(lambda model: jnp.sum(model(x) ** 3), argnums=wrt)(model)

    mpjax.nnx.update_scaling(model, observe(model, x))  # rounds all rows alike
    merged = jax.tree.map(jnp.maximum, observe(model, x[:4]), observe(model, x[4:]))
    jax.tree.map(np.testing.assert_array_equal, merged, observe(model, x))


@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_multi_steps_enter_what_one_large_batch_does():
    x = jax.random.randint(jax.random.key(0), (8, 16), -4, 5).astype(jnp.float32)
    x *= jnp.array([1, 8, 4, 2, 1, 1, 4, 2])[:, None]
    recipe = mpjax.delayed_scaling(history_length=4, rounding="up")

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.sum(model(x)), argnums=WRT)(model)
        optimizer.update(model, grads)
        mpjax.nnx.update_scaling(model, grads, optimizer.opt_state)

    def train(tx, batches):
        linear = nnx.Linear(16, 8, use_bias=False, rngs=rngs())
        linear.kernel[...] = jnp.round(4 * linear.kernel[...])
        model = mixed_precision(linear, rule(recipe))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for batch in batches:
            step(model, optimizer, batch)
        return model.kernel_scaling.get_value(), model.kernel[...]

    many = optax.MultiSteps(optax.sgd(1.0), 4, use_grad_mean=False)
    many = optax.GradientTransformation(many.init, many.update)
    once = optax.MultiSteps(optax.sgd(1.0), 1)
    once = optax.GradientTransformation(once.init, once.update)
    batches = [x[:2], x[2:4], x[4:6], x[6:]]
    jax.tree.map(np.testing.assert_array_equal, train(many, batches), train(once, [x]))
    state, _ = train(many, batches[:2])  # the step is not made
    assert not np.any(state.scale) and state.history[0, -1] == amax(x[:4])


def test_a_loss_scale_that_changes_beside_the_optimizer():
    model, optimizer = trainer()
    make_step([])(model, optimizer, normal(0, 4, 16))
    make_step([])(model, optimizer, normal(0, 4, 16))
    before = model.linear.kernel_scaling.get_value()
    other = mpjax.static_loss_scaling(optax.sgd(0.1), 8 * before.loss_scale)
    mpjax.nnx.rescale_scaling(model, other.init(jnp.ones(2)))
    after = model.linear.kernel_scaling.get_value()
    np.testing.assert_array_equal(after.scale, before.scale * jnp.array([1.0, 1.0, 8]))
    np.testing.assert_array_equal(after.history, before.history)
    assert after.loss_scale == 8 * before.loss_scale


def by_flax(path, state):
    pure = nnx.to_pure_dict(state)
    path.write_bytes(flax.serialization.to_bytes(pure))
    zeros = jax.tree.map(jnp.zeros_like, pure)
    return flax.serialization.from_bytes(zeros, path.read_bytes())


def by_orbax(path, state):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: nnx.to_pure_dict(state))
        return checkpointer.restore(path, shapes)


@pytest.mark.parametrize("store", [by_flax, by_orbax])
def test_training_resumes_bit_for_bit(tmp_path, store):
    pair, step = trainer(), make_step([])
    for seed in range(4):
        if seed == 2:
            pure = store(tmp_path / "state", nnx.state(pair))
            resumed = trainer()
            state = nnx.state(resumed)
            nnx.replace_by_pure_dict(state, pure)
            nnx.update(resumed, state)
        step(*pair, normal(seed, 4, 16), jnp.float32(1))
    for seed in range(2, 4):
        step(*resumed, normal(seed, 4, 16), jnp.float32(1))
    assert np.all(scales(resumed[0])["linear/kernel"] > 0)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(resumed), nnx.state(pair))


def test_quantized_arrays_are_stored_too():
    q = mpjax.quantize(normal(0, 6), jnp.float8_e4m3fn, block=(4,))
    data = flax.serialization.to_bytes(q)
    zeros = jax.tree.map(jnp.zeros_like, q)
    restored = flax.serialization.from_bytes(zeros, data)
    assert restored.dtype == E4M3 and restored.block == (4,)
    jax.tree.map(np.testing.assert_array_equal, restored, q)
    with pytest.raises(
        ValueError, match="QArray is read from qvalue, scale, got scale"
    ):
        flax.serialization.from_state_dict(q, {"scale": q.scale})
