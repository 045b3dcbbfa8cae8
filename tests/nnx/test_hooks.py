"""The classes that modules of a mixed model have, and hooks for subclasses."""

import pickle

import jax.numpy as jnp
import pytest
from flax import nnx

import mpjax
from mpjax.nnx import mixed_precision

SEEN = []


class Ordinary(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x * self.weight


class Watched(Ordinary):
    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)
        SEEN.append(key)


class Hooked(Watched, key="hooked"):
    pass


@pytest.mark.parametrize("make", [Ordinary, Hooked])
def test_a_metaclass_is_made_only_for_hooks(make):
    model = make()
    mixed = mixed_precision(model, "p=f32,c=bf16")
    assert mixed(jnp.ones(3)).dtype == jnp.bfloat16
    assert isinstance(mixed, make) and type(mixed).__mro__[-2:] == make.__mro__[-2:]
    assert (type(type(mixed)) is type(make)) == (make is Ordinary)
    assert SEEN == ["hooked"]  # classes of mpjax's are none of the author's
    assert type(pickle.loads(pickle.dumps(mixed))) is type(mixed)


def test_the_repr_of_a_class_has_its_policy():
    rules = [mpjax.Rule("head", None), "mixed_bfloat16"]
    model = nnx.Dict(body=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), head=Ordinary())
    mixed = mixed_precision(model, rules)
    assert repr(type(mixed.body)).endswith(".Linear[p=f32,c=bf16,o=f32]'>")
    assert type(mixed.body).__name__ == "Linear"
    assert repr(type(mixed.head)) == repr(Ordinary)
    # What is printed of a model is as before, and so are Flax's tables.
    assert repr(mixed.body).startswith("Linear(")
    assert " Linear " in nnx.tabulate(mixed.body, jnp.ones((1, 2)))
