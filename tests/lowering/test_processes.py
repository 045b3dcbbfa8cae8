"""Compilers run in processes of their own, which leave nothing behind."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import pytest
from lowering_programs import PAIR, dot

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx

Struct = jax.ShapeDtypeStruct
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def test_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment, devices = dict(os.environ), jax.devices()
    mpjax.lowering.report(dot, *PAIR, target="h100")
    with pytest.raises(mpjax.lowering.LoweringError):
        mpjax.lowering.report(dot, *[Struct((400_000,) * 2, BF16)] * 2, target="v5e")
    assert (dict(os.environ), jax.devices()) == (environment, devices)
    assert list(tmp_path.iterdir()) == []


ENDLESS = """
import signal, jax, jax.numpy as jnp, mpjax.lowering

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a job of a shell

def f(x):
    for _ in range(400):
        x = jnp.sin(x @ x)
    return x

x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
mpjax.lowering.report(f, x, target="v5e")
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_leaves_nothing(tmp_path, kind):
    def compiling():
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [path] if str(tmp_path) in path.read_text() else []
        return found

    def wait_until(condition):
        for _ in range(6000):  # ten minutes: a machine may be busy
            if condition():
                return
            time.sleep(0.1)
        raise AssertionError("nothing came of it in ten minutes")

    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | dict(TMPDIR=str(tmp_path), PYTHONPATH=str(root))
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        wait_until(lambda: list(tmp_path.glob("mpjax_*/dump/*")))
        assert len(compiling()) == 2  # the guard and the compiler
        process.send_signal(kind)
        process.communicate()
        wait_until(lambda: not compiling())
    assert process.returncode
    assert list(tmp_path.iterdir()) == []
