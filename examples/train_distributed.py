"""Trains the transformer of train_lm.py on many devices, is killed, and resumes.

    python examples/train_distributed.py --parallel data fsdp --kill-at random
    python examples/train_distributed.py --processes 2 --policy mixed_bfloat16 \
        --recipe delayed --kill-at 20

The devices are simulated, on any machine: `--devices` of them in each of `--processes`
processes, which find one another by ``jax.distributed`` on the loopback interface. Data
parallel, each has the whole state and a part of the batch; under FSDP each has a part
of the state as well. Every few steps a `CheckpointManager` saves the state while
training goes on.

With `--kill-at` all processes of a second run are ended by SIGKILL at that step. They
are started again, go on from the last checkpoint, and every loss from there on is bit
for bit that of the run which was not interrupted.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import tqdm
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import mpjax
import mpjax.checkpoints
import mpjax.linen

sys.path.append(str(pathlib.Path(__file__).parent))
from train_lm import BATCH, LENGTH, RECIPES, Transformer, batches

SAVE_EVERY = 5
FIGURES = "figures:"


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process of a run is told."""

    parallel: str
    policy: str
    recipe: str | None
    devices: int
    processes: int
    steps: int
    seed: int
    folder: str
    cache: str
    coordinator: str = ""


@dataclasses.dataclass
class Run:
    """What a run leaves for the table and the plot, each a number a step."""

    name: str
    losses: list[float] = dataclasses.field(default_factory=list)
    scales: list[float] = dataclasses.field(default_factory=list)
    skipped: int = 0
    killed_at: int | None = None
    resumed_from: int | None = None


def new_state(model, tx, key) -> mpjax.TrainState:
    """A state before its first step."""
    variables = model.init(key, jnp.zeros((1, LENGTH), jnp.int32))
    return mpjax.TrainState.create(apply_fn=model.apply, tx=tx, **variables)


def placed(shapes, mesh, parallel: str):
    """The shapes of a state, with the devices of each array.

    Under FSDP arrays are split along their last axis that can be.
    """

    def place(x):
        axes = [None] * x.ndim
        for axis in range(x.ndim) if parallel == "fsdp" else ():
            if x.shape[axis] % mesh.size == 0 and x.shape[axis] >= 32:
                axes = [None] * x.ndim
                axes[axis] = "devices"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def work(job: Job, process: int) -> None:
    """One process of a run. The first prints its figures, a line a step."""
    if job.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(job.coordinator, job.processes, process)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
    rule = mpjax.Rule(".*", job.policy, RECIPES[job.recipe]) if job.recipe else None
    model = mpjax.linen.MixedPrecision(Transformer(64, 2), rule or job.policy)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, job.steps // 10, job.steps)
    tx = mpjax.dynamic_loss_scaling(optax.adamw(schedule, b2=0.95), growth_interval=20)

    # The state is made where it is to be: no device ever holds more than its part.
    create = functools.partial(new_state, model, tx)
    key = jax.random.key(job.seed)
    shapes = placed(jax.eval_shape(create, key), mesh, job.parallel)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    def train_step(state, tokens):
        def loss_fn(variables):
            logits: Any = state.apply_fn(variables, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = mpjax.value_and_grad(loss_fn, state)(state.variables)
        new = state.apply_gradients(grads=grads)
        return new, (loss, state.loss_scale, new.skipped_steps)

    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=2
    )
    with ocp.CheckpointManager(job.folder, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            state = mpjax.checkpoints.restore(manager, shapes, done)
        else:
            state = jax.jit(create, out_shardings=shardings)(key)
        rows = NamedSharding(mesh, PartitionSpec("devices"))
        rest = itertools.islice(batches(job.steps, job.seed), done, None)
        for step, tokens in enumerate(rest, done + 1):
            tokens = jax.make_array_from_callback(
                tokens.shape, rows, tokens.__getitem__
            )
            state, figures = train_step(state, tokens)
            mpjax.checkpoints.save(manager, step, state)
            if process == 0:
                print(FIGURES, json.dumps([step, *map(float, figures)]), flush=True)


def start(job: Job) -> list[subprocess.Popen]:
    """The processes of a run; the first one's output is piped."""
    if job.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        job = dataclasses.replace(job, coordinator=address)
    flags = f"--xla_force_host_platform_device_count={job.devices}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        # A process that is started again compiles nothing.
        "JAX_COMPILATION_CACHE_DIR": job.cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(job))]
    return [
        subprocess.Popen(
            [*command, "--process", str(process)],
            env=env,
            text=True,
            stdout=subprocess.DEVNULL if process else subprocess.PIPE,
            stderr=subprocess.DEVNULL if process else None,
        )
        for process in range(job.processes)
    ]


def figures_of(processes: list[subprocess.Popen]) -> Iterator[list[float]]:
    """What the processes of a run print, until they end or are ended."""
    output = processes[0].stdout
    assert output is not None
    try:
        with output:
            for line in output:  # Gloo has lines of its own
                if line.startswith(FIGURES):
                    yield json.loads(line.removeprefix(FIGURES))
        if any(process.wait() for process in processes):
            raise RuntimeError("A process of the run has failed; see above.")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(name: str, job: Job, kill_at: int | None) -> Run:
    """Trains, and is killed on the way if it is told to be."""
    run = Run(name, killed_at=kill_at)
    with tqdm.tqdm(desc=name, total=job.steps) as progress:
        for at in (kill_at, None) if kill_at else (None,):
            for step, loss, scale, skipped in figures_of(start(job)):
                if at is None and kill_at and run.resumed_from is None:
                    run.resumed_from = int(step) - 1
                del run.losses[int(step) - 1 :], run.scales[int(step) - 1 :]
                run.losses.append(loss)
                run.scales.append(scale)
                run.skipped = int(skipped)
                progress.n = int(step)
                progress.set_postfix(loss=f"{loss:.3f}", scale=f"{scale:g}")
                if step == at:
                    break  # which ends the processes by SIGKILL
    return run


def table(runs: list[Run]) -> Table:
    """The runs; those that were killed are compared with those before them."""
    result = Table(
        title="Loss of the last step, nats a byte",
        caption="same: all losses and scales, bit for bit, as in the run before",
    )
    for column in (
        "run",
        "loss",
        "skipped",
        "scale",
        "killed at",
        "went on from",
        "same",
    ):
        result.add_column(column, no_wrap=True)
    for before, run in zip([None, *runs], runs, strict=False):
        same = "" if run.killed_at is None else str(before and same_losses(before, run))
        result.add_row(
            run.name,
            f"{run.losses[-1]:.6f}",
            f"{run.skipped}",
            f"{run.scales[-1]:g}",
            *("" if x is None else f"{x}" for x in (run.killed_at, run.resumed_from)),
            same,
        )
    return result


def same_losses(one: Run, other: Run) -> bool:
    """Whether all losses and loss scales are equal."""
    return (one.losses, one.scales) == (other.losses, other.scales)


def plot(runs: list[Run], path: str) -> None:
    """Draws losses against the step, and where a run was killed and went on."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        killed = run.killed_at is not None
        style: dict[str, Any] = {"linewidth": 1.5 if killed else 5, "alpha": 0.7}
        (line,) = axes.plot(range(1, len(run.losses) + 1), run.losses, **style)
        line.set_label(run.name)
        for at, dashes in ((run.killed_at, "-"), (run.resumed_from, ":")):
            if at is not None:
                axes.axvline(at, color=line.get_color(), linestyle=dashes, alpha=0.5)
    axes.set(
        ylabel="loss",
        xlabel="step",
        title="killed where the line is solid, went on from where it is dotted",
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def main(args=None) -> list[Run]:
    """Trains as it is asked to, without and with being killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--parallel", nargs="+", choices=("data", "fsdp"), default=["fsdp"]
    )
    parser.add_argument("--devices", type=int, default=4, help="in each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--recipe", choices=RECIPES, help="multiplies in fp8")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-at", help="a step, or 'random'")
    parser.add_argument("--plot", default="train_distributed.png")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(args)
    if args.job:
        work(Job(**json.loads(args.job)), args.process)
        return []
    if args.steps < 2:
        parser.error(f"--steps is at least 2, got {args.steps}")
    if min(args.devices, args.processes) < 1 or BATCH % (args.devices * args.processes):
        parser.error(f"--devices times --processes divides the batch of {BATCH}")
    mpjax.get_policy(args.policy)  # a misspelled one raises here, not in a process
    kill_at = None
    if args.kill_at == "random":
        kill_at = random.randrange(1, args.steps)
    elif args.kill_at:
        kill_at = int(args.kill_at)
        if not 0 < kill_at < args.steps:
            parser.error(f"--kill-at is a step before the last, got {kill_at}")
    pathlib.Path(args.plot).touch()  # rather than to fail when all is done

    runs = []
    with tempfile.TemporaryDirectory() as root:
        for parallel in args.parallel:
            for at in (None, kill_at) if kill_at else (None,):
                job = Job(
                    parallel,
                    args.policy,
                    args.recipe,
                    args.devices,
                    args.processes,
                    args.steps,
                    args.seed,
                    folder=f"{root}/{parallel}_{at}",
                    cache=f"{root}/cache",
                )
                name = f"{parallel}, killed" if at else parallel
                runs.append(train(name, job, at))
    Console().print(table(runs))
    plot(runs, args.plot)
    print(f"Plot of the losses: {args.plot}")
    return runs


if __name__ == "__main__":
    main()
