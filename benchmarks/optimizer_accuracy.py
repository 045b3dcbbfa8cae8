"""What low-precision training state does to the loss: every scheme against float32.

    python benchmarks/optimizer_accuracy.py                          # 500 steps
    python benchmarks/optimizer_accuracy.py --task digits
    python benchmarks/optimizer_accuracy.py --only drift --steps 5000 --batch 4

``--json`` enters the figures in ``results/optimizer_accuracy.json``, which the tables
of the README are made of.

The models and the data are those of ``examples/train_lm.py`` and
``examples/train_digits.py``. Everything is computed in float32, so that a difference is
one of parameters and of the optimizer's state. A 16-bit parameter has a gradient in 16
bits. The loss is the mean over the last 50 steps, and the difference to float32 one of
runs with the same seed: the same first parameters, rounded to what the scheme trains,
and the same batches. "plain bfloat16" is optax, given bfloat16 parameters.

Digits are learned by heart, and a ratio of two losses near zero says nothing: labels
are smoothed by a tenth there, so that the least loss is 0.50 nats, not zero.
"""

import functools
import os
import pathlib
import re
import statistics
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))

import _results
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_digits
import train_lm
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import mpjax
from mpjax._optimizers.halves import METHODS

SMOOTH = 50
RATES = {"lm": 3e-3, "digits": 3e-3}
SMALL = {"lm": 3e-4, "digits": 1e-4}
DRIFT = "float32", "float32, 8bit", "split, 8bit", "stochastic, 8bit"


def schemes(task: str) -> dict[str, tuple]:
    """Name: learning rate, whether parameters are bfloat16, and the wrappers."""
    states, params = mpjax.low_precision_state, mpjax.low_precision_params
    rate, small = RATES[task], SMALL[task]
    found: dict[str, tuple] = {
        "float32": (rate, False, lambda tx: tx),
        "float32, bfloat16": (rate, False, lambda tx: states(tx, "bfloat16")),
        "float32, 8bit": (rate, False, states),
    }
    for method in METHODS:
        for formats in "bfloat16", "8bit":
            if method == "float32" and formats == "bfloat16":
                continue  # as with "split", bit for bit

            def wrap(tx, method: Any = method, formats=formats):
                return params(states(tx, formats), method)

            name = "float32 master" if method == "float32" else method
            found[f"{name}, {formats}"] = rate, True, wrap
    found["plain bfloat16"] = rate, True, lambda tx: tx
    found["float32, small rate"] = small, False, lambda tx: tx
    found["split, 8bit, small rate"] = small, True, lambda tx: params(states(tx))
    found["stochastic, 8bit, small rate"] = (
        small,
        True,
        lambda tx: params(states(tx), "stochastic"),
    )
    found["plain bfloat16, small rate"] = small, True, lambda tx: tx
    return found


def rounded(params: Any) -> Any:
    """Parameters in bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def wide(params: Any) -> Any:
    """Parameters in float32, to compute with."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


@functools.cache
def lm(name: str, steps: int):
    """A function of a seed that trains the LM and returns losses and no accuracy."""
    rate, is_short, wrap = schemes("lm")[name]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    adamw = optax.adamw(schedule, b2=0.95)
    tx = wrap(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    model = train_lm.Transformer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        def loss_fn(params):
            logits: Any = model.apply(wide(params), tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), state, loss

    def run(seed):
        tokens = jnp.zeros((1, train_lm.LENGTH), jnp.int32)
        params = model.init(jax.random.key(seed), tokens)
        params = rounded(params) if is_short else params
        state, losses = tx.init(params), []
        for tokens in train_lm.batches(steps, seed):
            params, state, loss = step(params, state, tokens)
            losses.append(float(loss))
        return losses, None

    return run


@functools.cache
def digits(name: str, steps: int):
    """A function of a seed that trains on digits: losses, and accuracy in percent."""
    rate, is_short, wrap = schemes("digits")[name]
    tx = wrap(optax.adamw(optax.cosine_decay_schedule(rate, steps)))
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    graph = nnx.graphdef(train_digits.ResNet(rngs=nnx.Rngs(0)))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, state, images, labels):
        def loss_fn(params):
            model = nnx.merge(graph, wide(params), stats, copy=True)
            targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
            losses = optax.softmax_cross_entropy(model(images), targets)
            return losses.mean(), nnx.state(model, nnx.BatchStat)

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return mpjax.apply_updates(params, updates), stats, state, loss

    @jax.jit
    def predict(params, stats, images):
        model = nnx.merge(graph, wide(params), stats)
        model.eval()
        return model(images).argmax(-1)

    def run(seed):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(images))
        test, training = np.split(order, [train_digits.TEST])
        model = train_digits.ResNet(rngs=nnx.Rngs(seed))
        _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        params = rounded(params) if is_short else params
        state, losses = tx.init(params), []
        for _ in range(steps):
            batch = rng.choice(training, train_digits.BATCH, replace=False)
            params, stats, state, loss = step(
                params, stats, state, images[batch], labels[batch]
            )
            losses.append(float(loss))
        right = np.mean(predict(params, stats, images[test]) == labels[test])
        return losses, 100 * float(right)

    return run


def table(task: str, steps: int, losses: dict, accuracies: dict) -> Table:
    """The schemes, each against float32 with the same learning rate and seed."""
    result = Table(title=f"{task}, {steps} steps, loss of the last {SMOOTH}")
    for column in "parameters, moments", "losses", "to float32", "mean":
        result.add_column(column)
    if task == "digits":
        result.add_column("test accuracy")
    for name, found in losses.items():
        base = losses.get(base_of(name), {})
        ratios = [
            100 * (found[seed] / base[seed] - 1) for seed in found if seed in base
        ]
        cells = [
            name,
            " ".join(f"{loss:.4f}" for loss in found.values()),
            " ".join(f"{ratio:+.2f}%" for ratio in ratios),
            f"{statistics.mean(ratios):+.2f}%" if ratios else "",
        ]
        if task == "digits":
            cells.append(" ".join(f"{x:.2f}" for x in accuracies[name].values()))
        result.add_row(*cells)
    return result


def base_of(name: str) -> str:
    """What a scheme is compared with."""
    return "float32, small rate" if name.endswith("small rate") else "float32"


def main(args=None) -> dict[str, dict[int, float]]:
    """Trains, and prints a table after each seed."""
    parser = _results.parser(__doc__, "optimizer_accuracy")
    parser.add_argument("--task", choices=["lm", "digits"], default="lm")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=train_lm.BATCH, help="of the LM")
    parser.add_argument(
        "--only", default="", help="a regular expression of schemes, or drift"
    )
    options = parser.parse_args(args)
    train = {"lm": lm, "digits": digits}[options.task]
    wanted = [
        name
        for name in schemes(options.task)
        if (name in DRIFT if options.only == "drift" else re.search(options.only, name))
    ]
    bases = {base_of(name) for name in wanted}
    names = [n for n in schemes(options.task) if n in wanted or n in bases]
    losses: dict[str, dict[int, float]] = {name: {} for name in names}
    accuracies: dict[str, dict[int, float]] = {name: {} for name in names}
    train_lm.BATCH = options.batch
    seeds = [0] if options.only == "drift" else options.seeds
    for seed in seeds:
        for name in names:
            run, accuracy = train(name, options.steps)(seed)
            loss = float(np.mean(run[-SMOOTH:]))
            losses[name][seed] = loss
            if accuracy is not None:
                accuracies[name][seed] = accuracy
            print(f"{options.task} {name!r} seed {seed}: {loss:.4f}", flush=True)
            _results.save(
                options.json,
                {
                    "task": options.task,
                    "scheme": name,
                    "steps": options.steps,
                    "seed": seed,
                }
                | ({"batch": options.batch} if options.task == "lm" else {}),
                {"loss_nats": round(loss, 5), "test_accuracy_percent": accuracy}
                | tenths(run),
                deterministic=False,
            )
        Console().print(table(options.task, options.steps, losses, accuracies))
    return losses


def tenths(losses: list[float]) -> dict[str, list[float]]:
    """Mean losses of tenths of a long run, from which a drift could be seen."""
    if len(losses) < 5000:
        return {}
    means = np.reshape(losses[: len(losses) // 10 * 10], (10, -1)).mean(1)
    return {"loss_nats_by_tenth": [round(float(x), 5) for x in means]}


if __name__ == "__main__":
    main()
