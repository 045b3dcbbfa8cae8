"""What the length of a history does for training under delayed scaling.

    python benchmarks/history_length.py

A network of four layers learns digits from four seeds, in bfloat16 and under delayed
scaling with histories of several lengths. Prints the loss of the last 100 of 600 steps,
and loss and accuracy on images that it has not seen, as mean and deviation of the
seeds, and the bytes of the state of one product.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import mpjax
import mpjax.linen

STEPS, SEEDS, TRAINED = 600, 4, 1500
LENGTHS = 1, 4, 16, 1024


class Net(nn.Module):
    """Three hidden layers and a head."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.relu(nn.Dense(128, name=f"hidden_{i}")(x))
        return nn.Dense(10, name="head")(x)


def train(recipe, images, labels, seed):
    """The last losses, and loss and accuracy on the images that were kept back."""
    head = mpjax.Rule("head", "mixed_bfloat16")
    rules = [head, mpjax.Rule(".*", "mixed_bfloat16", recipe)]
    model = mpjax.linen.MixedPrecision(Net(), rules)
    variables = model.init(jax.random.key(seed), images[:1])
    tx = mpjax.scaled(optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS)))
    losses_of = optax.softmax_cross_entropy_with_integer_labels

    def step(carry, key):
        variables, opt_state = carry
        batch = jax.random.randint(key, (128,), 0, TRAINED)

        def loss_fn(variables):
            logits = cast(jax.Array, model.apply(variables, images[batch]))
            return losses_of(logits, labels[batch]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(variables)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return (mpjax.apply_updates(variables, updates), opt_state), loss

    keys = jax.random.split(jax.random.key(seed + 100), STEPS)
    (variables, _), losses = jax.lax.scan(step, (variables, tx.init(variables)), keys)
    logits = cast(jax.Array, model.apply(variables, images[TRAINED:]))
    rest = labels[TRAINED:]
    accuracy = (logits.argmax(-1) == rest).mean()
    return losses[-100:].mean(), losses_of(logits, rest).mean(), accuracy


def main():
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    print("history   bytes   last losses         loss                accuracy")
    recipes = [(n, mpjax.delayed_scaling(history_length=n)) for n in LENGTHS]
    for length, recipe in [("bf16", None), *recipes]:
        run = jax.vmap(lambda seed, r=recipe: train(r, images, labels, seed))
        figures = jax.device_get(jax.jit(run)(jnp.arange(SEEDS)))
        shown = (f"{np.mean(x):.5f} +- {np.std(x):.5f}" for x in figures)
        size = 0 if recipe is None else recipe.init().history.nbytes
        print(f"{length:>7} {size:>7}   {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
