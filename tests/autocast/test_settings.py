"""Rules, levels, and what they refuse."""

import jax
import jax.numpy as jnp
import pytest
from jaxprs import dots, equations

import mpjax

X, W = jnp.ones((4, 8)), jnp.full((8, 8), 0.1)


def mlp(x, w):
    with jax.named_scope("net"):
        with jax.named_scope("up"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("down"):
            return jnp.exp(x @ w) + x


def traced(fn=mlp, *args, **options):
    return jax.make_jaxpr(mpjax.autocast(fn, **options))(*(args or (X, W)))


def products(**options):
    return [dot.lhs.name for dot in dots(traced(**options))]


def results(name, jaxpr):
    found = (e for e in equations(jaxpr) if e.primitive.name == name)
    return [eqn.outvars[0].aval.dtype.name for eqn in found]


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        (mpjax.Rule("net/up"), ["float32", "bfloat16"]),
        (mpjax.Rule("net/up", "float32"), ["float32", "bfloat16"]),
        (mpjax.Rule("net/up", "c=f16"), ["float16", "bfloat16"]),
        ([mpjax.Rule("net/up", "c=f16"), mpjax.Rule()], ["float16", "float32"]),
        ([mpjax.Rule(), mpjax.Rule("x", optional=True)], ["float32", "float32"]),
        (mpjax.Rule("net/.*", "mixed_float16"), ["float16", "float16"]),
        (mpjax.Rule(primitive="dot_general"), ["float32", "float32"]),
        (mpjax.Rule(".*/down", primitive="dot_.*"), ["bfloat16", "float32"]),
    ],
)
def test_the_first_rule_that_matches_decides(rules, wanted):
    assert products(rules=rules) == wanted


def test_a_rule_by_primitive_decides_for_any_category():
    jaxpr = traced(rules=[mpjax.Rule(primitive="tanh", policy="float32")])
    assert results("tanh", jaxpr) == ["float32"]
    jaxpr = traced(rules=[mpjax.Rule(primitive="exp|add", policy="c=bf16")])
    assert results("exp", jaxpr) == results("add", jaxpr) == ["bfloat16"]


def test_paths_go_through_programs():
    @jax.jit
    def inner(x, w):
        with jax.named_scope("inner"):
            return x @ w

    def fn(x, w):
        def step(x, _):
            with jax.named_scope("step"):
                return inner(x, w), None

        with jax.named_scope("loop"):
            return jax.lax.scan(step, x, None, length=2)[0] + inner(x, w)

    rules = mpjax.Rule("loop/step/inner", "float32")
    names = [dot.lhs.name for dot in dots(traced(fn, rules=rules))]
    assert names == ["float32", "bfloat16"]


def test_the_path_of_a_backward_pass_is_that_of_the_forward_pass():
    def gradient(x, w):
        return jax.grad(lambda w: mlp(x, w).sum())(w)

    rules = mpjax.Rule("net/up", "float32")
    jaxpr = traced(gradient, rules=rules)
    assert sorted(d.lhs.name for d in dots(jaxpr)) == ["bfloat16"] * 3 + ["float32"] * 2


@pytest.mark.parametrize(
    ("level", "wanted"),
    [
        ("O0", ("float32", "float32", "float32")),
        ("O1", ("bfloat16", "float32", "float32")),
        ("O2", ("bfloat16", "float32", "bfloat16")),
        ("O3", ("bfloat16", "bfloat16", "bfloat16")),
    ],
)
def test_levels(level, wanted):
    jaxpr = traced(opt_level=level)
    found = [results(name, jaxpr) for name in ("dot_general", "exp", "add")]
    assert found == [[wanted[0]] * 2, [wanted[1]], [wanted[2]]]
    assert jaxpr.out_avals[0].dtype == jnp.float32


def test_level_o3_leaves_what_has_no_form_in_16_bits():
    def fn(x):
        return jnp.linalg.cholesky(x @ x.T + jnp.eye(4))

    assert mpjax.autocast(fn, opt_level="O3")(X[:, :4]).dtype == jnp.float32


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (mpjax.Rule("nets/.*"), r"Rule\('nets/.\*'\) matches no operation.*'net/up'"),
        (mpjax.Rule("net/up", primitive="erf"), "matches no .* has the primitives"),
        (mpjax.Rule(module_type="Dense"), "Rule.module_type is for modules"),
        (mpjax.Rule(role="norm", policy="f32"), "Rule.role is for modules"),
        (mpjax.Rule(policy="f32", cast_inputs=False), "Rule.cast_inputs is for"),
        (mpjax.Rule(recipe=mpjax.delayed_scaling()), "no place for the state"),
        (mpjax.Rule(primitive="dot_genral"), "no primitive 'dot_genral'.*dot_general"),
        (mpjax.Rule(primitive="scan", policy="f32"), "asks for a dtype of scan"),
        (mpjax.Rule("mlp", recipe=mpjax.current_scaling()), "matches no operation"),
        (
            mpjax.Rule(recipe=mpjax.current_scaling(), min_size=128),
            "serves no product: .*min_size",
        ),
    ],
)
def test_a_rule_that_is_for_nothing_is_refused(rule, match):
    def fn(x, w):
        return jax.lax.scan(lambda x, _: (mlp(x, w), None), x, None, length=1)[0]

    with pytest.raises(ValueError, match=match):
        traced(fn, rules=rule)


def test_what_has_no_form_in_16_bits_cannot_be_asked_for():
    rules = mpjax.Rule(primitive="cholesky", policy="c=bf16")
    with pytest.raises(ValueError, match="JAX has it in 32 bits only"):
        traced(jnp.linalg.cholesky, jnp.eye(2), rules=rules)


def test_modules_have_no_rules_for_operations():
    import flax.linen as nn

    import mpjax.linen

    for rule, match in [
        (mpjax.Rule(policy="bf16", primitive="exp"), "is for operations"),
        (mpjax.Rule(recipe=mpjax.current_scaling()), "needs a policy"),
    ]:
        with pytest.raises(ValueError, match=match):
            mpjax.linen.MixedPrecision(nn.Dense(2), [rule]).init(jax.random.key(0), X)
