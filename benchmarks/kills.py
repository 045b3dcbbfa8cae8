"""Kills a training run at random points, and compares what it goes on from.

    nice python benchmarks/kills.py --kills 25 --front-end linen nnx

A small model trains in float16 with fp8 under delayed scaling, kept weights, batch
statistics, an average of its parameters, dropout, microbatches of `optax.MultiSteps`
and batches that overflow; a `CheckpointManager` saves every step asynchronously. The
process is ended by SIGKILL after a random time, in a step, while a checkpoint is
written or while the next one is begun, and started again. The state that it resumes
from has to be, bit for bit, that of the same step in a run that was not interrupted.
A run that comes to its end begins again in an empty folder, until there were as many
kills as asked for.
"""

import argparse
import functools
import hashlib
import logging
import multiprocessing
import pathlib
import random
import signal
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import mpjax
import mpjax.checkpoints
import mpjax.linen
import mpjax.nnx

RULE = mpjax.Rule(
    ".*",
    "mixed_float16",
    mpjax.delayed_scaling(history_length=4, keep_weights=True),
)
STEPS = 40
PRELOADED = ["jax", "flax", "optax", "orbax.checkpoint", "mpjax.checkpoints"]


class Linen(nn.Module):
    """Two layers with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        x = nn.Dropout(0.25, deterministic=False)(nn.relu(x))
        return nn.Dense(8)(x)


class Nnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.first = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.last = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def optimizer():
    inner: Any = optax.MultiSteps(optax.adam(1e-2), 2)
    return mpjax.dynamic_loss_scaling(inner, growth_interval=3)


def batch(step):
    """That of a step; every eighth overflows in float16."""
    x = np.random.default_rng(step).normal(size=(8, 16)).astype(np.float32)
    return x * np.float32(1e5) if step % 8 == 5 else x


def new_linen() -> Any:
    model = mpjax.linen.MixedPrecision(Linen(), RULE)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, jnp.ones((8, 16)))
    return mpjax.TrainState.create(
        apply_fn=model.apply,
        tx=optimizer(),
        ema=jax.tree.map(jnp.copy, variables["params"]),
        key=jax.random.key(2),
        **variables,
    )


@jax.jit
def step_linen(state, x):
    key, dropout = jax.random.split(state.key)

    def loss_fn(variables):
        out, new = state.apply_fn(
            {**variables, "batch_stats": state.batch_stats},
            x,
            rngs={"dropout": dropout},
            mutable=["batch_stats"],
        )
        return jnp.mean(out.astype(jnp.float32) ** 2), new

    grad_fn = mpjax.value_and_grad(loss_fn, state, has_aux=True)
    (_, new), grads = grad_fn(state.variables)
    return state.apply_gradients(
        grads=grads,
        ema=lambda params: optax.incremental_update(params, state.ema, 0.1),
        key=key,
        **new,
    )


def new_nnx() -> Any:
    model = mpjax.nnx.mixed_precision(Nnx(nnx.Rngs(0)), RULE)
    return model, Nnx(nnx.Rngs(0)), mpjax.nnx.Optimizer(model, optimizer())


def step_nnx(state, x):
    model, average, optimizer = state
    _step_nnx(model, average, optimizer, x)
    return state


@nnx.jit
def _step_nnx(model, average, optimizer, x):
    def loss_fn(model):
        return jnp.mean(model(x).astype(jnp.float32) ** 2)

    _, grads = mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)
    optimizer.update(model, grads)
    with optimizer.if_applied(average):
        params = nnx.state(model, nnx.Param), nnx.state(average, nnx.Param)
        nnx.update(average, optax.incremental_update(*params, 0.1))


FRONT_ENDS = {"linen": (new_linen, step_linen), "nnx": (new_nnx, step_nnx)}


def digest(state) -> str:
    """Of all bits of a state, with paths, shapes and dtypes."""
    if isinstance(state, tuple):
        state = [nnx.state(module) for module in state]
    text = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}"
        text.update(name.encode() + array.tobytes())
    return text.hexdigest()


def train(
    front_end: str, steps: int, folder: str, cache: str, every_step: bool, tell
) -> None:
    """The process that is killed.

    Args:
      front_end: "linen" or "nnx".
      steps: how many the run has.
      folder: of checkpoints.
      cache: of compiled programs.
      every_step: whether digests of all states are told, or those alone of the first,
        from which it goes on, and of the last.
      tell: a connection for pairs of a step and the digest of its state, or None.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # unfinished checkpoints
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    new, step = FRONT_ENDS[front_end]
    state, done = new(), 0
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        latest = manager.latest_step()
        if latest is not None:
            state, done = mpjax.checkpoints.restore(manager, state, latest), latest
        tell.send((done, digest(state)))
        while done < steps:
            state, done = step(state, batch(done)), done + 1
            mpjax.checkpoints.save(manager, done, state)
            is_last = done == steps
            tell.send((done, digest(state) if every_step or is_last else None))


def start(*args):
    """Starts `train` and returns its process, and what it tells."""
    # A server that has imported everything, and started no device, is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(*args, tell), daemon=True)
    process.start()
    tell.close()
    return process, told


def run(front_end: str, kills: int, seed: int = 0, steps: int = STEPS) -> int:
    """Kills runs of a front end, and returns how many were killed.

    Args:
      front_end: "linen" or "nnx".
      kills: how many.
      seed: of the points: up to four steps and a fifth of a second later.
      steps: how many a run has.

    Raises:
      AssertionError: a state is not the one of the run that was not interrupted.
    """
    rng, runs, killed, resumed = random.Random(seed), 0, 0, []
    with tempfile.TemporaryDirectory() as root:
        start_one = functools.partial(start, front_end, steps)
        cache = str(pathlib.Path(root) / "cache")
        process, told = start_one(str(pathlib.Path(root) / "whole"), cache, True)
        whole = dict(told.recv() for _ in range(steps + 1))
        process.join()
        while killed < kills:
            runs, ended, state = runs + 1, False, None
            folder = pathlib.Path(root) / f"killed_{runs}"
            while not ended:
                process, told = start_one(str(folder), cache, False)
                at, state = told.recv()
                assert state == whole[at], (
                    f"{front_end}: step {at} resumes from another"
                )
                resumed.append(at)
                more = rng.randint(0, 4) if killed < kills else steps
                for _ in range(min(more, steps - at)):
                    at, state = told.recv()
                ended = at == steps
                if not ended:
                    time.sleep(rng.uniform(0, 0.2))
                    process.kill()
                process.join()
                killed += process.exitcode == -signal.SIGKILL
            assert state == whole[steps], f"{front_end}: another end"
    print(
        f"{front_end}: {killed} kills in {runs} runs of {steps} steps; resumed from "
        f"steps {resumed}, each time bit for bit the state of the run that was not "
        "interrupted",
        flush=True,
    )
    return killed


def main(args=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="for each front end")
    parser.add_argument(
        "--front-end", nargs="+", choices=FRONT_ENDS, default=[*FRONT_ENDS]
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(args)
    for front_end in args.front_end:
        begin = time.perf_counter()
        run(front_end, args.kills, args.seed)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
