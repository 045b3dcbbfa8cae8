"""Scaling states of NNX: variables, through every transformation that there is."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from front_ends import (
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
from nnx_models import Foreign, RoutedBlock, Twice, rngs

import mpjax
import mpjax.nnx
from mpjax.nnx import ScalingStat, mixed_precision


class Stack(nnx.Module):
    """Blocks stacked by vmap and run by scan, or one by one."""

    def __init__(self, rngs, unrolled=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return RoutedBlock(rngs)

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
    states = nnx.to_flat_state(nnx.state(model, ScalingStat))
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
    return scales(grads)["dense/kernel"]


def test_ways_to_run_a_layer_that_is_called_twice():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 4, 16)
    expected = observed(lambda model, x: model(x), model, x)

    def functional(model, x):
        return nnx.merge(*nnx.split(model))(x)

    def conditional(model, x):
        return nnx.cond(True, lambda model, x: model(x), lambda model, x: x, model, x)

    for run in (functional, conditional):
        np.testing.assert_array_equal(observed(run, model, x), expected)
    # A transformation of JAX cannot hand on what a constant of it observes.
    closed = observed(lambda model, x: jax.checkpoint(lambda x: model(x))(x), model, x)
    assert np.all(closed >= expected) and closed[1] == 2 * expected[1]


def test_update_scaling_wants_the_gradient_of_the_states():
    x = normal(0, 4, 16)
    delayed, current = (
        mixed_precision(Twice(rngs()), rule(r)) for r in (DELAYED, CURRENT)
    )
    without = nnx.grad(lambda model: weigh(model(x)))
    with pytest.raises(ValueError, match=r"lack that of 'dense/kernel_scaling'"):
        mpjax.nnx.update_scaling(delayed, without(delayed))
    with pytest.raises(ValueError, match="no states of delayed scaling to update"):
        mpjax.nnx.update_scaling(current, without(current))


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
    assert seen[1] == amax(model.dense.kernel[...])
    # Examples scale themselves until the first update, so the rest is only close.
    whole = observed(lambda model, x: model(x), model, x)
    np.testing.assert_allclose(seen, whole, rtol=0.1)


def test_jax_grad_of_split_states():
    model, x = mixed_precision(Twice(rngs()), rule(DELAYED)), normal(0, 4, 16)
    graph, params, scaling, rest = nnx.split(model, nnx.Param, ScalingStat, ...)

    @jax.jit
    def gradients(params, scaling, rest):
        def loss_fn(params, scaling):
            return weigh(nnx.merge(graph, params, scaling, rest)(x))

        return jax.grad(loss_fn, argnums=(0, 1))(params, scaling)

    grads, seen = gradients(params, scaling, rest)
    _, expected = loss_and_gradients(model, x)
    np.testing.assert_array_equal(
        scales(seen)["dense/kernel"], scales(expected)["dense/kernel"]
    )
    np.testing.assert_array_equal(
        grads["dense"]["kernel"][...], expected["dense"]["kernel"][...]
    )
    mpjax.nnx.update_scaling(model, seen)
    assert np.all(scales(model)["dense/kernel"] > 0)


def test_ensembles_under_vmap():
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Twice(rngs)))
    model, x = mixed_precision(make(rngs()), rule(DELAYED)), normal(0, 4, 16)

    @nnx.jit
    @nnx.vmap(in_axes=(0, None))
    def gradients(model, x):
        return nnx.grad(lambda model: weigh(model(x)), argnums=WRT)(model)

    seen = scales(gradients(model, x))["dense/kernel"]
    np.testing.assert_array_equal(seen[:, 1], jax.vmap(amax)(model.dense.kernel[...]))


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
    np.testing.assert_array_equal(*(scales(m)["dense/kernel"] for m in (model, again)))
    assert nnx.split(again)[0] == nnx.split(model)[0]
    alone = mixed_precision(model, [mpjax.Rule("dense", None), "mixed_bfloat16"])
    assert type(alone.dense) is type(model.dense)
    np.testing.assert_array_equal(*(scales(m)["dense/kernel"] for m in (model, alone)))
    other = mixed_precision(model, rule(mpjax.delayed_scaling(history_length=8)))
    assert other.dense.kernel_scaling.history.shape == (3, 8)
    assert not np.any(scales(other)["dense/kernel"])
    assert not scales(mixed_precision(model, "mixed_bfloat16"))


def test_abstract_models_have_abstract_states():
    abstract = nnx.eval_shape(lambda: Stack(rngs()))
    model = mixed_precision(abstract, rule(DELAYED))
    for _, variable in nnx.to_flat_state(nnx.state(model, ScalingStat)):
        assert isinstance(variable.get_value().scale, jax.ShapeDtypeStruct)
    inside = nnx.eval_shape(lambda: mixed_precision(Stack(rngs()), rule(DELAYED)))
    assert nnx.split(inside)[0] == nnx.split(model)[0]
