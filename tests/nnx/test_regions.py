"""Where a policy begins and ends, and which rule decides there."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import normal
from jaxprs import dots
from nnx_models import SEEN, Probe, Stack, jaxpr_of, rngs

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.nnx import mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)


def probes(rules, method="__call__", *args, **kwargs):
    SEEN.clear()
    model = Probe("root", Probe("mid", Probe("leaf")))
    mixed = mixed_precision(model, rules)
    return getattr(mixed, method)(jnp.ones(3), *args, **kwargs)


def test_arguments_and_results_are_cast_at_the_border_only():
    assert probes("mixed_bfloat16").dtype == F32
    assert set(SEEN.values()) == {("bfloat16", "bfloat16")}
    x = {"x": jnp.ones(3), "n": np.arange(3)}
    y, rest = probes("mixed_bfloat16", "other", options=x)
    assert (y.dtype, rest["y"].dtype, rest["n"].dtype) == (F32, F32, np.arange(3).dtype)
    assert isinstance(rest["self"], Probe) and x["x"].dtype == F32
    assert SEEN["root"] == ("bfloat16", "bfloat16")


def test_the_first_rule_decides():
    rules = [
        mpjax.Rule("inner/inner", "float32"),
        mpjax.Rule("inner", None),
        mpjax.Rule(".*", "c=f16,o=f16", module_type=Probe),
    ]
    assert probes(rules).dtype == jnp.float16
    assert SEEN == {
        "root": ("float16", "float16"),
        "mid": ("float16", "float32"),  # left alone: it takes what comes
        "leaf": ("float32", "float32"),
    }


def test_a_module_left_alone_ends_the_region_around_it():
    rules = [mpjax.Rule("inner", None), mpjax.Rule(".*", "p=f32,c=bf16,o=f32")]
    SEEN.clear()
    leaf = Probe("leaf")
    mixed = mixed_precision(Probe("root", Probe("mid", leaf)), rules)
    mixed.inner.inner = mixed_precision(leaf, "p=f32,c=bf16,o=f16")
    assert mixed(jnp.ones(3)).dtype == F32
    assert SEEN["mid"] == ("bfloat16", "float32")
    # An entry again, though the policy is that of the root: f16 comes out of it.
    same = mixed_precision(Probe("root", Probe("mid", leaf)), rules)
    assert same.inner(jnp.ones(3, BF16)).dtype == F32


def test_kinds_of_methods():
    model = Probe("root")
    mixed, x = mixed_precision(model, "p=f32,c=bf16"), jnp.ones(3)
    assert mixed.static(x) is x
    assert mixed._private(x).dtype == mixed.total.dtype == F32
    assert mixed.weight is not model.weight and mixed.weight[...] is model.weight[...]
    assert mixed.jitted(x).dtype == BF16 and model.jitted(x).dtype == F32

    class Child(type(mixed)):
        def __call__(self, x):
            return super().__call__(x)

    assert Child("child")(x).dtype == BF16


def test_only_the_methods_of_the_model_see_casts():
    read = nnx.jit(lambda model: model.weight[...])

    class Reads(Probe):
        def __call__(self, x):
            return read(self)

    mixed = mixed_precision(Reads("root"), "p=f32,c=bf16")
    for _ in range(2):  # one jitted function, inside and outside
        assert read(mixed).dtype == F32
        assert mixed(jnp.ones(3)).dtype == BF16


def test_twice_is_once_and_the_last_policy_counts():
    x = normal(7, 2, 4, 8)
    once = mixed_precision(Stack(None, rngs()), "mixed_bfloat16")
    twice = mixed_precision(once, "mixed_bfloat16")
    assert nnx.graphdef(once) == nnx.graphdef(twice)
    other = mixed_precision(once, "mixed_float16")
    expected = mixed_precision(Stack(None, rngs()), "mixed_float16")
    np.testing.assert_array_equal(other(x), expected(x))
    back = mixed_precision(once, "float32")
    np.testing.assert_array_equal(back(x), Stack(None, rngs())(x))
    parts = mixed_precision(Stack(None, rngs()), mpjax.Rule("heads/a", "c=bf16"))
    parts = mixed_precision(parts, mpjax.Rule("layers/layers/0", "c=f16,o=f32"))
    assert [d.lhs.name for d in dots(jaxpr_of(parts, x))] == [
        "float16",
        "float32",
        "float32",
        "bfloat16",
    ]


def test_models_of_two_policies_do_not_meet():
    class Inner(Probe):
        product = staticmethod(jax.jit(jnp.matmul))

        def __call__(self, x):
            return self.product(x, self.weight[...]) + self.jitted(x).sum()

    bare, x = Inner("root"), jnp.full(3, 1 + 2**-9)
    models = {
        name: mixed_precision(bare, f"p=f32,c={name},o=f32") for name in ("bf16", "f16")
    } | {"f32": bare}
    run = nnx.jit(lambda model, x: model(x))
    expected = {"bf16": 6.0, "f16": 6 * (1 + 2**-9), "f32": 6 * (1 + 2**-9)}
    results = {name: [] for name in models}

    def work(names):
        for name in names:
            results[name] += [run(models[name], x), models[name](x)]

    threads = [
        threading.Thread(target=work, args=(order * 3,))
        for order in (["bf16", "f32", "f16"], ["f16", "bf16", "f32"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, values in results.items():
        assert len(values) == 12
        np.testing.assert_allclose(values, expected[name], rtol=2e-3, err_msg=name)
    assert run(bare, x) == 6 * (1 + 2**-9) and run(models["bf16"], x) == 6
