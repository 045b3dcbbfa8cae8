"""Reports: what they take, how they read, and what they refuse."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from lowering_programs import PAIR, dot

import mpjax.lowering

Struct = jax.ShapeDtypeStruct
BF16 = jnp.bfloat16
SIZE = 512


def test_every_cell_is_asked_for_once():
    made = mpjax.lowering.census(dot, *PAIR)
    assert [p.flops for p in made.products] == [2 * SIZE**3]
    assert made.products[0].where.startswith("lowering_programs.py:")


def test_own_gpu(tmp_path):
    figures = pathlib.Path(mpjax.__file__).parent / "_hardware" / "gpus" / "h100.txtpb"
    path = tmp_path / "h200.txtpb"
    path.write_text(figures.read_text().replace("85", "141", 1))
    made = mpjax.lowering.report(dot, *PAIR, target=path)
    assert (made.target, made.native_share) == ("h200", 1)


def test_readable_in_every_form():
    made = mpjax.lowering.report(dot, *PAIR, target="h100")
    text, page = str(made), made._repr_html_()
    assert text.startswith("h100: 1 product, 268 MFLOP, 100.0% native")
    assert "__cublas$lt$matmul$f8" in page and "cublas" not in text
    for shown in ("e4m3fn -> f32", "native"):
        assert shown in text
        assert shown.replace(">", "&gt;") in page
    data = json.loads(made.to_json())
    assert data == made.to_dict() | {"products": [dict(data["products"][0])]}
    (row,) = data["products"]
    assert (row["verdict"], row["flops"], row["share"]) == ("native", 2 * SIZE**3, 1)
    assert data["memory"]["argument"] == 2 * SIZE**2
    assert (
        made.flops_by_unit() == made.flops_by_dtype() == {"float8_e4m3fn": made.flops}
    )


@functools.partial(jax.jit, static_argnames="mode", donate_argnums=0)
def sampled(x, key, *, mode):
    noise = jax.random.normal(key, x.shape, x.dtype)
    return x @ x + noise if mode == "train" else x @ x


def test_keys_static_and_donated_arguments():
    x, key = Struct((256, 256), BF16), jax.random.key(0)
    made = mpjax.lowering.report(sampled, x, key, mode="train", target="h100")
    assert made.memory.aliased == made.memory.output == 2 * 256**2


def printing(x):
    with jax.named_scope("layer"):
        jax.debug.print("{}", x[0, 0])
    return x @ x


def shapes(*shape):
    return Struct(shape, BF16)


def test_arguments_on_two_meshes_are_refused_before_any_compiler():
    def place(dtype, **axes):
        mesh = AbstractMesh(
            tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
        )
        sharding = NamedSharding(mesh, PartitionSpec(*list(axes)[:1]))
        return Struct((8, 8), dtype, sharding=sharding)

    for other in (dict(b=4), dict(a=2), dict(a=2, b=2), dict(b=2, a=2)):
        args = place(BF16, a=4), place(BF16, **other)
        with pytest.raises(ValueError, match=r"one mesh; got .*'a': 4.* and "):
            mpjax.lowering.report(jnp.dot, *args, target="h100")


def test_clear_errors(monkeypatch):
    report = functools.partial(mpjax.lowering.report, target="h100")
    with pytest.raises(ValueError, match=r"Known targets are cpu.*got 'h900'"):
        mpjax.lowering.report(dot, *PAIR, target="h900")
    with pytest.raises(ValueError, match="no compiler for mi300"):
        mpjax.lowering.report(dot, *PAIR, target="mi300")
    for target in (None, 3, ["cpu", "h100"], jax.devices()[0]):
        with pytest.raises(TypeError, match=r"one name such as 'h100'.*got"):
            mpjax.lowering.report(dot, *PAIR, target=target)
    for topology in (4, (2, 2)):
        with pytest.raises(ValueError, match="A topology of v5e is 2 numbers"):
            mpjax.lowering.report(dot, *PAIR, target="v5e", topology=topology)
    for options in ("xla_a=1", ["xla_a"]):
        with pytest.raises(TypeError, match=r"is a dict of options.*xla_a"):
            report(dot, *PAIR, compiler_options=options)
    for options in ({"xla_a": np.ones(2)}, {"xla_a": None}, {1: True}):
        with pytest.raises(TypeError, match=r"maps names to strings.*got .*, of "):
            report(dot, *PAIR, compiler_options=options)
    with pytest.raises(mpjax.lowering.LoweringError, match="No such compile option"):
        report(dot, *PAIR, compiler_options={"xla_a": True})
    with pytest.raises(ValueError, match=r"debug.*test_report.py:\d+ in printing"):
        report(printing, shapes(8, 8))
    with pytest.raises(TypeError, match="contracting dimensions"):  # of JAX, as it is
        report(jnp.dot, shapes(8, 9), shapes(8, 9))
    with pytest.raises(mpjax.lowering.LoweringError, match="HBM"):
        mpjax.lowering.report(jnp.dot, *[shapes(400_000, 400_000)] * 2, target="v5e")
    with pytest.raises(mpjax.lowering.LoweringError, match=r"lower.* for h100"):
        report(lambda x: lax.platform_dependent(x, tpu=jnp.sin), shapes(8, 8))
    find = "mpjax._lowering.compiler.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    for target in ("h100", "v5e", "cpu"):
        with pytest.raises(ImportError, match=r"pip install 'mpjax\[lowering\]'"):
            mpjax.lowering.report(dot, *PAIR, target=target)
