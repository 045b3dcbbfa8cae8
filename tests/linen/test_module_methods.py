"""What a user calls on a model besides ``init`` and ``apply``, as on a bare module."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal

from mpjax.linen import MixedPrecision

KEY, X = jax.random.key(0), jnp.ones((4, 8))


class Net(nn.Module):
    deterministic: bool = False
    width: int = 8

    def setup(self):
        self.dense = nn.Dense(self.width)
        self.drop = nn.Dropout(0.5, deterministic=self.deterministic)

    def __call__(self, x):
        h = self.perturb("h", self.dense(x))
        self.sow("intermediates", "h", h)
        return self.drop(h)


def wrap(model):
    return MixedPrecision(model, "mixed_bfloat16")


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net(True).init)(KEY, X)


@pytest.mark.parametrize("make", ["clone", "copy", "bound clone", "bound copy"])
def test_copies_take_the_fields_of_the_module(make, variables):
    model = wrap(Net())
    if "bound" in make:
        model = model.bind(variables)
    method = getattr(model, make.split()[-1])
    other = method(**({"parent": None} if "copy" in make else {}), deterministic=True)
    assert isinstance(other, MixedPrecision)
    assert other.deterministic and not model.deterministic
    assert other.scope is other.module.scope is None
    assert_trees_equal(other.apply(variables, X), wrap(Net(True)).apply(variables, X))
    np.testing.assert_array_equal(  # the rules are still there
        other.apply(variables, X, mutable=["intermediates"])[1]["intermediates"]["h"][
            0
        ].dtype,
        jnp.bfloat16,
    )


def test_a_clone_is_equal_to_what_it_says():
    model = wrap(Net())
    assert model.clone() == model
    assert model.clone(deterministic=True, width=3) == wrap(Net(True, 3))
    assert model.clone(rules="float32", width=3) == MixedPrecision(
        Net(width=3), "float32"
    )
    assert model.clone(module=Net(True), width=3) == wrap(Net(True, 3))
    assert model.clone(name="net").name == "net"
    with pytest.raises(TypeError, match=r"Net\.__init__\(\) got .* 'depth'"):
        model.clone(depth=3)


@pytest.mark.parametrize("make", ["clone", "copy"])
def test_copies_inside_a_model_have_scopes_of_their_own(make):
    class Outer(nn.Module):
        wrap: bool

        @nn.compact
        def __call__(self, x):
            net = nn.Dense(8, name="one")
            net = wrap(net) if self.wrap else net
            other = getattr(net, make)(features=4, parent=self, name="two")
            return other(net(x))

    variables = Outer(False).init(KEY, X)
    assert variables["params"]["two"]["kernel"].shape == (8, 4)
    assert_trees_equal(Outer(True).init(KEY, X), variables)
    actual = Outer(True).apply(variables, X)
    expected = Outer(False).apply(variables, X)
    np.testing.assert_allclose(actual, expected, rtol=2**-6, atol=2**-6)


def call(method, *args):
    return lambda model, v: getattr(model.bind(v, mutable=True), method)(*args)


def paths(model, v):
    return dict.fromkeys(model.module_paths(KEY, X, show_repeated=True), 0)


def unbind(model, v):
    other, variables = model.bind(v).unbind()
    return other == model, other.scope is None, variables


def perturbations(model, v):
    def loss(perturbations):
        y = model.apply({**v, "perturbations": perturbations}, X)
        return jnp.sum(y.astype(jnp.float32))

    return jax.grad(loss)(v["perturbations"])


def put(model, v):
    bound = model.bind(v, mutable=["cache"])
    bound.put_variable("cache", "x", X)
    return bound.variables, bound.is_mutable_collection("cache")


def sow(model, v):
    bound = model.bind(v, mutable=["intermediates"])
    return bound.sow("intermediates", "x", X), bound.variables["intermediates"]


def make_rng(model, v):
    bound = model.bind(v, rngs={"dropout": KEY})
    key = jax.random.key_data(bound.make_rng("dropout"))
    return key, bound.has_rng("dropout"), bound.has_rng("params")


METHODS = {
    "unbind": unbind,
    "module_paths": paths,
    "lazy_init": lambda model, _: model.lazy_init(
        KEY, jax.ShapeDtypeStruct(X.shape, X.dtype)
    ),
    "path": lambda model, v: model.bind(v).path,
    "is_initializing": call("is_initializing"),
    "in init": lambda model, v: model.init_with_output(
        KEY, X, method=lambda model, x: (model.is_initializing(), model.path, model(x))
    ),
    "variables": lambda model, v: model.bind(v).variables,
    "has_variable": call("has_variable", "params", "dense"),
    "has no variable": call("has_variable", "params", "Dense_0"),
    "get_variable": call("get_variable", "params", "dense"),
    "put_variable": put,
    "sow": sow,
    "perturb": call("perturb", "h", X),
    "perturbations": perturbations,
    "make_rng": make_rng,
    "pickle": lambda model, v: pickle.loads(pickle.dumps(model)).apply(v, X),
    "deepcopy": lambda model, v: copy.deepcopy(model).apply(v, X),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_wrapper_answers_as_the_bare_module(method, variables):
    bare = METHODS[method](Net(True), variables)
    ours = METHODS[method](wrap(Net(True)), variables)
    assert jax.tree.structure(ours) == jax.tree.structure(bare)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(bare), strict=True):
        assert jnp.shape(one) == jnp.shape(other)
        np.testing.assert_allclose(one, other, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("method", ["variables", "path", "unbind", "__call__"])
def test_an_unbound_wrapper_raises_as_the_bare_module(method):
    def use(model):
        value = getattr(model, method)
        return value(X) if method == "__call__" else value()

    with pytest.raises(Exception) as bare:
        use(Net())
    with pytest.raises(type(bare.value)):
        use(wrap(Net()))
