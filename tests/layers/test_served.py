"""A row of the table of layers is all that either front end needs to serve one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxprs import dots

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax._layers import served

BF16, E4M3 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)
MATMUL = (((1,), (0,)), ((), ()))
X = jnp.linspace(-1, 1, 4 * 32).reshape(4, 32)


class LinenToy(nn.Module):
    """A layer that multiplies in a way that no hook is known for."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("weight", nn.initializers.normal(), (32, 16))


class NnxToy(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones((32, 16)))

    def __call__(self, x):
        return x @ self.weight[...]


class LinenHooked(nn.Module):
    """A layer that multiplies through an attribute of a name of its own."""

    multiply: object = jax.lax.dot_general

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (32, 16))
        return self.multiply(x, kernel, MATMUL)


class NnxHooked(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((32, 16)))
        self.multiply = jax.lax.dot_general

    def __call__(self, x):
        return self.multiply(x, self.kernel[...], MATMUL)


def body(layer, products, read, x):
    del layer
    weight = read("weight").astype(x.dtype)
    return products.dot_general(x, weight, MATMUL, name="weight")


ROWS = {
    "body": served.ServedLayer(
        types=(LinenToy, NnxToy),
        bodies={LinenToy.__call__: body, NnxToy.__call__: body},
        parameter="weight",
        shape=lambda layer: (32, 16),
        size=lambda layer: (32, 16),
    ),
    "hook": served.ServedLayer(
        types=(LinenHooked, NnxHooked),
        hooks={"multiply": served.Hook("dot_general", (jax.lax.dot_general,))},
    ),
}
TOYS = {
    "body": {"linen": LinenToy, "nnx": NnxToy},
    "hook": {"linen": LinenHooked, "nnx": NnxHooked},
}


def trace(front_end, make, rule):
    """The products of a layer under a rule, and its scaling states."""
    if front_end == "linen":
        model = mpjax.linen.MixedPrecision(make(), rule)
        variables = model.init(jax.random.key(0), X)
        jaxpr = jax.make_jaxpr(model.apply)(variables, X)
        return dots(jaxpr), list(map(state_of, variables.get("scaling") or {}))
    model = mpjax.nnx.mixed_precision(make(), rule)
    states = nnx.to_flat_state(nnx.state(model, mpjax.nnx.ScalingStat))
    jaxpr = jax.make_jaxpr(nnx.merge(*nnx.split(model)))(X)
    return dots(jaxpr), [state_of(path[-1]) for path, _ in states]


def state_of(name):
    """The parameter whose product has a state of that name."""
    assert name.endswith("_scaling")
    return name.removesuffix("_scaling")


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_row_serves_a_layer_of_another_author(front_end, way, monkeypatch):
    make = TOYS[way][front_end]
    rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.delayed_scaling(history_length=4))
    with pytest.raises(ValueError, match="serves no product"):
        trace(front_end, make, rule)

    monkeypatch.setattr(served, "LAYERS", (ROWS[way], *served.LAYERS))
    found, states = trace(front_end, make, rule)
    # A processor without fp8 has a branch of its own.
    assert len(found) == 2
    assert {(d.lhs, d.rhs) for d in found} == {(E4M3, E4M3), (BF16, BF16)}
    assert states == [ROWS[way].parameter]


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_row_may_know_that_a_layer_is_small(front_end, monkeypatch):
    monkeypatch.setattr(served, "LAYERS", (ROWS["body"], *served.LAYERS))
    make = TOYS["body"][front_end]
    recipe = mpjax.current_scaling()
    rule = mpjax.Rule(".*", "mixed_bfloat16", recipe, min_size=17)
    with pytest.raises(ValueError, match=r"serves no product.*min_size=17"):
        trace(front_end, make, rule)
    rule = mpjax.Rule(".*", "mixed_bfloat16", recipe, min_size=16)
    assert E4M3 in {d.lhs for d in trace(front_end, make, rule)[0]}


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_a_row_may_refuse_a_layer(front_end, monkeypatch):
    make = TOYS["hook"][front_end]
    row = served.ServedLayer(
        types=(make,),
        hooks=ROWS["hook"].hooks,
        refuses=lambda layer: "multiplies by the moon",
    )
    monkeypatch.setattr(served, "LAYERS", (row, *served.LAYERS))
    rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.current_scaling())
    with pytest.raises(ValueError, match="by the moon and takes no recipe"):
        trace(front_end, make, rule)


def test_a_subclass_has_the_row_of_its_base():
    class Dense(nn.Dense):
        pass

    class Convolution(nnx.Conv):
        pass

    assert served.served_layer(Dense) is served.served_layer(nnx.Linear)
    assert served.served_layer(Convolution).hooks.keys() == {"conv_general_dilated"}
    assert served.served_layer(nnx.Dropout) is served.LAYERS[-1]
