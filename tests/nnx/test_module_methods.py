"""What a user calls on a model of NNX besides its methods."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mpjax.nnx

BF16, X = jnp.dtype(jnp.bfloat16), jnp.ones((4, 8))


class Net(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        h = self.perturb("h", self.dense(x))
        self.sow(nnx.Intermediate, "sown", h)
        return self.drop(h)


def test_variants_of_a_mixed_model_are_mixed():
    model = mpjax.nnx.mixed_precision(Net(), "c=bf16")
    with warnings.catch_warnings():  # Flax wants perturb inside of nnx.capture
        warnings.simplefilter("ignore", DeprecationWarning)
        model.eval()
        assert model.drop.deterministic
        y = nnx.clone(model)(X)
        model.train()
        assert not model.drop.deterministic
    assert y.dtype == BF16
    assert isinstance(model, Net)


def test_perturbations_are_float32_and_do_not_widen_the_stream():
    bare = Net()
    model = mpjax.nnx.mixed_precision(bare, "c=bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for m in (bare, model):
            m.eval()
            y = m(X)
            assert m.h[...].dtype == np.float32
        assert y.dtype == model.sown[0].dtype == BF16
        wrt = nnx.DiffState(0, nnx.Perturbation)

        def loss(model):
            return jnp.sum(model(X).astype(np.float32) * jnp.arange(8.0)[None])

        expected = nnx.grad(loss, argnums=wrt)(bare)["h"][...]
        actual = nnx.grad(loss, argnums=wrt)(model)["h"][...]
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)
    assert jax.typeof(actual).shape == (4, 8)
