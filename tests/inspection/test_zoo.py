"""Models that are right have few findings, each with a reason."""

import jax
import jax.numpy as jnp
import pytest
import zoo_float32
import zoo_linen
import zoo_nnx
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx

# What is found beside gradients that add up in 16 bits.
FOUND = {"siren": {"angles"}}  # coordinates are cast where they enter the model
FP8 = "cnn", "graph", "moe"


def loss_of(outputs):
    total = jnp.zeros(())
    for out in jax.tree.leaves(outputs):
        labels = jnp.zeros((*out.shape[:-1], 1), jnp.int32)
        likely = jax.nn.log_softmax(out.astype(jnp.float32))
        total -= jnp.take_along_axis(likely, labels, -1).mean()
    return total


def findings_in_linen(name, rules):
    module, *inputs = LINEN[name]
    model = mpjax.linen.MixedPrecision(module, rules)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, rest = _split(
            jax.eval_shape(model.init, {"params": key, "dropout": key}, *inputs)
        )

        def loss(params, rest, key, *inputs):
            variables = {"params": params} | rest
            rngs = {"dropout": key}
            return loss_of(model.apply(variables, *inputs, rngs=rngs, mutable=True)[0])

        return mpjax.lowering.census(jax.grad(loss), params, rest, key, *inputs)


def _split(variables):
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


def findings_in_nnx(name, rules):
    kind, *inputs = zoo_nnx.MODELS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = mpjax.nnx.mixed_precision(
            nnx.eval_shape(lambda: kind(nnx.Rngs(0))), rules
        )
        gradient = nnx.grad(lambda model, *inputs: loss_of(model(*inputs)))
        return mpjax.lowering.census(gradient, model, *inputs)


LINEN = zoo_linen.MODELS | zoo_float32.MODELS
FRONT_ENDS = {
    "linen": (LINEN, findings_in_linen),
    "nnx": (zoo_nnx.MODELS, findings_in_nnx),
}
CASES = [(end, name) for end, (models, _) in FRONT_ENDS.items() for name in models]


def assert_few(found, expected):
    sums = [f for f in found if f.kind == "reduction"]
    assert {f.kind for f in found} - {"reduction"} == expected, found
    assert len(sums) <= 2 and all(f.backward for f in sums), sums


@pytest.mark.parametrize(("front_end", "name"), CASES)
def test_a_model_that_is_right_has_at_most_two_sums(front_end, name):
    _, findings_in = FRONT_ENDS[front_end]
    made = findings_in(name, "mixed_bfloat16")
    assert_few(made.findings, FOUND.get(name, set()))


@pytest.mark.parametrize("name", FP8)
def test_nor_has_it_more_in_fp8_or_other_operations(name):
    rule = mpjax.Rule(".*", "mixed_float8", mpjax.current_scaling(), min_size=16)
    made = findings_in_linen(name, rule)
    assert_few(made.findings, set())
    wide = findings_in_linen(name, "mixed_bfloat16")
    assert (made.flops, len(made.products)) == (wide.flops, len(wide.products))


@pytest.mark.parametrize("name", ["gpt_mish", "ssm"])
def test_nor_in_float16(name):
    assert_few(findings_in_linen(name, "mixed_float16").findings, set())


def test_the_sines_of_a_network_of_coordinates_are_mended_by_a_rule():
    rules = findings_in_linen("siren", "mixed_bfloat16").suggested_rules()
    mended = findings_in_linen("siren", [*rules, "mixed_bfloat16"])
    assert len(rules) == 1 and mended.findings == ()
