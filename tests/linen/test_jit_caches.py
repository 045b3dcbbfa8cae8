"""Traces that Flax and JAX cache follow the policy of their own program."""

import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import dots
from linen_models import RNGS, Compact, Head, Jitted, X

import mpjax
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)
POLICIES = ["mixed_bfloat16", "mixed_float16", "float32"]


@pytest.mark.parametrize("cls", [Jitted, Compact])
def test_interleaved_policies_do_not_meet_in_caches(cls):
    # One class, jitted inside: Flax would reuse the first trace for the others.
    variables = jax.eval_shape(cls().init, KEY, X)
    for policy in [*POLICIES, *reversed(POLICIES)]:
        model = MixedPrecision(cls(), policy)
        jaxpr = jax.make_jaxpr(model.apply)(variables, X)
        dtype = mpjax.get_policy(policy).compute_dtype
        assert {d.lhs for d in dots(jaxpr)} == {dtype}
        bare = jax.make_jaxpr(cls().apply)(variables, X)
        assert {d.lhs for d in dots(bare)} == {np.dtype(np.float32)}


class Decorated(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


class TwoDecorated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Decorated(name="second")(Decorated(name="first")(x))


@pytest.mark.parametrize("cls", [Decorated, TwoDecorated])
@pytest.mark.parametrize("bare_first", [True, False])
def test_a_jitted_method_follows_the_policy_of_its_program(cls, bare_first):
    # Flax makes the key of nn.jit before an interceptor sees the method.
    variables = jax.eval_shape(cls().init, KEY, X)
    models = {p: MixedPrecision(cls(), p) for p in POLICIES}
    models = {"bare": cls(), **models} if bare_first else {**models, "bare": cls()}
    for policy, model in [*models.items(), *models.items()]:
        found = dots(jax.make_jaxpr(model.apply)(variables, X))
        dtype = "f32" if policy == "bare" else policy
        assert {d.lhs for d in found} == {mpjax.get_policy(dtype).compute_dtype}
        assert {d.rhs for d in found} == {mpjax.get_policy(dtype).compute_dtype}


def test_jitted_methods_of_one_class_follow_their_own_rules():
    rules = [mpjax.Rule("second(/.*)?", "float32"), "mixed_float16"]
    model = MixedPrecision(TwoDecorated(), rules)
    variables = jax.eval_shape(TwoDecorated().init, KEY, X)
    jaxpr = jax.make_jaxpr(model.apply)(variables, X)
    assert [d.lhs.name for d in dots(jaxpr)] == ["float16", "float32"]


def test_jitted_layers_of_one_class_follow_their_own_rules():
    rules = [mpjax.Rule("JitBlock_0(/.*)?", "float32"), "mixed_float16"]
    model = MixedPrecision(Jitted(), rules)
    variables = jax.eval_shape(model.init, KEY, X)
    jaxpr = jax.make_jaxpr(model.apply)(variables, X)
    assert [d.lhs.name for d in dots(jaxpr)] == ["float16"] * 3 + ["float32"] * 2


def test_threads_do_not_share_a_policy():
    variables = jax.eval_shape(Compact().init, KEY, X)
    found = {}

    def trace(policy):
        for _ in range(3):
            jaxpr = jax.make_jaxpr(MixedPrecision(Compact(), policy).apply)
            with jax.numpy_dtype_promotion("strict"):
                found.setdefault(policy, set()).update(
                    d.lhs for d in dots(jaxpr(variables, X))
                )

    threads = [threading.Thread(target=trace, args=(p,)) for p in POLICIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {p: {mpjax.get_policy(p).compute_dtype} for p in POLICIES}


def test_equal_wrappers_do_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def forward(model, variables, x):
        traces.append(model)
        return model.apply(variables, x)

    variables = Head().init(KEY, X)
    for policy in ("mixed_bfloat16", mpjax.Rule(policy="mixed_bfloat16")):
        forward(MixedPrecision(Head(), policy), variables, X)
    assert len(traces) == 1


def test_flax_keeps_the_ways_we_rely_on():
    """Scope flags are in nn.jit's key; attributes of a bound module may be set."""

    class Probe(nn.Module):
        @nn.compact
        def __call__(self):
            vars(self)["param"] = lambda name: name
            assert self.param("ours") == "ours"
            del vars(self)["param"]
            self.scope.flags = {**self.scope.flags, "ours": 1}
            child = nn.Dense(1)
            assert child.scope.flags["ours"] == 1
            return self.param("own", nn.initializers.ones, ())

    assert Probe().init_with_output(KEY)[0] == 1


class InTurn(nn.Module):
    """Runs one module bare and under policies, one after the other."""

    inner: nn.Module
    order: tuple

    @nn.compact
    def __call__(self, x):
        policies = {"b": "mixed_bfloat16", "h": "mixed_float16"}
        runs = {k: MixedPrecision(self.inner, p) for k, p in policies.items()}
        return [runs.get(kind, self.inner)(x) for kind in self.order]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


class SetupPlain(nn.Module):
    def setup(self):
        self.inner = Decorated()

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize("inner", [Plain, nn.jit(Plain), Decorated, SetupPlain])
@pytest.mark.parametrize("nested", [False, True])
def test_no_policy_outlives_its_run(inner, nested):
    name = {"b": BF16, "h": np.dtype(np.float16)}
    outer = np.dtype(np.float32)
    variables = jax.eval_shape(InTurn(inner(), "-").init, KEY, X)
    for order in ("b-b-", "-bh-", "hb-h", "b-hb"):
        model = InTurn(inner(), tuple(order))
        if nested:
            model, outer = MixedPrecision(model, "c=f16"), np.dtype(np.float16)
        for _ in range(2):
            found = dots(jax.make_jaxpr(model.apply)(variables, X))
            assert [d.lhs for d in found] == [name.get(kind, outer) for kind in order]


@pytest.mark.parametrize("jitted", [False, True])
def test_a_module_may_run_in_training_only(jitted):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            return nn.Dropout(0.5, name="drop")(x, deterministic=False) if train else x

    cls = nn.jit(Model, static_argnums=2) if jitted else Model
    rules = [mpjax.Rule("drop", "float32"), "mixed_bfloat16"]
    with pytest.raises(ValueError, match="optional=True"):
        MixedPrecision(cls(), rules).init(RNGS, X, False)
    model = MixedPrecision(cls(), rules)
    variables = model.init(RNGS, X, True)
    for train in (True, False, True, False):
        model.apply(variables, X, train, rngs=RNGS)
