import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import dots

import mpjax
import mpjax.linen
from mpjax._lowering import support

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
ALL = [
    mpjax.current_scaling,
    mpjax.delayed_weight_scaling,
    mpjax.delayed_scaling,
    mpjax.per_channel_scaling,
    mpjax.block_scaling,
    mpjax.mx_scaling,
]


@pytest.mark.parametrize("make", ALL)
def test_recipes_are_values(make):
    assert make() == make() and hash(make()) == hash(make())
    assert make(dtype="float8_e5m2") == make(dtype=jnp.float8_e5m2) != make()
    assert make().lhs.dtype == E4M3


def test_an_equal_recipe_does_not_retrace():
    traces = []

    static = jax.jit(lambda x, recipe: traces.append(1) or x, static_argnums=1)
    for _ in range(3):
        static(jnp.ones(2), mpjax.current_scaling(E4M3))
        static(jnp.ones(2), mpjax.current_scaling("float8_e4m3fn"))
    assert len(traces) == 1


def test_formats_of_the_named_recipes():
    assert mpjax.current_scaling().grad.dtype == E5M2
    assert mpjax.delayed_scaling().grad.dtype == E5M2
    assert mpjax.delayed_scaling() == mpjax.delayed_scaling(
        history_length=16, algorithm="max", margin=0
    )
    current, weights = mpjax.current_scaling(), mpjax.DelayedScaling(E4M3, "up", 1)
    delayed = mpjax.delayed_weight_scaling()
    assert dataclasses.replace(delayed, rhs=current.rhs) == current
    assert dataclasses.replace(delayed.rhs, algorithm="max") == weights
    for make in (mpjax.per_channel_scaling, mpjax.block_scaling):
        assert make().grad.dtype == E4M3
    block = mpjax.block_scaling()
    assert block.lhs.block((256, 512), (1,)) == (1, 128)
    assert block.grad.block((256, 512), (0,)) == (128, 1)
    assert block.rhs.block((512, 256), (0,)) == block.rhs.block((512, 256), (1,))
    assert mpjax.mx_scaling().lhs.rounding == "up"
    assert mpjax.mx_scaling(rounding="floor").lhs.rounding == "floor"


@pytest.mark.parametrize("make", ALL)
def test_every_recipe_has_one_order_of_arguments_and_one_word_for_rounding(make):
    first, second, *others = inspect.signature(make).parameters.values()
    assert (first.name, second.name) == ("dtype", "grad_dtype")
    assert {other.kind for other in others} == {inspect.Parameter.KEYWORD_ONLY}
    for rounding in ("floor", "up"):
        recipe = make(E4M3, E5M2, rounding=rounding)
        assert {s.rounding for s in recipe.scalings.values()} == {rounding}
        dtypes = [scaling.dtype for scaling in recipe.scalings.values()]
        assert dtypes == [E4M3, E4M3, E5M2]
    assert make() == make(rounding="up")
    if make is not mpjax.mx_scaling:
        assert make(rounding="exact").grad.rounding == "exact"
    with pytest.raises(ValueError, match="'exact', 'up' or 'floor', got 'down'"):
        make(rounding="down")


@pytest.mark.parametrize("make", ALL)
def test_every_recipe_has_a_variant_for_amd(make):
    variant = make(dtype=E4M3, grad_dtype=E5M2).fnuz()
    assert variant.rhs.dtype == jnp.float8_e4m3fnuz
    assert variant.grad.dtype == jnp.float8_e5m2fnuz
    assert variant.fnuz() == variant
    assert dataclasses.replace(variant.lhs, dtype=E4M3) == make().lhs


@pytest.mark.parametrize(
    ("recipe", "native"),
    [
        (mpjax.current_scaling(), {"h100", "b200", "v7x"}),
        (mpjax.delayed_scaling(), {"h100", "b200", "v7x"}),
        (mpjax.per_channel_scaling(), {"h100", "b200", "v7x"}),
        (mpjax.block_scaling(), set()),
        (mpjax.mx_scaling(), {"b200"}),
        (mpjax.current_scaling().fnuz(), {"mi300"}),
        (mpjax.current_scaling(E5M2), {"v5e", "v5p", "v6e", "v7x"}),
        (
            mpjax.current_scaling("int8", "int8"),
            {"a100", "h100", "b200", "v5e", "v5p", "v6e"},
        ),
    ],
)
def test_what_runs_natively_where(recipe, native):
    targets = ["cpu", "a100", "h100", "b200", "mi300", "v4", "v5e", "v5p", "v6e", "v7x"]
    answers = {target: recipe.is_supported(target) for target in targets}
    assert {target for target, (yes, _) in answers.items() if yes} == native
    assert all(isinstance(reason, str) and reason for _, reason in answers.values())


def test_a_reason_names_the_product_and_the_formats():
    yes, reason = mpjax.current_scaling(E5M2, E4M3).is_supported("h100")
    assert not yes and "float8_e5m2 with float8_e5m2 (product out)" in reason
    forward = dataclasses.replace(mpjax.current_scaling(E5M2), quantized=())
    assert forward.is_supported("h100")[0]
    with pytest.raises(ValueError, match="Known targets are cpu, a100"):
        mpjax.current_scaling().is_supported("tpu")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c: mpjax.Recipe(c, c, E4M3), TypeError, "grad of a recipe"),
        (lambda c: mpjax.Recipe(c, None, c), TypeError, "rhs of a recipe"),
        (lambda c: mpjax.Recipe(c, c, c, ("output",)), ValueError, "names out of"),
        (lambda c: mpjax.Recipe(c, c, c, "out"), ValueError, "names out of"),
        (
            lambda c: mpjax.Recipe(
                mpjax.DelayedScaling(E4M3),
                c,
                mpjax.DelayedScaling(E4M3, "exact", 4),
            ),
            ValueError,
            "share one history_length",
        ),
        (
            lambda c: mpjax.Recipe(
                mpjax.BlockScaling(E4M3, size=32), mpjax.BlockScaling(E4M3), c
            ),
            ValueError,
            "have one size",
        ),
        (lambda c: mpjax.delayed_scaling(history_length=0), ValueError, "at least 1"),
        (lambda c: mpjax.mx_scaling(rounding="exact"), ValueError, "powers of two"),
        (lambda c: mpjax.current_scaling().init(), ValueError, "DelayedScaling"),
        (
            lambda c: mpjax.delayed_scaling(margin=0.5),
            ValueError,
            "whole number",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(mpjax.CurrentScaling(E4M3))


class Oracle:
    """Delayed scaling of one tensor, as a list and a loop."""

    def __init__(self, largest, length, algorithm, margin):
        self.largest, self.length = largest, length
        self.algorithm, self.margin = algorithm, margin
        self.history, self.scale = [], 0.0

    def update(self, amax):
        known = np.isfinite(amax) and amax > 0
        self.history = [*self.history, amax if known else 0.0][-self.length :]
        latest = self.history[-1]
        amax = latest if self.algorithm == "most_recent" else max(self.history)
        if amax > 0:
            scale = np.float32(amax) * np.float32(1 / self.largest)
            self.scale = float(scale) * 2.0**self.margin


AMAXES = st.sampled_from([0.0, 0.5, 1.0, 3.0, 448.0, 1e-6, 1e30, np.inf, np.nan])


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(st.tuples(AMAXES, AMAXES, AMAXES), min_size=1, max_size=12),
    algorithm=st.sampled_from(["max", "most_recent"]),
    margin=st.sampled_from([0, 1, -0.5]),
    rounding=st.sampled_from(["up", "exact"]),
)
def test_update_follows_the_oracle(steps, algorithm, margin, rounding):
    margin = round(margin) if rounding == "up" else margin
    recipe = mpjax.delayed_scaling(
        history_length=3, algorithm=algorithm, margin=margin, rounding=rounding
    )
    state, update = recipe.init(), jax.jit(recipe.update)
    oracles = [Oracle(m, 3, algorithm, margin) for m in (448, 448, 57344)]
    for amaxes in steps:
        state = update(state, jnp.array(amaxes, jnp.float32))
        for oracle, amax in zip(oracles, amaxes, strict=True):
            oracle.update(amax)
        expected = np.array([oracle.scale for oracle in oracles])
        if rounding == "up":
            known = expected > 0
            expected[known] = 2.0 ** np.ceil(np.log2(expected[known]))
        np.testing.assert_allclose(state.scale, np.float32(expected), rtol=2e-7)


def test_a_step_of_an_unknown_loss_scale_divides_by_no_zero():
    recipe = mpjax.delayed_scaling(history_length=2)
    with jax.debug_nans(True):
        state = recipe.update(recipe.init(0.0), jnp.ones(3), 8.0)
    assert not state.history.any() and not state.scale.any()
    assert state.loss_scale == 8.0


def test_an_overflow_is_forgotten_at_once():
    """It does not hold the scale down for a whole history."""
    recipe = mpjax.delayed_scaling(history_length=1024)
    before = recipe.update(recipe.init(), jnp.full(3, 2.0))
    state = recipe.update(before, jnp.array([jnp.inf, jnp.nan, jnp.inf]))
    np.testing.assert_array_equal(state.scale, before.scale)
    state = recipe.update(state, jnp.full(3, 4.0))
    np.testing.assert_array_equal(state.scale, 2 * before.scale)


def test_the_history_forgets_what_is_too_old():
    recipe = mpjax.delayed_scaling(history_length=2, rounding="exact")
    state = recipe.init()
    for amax, expected in ((8.0, 8.0), (1.0, 8.0), (2.0, 2.0), (0.0, 2.0), (0.0, 2.0)):
        state = recipe.update(state, jnp.full(3, amax))
        assert state.scale[0] == np.float32(expected) * np.float32(1 / 448)


def test_the_scale_of_the_gradient_follows_the_loss_scale():
    recipe = mpjax.delayed_scaling()
    observed = jnp.array([1.0, 2.0, 3.0 * 2**16])
    state = recipe.update(recipe.init(2.0**16), observed, 2.0**-40)
    plain = recipe.update(recipe.init(), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(state.history, plain.history)
    on_grad = np.float32([1, 1, 2.0**-40])
    np.testing.assert_array_equal(state.scale, plain.scale * on_grad)
    assert state.loss_scale == 2.0**-40
    back = recipe.rescale(state, 1.0)
    jax.tree.map(np.testing.assert_array_equal, back, plain)
    # An old scale that is kept follows as well.
    kept = recipe.update(state, jnp.full(3, jnp.inf), 4.0)
    np.testing.assert_array_equal(kept.scale, plain.scale * np.float32([1, 1, 4]))


def test_nothing_is_entered_while_the_loss_scale_is_not_known():
    recipe = mpjax.delayed_scaling(history_length=4)
    observed = jnp.array([1.0, 2.0, 3.0])
    state = recipe.update(recipe.init(loss_scale=0), observed, 8.0)
    assert (
        state.loss_scale == 8 and not np.any(state.scale) and not np.any(state.history)
    )
    state = recipe.update(state, observed, 8.0)
    np.testing.assert_array_equal(state.history[:, -1], np.float32([1, 2, 3 / 8]))
    # Where no loss scale is ever named there is nothing to know.
    state = recipe.update(recipe.init(loss_scale=0), observed)
    np.testing.assert_array_equal(state.history[:, -1], observed)


def test_scales_stay_normal_numbers():
    recipe = mpjax.delayed_scaling(history_length=4)
    state = recipe.update(recipe.init(), jnp.full(3, 1e-30))
    for loss_scale in (2.0**-126, 2.0**127):
        moved = recipe.rescale(state, loss_scale).scale
        assert np.all(moved >= 2.0**-126) and np.all(moved <= 2.0**126)


def test_states_of_stacked_layers_update_as_one():
    recipe = mpjax.delayed_scaling(history_length=4)
    one = recipe.init()
    stack = jax.tree.map(lambda x: jnp.stack([x] * 5), one)
    observed = jnp.arange(1.0, 16.0).reshape(5, 3)
    together = jax.jit(recipe.update)(stack, observed)
    for i in range(5):
        alone = recipe.update(one, observed[i])
        for new, old in zip(
            jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
        ):
            np.testing.assert_array_equal(new[i], old)
    moved = recipe.rescale(together, 2.0)
    doubled = np.asarray(together.scale) * np.float32([1, 1, 2])
    np.testing.assert_array_equal(moved.scale, doubled)


def test_update_keeps_shapes_and_dtypes():
    recipe = mpjax.delayed_scaling(history_length=4)
    state = recipe.init()
    new = jax.eval_shape(recipe.update, state, jnp.ones(3))
    for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert (old.shape, old.dtype) == (leaf.shape, leaf.dtype)
    assert reference.dtype("float8_e4m3fn") == recipe.lhs.dtype


def test_a_new_recipe_is_one_function(monkeypatch):
    """Used through a rule, and shown for every device by `python -m mpjax targets`."""

    def forward_scaling(dtype=E4M3):
        return dataclasses.replace(mpjax.current_scaling(dtype), quantized=("out",))

    monkeypatch.setitem(support.RECIPES, "forward_scaling()", forward_scaling())
    (row,) = (
        line for line in support.matrix().splitlines() if "forward_scaling" in line
    )
    assert "yes" in row
    assert forward_scaling().is_supported("h100")[0]
    rule = mpjax.Rule(".*", "mixed_bfloat16", forward_scaling())
    model = mpjax.linen.mixed_precision(nn.Dense(8), rule)
    x = jnp.ones((4, 16))
    params = model.init(jax.random.key(0), x)

    def loss(params):
        return model.apply(params, x).sum()

    found = dots(jax.make_jaxpr(jax.grad(loss))(params))
    assert {dot.lhs.name for dot in found} >= {"float8_e4m3fn", "bfloat16"}
