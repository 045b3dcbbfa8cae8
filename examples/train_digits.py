"""Trains a convolutional network on handwritten digits in float16, and in float32.

    python examples/train_digits.py --poison

`--poison` throws in a batch that overflows, whatever the policy. The step is skipped:
parameters, optimizer state and batch statistics stay bit for bit as they were, and
training goes on. The loss scale halves where gradients overflow; a loss that is NaN by
itself, as in float16, says nothing about its scale.
"""

import argparse

import jax
import numpy as np
import optax
import tqdm
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import mpjax
import mpjax.nnx

BATCH = 64
TEST = 797  # of 1797 images


class Block(nnx.Module):
    """Two convolutions, added to what came in."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(y)))


class ResNet(nnx.Module):
    """Tells digits apart. It knows nothing of mixed precision."""

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs), Block(width, rngs)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def train(policy: str, epochs: int, seed: int, poison: bool) -> tuple:
    """Trains from scratch; returns policy, test accuracy, skipped steps, loss scale."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    rng = np.random.default_rng(seed)
    test, training = np.split(rng.permutation(len(images)), [TEST])
    steps = epochs * len(training) // BATCH

    model = mpjax.nnx.mixed_precision(ResNet(rngs=nnx.Rngs(seed)), policy)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))
    optimizer = mpjax.dynamic_loss_scaling(optimizer)

    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, stats, opt_state, images, labels):
        def loss_fn(params):
            model = nnx.merge(graph, params, stats, copy=True)  # it writes to stats
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model(images), labels
            )
            return losses.mean(), nnx.state(model, nnx.BatchStat)

        grad_fn = mpjax.value_and_grad(loss_fn, opt_state, has_aux=True)
        (loss, new_stats), grads = grad_fn(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        # A batch that overflowed has spoiled its statistics as well: keep the old ones.
        finite = mpjax.last_step_finite(opt_state)
        stats = mpjax.select_tree(finite, new_stats, stats)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    @jax.jit
    def predict(params, stats, images):
        model = nnx.merge(graph, params, stats)
        model.eval()
        return model(images)

    progress = tqdm.trange(steps, desc=policy)
    for step in progress:
        batch = rng.choice(training, BATCH, replace=False)
        is_poisoned = poison and step == steps // 2
        factor = np.float32(1e38 if is_poisoned else 1)
        before = params, stats, opt_state
        params, stats, opt_state, loss = train_step(
            *before, images[batch] * factor, labels[batch]
        )
        scale = float(mpjax.loss_scale(opt_state))
        progress.set_postfix(loss=f"{loss:.3f}", scale=f"{scale:g}")
        if is_poisoned:
            report(loss, before, (params, stats, opt_state))

    predicted = predict(params, stats, images[test]).argmax(-1)
    accuracy = float(np.mean(predicted == labels[test]))
    scale = float(mpjax.loss_scale(opt_state))
    return policy, accuracy, int(mpjax.skipped_steps(opt_state)), scale


def report(loss, before, after) -> None:
    """Says what has become of the step with the poisoned batch."""
    *old, old_state = before
    *new, new_state = after
    same = jax.tree.map(
        lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
        (old, old_state.inner_state),
        (new, new_state.inner_state),
    )
    tqdm.tqdm.write(
        f"A poisoned batch: loss {loss}, loss scale {mpjax.loss_scale(old_state):g} -> "
        f"{mpjax.loss_scale(new_state):g}; parameters, batch statistics and optimizer "
        f"state bit for bit as before: {all(jax.tree.leaves(same))}"
    )


def main(args=None) -> list[tuple]:
    """Trains under the policies asked for, and in float32."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policy", nargs="+", default=["mixed_float16"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--poison", action="store_true", help="a batch that overflows")
    args = parser.parse_args(args)
    if args.epochs < 1:
        parser.error(f"--epochs is at least 1, got {args.epochs}")
    for policy in args.policy:
        mpjax.get_policy(policy)  # a misspelled one raises here, not minutes later

    model = mpjax.nnx.mixed_precision(ResNet(rngs=nnx.Rngs(0)), args.policy[0])
    print(mpjax.nnx.tabulate(model))

    policies = ["float32", *(p for p in args.policy if p != "float32")]
    runs = [train(p, args.epochs, args.seed, args.poison) for p in policies]
    columns = "policy", "test accuracy", "points to float32", "skipped", "loss scale"
    table = Table(*columns)
    for policy, accuracy, skipped, scale in runs:
        points = 100 * (accuracy - runs[0][1])
        table.add_row(
            policy, f"{accuracy:.2%}", f"{points:+.2f}", f"{skipped}", f"{scale:g}"
        )
    Console().print(table)
    return runs


if __name__ == "__main__":
    main()
