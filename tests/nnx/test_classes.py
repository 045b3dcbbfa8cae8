"""Classes of every kind, their dtype attributes and their hooks."""

from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal
from nnx_models import Transformer, inputs, rngs

import mpjax.nnx
from mpjax.nnx import mixed_precision

BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)


class Typed(nnx.Module):
    """A custom layer with a dtype of its own."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.weight = nnx.Param(normal(7, 3))

    def __call__(self, x):
        return jnp.asarray(x, self.dtype) * jnp.asarray(self.weight[...], self.dtype)


class Configured(nnx.Module):
    def __init__(self):
        self.config = {"dtype": "float32"}

    @property
    def dtype(self):
        return self.config["dtype"]

    def __call__(self, x):
        return x.astype(self.dtype)


class ClassTyped(nnx.Module):
    dtype = jnp.float32

    def __call__(self, x):
        return x.astype(self.dtype)


class Calls(nnx.Module):
    """A layer that uses its dtype in the way in which it was given."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, x):
        if isinstance(self.dtype, str):
            return x * getattr(jnp, self.dtype)(0.5)
        if isinstance(self.dtype, np.dtype):
            return x * jnp.asarray(0.5, self.dtype.name)
        return x * self.dtype(0.5)


class CallsOfClass(Calls):
    dtype = "float32"

    def __init__(self):
        pass


class DtypeOfAnotherKind(nnx.Module):
    def __init__(self):
        self.dtype = {"params": "float32"}

    def __call__(self, x):
        return x.astype(self.dtype["params"])[:2]  # no stream, by its shape


@pytest.mark.parametrize(
    "model, dtype",
    [
        (Typed(None), BF16),
        (Typed("float32"), BF16),
        (Typed(jnp.float32), BF16),
        (Configured(), BF16),
        (ClassTyped(), BF16),
        (Calls("float32"), BF16),
        (Calls(jnp.float32), BF16),
        (Calls(np.dtype("float32")), BF16),
        (CallsOfClass(), BF16),
        (DtypeOfAnotherKind(), F32),
    ],
)
def test_dtype_attributes(model, dtype):
    mixed = mixed_precision(model, "p=f32,c=bf16")
    graph, state = nnx.split(mixed)
    inner = []

    class Outer(nnx.Module):
        def __init__(self, model):
            self.model = model

        def __call__(self, x):
            y = self.model(x)
            inner.append(y.dtype)
            return y

    outer = mixed_precision(Outer(nnx.merge(graph, state)), "p=f32,c=bf16")
    outer(jnp.ones(3))
    assert inner == [dtype]
    assert model(jnp.ones(3)).dtype == F32
    again = mixed_precision(mixed, "p=f32,c=bf16")
    assert nnx.graphdef(again) == nnx.graphdef(mixed)


class NotAPytree(nnx.Module, pytree=False):
    def __init__(self, rngs):
        self.layers = [nnx.Linear(8, 8, rngs=rngs) for _ in range(2)]
        self.scales = [nnx.Param(jnp.ones(8))]

    def __call__(self, x):
        return self.layers[1](self.layers[0](x)) * self.scales[0][None]


@nnx.dataclass
class DataClass(nnx.Module):
    weight: nnx.Param = nnx.data(default_factory=lambda: nnx.Param(jnp.ones((8, 8))))
    activation: object = nnx.static(default=jax.nn.relu)
    dtype: object = None

    def __call__(self, x):
        return self.activation(x @ self.weight)


class Weights(nnx.Pytree):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(8))


class ControlFlow(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.weights = Weights()

    def __call__(self, x):
        def branch(self, x):
            return self.a(x) * self.weights.scale[None]

        x = nnx.cond(x.sum() > 0, branch, lambda self, x: self.b(x), self, x)
        return nnx.fori_loop(0, 2, lambda i, c: (c[0], c[0].a(c[1])), (self, x))[1]


@pytest.mark.parametrize("kind", [NotAPytree, lambda rngs: DataClass(), ControlFlow])
def test_kinds_of_modules(kind):
    bare, x = kind(rngs()), normal(7, 2, 8)
    mixed = mixed_precision(bare, "p=f32,c=bf16")
    runs = [nnx.jit(lambda model, x: model(x))]
    if kind is not NotAPytree:
        runs += [nnx.jit(lambda model, x: model(x), graph=False)]
        runs += [jax.jit(lambda model, x: model(x))]
    for run in runs:
        output = run(mixed, x)
        assert output.dtype == BF16 and bare(x).dtype == F32
        np.testing.assert_allclose(output.astype(F32), bare(x), rtol=0.05, atol=0.05)
    dtypes = {a.dtype for a in jax.tree.leaves(nnx.state(mixed, nnx.Param))}
    assert dtypes == {F32}


REGISTRY = {}


class Registered:
    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTRY[key] = cls


class Base(Registered, nnx.Module, key="base"):
    pass


class Leaf(Base, key="leaf"):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x * self.weight


T = TypeVar("T")


class Of(Base, Generic[T], key="of"):
    def __init__(self, inner: T):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def test_classes_with_hooks_for_subclasses():
    mixed = mixed_precision(Of[Leaf](Leaf()), "p=f32,c=bf16")
    assert nnx.jit(lambda model, x: model(x))(mixed, jnp.ones(3)).dtype == BF16
    assert REGISTRY == {"base": Base, "leaf": Leaf, "of": Of}
    assert isinstance(mixed, Of) and isinstance(mixed.inner, Leaf)

    class Child(type(mixed.inner), key="child"):
        pass

    assert REGISTRY.pop("child") is Child

    class Behind(nnx.Module, Registered, key="behind"):
        def __call__(self, x):
            return x

    mixed = mixed_precision(Behind(), "p=f32,c=bf16")
    assert mixed(jnp.ones(3)).dtype == BF16 and REGISTRY.pop("behind") is Behind


def test_abstract_models():
    def make():
        return mixed_precision(Transformer(None, rngs()), "mixed_bfloat16")

    abstract = nnx.eval_shape(make)
    again = mixed_precision(
        nnx.eval_shape(lambda: Transformer(None, rngs())), "bfloat16"
    )
    kernel = again.blocks[0].up.kernel
    assert kernel.get_raw_value() == jax.ShapeDtypeStruct((8, 16), BF16)
    model = nnx.merge(nnx.graphdef(abstract), nnx.state(Transformer(None, rngs())))
    assert model(inputs("transformer")).dtype == F32
    assert mpjax.nnx.tabulate(abstract) == mpjax.nnx.tabulate(make())
