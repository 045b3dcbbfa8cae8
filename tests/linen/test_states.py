"""Scaling states of Linen: a collection, through every transformation that there is."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from front_ends import BF16, DELAYED, LinenTrainer, rule, scales
from helpers import normal
from linen_models import Twice

import mpjax
from mpjax.linen import MixedPrecision


class Scanned(nn.Module):
    axes: tuple = ("params",)

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes=dict.fromkeys(self.axes, 0),
            split_rngs={"params": True},
            length=3,
        )
        return layers(nn.Dense(16, name="dense"), x, None)[0]


def test_a_state_that_was_forgotten_is_asked_for():
    model, x = MixedPrecision(nn.Dense(16), rule(DELAYED)), normal(0, 4, 8)
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="finds no state\\. Give apply the collection"):
        model.apply({"params": params}, x)


def observe(model, variables, x, **kwargs):
    """What the layer of a model observes in a step."""
    scaling = variables["scaling"]

    @jax.jit
    def grad(scaling):
        def loss_fn(scaling):
            out = model.apply({**variables, "scaling": scaling}, x, **kwargs)
            return jnp.sum((out[0] if kwargs else out) ** 2)

        return jax.grad(loss_fn)(scaling)

    (seen,) = scales(grad(scaling)).values()
    return seen


class Around(nn.Module):
    """A module that has the wrapper inside."""

    lift: str

    @nn.compact
    def __call__(self, x):
        return MixedPrecision(Twice(self.lift), rule(DELAYED))(x)


def test_the_wrapper_inside_another_module():
    x = normal(0, 4, 16)
    model = MixedPrecision(Twice(), rule(DELAYED))
    for lift in ("", "remat", "jit"):
        inside = Around(lift)
        variables = inside.init(jax.random.key(0), x)
        kernel = variables["params"]["Twice_0"]["dense"]["kernel"]
        top = float(jnp.abs(kernel.astype(BF16)).max())
        seen = observe(inside, variables, x)
        # States that cannot be written pass no border of Linen's transformations.
        assert seen[1] == (2 * top if lift else top)
        if not lift:
            alone = {name: tree["Twice_0"] for name, tree in variables.items()}
            np.testing.assert_array_equal(seen, observe(model, alone, x))
        assert observe(inside, variables, x, mutable=["scaling"])[1] == top


def test_a_bound_model_observes_the_maximum():
    x = normal(0, 4, 16)
    model = MixedPrecision(Twice(), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def run(scaling):
        return jnp.sum(model.bind({**variables, "scaling": scaling})(x) ** 2)

    (seen,) = scales(jax.grad(run)(variables["scaling"])).values()
    np.testing.assert_array_equal(seen, observe(model, variables, x))
    bound = model.bind(variables)
    for _ in range(2):  # nothing of one trace is left to another
        np.testing.assert_array_equal(
            jax.jit(lambda x: bound(x))(x), model.apply(variables, x)
        )


class OfJax(nn.Module):
    """Calls a layer, twice, in a function that it gives to a transformation of JAX."""

    way: Callable

    def setup(self):
        self.dense = nn.Dense(16, use_bias=False)

    def __call__(self, x):
        run = self.way(lambda x: self.dense(4 * self.dense(x)))
        return run(x) if self.is_initializing() else self.dense(run(x))


def of_scan(run):
    return lambda x: jax.lax.scan(lambda x, _: (run(x), None), x, length=2)[0]


WAYS = {
    "checkpoint": (jax.checkpoint, 2),
    "jit": (jax.jit, 2),
    "scan": (of_scan, 3),
    "vmap": (jax.vmap, 2),
    "cond": (lambda run: lambda x: jax.lax.cond(True, run, jnp.sin, x), 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_transformations_of_jax_in_a_model(way):
    transform, uses = WAYS[way]
    x = normal(0, 4, 16)
    models = (
        MixedPrecision(OfJax(f), rule(DELAYED)) for f in (transform, lambda run: run)
    )
    model, plain = models
    variables = plain.init(jax.random.key(0), x)
    if way != "scan":  # no parameter is made in a scan
        made = model.init(jax.random.key(0), x)["scaling"]
        jax.tree.map(np.testing.assert_array_equal, made, variables["scaling"])
    kernel = variables["params"]["dense"]["kernel"]
    top = float(jnp.abs(kernel.astype(BF16)).max())
    seen, exact = (observe(m, variables, x) for m in (model, plain))
    assert exact[1] == top
    # Uses within the function and outside of it add up; a loop is many of them.
    np.testing.assert_allclose(seen[1], uses * top, rtol=1e-6)
    assert seen[0] >= exact[0]


def test_layers_of_a_scan_have_states_of_their_own():
    x = normal(0, 4, 16)
    scanned = LinenTrainer(Scanned(("params", "scaling")), rule(DELAYED), x)
    state = scanned.states["dense/kernel"]
    assert state.history.shape == (3, 3, 4)
    _, _, seen = scanned.gradients(x)
    kernels = scanned.params["dense/kernel"].astype(BF16)
    np.testing.assert_array_equal(
        seen["dense/kernel"][:, 1], jnp.abs(kernels).max((1, 2))
    )
    scanned.step(x)
    assert scanned.states["dense/kernel"].scale.shape == (3, 3)


def test_a_scan_without_an_axis_for_states_is_refused_inside_another_module():
    class Around(nn.Module):  # whose variables are not the wrapper's
        @nn.compact
        def __call__(self, x):
            return MixedPrecision(Scanned(), rule(DELAYED))(x)

    model = Around()
    with pytest.raises(ValueError, match=r"variable_axes={'params': 0, 'sc"):
        model.init(jax.random.key(0), jnp.ones((2, 16)))


class Normed(nn.Module):
    """What normalizes the weights of the layers inside of it."""

    kind: type = nn.WeightNorm
    inner: type = Twice

    @nn.compact
    def __call__(self, x):
        kwargs = {"update_stats": True} if self.kind is nn.SpectralNorm else {}
        return self.kind(self.inner(name="inner"), name="norm")(x, **kwargs)


@pytest.mark.parametrize("kind", [nn.WeightNorm, nn.SpectralNorm])
@pytest.mark.parametrize("lift", [lambda kind: kind, nn.jit, nn.remat])
def test_layers_whose_weights_are_normalized(kind, lift):
    x = normal(0, 4, 16)
    bare = lift(Normed)(kind)
    model = MixedPrecision(bare, rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    params, scaling = variables["params"], variables.pop("scaling")
    jax.tree.map(
        np.testing.assert_array_equal, variables, bare.init(jax.random.key(0), x)
    )
    assert set(scaling["norm"]) == {"inner/dense/kernel_scaling"}

    @jax.jit
    def observe(scaling):
        def loss_fn(scaling):
            collections = {**variables, "scaling": scaling}
            out, changed = model.apply(collections, x, mutable=["batch_stats"])
            assert "scaling" not in changed
            return jnp.sum(out**2)

        return jax.grad(loss_fn)(scaling)

    observed = observe(scaling)
    (seen,) = scales(observed).values()
    if kind is nn.WeightNorm:
        kernel = params["inner"]["dense"]["kernel"]
        kernel /= jnp.linalg.norm(kernel, axis=0, keepdims=True)
        assert seen[1] == float(jnp.abs(kernel).max().astype(BF16))
    assert seen[0] > float(jnp.abs(x).max())  # the second use has four times as much
    (scale,) = scales(mpjax.update_scaling(scaling, observed)).values()
    up = 2.0 ** np.ceil(np.log2(seen / np.array([448.0, 448.0, 57344.0])))
    np.testing.assert_array_equal(scale, up)


def test_a_transformation_where_weights_are_normalized_is_refused():
    model = MixedPrecision(Normed(inner=nn.jit(Twice)), rule(DELAYED))
    with pytest.raises(ValueError, match=r"'inner/dense' .*Transform the WeightNorm"):
        model.init(jax.random.key(0), normal(0, 4, 16))


@pytest.mark.parametrize("hands_on", [False, True])
def test_calls_in_one_loss_observe_a_sum_unless_states_are_handed_on(hands_on):
    """Of two views of a batch, say, or of what is real and what is made up."""
    x = normal(0, 4, 16)
    model = MixedPrecision(nn.Dense(16, use_bias=False), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)

    def loss_fn(scaling):
        loss = 0.0
        for factor in (1.0, 2.0):
            given = {**variables, "scaling": scaling}
            out, changed = model.apply(given, factor * x, mutable=["scaling"])
            scaling = changed["scaling"] if hands_on else scaling
            loss += jnp.sum(out)
        return loss

    seen = jax.grad(loss_fn)(variables["scaling"])["kernel_scaling"].scale
    kernel = variables["params"]["kernel"]
    tops = [float(jnp.abs(a.astype(BF16)).max()) for a in (x, kernel)]
    uses = [2, 1, 1] if hands_on else [1 + 2, 2, 2]
    np.testing.assert_array_equal(seen, np.float32([*tops, 1]) * np.float32(uses))


def test_apply_returns_what_it_always_returns():
    x = normal(0, 4, 8)
    module = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False)])
    model = MixedPrecision(module, rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    out, changed = model.apply(variables, x, mutable=["batch_stats"])
    assert out.shape == (4, 8) and set(changed) == {"batch_stats"}
    assert set(model.apply(variables, x, mutable="batch_stats")[1]) == {"batch_stats"}
    both = model.apply(variables, x, mutable=["batch_stats", "scaling"])[1]
    assert set(both) == {"batch_stats", "scaling"}
    assert set(model.apply(variables, x, mutable=True)[1]) == set(variables)


def test_a_state_of_another_recipe_is_refused():
    x = normal(0, 4, 16)
    variables = MixedPrecision(nn.Dense(16), rule(DELAYED)).init(jax.random.key(0), x)
    other = MixedPrecision(nn.Dense(16), rule(DELAYED.fnuz()))
    with pytest.raises(ValueError, match="The scaling state of module '' is one of"):
        other.apply(variables, x)
    calibrated = dataclasses.replace(DELAYED, calibrated=True)
    MixedPrecision(nn.Dense(16), rule(calibrated)).apply(variables, x)
