"""Wrappers inside of models, under transformations, and of shared scopes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal
from jaxprs import dots
from linen_models import Block, Outer, OwnParams, X

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)


def test_a_wrapper_inside_a_model_keeps_the_variables():
    class Model(nn.Module):
        wrap: bool

        @nn.compact
        def __call__(self, x):
            block = Block(name="block")
            x = (MixedPrecision(block, "mixed_bfloat16") if self.wrap else block)(x)[0]
            return nn.Dense(4)(x.astype(jnp.float32))

    variables = Model(False).init(KEY, X)
    assert_trees_equal(Model(True).init(KEY, X), variables)
    found = dots(jax.make_jaxpr(Model(True).apply)(variables, X))
    assert [d.lhs for d in found] == [BF16, BF16, np.float32]


class WrapperInside(nn.Module):
    """A block, twice the same, wrapped or not, under a transformation or not."""

    wrap: bool
    lift: str

    def setup(self):
        lift = {"none": lambda cls: cls, "remat": nn.remat, "jit": nn.jit}[self.lift]
        if self.wrap:
            self.block = lift(MixedPrecision)(Block(), "mixed_bfloat16")
        else:
            self.block = lift(Block)()
        self.given = Outer(Block())
        wrapped = MixedPrecision(self.given, "mixed_bfloat16")
        self.run_given = wrapped if self.wrap else self.given

    def __call__(self, x):
        return self.run_given(self.block(self.block(x)[0])[0])[0]


@pytest.mark.parametrize("lift", ["none", "remat", "jit"])
def test_wrappers_in_setup_and_under_transformations(lift):
    variables = WrapperInside(False, lift).init(KEY, X)
    model = WrapperInside(True, lift)
    assert_trees_equal(model.init(KEY, X), variables)
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: jnp.sum(model.apply(v, X))))(variables)
    assert {(d.lhs, d.rhs) for d in dots(jaxpr)} == {(BF16, BF16)}


def test_a_scan_over_wrappers():
    def stack(wrap):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                block = Block(name="block")
                if wrap:
                    block = MixedPrecision(block, "mixed_bfloat16")
                return block(x)[0], None

        return nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )()

    variables = stack(False).init(KEY, X, None)
    assert_trees_equal(stack(True).init(KEY, X, None), variables)
    found = dots(jax.make_jaxpr(stack(True).apply)(variables, X, None))
    assert {d.lhs for d in found} == {BF16}


def test_an_inner_wrapper_has_the_last_word():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = MixedPrecision(OwnParams(), "float32")(x)
            return nn.Dense(4)(x)

    model = MixedPrecision(Model(), "mixed_float16")
    jaxpr = jax.make_jaxpr(model.apply)(model.init(KEY, X), X)
    f16, f32 = np.float16, np.float32
    assert [d.rhs for d in dots(jaxpr)] == [f16, f32, f32, f16]


def test_a_cell_is_wrapped_as_a_part_of_a_bare_model():
    cell = MixedPrecision(nn.LSTMCell(4), "mixed_bfloat16")
    c, h = cell.initialize_carry(KEY, (2, 8))
    assert c.shape == h.shape == (2, 4)
    bare, model = nn.RNN(nn.LSTMCell(4)), nn.RNN(cell)
    variables = bare.init(KEY, X)
    assert_trees_equal(model.init(KEY, X), variables)
    with jax.numpy_dtype_promotion("standard"):
        y = model.apply(variables, X)
    np.testing.assert_allclose(y, bare.apply(variables, X), atol=0.05)


class LoRA(nn.Module):
    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.normal(), (8, 2))
        return self.inner(x).astype(x.dtype) + x @ a @ a.T


@pytest.mark.parametrize("bound", [False, True])
def test_a_wrapper_may_share_its_scope(bound):
    class Model(nn.Module):
        wrap: bool

        @nn.compact
        def __call__(self, x):
            parent = self if bound else None
            dense = nn.Dense(8, parent=parent)
            if self.wrap:
                dense = MixedPrecision(dense, "c=bf16", parent=parent)
            layer = LoRA(dense)
            return layer(layer(x))

    variables = Model(False).init(KEY, X)
    assert_trees_equal(Model(True).init(KEY, X), variables)
    found = dots(jax.make_jaxpr(Model(True).apply)(variables, X))
    assert [d.lhs for d in found] == [BF16, np.float32, np.float32] * 2


def test_rules_by_type_find_both_modules_of_one_scope():
    rules = [
        mpjax.Rule(module_type=LoRA, policy="c=f16"),
        mpjax.Rule(module_type=nn.Dense, policy="c=bf16"),
    ]
    model = MixedPrecision(LoRA(nn.Dense(8)), rules)
    variables = model.init(KEY, X)
    found = dots(jax.make_jaxpr(model.apply)(variables, X))
    assert [d.lhs for d in found] == [BF16, np.float16, np.float16]
    table = mpjax.linen.tabulate(model, KEY, X)
    assert "LoRA" in table and "Dense" in table and "2 layers, 88 param" in table
