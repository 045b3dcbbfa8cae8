"""Recipes in rules of ``mpjax.linen``: layers that multiply in fp8."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jaxprs import dots

import mpjax
import mpjax.linen
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
MATMUL = (((1,), (0,)), ((), ()))
DELAYED = mpjax.delayed_scaling(history_length=4)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rule(recipe, **kwargs):
    return mpjax.Rule(".*", "mixed_bfloat16", recipe, **kwargs)


def is_state(node):
    return isinstance(node, mpjax.ScalingState)


def scales(states):
    """What stands in place of the scales, as {path: [lhs, rhs, grad]}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(states, is_leaf=is_state)
    return {"/".join(k.key for k in path): state.scale for path, state in flat}


def loss_and_gradients(model, variables, x, **kwargs):
    """The loss, and its gradients for params and scaling states."""

    def loss_fn(params, scaling):
        collections = {"params": params} | ({"scaling": scaling} if scaling else {})
        out = model.apply(collections, x, **kwargs)
        weights = jnp.linspace(-1, 1, out.size, dtype=out.dtype).reshape(out.shape)
        return jnp.sum(out * weights)

    arguments = variables["params"], variables.get("scaling", {})
    return jax.value_and_grad(loss_fn, argnums=(0, 1))(*arguments)


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(24, 32).attend(x)


LAYERS = {
    "Dense": (nn.Dense(24), (3, 32)),
    "Dense without bias": (nn.Dense(24, use_bias=False), (32,)),
    "DenseGeneral": (nn.DenseGeneral((4, 6), axis=(-2, -1)), (3, 4, 8)),
    "DenseGeneral with batch": (nn.DenseGeneral(6, batch_dims=(0,)), (3, 5, 8)),
    "Einsum": (nn.Einsum((4, 8, 6), "bsd,ndh->bnsh"), (3, 5, 8)),
    "Einsum with dots": (nn.Einsum((8, 6), "...d,dh->...h"), (3, 5, 8)),
    "Einsum without bias": (nn.Einsum((8, 6), "...d,dh->h...", False), (3, 5, 8)),
    "Conv": (nn.Conv(12, (3, 3)), (2, 8, 8, 16)),
    "Conv circular": (nn.Conv(12, (3,), 2, "CIRCULAR", kernel_dilation=2), (8, 16)),
    "Conv in groups": (nn.Conv(12, (3,), feature_group_count=4), (2, 3, 8, 16)),
    "ConvTranspose": (nn.ConvTranspose(12, (3, 4), (2, 1)), (2, 8, 8, 16)),
    "ConvTranspose valid": (nn.ConvTranspose(12, (2,), (3,), "VALID"), (8, 16)),
    "ConvTranspose of a gradient": (
        nn.ConvTranspose(12, (3, 2), (2, 3), transpose_kernel=True, use_bias=False),
        (2, 3, 8, 5, 16),
    ),
    "ConvTranspose dilated": (
        nn.ConvTranspose(12, (3,), padding=[(2, 1)], kernel_dilation=(2,)),
        (2, 8, 16),
    ),
    "ConvTranspose padded": (nn.ConvTranspose(12, 3, (2,), 1), (2, 8, 16)),
    "ConvTranspose masked": (
        nn.ConvTranspose(12, (3,), mask=jnp.ones((3, 16, 12)).at[0].set(0)),
        (2, 8, 16),
    ),
    "attend": (Attend(), (3, 32)),
    "attention": (nn.MultiHeadDotProductAttention(4), (2, 5, 16)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    module, shape = LAYERS[request.param]
    return module, normal(0, *shape)


def test_a_recipe_that_quantizes_nothing_changes_nothing(layer):
    """The stand-ins for what a layer multiplies with are the layer's own products."""
    module, x = layer
    recipe = dataclasses.replace(mpjax.current_scaling(), quantized=())
    plain = MixedPrecision(module, "mixed_bfloat16")
    mixed = MixedPrecision(module, rule(recipe, attention=True))
    variables = plain.init(jax.random.key(1), x)
    initial = mixed.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, initial, variables)
    expected = loss_and_gradients(plain, variables, x)
    actual = loss_and_gradients(mixed, variables, x)
    # Axes of a product may come in another order, and with them those of its sums.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2**-6 * np.abs(b).max()
        ),
        actual,
        expected,
    )


@pytest.mark.parametrize("recipe", [mpjax.current_scaling(), DELAYED], ids=str)
def test_every_product_of_a_layer_has_the_formats_of_its_recipe(layer, recipe):
    module, x = layer
    model = MixedPrecision(module, rule(recipe, attention=True))
    variables = model.init(jax.random.key(1), x)
    bare = module.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], bare["params"])
    assert ("scaling" in variables) == recipe.stateful
    step = functools.partial(loss_and_gradients, model)
    found = dots(jax.make_jaxpr(step)(variables, x))
    if not any(dot.name == "conv_general_dilated" for dot in found):
        narrow = [dot[1:] for dot in found if dot.lhs.itemsize == 1]
        forward = narrow.count((E4M3, E4M3, jnp.float32))
        backward = [{dot[0], dot[1]} for dot in narrow].count({E4M3, E5M2})
        assert forward >= 1 and len(narrow) == forward + backward
        # The branch for processors without fp8 has as many, of bfloat16.
        assert len(found) == 2 * len(narrow)
    _, (grads, observed) = step(variables, x)
    exact = MixedPrecision(module, "float32")
    _, (exact_grads, _) = loss_and_gradients(exact, bare, x)
    # The thresholds for a layer; behind attention stand five products.
    attends = "query" in grads
    out = model.apply(variables, x)
    assert reference.sqnr(exact.apply(bare, x), out) > (15 if attends else 18)
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    for (path, actual), expected in zip(
        flat, jax.tree.leaves(exact_grads), strict=True
    ):
        if path[-1].key != "bias":
            assert reference.sqnr(expected, actual) > (15 if attends else 17), path
    for seen in scales(observed).values():
        assert np.all(np.isfinite(seen)) and np.all(seen > 0)


def test_dense_is_the_scaled_product():
    recipe, x = mpjax.per_channel_scaling(), normal(0, 16, 32)
    model = MixedPrecision(nn.Dense(24), rule(recipe))
    variables = model.init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"].astype(BF16)
    expected = mpjax.scaled_dot_general(x.astype(BF16), kernel, MATMUL, recipe=recipe)
    actual = model.apply(variables, x)
    np.testing.assert_array_equal(actual, expected.astype(jnp.float32))


def test_small_products_stay_in_the_compute_dtype():
    model = MixedPrecision(
        nn.Sequential([nn.Dense(32), nn.Dense(8), nn.Dense(32)]),
        rule(mpjax.current_scaling(), min_size=16),
    )
    x = normal(0, 4, 16)
    variables = model.init(jax.random.key(0), x)
    found = dots(jax.make_jaxpr(model.apply)(variables, x))
    assert [dot.lhs for dot in found] == [BF16, E4M3, BF16, BF16]
    table = mpjax.linen.tabulate(model, jax.random.key(0), x)
    served = [line.split()[0] for line in table.splitlines() if "current" in line]
    assert served == ["layers_0"]


def test_attention_products_have_a_switch_of_their_own():
    attention, x = nn.MultiHeadDotProductAttention(4), normal(0, 2, 5, 16)
    numbers = []
    for rules in (
        rule(DELAYED),
        [
            mpjax.Rule(
                ".*",
                "mixed_bfloat16",
                DELAYED,
                module_type=nn.MultiHeadDotProductAttention,
                attention=True,
            ),
            "mixed_bfloat16",
        ],
    ):
        model = MixedPrecision(attention, rules)
        variables = model.init(jax.random.key(0), x)
        numbers.append(set(scales(variables["scaling"])))
    assert numbers[0] == {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    assert numbers[1] == {"query_key", "weights_value"}


# -------------------------------------------------------------------------- refusals


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


@pytest.mark.parametrize(
    ("module", "rules", "match"),
    [
        (nn.ConvLocal(4, (3,)), rule(mpjax.current_scaling()), "ConvLocal"),
        (nn.Conv(4, (3,)), rule(mpjax.mx_scaling()), "cannot be scaled by block"),
        (
            nn.ConvTranspose(4, (3,), padding="CIRCULAR"),
            rule(mpjax.current_scaling()),
            "circular padding",
        ),
        (
            nn.Dense(4, dot_general=lambda *args, **kwargs: None),
            rule(mpjax.current_scaling()),
            "dot_general of its own",
        ),
        (
            nn.MultiHeadDotProductAttention(
                2, out_dot_general_cls=lambda: jax.lax.dot_general
            ),
            rule(mpjax.current_scaling()),
            "'out' .*dot_general of its own",
        ),
        (
            nn.MultiHeadDotProductAttention(2, attention_fn=lambda *qkv, **_: qkv[2]),
            rule(mpjax.current_scaling(), attention=True),
            r"Module '' .* has an attention_fn of its own.*Leave attention=True out",
        ),
        (nn.LayerNorm(), "mixed_float8", None),
        (
            nn.Dense(16),
            mpjax.Rule(".*", "mixed_float8"),
            r"serves no product.*\(Dense\).*min_size=128",
        ),
        (Scanned(), rule(DELAYED), "variable_axes={'params': 0, 'scaling': 0}"),
        (
            nn.Einsum((8, 8), "...d,...d->...d"),
            rule(mpjax.current_scaling()),
            "indices",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_path(module, rules, match):
    x = jnp.ones((2, 8, 8)) if not isinstance(module, Scanned) else jnp.ones((2, 16))
    model = MixedPrecision(module, rules)
    if match is None:
        model.init(jax.random.key(0), x)
        return
    with pytest.raises(ValueError, match=match):
        model.init(jax.random.key(0), x)


def test_a_state_that_was_forgotten_is_asked_for():
    model, x = MixedPrecision(nn.Dense(16), rule(DELAYED)), normal(0, 4, 8)
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="finds no state\\. Give apply the collection"):
        model.apply({"params": params}, x)


# ------------------------------------------------------------------- delayed scaling


class Twice(nn.Module):
    """A layer that is called twice."""

    lift: str = ""

    @nn.compact
    def __call__(self, x):
        kind = {"": nn.Dense, "remat": nn.remat(nn.Dense), "jit": nn.jit(nn.Dense)}
        dense = kind[self.lift](16, use_bias=False, name="dense")
        return dense(4 * dense(x))


@pytest.mark.parametrize("lift", ["", "remat", "jit"])
def test_a_layer_called_twice_observes_the_maximum(lift):
    x = normal(0, 4, 16)
    model = MixedPrecision(Twice(lift), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    _, (_, observed) = jax.jit(functools.partial(loss_and_gradients, model))(
        variables, x
    )
    (seen,) = scales(observed).values()
    kernel = variables["params"]["dense"]["kernel"].astype(BF16)
    assert seen[1] == float(jnp.abs(kernel).max())

    def second(x):
        return 4 * mpjax.scaled_dot_general(
            x.astype(BF16), kernel, MATMUL, recipe=mpjax.current_scaling()
        )

    inputs = jnp.abs(x.astype(BF16)).max(), jnp.abs(second(x)).max()
    assert seen[0] == max(map(float, inputs))


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
    model = MixedPrecision(Scanned(("params", "scaling")), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    assert variables["scaling"]["dense"]["kernel"].history.shape == (3, 3, 4)
    step = jax.jit(functools.partial(loss_and_gradients, model))
    _, (_, observed) = step(variables, x)
    kernels = variables["params"]["dense"]["kernel"].astype(BF16)
    seen = observed["dense"]["kernel"].scale
    np.testing.assert_array_equal(seen[:, 1], jnp.abs(kernels).max((1, 2)))
    states = mpjax.update_scaling(variables["scaling"], observed)
    assert states["dense"]["kernel"].scale.shape == (3, 3)


class Again(nn.Module):
    """One layer in all steps of a loop, which broadcasts its states or carries them."""

    carries: bool

    @nn.compact
    def __call__(self, x):
        def step(dense, x, _):
            return dense(x), None

        lift = {"variable_broadcast": ["params", "scaling"]}
        if self.carries and not self.is_initializing():
            lift = {"variable_broadcast": "params", "variable_carry": "scaling"}
        loop = nn.scan(step, split_rngs={"params": False}, length=4, **lift)
        dense = nn.Dense(x.shape[-1], use_bias=False, name="dense")
        return loop(dense, x, None)[0]


@pytest.mark.parametrize("carries", [False, True])
def test_steps_that_share_a_layer_observe_a_sum_unless_states_are_carried(carries):
    model, x = MixedPrecision(Again(carries), rule(DELAYED)), normal(0, 4, 16)
    variables = model.init(jax.random.key(0), x)
    kernel = variables["params"]["dense"]["kernel"].astype(BF16)
    _, rhs, _ = observe(model, variables, x)
    np.testing.assert_array_equal(rhs, (1 if carries else 4) * jnp.abs(kernel).max())


@jax.numpy_dtype_promotion("standard")  # the cell mixes dtypes
def test_the_steps_of_a_recurrent_cell_observe_the_maximum():
    x = jnp.concatenate([normal(0, 2, 6, 16), 50 * normal(1, 2, 1, 16)], 1)
    model = MixedPrecision(nn.RNN(nn.GRUCell(16)), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    _, (_, observed) = jax.jit(functools.partial(loss_and_gradients, model))(
        variables, x
    )
    seen = scales(observed)
    assert len(seen) == 6
    kernels = variables["params"]["cell"]
    for path, (lhs, rhs, grad) in seen.items():
        gate = path.split("/")[-2]
        assert rhs == float(jnp.abs(kernels[gate]["kernel"].astype(BF16)).max())
        if gate.startswith("i"):
            assert lhs == float(jnp.abs(x.astype(BF16)).max())
        assert np.isfinite(grad)


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
    assert set(scaling["norm"]) == {"inner/dense/kernel"}

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


def test_microbatches_observe_what_one_batch_does():
    x = normal(0, 8, 16)
    model = MixedPrecision(nn.Dense(16), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def observe(x):
        def loss_fn(scaling):
            out = model.apply({"params": variables["params"], "scaling": scaling}, x)
            return jnp.sum(out**3)

        return jax.grad(loss_fn)(variables["scaling"])

    merged = jax.tree.map(jnp.maximum, observe(x[:4]), observe(x[4:]))
    jax.tree.map(np.testing.assert_array_equal, merged, observe(x))


EXACT = mpjax.delayed_scaling(history_length=4, rounding="up")


def integers(seed, *shape):
    """Small enough to be exact in every format that is scaled by powers of two."""
    return jax.random.randint(jax.random.key(seed), shape, -4, 5).astype(jnp.float32)


def accumulate(tx, batches, factors=None):
    """Updates and states of an optimizer step by step, of a layer that never moves."""
    model = MixedPrecision(nn.Dense(8, use_bias=False), rule(EXACT))
    params, weigh = {"kernel": integers(9, 16, 8)}, integers(8, 1, 8)
    scaling = model.init(jax.random.key(0), batches[0])["scaling"]

    @jax.jit
    def step(scaling, opt_state, x, factor):
        def loss_fn(params, scaling):
            out = model.apply({"params": params, "scaling": scaling}, x)
            return jnp.sum(out.astype(jnp.float32) * weigh * factor)

        take = functools.partial(mpjax.value_and_grad, opt_state=opt_state)
        take = take if is_scaled else jax.value_and_grad
        _, (grads, observed) = take(loss_fn, argnums=(0, 1))(params, scaling)
        updates, opt_state = tx.update(grads, opt_state, params)
        told = opt_state if is_scaled or is_multi else None
        return updates, mpjax.update_scaling(scaling, observed, told), opt_state

    opt_state, seen = tx.init(params), []
    is_scaled = isinstance(opt_state, mpjax.LossScalingState)
    is_multi = isinstance(opt_state, optax.MultiStepsState)
    for x, factor in zip(batches, factors or [1.0] * len(batches), strict=True):
        updates, scaling, opt_state = step(scaling, opt_state, x, jnp.float32(factor))
        seen.append((updates["kernel"], scaling["kernel"]))
    return seen


def assert_same_step(actual, expected):
    """That the next step of microbatches is that after one large batch."""
    (updates, state), (large_updates, large) = actual, expected
    np.testing.assert_array_equal(updates, large_updates)
    np.testing.assert_array_equal(state.scale, large.scale)
    np.testing.assert_array_equal(state.loss_scale, large.loss_scale)
    # The last entry of the history is that of the step that begins.
    np.testing.assert_array_equal(state.history[:, :-1], large.history[:, 1:])
    assert not np.any(state.history[:, -1])


@pytest.mark.parametrize("is_scaled", [False, True])
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_multi_steps_enter_what_one_large_batch_does(is_scaled):
    def scaled(inner):
        return mpjax.static_loss_scaling(inner, 64.0) if is_scaled else inner

    sizes = (1.0, 8.0, 0.5, 2.0, 1.0, 0.25)
    batches = [size * integers(i, 8, 16) for i, size in enumerate(sizes)]
    parts = [part for x in batches for part in (x[:2], x[2:4], x[4:6], x[6:])]
    many = optax.MultiSteps(optax.sgd(1.0), 4, use_grad_mean=False)
    many = optax.GradientTransformation(many.init, many.update)
    one = optax.MultiSteps(optax.sgd(1.0), 1)  # which has a single microbatch
    one = optax.GradientTransformation(one.init, one.update)
    large = accumulate(scaled(optax.sgd(1.0)), batches)
    small = accumulate(scaled(many), parts)
    for step, expected in enumerate(large):
        *before, done = small[4 * step : 4 * step + 4]
        assert_same_step(done, expected)
        last = large[step - 1][1].scale if step else np.zeros(3)
        for updates, state in before:
            assert not np.any(updates)
            np.testing.assert_array_equal(state.scale, last)
    for actual, expected in zip(accumulate(scaled(one), batches), large, strict=True):
        assert_same_step(actual, expected)


@jax.numpy_dtype_promotion("standard")
def test_a_microbatch_that_is_skipped_is_not_entered():
    many = optax.MultiSteps(optax.sgd(1.0), 2, use_grad_mean=False)
    tx = mpjax.dynamic_loss_scaling(
        optax.GradientTransformation(many.init, many.update), init_scale=64.0
    )
    x = integers(0, 8, 16)
    seen = accumulate(tx, [x, 64 * x, 2 * x, x], [1.0, 1e37, 1.0, 1.0])
    entries = [state.history for _, state in seen]
    top = float(jnp.abs(x).max())
    assert [float(h[0, -1]) for h in entries] == [top, top, 0, top]
    assert float(entries[2][0, -2]) == 2 * top
    # The gradient is that of the unscaled loss, whatever the scale became in between.
    assert [float(state.loss_scale) for _, state in seen] == [64, 32, 32, 32]
    grad = [float(h[2].max()) for h in entries]
    assert grad == grad[:1] * 4
    np.testing.assert_array_equal(seen[2][1].scale[2], grad[0] * 32 / 2**15)


@jax.numpy_dtype_promotion("standard")
def test_a_microbatch_that_optax_skips_is_not_entered():
    """Neither as the first of a step nor as a later one, though all is finite."""
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=1e12)
    many = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=skip)
    tx = optax.GradientTransformation(many.init, many.update)
    x, large = integers(0, 8, 16), 64 * integers(0, 8, 16)
    batches, factors = [large, x, large, 2 * x], [1e6, 1.0, 1e6, 1.0]
    states = [state for _, state in accumulate(tx, batches, factors)]
    expected = [state for _, state in accumulate(tx, [x, 2 * x])]
    assert not np.any(states[0].history) and not np.any(states[0].scale)
    for state, other in zip(states[1:], [expected[i] for i in (0, 0, 1)], strict=True):
        np.testing.assert_array_equal(state.history, other.history)
        np.testing.assert_array_equal(state.scale, other.scale)


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

    seen = jax.grad(loss_fn)(variables["scaling"])["kernel"].scale
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


class Overflow(nn.Module):
    """Its output, and the gradient of its kernel, can be made to overflow."""

    @nn.compact
    def __call__(self, x, factor):
        out = nn.Dense(16, use_bias=False)(x)
        return out.astype(jnp.float32) * factor.astype(jnp.float32)


def make_step(model, tx, traces=None):
    @jax.jit
    def step(params, scaling, opt_state, x, factor):
        if traces is not None:
            traces.append(1)

        def loss_fn(params, scaling):
            out = model.apply({"params": params, "scaling": scaling}, x, factor)
            return jnp.mean(out**2)

        (_, (grads, observed)) = mpjax.value_and_grad(
            loss_fn, opt_state, argnums=(0, 1)
        )(params, scaling)
        updates, opt_state = tx.update(grads, opt_state, params)
        scaling = mpjax.update_scaling(scaling, observed, opt_state)
        return optax.apply_updates(params, updates), scaling, opt_state, observed

    return step


def test_loss_scaling_and_delayed_scaling_together():
    """PEERS 1 and 4: neither divides, poisons nor saturates the other's numbers."""
    x = normal(0, 4, 16)
    fp16 = mpjax.Rule(".*", "mixed_float16", DELAYED)
    model = MixedPrecision(Overflow(), fp16)
    tx = mpjax.dynamic_loss_scaling(
        optax.sgd(0.0), init_scale=2.0**4, growth_interval=2
    )
    variables = model.init(jax.random.key(0), x, jnp.float32(1))
    params, scaling = variables["params"], variables["scaling"]
    opt_state, traces = tx.init(params), []
    step = make_step(model, tx, traces)

    def state():
        return scaling["Dense_0"]["kernel"]

    history = []
    for factor in (1.0, 1.0, 1.0, 1e30, 1.0, 1.0, 1.0):
        before, loss_scale = state(), mpjax.loss_scale(opt_state)
        params, scaling, opt_state, observed = step(
            params, scaling, opt_state, x, jnp.float32(factor)
        )
        assert state().loss_scale == mpjax.loss_scale(opt_state)
        if factor == 1e30:
            assert not mpjax.last_step_finite(opt_state)
            assert np.isinf(observed["Dense_0"]["kernel"].scale[2])
            np.testing.assert_array_equal(state().history, before.history)
        elif before.loss_scale > 0:
            # What the history remembers is the gradient of the unscaled loss.
            seen = observed["Dense_0"]["kernel"].scale[2] / loss_scale
            history.append(float(state().history[2, -1]))
            assert history[-1] == seen
            # The scale of the next step maps it below the top of the format.
            up = 2.0 ** np.ceil(np.log2(max(history[-4:]) / 57344))
            assert state().scale[2] == up * state().loss_scale
    # Loss scales were 16 (unknown), 16, 32, 32 (skipped), 16, 16, 32.
    np.testing.assert_allclose(history, history[0], rtol=2e-3)
    assert len(history) == 5 and len(traces) == 1


def test_training_can_be_resumed_bit_for_bit():
    x = normal(0, 8, 16)
    model = MixedPrecision(Overflow(), rule(DELAYED))
    tx = mpjax.dynamic_loss_scaling(optax.sgd(1e-2, momentum=0.9), growth_interval=2)
    variables = model.init(jax.random.key(0), x, jnp.float32(1))
    step = make_step(model, tx)
    carry = variables["params"], variables["scaling"], tx.init(variables["params"])
    for _ in range(3):
        carry = step(*carry, x, jnp.float32(1))[:3]
    leaves, structure = jax.tree.flatten(carry)
    saved = structure.unflatten([np.array(leaf) for leaf in leaves])
    for _ in range(3):
        carry = step(*carry, x, jnp.float32(1))[:3]
        saved = step(*saved, x, jnp.float32(1))[:3]
    jax.tree.map(np.testing.assert_array_equal, carry, saved)


def test_update_scaling_wants_the_gradient_of_the_states():
    model, x = MixedPrecision(nn.Dense(16), rule(DELAYED)), normal(0, 4, 8)
    variables = model.init(jax.random.key(0), x)
    states = {"a": variables["scaling"]}
    state = states["a"]["kernel"]
    other = DELAYED.fnuz().init()
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for observed, wrong in (
        ({"a": variables["params"]}, "'a/kernel' is a ArrayImpl for a ScalingState"),
        ({"a": {}}, "'a/kernel' is only in states"),
        ({"a": {"kernel": state, "other": state}}, "'a/other' is only in observed"),
        ({"a": {"kernel": stack}}, r"'a/kernel' has scales \(2, 3\) for \(3,\)"),
        ({"a": {"kernel": other}}, "'a/kernel' is of a recipe delayed e4m3fnuz/.* for"),
    ):
        with pytest.raises(ValueError, match="structure; got one in which") as error:
            mpjax.update_scaling(states, observed)
        assert error.match(wrong) and len(str(error.value)) < 250
    with pytest.raises(ValueError, match="loss scale"):
        mpjax.update_scaling(variables["scaling"], variables["scaling"], ())


def test_without_updates_scaling_is_current():
    """Also where states are trained, by mistake, as parameters are."""
    x = normal(0, 4, 16)
    model = MixedPrecision(nn.Dense(16), rule(DELAYED))
    current = MixedPrecision(nn.Dense(16), rule(mpjax.current_scaling()))
    variables = model.init(jax.random.key(0), x)
    params = {"params": variables["params"]}
    observed = loss_and_gradients(model, variables, x)[1][1]
    tx = optax.sgd(1e-3)
    moved, _ = tx.update(observed, tx.init(variables["scaling"]))
    trained = optax.apply_updates(variables["scaling"], moved)
    for scaling in (variables["scaling"], trained):
        for factor in (1, 30):
            variables = params | {"scaling": scaling}
            loss, (grads, _) = loss_and_gradients(model, variables, factor * x)
            expected, (other, _) = loss_and_gradients(current, params, factor * x)
            assert loss == expected
            jax.tree.map(np.testing.assert_array_equal, grads, other)


def test_an_update_with_nothing_observed_changes_no_scale():
    x = normal(0, 4, 16)
    model = MixedPrecision(nn.Dense(16), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    observed = loss_and_gradients(model, variables, x)[1][1]
    states = mpjax.update_scaling(variables["scaling"], observed)
    nothing = jax.tree.map(jnp.zeros_like, observed)
    for _ in range(6):  # longer than the history
        later = mpjax.update_scaling(states, nothing)
        np.testing.assert_array_equal(later["kernel"].scale, states["kernel"].scale)
        states = later


def test_a_loss_scale_that_changes_beside_the_optimizer():
    """Of restored states, say: the next gradients neither saturate nor vanish."""
    x = normal(0, 4, 16)
    model = MixedPrecision(nn.Dense(16), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    params, scaling = variables["params"], variables["scaling"]

    def gradients(scaling, scale):
        opt_state = mpjax.static_loss_scaling(optax.sgd(0.0), scale).init(params)
        _, grads = mpjax.value_and_grad(
            lambda params, scaling: jnp.mean(
                model.apply({"params": params, "scaling": scaling}, x) ** 2
            ),
            opt_state,
            argnums=(0, 1),
        )(params, scaling)
        return *grads, opt_state

    _, observed, opt_state = gradients(scaling, 2.0)
    scaling = mpjax.update_scaling(scaling, observed, opt_state)
    expected, _, _ = gradients(scaling, 2.0)
    _, _, opt_state = gradients(scaling, 2.0**12)
    actual, _, _ = gradients(mpjax.rescale_scaling(scaling, opt_state), 2.0**12)
    saturated, _, _ = gradients(scaling, 2.0**12)
    np.testing.assert_array_equal(actual["kernel"] / 2**11, expected["kernel"])
    # Each has an array of its own: a train step may be given them and opt_state.
    rescaled = mpjax.rescale_scaling({"a": scaling, "b": scaling}, opt_state)
    arrays = [rescaled[name]["kernel"].loss_scale for name in "ab"]
    arrays.append(mpjax.loss_scale(opt_state))
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == 3
    assert np.abs(saturated["kernel"]).max() < np.abs(actual["kernel"]).max() / 100
    with pytest.raises(ValueError, match="no loss scale"):
        mpjax.rescale_scaling(scaling, optax.sgd(0.1).init(params))


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_an_overflow_in_one_step_is_over_in_the_next(bad):
    """PEERS 4: one bad step neither freezes the scale nor hides from the check."""
    x = normal(0, 4, 16)
    model = MixedPrecision(Overflow(), rule(mpjax.delayed_scaling(history_length=1024)))
    variables = model.init(jax.random.key(0), x, jnp.float32(1))
    tx = mpjax.static_loss_scaling(optax.sgd(0.0), 1.0)
    params, scaling = variables["params"], variables["scaling"]
    step, opt_state = make_step(model, tx), tx.init(params)
    seen = []
    for factor in (1.0, 1.0, 1.0, bad, 1.0):
        params, scaling, opt_state, _ = step(
            params, scaling, opt_state, x, jnp.float32(factor)
        )
        seen.append(scaling["Dense_0"]["kernel"].scale)
        assert mpjax.last_step_finite(opt_state) == np.isfinite(factor)
    np.testing.assert_array_equal(seen[2], seen[3])
    np.testing.assert_array_equal(seen[2], seen[4])


def test_a_recipe_belongs_to_a_model_and_not_to_the_process():
    """PEERS 8 and 10: models of the same shapes, interleaved, each run as told."""
    x = normal(0, 16, 32)
    rules = {
        "current": rule(mpjax.current_scaling(rounding="exact")),
        "mx": rule(mpjax.mx_scaling()),
        "none": "mixed_bfloat16",
    }
    dense = nn.jit(nn.Dense)(24)
    variables = dense.init(jax.random.key(0), x)
    models = {name: MixedPrecision(dense, r) for name, r in rules.items()}

    def run(name):
        return jax.jit(models[name].apply)(variables, x)

    alone = {}
    for name in models:
        jax.clear_caches()
        alone[name] = run(name)
    jax.clear_caches()
    for name in ("none", "current", "mx", "current", "none", "mx"):
        np.testing.assert_array_equal(run(name), alone[name])
    assert len({float(out.sum()) for out in alone.values()}) == 3


def test_arguments_may_stay_as_they_are():
    class Time(nn.Module):
        @nn.compact
        def __call__(self, x, time):
            assert time.dtype == jnp.float32
            return nn.Dense(8)(x) + jnp.sin(1e3 * time)[:, None].astype(BF16)

    x, time = normal(0, 4, 8), jnp.linspace(0.001, 1.0, 4)
    rules = mpjax.Rule(".*", "mixed_bfloat16", cast_inputs=False)
    model = MixedPrecision(Time(), rules)
    variables = model.init(jax.random.key(0), x, time)
    found = dots(jax.make_jaxpr(model.apply)(variables, x, time))
    assert [(dot.lhs, dot.rhs) for dot in found] == [(BF16, BF16)]


class Nested(nn.Module):
    """Layers within every transformation of Linen, and products that are its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.jit(nn.Dense)(16, name="jit")(x)
        x = nn.remat(nn.Dense)(16, name="remat")(x)
        dense = nn.Dense(16, name="cond")
        x = nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(2 * x), dense, x)
        x, _ = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )(nn.Dense(16, name="scan"), x, None)
        integers = jnp.ones((16, 16), jnp.int8)
        counts = jax.lax.dot(integers, integers, preferred_element_type=jnp.int32)
        return x + counts.sum().astype(x.dtype)


def test_layers_within_transformations_are_served_and_integers_are_left_alone():
    """PEERS 7."""
    x = normal(0, 4, 16)
    model = MixedPrecision(Nested(), rule(mpjax.current_scaling()))
    variables = model.init(jax.random.key(0), x)
    found = dots(jax.make_jaxpr(model.apply)(variables, x))
    narrow = [dot for dot in found if dot.lhs == dot.rhs == E4M3]
    integers = [dot for dot in found if dot.lhs == jnp.int8]
    emulated = [dot for dot in found if dot.lhs == dot.rhs == BF16]
    assert len(narrow) == len(emulated) == 5  # nn.cond has two branches
    assert len(integers) == 1 and integers[0].out == jnp.int32
    assert len(found) == 11
    assert {dot.out for dot in narrow} == {jnp.dtype(jnp.float32)}


def test_a_remat_policy_of_the_users_keeps_the_8_bit_copies():
    """PEERS 10: no policy of the library's own is needed to see its products."""
    x = normal(0, 64, 64)
    policy = jax.checkpoint_policies.save_only_these_names("mpjax_quantized")
    kinds = {
        name: nn.remat(nn.Dense, policy=p) for name, p in (("", None), ("q", policy))
    }
    counts = {}
    for name, kind in kinds.items():
        model = MixedPrecision(kind(64), rule(mpjax.current_scaling()))
        variables = model.init(jax.random.key(0), x)
        step = functools.partial(loss_and_gradients, model)
        text = str(jax.make_jaxpr(step)(variables, x))
        counts[name] = text.count("reduce_max")
    assert counts["q"] < counts[""]  # amaxes are not taken again


class TiedByHand(nn.Module):
    """As transformers ties its heads: the layer is applied to variables by itself."""

    def setup(self):
        self.wte = nn.Embed(24, 16)
        self.up = nn.Dense(16)
        self.lm_head = nn.Dense(24, use_bias=False)

    def __call__(self, tokens):
        hidden = self.up(self.wte(tokens))
        table = self.variables["params"]["wte"]["embedding"]
        return self.lm_head.apply({"params": {"kernel": table.T}}, hidden)


@pytest.mark.parametrize("recipe", [mpjax.current_scaling(), DELAYED], ids=str)
def test_a_layer_that_a_model_applies_by_itself_has_its_path(recipe):
    tokens = jnp.zeros((1, 8), jnp.int32)
    rules = mpjax.Rule(".*", "mixed_float8", recipe, min_size=16)
    model = MixedPrecision(TiedByHand(), rules)
    variables = model.init(jax.random.key(0), tokens)
    table = mpjax.linen.tabulate(model, jax.random.key(0), tokens)
    rows = {line.split()[0]: line for line in table.splitlines() if "Dense" in line}
    assert set(rows) == {"up", "lm_head"}
    assert str(recipe) in rows["up"] and str(recipe) not in rows["lm_head"]
    found = dots(jax.make_jaxpr(model.apply)(variables, tokens))
    assert [dot.lhs for dot in found] == [BF16, E4M3, BF16]
    alone = [mpjax.Rule("lm_head", "float32"), rules]
    out = MixedPrecision(TiedByHand(), alone)
    found = dots(jax.make_jaxpr(out.apply)(variables, tokens))
    assert found[-1].lhs == jnp.float32


@pytest.mark.parametrize("layer", [nn.Dense(16), nn.Conv(16, (3,))])
def test_a_second_derivative_is_refused(layer):
    x = normal(0, 4, 16)
    model = MixedPrecision(layer, rule(mpjax.current_scaling()))
    variables = model.init(jax.random.key(0), x)

    def loss_fn(x):
        return model.apply(variables, x).sum()

    def penalty(x):
        return jnp.sum(jax.grad(loss_fn)(x) ** 2)

    jax.jit(jax.grad(jax.checkpoint(loss_fn)))(x)
    for second in (jax.grad(penalty), jax.hessian(loss_fn)):
        with pytest.raises(TypeError, match="differentiated once"):
            second(x)


def test_a_state_of_another_recipe_is_refused():
    x = normal(0, 4, 16)
    variables = MixedPrecision(nn.Dense(16), rule(DELAYED)).init(jax.random.key(0), x)
    other = MixedPrecision(nn.Dense(16), rule(DELAYED.fnuz()))
    with pytest.raises(ValueError, match="The scaling state of module '' is one of"):
        other.apply(variables, x)
    calibrated = dataclasses.replace(DELAYED, calibrated=True)
    MixedPrecision(nn.Dense(16), rule(calibrated)).apply(variables, x)


def test_what_a_step_observed_knows_its_loss_scale():
    """Whatever becomes of the loss scale between steps, the history is right."""
    x = normal(0, 4, 16)
    model = MixedPrecision(nn.Dense(16), rule(DELAYED))
    variables = model.init(jax.random.key(0), x)
    params, scaling = variables["params"], variables["scaling"]
    amaxes = []
    for scale in (2.0**6, 2.0**14, 2.0**-3):
        tx = mpjax.static_loss_scaling(optax.sgd(0.0), scale)
        opt_state = tx.init(params)

        def loss_fn(params, scaling):
            return model.apply({"params": params, "scaling": scaling}, x).mean()

        _, (grads, observed) = mpjax.value_and_grad(loss_fn, opt_state, argnums=(0, 1))(
            params, scaling
        )
        _, opt_state = tx.update(grads, opt_state, params)
        told = mpjax.update_scaling(scaling, observed, opt_state)
        forgot = mpjax.update_scaling(scaling, observed)
        jax.tree.map(np.testing.assert_array_equal, told, forgot)
        scaling = told
        amaxes.append(float(scaling["kernel"].history[2, -1]))
    np.testing.assert_allclose(amaxes, amaxes[0], rtol=1e-2)
    assert amaxes[0] > 0


def test_models_of_other_layers_are_checked_for_themselves():
    """Also of one class, which the layers are given to."""
    rule = mpjax.Rule(".*", "mixed_bfloat16", mpjax.current_scaling())
    served = mpjax.linen.MixedPrecision(nn.Sequential([nn.Dense(8)]), rule)
    served.init(jax.random.key(0), jnp.ones((2, 8)))
    other = mpjax.linen.MixedPrecision(nn.Sequential([nn.PReLU()]), rule)
    with pytest.raises(ValueError, match="serves no product"):
        other.init(jax.random.key(0), jnp.ones((2, 8)))


class Modes(nn.Module):
    """Attributes are dicts; the keys of one have no order."""

    layers: Mapping[str, nn.Module]
    rates: Mapping[object, float]

    def __call__(self, x):
        return self.layers["only"](x)


def test_layers_in_dicts_are_told_apart_and_keys_need_no_order():
    def init(layer):
        modes = Modes({"only": layer}, {int: 0.1, None: 0.2, 3: 0.3})
        model = MixedPrecision(modes, rule(mpjax.current_scaling()))
        model.init(jax.random.key(0), jnp.ones((2, 8)))

    init(nn.Dense(8))
    with pytest.raises(ValueError, match="serves no product"):
        init(nn.PReLU())
