"""Recipes in rules of ``mpjax.linen``: layers that multiply in fp8."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from front_ends import BF16, CURRENT, DELAYED, LinenTrainer, rule, scales
from helpers import normal
from jaxprs import dots

import mpjax
import mpjax.linen
from mpjax.linen import MixedPrecision

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
MATMUL = (((1,), (0,)), ((), ()))


def test_dense_is_the_scaled_product():
    recipe, x = mpjax.per_channel_scaling(), normal(0, 16, 32)
    model = MixedPrecision(nn.Dense(24), rule(recipe))
    variables = model.init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"].astype(BF16)
    expected = mpjax.scaled_dot_general(x.astype(BF16), kernel, MATMUL, recipe=recipe)
    actual = model.apply(variables, x)
    np.testing.assert_array_equal(actual, expected.astype(jnp.float32))


def test_tabulate_shows_recipes_where_they_are_used():
    model = MixedPrecision(
        nn.Sequential([nn.Dense(32), nn.Dense(8), nn.Dense(32)]),
        rule(CURRENT, min_size=16),
    )
    x = normal(0, 4, 16)
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


@pytest.mark.parametrize(
    ("module", "rules", "match"),
    [
        (nn.ConvLocal(4, (3,)), rule(CURRENT), "ConvLocal"),
        (
            nn.ConvTranspose(4, (3,), padding="CIRCULAR"),
            rule(CURRENT),
            "circular padding",
        ),
        (
            nn.Dense(4, dot_general=lambda *args, **kwargs: None),
            rule(CURRENT),
            "dot_general of its own",
        ),
        (
            nn.MultiHeadDotProductAttention(
                2, out_dot_general_cls=lambda: jax.lax.dot_general
            ),
            rule(CURRENT),
            "'out' .*dot_general of its own",
        ),
        (
            nn.MultiHeadDotProductAttention(2, attention_fn=lambda *qkv, **_: qkv[2]),
            rule(CURRENT, attention=True),
            r"Module '' .* has an attention_fn of its own.*Leave attention=True out",
        ),
        (
            nn.Einsum((8, 8), "...d,...d->...d"),
            rule(CURRENT),
            "indices",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_path(module, rules, match):
    model = MixedPrecision(module, rules)
    with pytest.raises(ValueError, match=match):
        model.init(jax.random.key(0), jnp.ones((2, 8, 8)))


def test_a_recipe_belongs_to_a_model_and_not_to_the_process():
    """Models of the same shapes, interleaved, run each under its own recipe."""
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
    """In ``nn.jit``, ``nn.remat``, ``nn.cond`` and ``nn.scan``."""
    x = normal(0, 4, 16)
    model = MixedPrecision(Nested(), rule(CURRENT))
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
    """No policy of the library's own is needed to see its products."""
    x = normal(0, 64, 64)
    policy = jax.checkpoint_policies.save_only_these_names("mpjax_quantized")
    kinds = {
        name: nn.remat(nn.Dense, policy=p) for name, p in (("", None), ("q", policy))
    }
    counts = {}
    for name, kind in kinds.items():
        text = str(LinenTrainer(kind(64), rule(CURRENT), x).trace_gradients(x))
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


@pytest.mark.parametrize("recipe", [CURRENT, DELAYED], ids=str)
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


def test_models_of_other_layers_are_checked_for_themselves():
    """Also of one class, which the layers are given to."""
    rule = mpjax.Rule(".*", "mixed_bfloat16", CURRENT)
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
        model = MixedPrecision(modes, rule(CURRENT))
        model.init(jax.random.key(0), jnp.ones((2, 8)))

    init(nn.Dense(8))
    with pytest.raises(ValueError, match="serves no product"):
        init(nn.PReLU())
