"""Mistakes in a training loop have an error, or are found between steps."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from front_ends import rule
from helpers import normal

import mpjax
import mpjax.linen
import mpjax.nnx

X = normal(0, 4, 16)
RECIPE = mpjax.delayed_scaling(history_length=2)
SGD = optax.sgd(0.1)
SCALED = mpjax.dynamic_loss_scaling(SGD, init_scale=2.0**4)


@functools.cache
def setup(policy="mixed_float16", recipe=RECIPE):
    model = mpjax.linen.MixedPrecision(nn.Dense(8), rule(recipe, policy))
    return model, jax.jit(model.init)(jax.random.key(0), X)


def create(tx=SCALED, policy="mixed_float16", recipe=RECIPE):
    model, variables = setup(policy, recipe)
    return mpjax.TrainState.create(apply_fn=model.apply, tx=tx, **variables)


def loss_of(state, variables):
    return jnp.mean(state.apply_fn(variables, X) ** 2)


@jax.jit
def step(state):
    loss_fn = functools.partial(loss_of, state)
    loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
    return state.apply_gradients(grads=grads), loss


def make_nnx(tx=SCALED, policy="mixed_float16"):
    bare = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    model = mpjax.nnx.mixed_precision(bare, rule(RECIPE, policy))
    return model, mpjax.nnx.Optimizer(model, tx)


def nnx_loss(model):
    return jnp.mean(model(X) ** 2)


# Gradients of a loss that was not scaled, or by another state.


def test_gradients_of_a_loss_that_was_not_scaled():
    @jax.jit
    def take_step(state):
        grads = jax.grad(functools.partial(loss_of, state))(state.variables)
        return state.apply_gradients(grads=grads)

    with pytest.raises(ValueError, match=r"no loss was scaled by its state"):
        take_step(create())
    take_step(create(SGD, "mixed_bfloat16"))
    model, optimizer = make_nnx()
    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, mpjax.nnx.ScalingStat))

    @nnx.jit
    def nnx_step(model, optimizer):
        optimizer.update(model, nnx.grad(nnx_loss, argnums=wrt)(model))

    with pytest.raises(ValueError, match=r"no loss was scaled by its state"):
        nnx_step(model, optimizer)


def test_gradients_of_a_loss_that_another_state_has_scaled():
    @jax.jit
    def take_step(state, other):
        loss_fn = functools.partial(loss_of, state)
        _, grads = mpjax.value_and_grad(loss_fn, other)(state.variables)
        return state.apply_gradients(grads=grads)

    with pytest.raises(ValueError, match=r"no loss was scaled by its state"):
        take_step(create(), create())


def test_a_gradient_function_that_is_made_once():
    """Before the steps, with the first state, whose loss scale would stay."""
    state = create()
    grad_fn = mpjax.value_and_grad(functools.partial(loss_of, state), state)

    @jax.jit
    def take_step(state):
        _, grads = grad_fn(state.variables)
        return state.apply_gradients(grads=grads)

    with pytest.raises(ValueError, match=r"state is no argument of the function"):
        take_step(state)
    model, optimizer = make_nnx()
    nnx_grad = mpjax.nnx.value_and_grad(nnx_loss, optimizer)

    @nnx.jit
    def nnx_step(model, optimizer):
        optimizer.update(model, nnx_grad(model)[1])

    with pytest.raises(ValueError, match=r"state is no argument of the function"):
        nnx_step(model, optimizer)


def test_gradients_of_two_compiled_functions_say_what_their_loss_was_scaled_by():
    state = create()
    expected, _ = step(state)

    @jax.jit
    def gradients(state):
        loss_fn = functools.partial(loss_of, state)
        _, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
        return grads, state.loss_scale

    @jax.jit
    def apply(state, grads, scale):
        return state.apply_gradients(grads=grads, loss_scale=scale)

    grads, scale = gradients(state)
    got = apply(state, grads, scale)
    jax.tree.map(np.testing.assert_array_equal, got.variables, expected.variables)
    with pytest.raises(ValueError, match=r"no loss was scaled.*pass loss_scale="):
        jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)


# Observations that are not entered.


def test_gradients_without_those_of_the_states():
    @jax.jit
    def take_step(state):
        def loss_fn(params):
            return loss_of(state, {**state.variables, "params": params})

        _, grads = mpjax.value_and_grad(loss_fn, state)(state.params)
        return state.apply_gradients(grads=grads)

    with pytest.raises(ValueError, match=r"lack those of scaling.*state\.variables"):
        take_step(create())
    model, optimizer = make_nnx(SGD, "mixed_bfloat16")
    with pytest.raises(ValueError, match=r"lack that of 'kernel_scaling'"):
        optimizer.update(model, nnx.jit(nnx.grad(nnx_loss))(model))


def test_a_loss_that_has_its_states_from_elsewhere():
    @jax.jit
    def take_step(state):
        def loss_fn(variables):
            given = {"params": variables["params"], "scaling": state.scaling}
            return loss_of(state, given)

        _, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
        return state.apply_gradients(grads=grads)

    state = create()
    mpjax.check_training(state)  # before its first step
    state = take_step(take_step(state))
    with pytest.raises(ValueError, match=r"2 steps were made, and no scaling state"):
        mpjax.check_training(state)
    state, _ = step(state)
    mpjax.check_training(state)


def test_states_of_nnx_that_no_step_enters():
    model, optimizer = make_nnx(SGD, "mixed_bfloat16")
    mpjax.check_training((model, optimizer))
    flax = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    flax.update(model, nnx.jit(nnx.grad(nnx_loss))(model))
    for run in (((model, flax),), (model, flax)):
        with pytest.raises(ValueError, match=r"1 steps were made, and no scaling"):
            mpjax.check_training(*run)

    @nnx.jit
    def nnx_step(model, optimizer):
        _, grads = mpjax.nnx.value_and_grad(nnx_loss, optimizer)(model)
        optimizer.update(model, grads)

    nnx_step(model, optimizer)
    mpjax.check_training((model, optimizer))
    mpjax.check_training(model, optimizer)


# States that an optimizer takes for parameters.


def test_states_are_not_trained():
    """Adam would move them by its rate; momentum has no entry of theirs."""
    state = create(mpjax.dynamic_loss_scaling(optax.sgd(0.1, 0.9)))
    kinds = [leaf.shape for leaf in jax.tree.leaves(state.opt_state.inner_state)]
    assert sorted(kinds) == [(8,), (16, 8)]
    state, _ = step(state)
    assert np.all(state.scaling["kernel_scaling"].scale > 0)
    model, _ = make_nnx()
    with pytest.raises(ValueError, match=r"leave mpjax\.nnx\.ScalingStat out"):
        wrt = nnx.Any(nnx.Param, mpjax.nnx.ScalingStat)
        mpjax.nnx.Optimizer(model, SCALED, wrt=wrt)
    _, variables = setup()
    with pytest.raises(ValueError, match=r"mpjax\.scaled\(mpjax\.dynamic_loss"):
        SCALED.init(variables)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_an_optimizer_of_optax_over_the_states(known):
    """Its first step is found between steps, the next one is NaN as well."""
    state = create(SGD, "mixed_bfloat16")
    if known:
        state, _ = step(state)
    mpjax.check_training(state)
    variables, loss_fn = state.variables, functools.partial(loss_of, state)
    grads = jax.jit(jax.grad(loss_fn))(variables)
    updates, _ = SGD.update(grads, SGD.init(variables))
    wrong = optax.apply_updates(variables, updates)
    for tree in (wrong, state.replace(**wrong)):
        with pytest.raises(ValueError, match=r"kernel_scaling' has a scale of lhs"):
            mpjax.check_training(tree)
    if not known:
        assert np.isnan(jax.jit(loss_fn)(wrong))
    with pytest.raises(ValueError, match=r"Make the optimizer with mpjax\.scaled"):
        mpjax.apply_updates(variables, updates)


@pytest.mark.parametrize("rounding", ["exact", "up", "floor"])
@pytest.mark.parametrize("scale", [16.0, 1000.0])
def test_no_step_of_ours_is_taken_for_one_of_optax(rounding, scale):
    recipe = mpjax.delayed_scaling(history_length=2, rounding=rounding)
    state = create(mpjax.static_loss_scaling(SGD, scale), recipe=recipe)
    for _ in range(3):
        state, _ = step(state)
        mpjax.check_training(state)
    assert state.step == 3


# Others.


def test_states_of_another_recipe():
    written = flax.serialization.to_bytes(create())
    other = mpjax.delayed_scaling(history_length=2, margin=1)
    with pytest.raises(ValueError, match=r"was written as .* and is read as"):
        flax.serialization.from_bytes(create(recipe=other), written)
    longer = mpjax.delayed_scaling(history_length=3)
    with pytest.raises(ValueError, match=r"history of a ScalingState has shape"):
        flax.serialization.from_bytes(create(recipe=longer), written)
    state, observed = create(), create(recipe=other).scaling
    with pytest.raises(ValueError, match=r"of a recipe .* for another|one structure"):
        state.apply_gradients(
            grads={"params": state.params, "scaling": observed}, loss_scale=1.0
        )


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_float16_without_loss_scaling(policy):
    model, variables = setup(policy, None)
    applies = (
        model.apply,
        jax.jit(model.apply),
        functools.partial(model.apply, rngs={}),
    )
    for apply_fn in applies:
        with pytest.raises(ValueError, match=r"scales no loss.*dynamic_loss_scaling"):
            mpjax.TrainState.create(apply_fn=apply_fn, tx=SGD, **variables)
        mpjax.TrainState.create(apply_fn=apply_fn, tx=SCALED, **variables)
    bare = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    net = mpjax.nnx.mixed_precision(bare, policy)
    with pytest.raises(ValueError, match=r"scales no loss.*dynamic_loss_scaling"):
        mpjax.nnx.Optimizer(net, SGD)
    mpjax.nnx.Optimizer(net, mpjax.static_loss_scaling(SGD, 1.0))
    mpjax.nnx.Optimizer(mpjax.nnx.mixed_precision(bare, "mixed_bfloat16"), SGD)


def test_rules_of_which_one_computes_in_float16():
    rules = [mpjax.Rule("Dense_1", "float32"), "mixed_float16"]
    model = mpjax.linen.MixedPrecision(nn.Dense(4), ["mixed_float16"])
    with pytest.raises(ValueError, match="scales no loss"):
        mpjax.TrainState.create(apply_fn=model.apply, params={}, tx=SGD)
    two = nn.Sequential([nn.Dense(4), nn.Dense(4)])
    model = mpjax.linen.MixedPrecision(two, rules)
    with pytest.raises(ValueError, match="scales no loss"):
        mpjax.TrainState.create(apply_fn=model.apply, params={}, tx=SGD)


def test_mismatched_trees_leave_nothing_half_applied():
    state = create()
    for grads in ({}, {"params": {}}, state.params, {**state.variables, "x": {}}):
        with pytest.raises(ValueError, match=r"state\.variables"):
            state.apply_gradients(grads=grads, loss_scale=1.0)
    zeros = jax.tree.map(jnp.zeros_like, state.variables)
    with_others = functools.partial(state.apply_gradients, grads=zeros, loss_scale=1.0)
    for name in ("step", "params", "opt_state", "scaling"):
        with pytest.raises(ValueError, match=f"makes {name!r} itself"):
            with_others(**{name: 0})
    with pytest.raises(ValueError, match=r"there is no 'cache'; begin with one"):
        with_others(cache=0)
    full = mpjax.TrainState.create(
        apply_fn=state.apply_fn, tx=SCALED, m=jnp.zeros(2), **setup()[1]
    )
    for new in (jnp.zeros(3), jnp.zeros(2, jnp.bfloat16), {"a": jnp.zeros(2)}):
        with pytest.raises((ValueError, TypeError), match="The new 'm' cannot stand"):
            full.apply_gradients(grads=zeros, loss_scale=1.0, m=new)
    assert full.step == 0 and full.opt_state.total_notfinite == 0
    for wrong, kind in ((3, "apply_fn is a function"), (jnp.sin, "inner must be")):
        with pytest.raises(TypeError, match=kind):
            mpjax.TrainState.create(apply_fn=wrong, params={}, tx=0.1)


def test_states_of_a_teacher_that_have_seen_nothing_are_its_own():
    states = {"scaling": {"kernel": mpjax.delayed_scaling().init()}}
    params = {"w": jnp.ones(3)}
    state = mpjax.TrainState.create(
        apply_fn=abs, params=params, tx=optax.sgd(0.1), teacher=states
    )
    state = state.apply_gradients(grads=params)
    mpjax.check_training(state)
    state = mpjax.TrainState.create(
        apply_fn=abs, params=params, tx=optax.sgd(0.1), **states
    )
    with pytest.raises(ValueError, match="no scaling state has entered"):
        mpjax.check_training(state.replace(step=jnp.array(1)))
