"""A compiler without an answer is distinguished from one that refuses the program."""

import errno
import importlib.util
import pathlib

import jax.numpy as jnp
import pytest
from lowering_programs import PAIR, dot

import mpjax.lowering
from mpjax._lowering import compiler

ENDS = {
    "killed": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        r"killed by SIGKILL, which says nothing about this program: .* memory",
    ),
    "full disk": (
        "raise OSError(28, 'No space left on device', 'module.txt')",
        r"disk is full, which says nothing about this program: .*mpjax_.*set TMPDIR",
    ),
    "no memory": ("raise MemoryError('of the host')", r"found no memory \(exit status"),
    "crash": (
        "import os; os.write(2, b'F0000 Check failed: x'); os.abort()",
        r"crashed on this program \(SIGABRT\):\n.*Check failed: x",
    ),
    "refusal": (
        "raise ValueError('no such layout')",
        r"refused this program \(exit status 1\):\nValueError: no such layout",
    ),
}


@pytest.fixture
def compile_by(tmp_path, monkeypatch):
    """Puts a script in the place of the compiler."""

    def put(script):
        worker = tmp_path / "worker.py"
        worker.write_text(script)
        monkeypatch.setattr(compiler, "_WORKER", worker)

    return put


@pytest.mark.parametrize("end", ENDS)
def test_the_message_says_how_a_compiler_ended(compile_by, end):
    script, message = ENDS[end]
    compile_by(script)
    with pytest.raises(mpjax.lowering.LoweringError, match=f"(?s){message}") as raised:
        mpjax.lowering.report(dot, *PAIR, target="cpu")
    assert "cpu" in str(raised.value)
    assert ("refused" in str(raised.value)) == (end == "refusal")


def test_one_that_hangs_is_ended(compile_by, tmp_path):
    compile_by(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
        "\ntime.sleep(10_000)"
    )
    with pytest.raises(mpjax.lowering.LoweringError, match="after timeout=2 seconds"):
        mpjax.lowering.report(dot, *PAIR, target="cpu", timeout=2)
    pid = tmp_path / "pid"
    assert not pid.exists() or not pathlib.Path("/proc", pid.read_text()).exists()


def test_a_disk_that_is_full_before_the_compiler_runs(monkeypatch):
    def write_bytes(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    with pytest.raises(mpjax.lowering.LoweringError, match="The disk is full"):
        mpjax.lowering.report(dot, *PAIR, target="cpu")


def test_what_is_missing_is_named_before_anything_runs(monkeypatch):
    find = importlib.util.find_spec

    def without(name, *args):
        return None if name == "flatbuffers" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)

    def never(x, y):
        raise AssertionError("the function ran")

    for call in (
        lambda: mpjax.lowering.report(never, *PAIR, target="cpu"),
        lambda: mpjax.lowering.assert_native(
            never, *PAIR, target="v7x", dtype=jnp.bfloat16
        ),
    ):
        with pytest.raises(ImportError, match=r"needs flatbuffers.*mpjax\[lowering\]"):
            call()


@pytest.mark.parametrize(
    ("timeout", "error"), [(0, ValueError), (-1.0, ValueError), ("5", TypeError)]
)
def test_a_timeout_is_a_number_of_seconds(timeout, error):
    with pytest.raises(error, match=r"timeout is a .*number of seconds"):
        mpjax.lowering.report(dot, *PAIR, target="cpu", timeout=timeout)
