"""Reports of whole programs: train steps, meshes, the examples."""

import os
import pathlib
import re
import resource
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from lowering_programs import Stack, dot, fp8, train_step

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx

Struct = jax.ShapeDtypeStruct
E4M3, E5M2, INT8 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.mark.parametrize("target", ["v7x", "h100"])
def test_scan_and_remat(target):
    model = mpjax.linen.MixedPrecision(Stack(), fp8())
    step, args = train_step(model, Struct((64, 128), F32))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    made, quick = (
        mpjax.lowering.report(jitted, *args, target=target, quick=quick)
        for quick in (False, True)
    )
    units = [[(p.traced, p.unit, p.verdict) for p in r.products] for r in (made, quick)]
    assert units[0] == units[1]
    written = mpjax.lowering.census(step, *args)
    # Forward, recomputed, and both gradients; XLA drops what nobody needs.
    assert made.flops <= written.flops
    layer = 2 * 64 * 128 * 512 * 4
    rows = [p for p in made.products if p.traced.path.endswith("Dense_1")]
    assert {p.traced.flops for p in rows} == {layer}
    assert made.native_share > 0.99, str(made)
    assert not [p for p in made.products if p.verdict in ("vector", "unknown")]
    assert all("Layer" in p.traced.path for p in rows)
    assert made.memory.aliased == pytest.approx(made.memory.output, rel=0.01)


@pytest.mark.long
def test_a_billion_parameters():
    """In a process of its own, so that all that was ever allocated can be counted."""
    folder = pathlib.Path(__file__).parent
    support, root = folder.parent / "support", folder.parents[1]
    path = os.pathsep.join([str(root), str(support), os.environ.get("PYTHONPATH", "")])
    command = "import test_programs; test_programs.report_a_billion_parameters()"
    environment = os.environ | {"PYTHONPATH": path}
    run = [sys.executable, "-c", command]
    subprocess.run(run, cwd=folder, env=environment, check=True)


def report_a_billion_parameters():
    model = mpjax.linen.MixedPrecision(Stack(width=2048, depth=32), fp8())
    step, args = train_step(model, Struct((256, 2048), F32))
    size = sum(x.size for x in jax.tree.leaves(args[0]))
    assert size > 1e9
    for target in ("v7x", "h100"):
        made = mpjax.lowering.report(step, *args, target=target, quick=True)
        assert made.native_share > 0.99
        assert made.memory.argument > 8 * size  # float32 parameters and momentum
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    of_compilers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peaks: {peak / 1e6:.2f} GB here, {of_compilers / 1e6:.2f} GB of a compiler")
    assert 1024 * max(peak, of_compilers) < 4 * size


@pytest.mark.parametrize("target", ["v7x", "h100"])
def test_sharded(target):
    abstract = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    model = mpjax.linen.MixedPrecision(
        nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(256)]), fp8()
    )
    reports = []
    for mesh in (abstract, devices):

        def place(x, *names, mesh=mesh):
            sharding = NamedSharding(mesh, PartitionSpec(*names))
            return Struct(x.shape, x.dtype, sharding=sharding)

        step, args = train_step(model, Struct((128, 256), F32))
        params = jax.tree.map(
            lambda x: place(x, *[None] * (x.ndim - 1), "model"), args[0]
        )
        inputs = place(args[2], "data")
        args = params, jax.eval_shape(optax.sgd(1e-3, 0.9).init, params), inputs
        reports.append(mpjax.lowering.report(step, *args, target=target))
    abstract, concrete = reports
    assert abstract.to_dict() == concrete.to_dict()
    assert abstract.native_share > 0.99 and abstract.flops == 2 * 128 * 256 * 512 * 5
    weights = 4 * 2 * 256 * 512
    assert abstract.memory.argument < 1.5 * (weights + 4 * 128 * 256)


def test_gathered_in_fp8():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data", None)

    def gathered(x, w):
        return dot(x, lax.all_gather(w, "data", axis=0, tiled=True))

    fn = jax.shard_map(
        gathered, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
    )
    x = Struct((512, 512), E4M3, sharding=NamedSharding(mesh, spec))
    made = mpjax.lowering.report(fn, x, x, target="h100")
    assert (made.native_share, made.flops) == (1, 2 * 512**3)


def example(name):
    import importlib.util

    path = pathlib.Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize("target", ["v6e", "h100"])
def test_train_step_of_the_language_model(target):
    model = mpjax.linen.MixedPrecision(
        example("train_lm").Transformer(), "mixed_bfloat16"
    )
    optimizer = mpjax.dynamic_loss_scaling(optax.adamw(1e-3))

    @jax.jit
    def step(params, opt_state, tokens):
        def loss_fn(params):
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        loss, grads = mpjax.value_and_grad(loss_fn, opt_state)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    tokens = Struct((16, 65), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), Struct((1, 64), jnp.int32))
    args = params, jax.eval_shape(optimizer.init, params), tokens
    with jax.numpy_dtype_promotion("standard"):  # as optax.adamw needs it
        made = mpjax.lowering.assert_native(
            step, *args, target=target, dtype=BF16, at_least=0.85
        )
    assert len(made.products) == 3 * (3 * 8 + 1)
    assert not [p for p in made.products if p.verdict == "removed"]
    paths = {p.traced.path.removeprefix("MixedPrecision/") for p in made.products}
    assert {"Transformer/Block_2/Dense_1", "Transformer/Embed_0.attend"} <= paths
    assert {p.traced.where.split(":")[0] for p in made.products} == {"train_lm.py"}


@pytest.mark.long
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_train_step_of_the_digits(target):
    from flax import nnx

    network = example("train_digits").ResNet(rngs=nnx.Rngs(0))
    model = mpjax.nnx.mixed_precision(network, "mixed_bfloat16")
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, images, labels):
        model = nnx.merge(graph, params, stats, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    step = jax.grad(loss_fn, has_aux=True)
    images, labels = Struct((64, 8, 8, 1), F32), Struct((64,), jnp.int32)
    made = mpjax.lowering.report(step, params, stats, images, labels, target=target)
    convolutions = [
        p for p in made.products if p.traced.primitive == "conv_general_dilated"
    ]
    assert len(convolutions) == 2 + 4 * 3  # nobody needs the gradient of the images
    assert made.flops_by_dtype() == {"bfloat16": made.flops}
    assert not [p for p in made.products if p.verdict in ("removed", "unknown")]
