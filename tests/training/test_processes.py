"""Two processes with four devices each take the decisions of one device."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from training_programs import on_one_device

import mpjax

ROOT = pathlib.Path(mpjax.__file__).parent.parent
SUPPORT = ROOT / "tests" / "support"
SECONDS = 600
ROUNDING = 1e-5  # as of eight devices of one process


@contextlib.contextmanager
def own_port():
    """A port of the loopback interface that no other process is given meanwhile."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))  # and does not listen
        yield held.getsockname()[1]


def run_both(folder):
    """Runs both to their end; if one fails the other is ended too."""
    paths = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    program = [sys.executable, str(SUPPORT / "one_of_two_processes.py")]
    logs = [folder / f"log{i}" for i in range(2)]
    with own_port() as port, contextlib.ExitStack() as stack:
        processes = []
        for i, log in enumerate(logs):
            args = [*program, f"127.0.0.1:{port}", str(i), str(folder)]
            out = stack.enter_context(log.open("w"))
            process = subprocess.Popen(args, env=env, stdout=out, stderr=out)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        end = time.monotonic() + SECONDS
        while not all(process.poll() == 0 for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > end:
                pytest.fail("\n".join(log.read_text()[-3000:] for log in logs))
            time.sleep(0.05)


@pytest.mark.long
def test_two_processes_are_one_device(tmp_path):
    run_both(tmp_path)
    for front_end in ("linen", "nnx"):
        decisions, before, after, history = on_one_device(front_end, 2)
        for process in range(2):
            with np.load(tmp_path / f"{front_end}{process}.npz") as saved:
                seen, *arrays, amaxes = saved.values()
            np.testing.assert_array_equal(seen, decisions)
            for x, old, new in zip(arrays, before, after, strict=True):
                distance = np.linalg.norm(new - old)
                assert np.linalg.norm(x - new) <= ROUNDING * distance
            np.testing.assert_allclose(amaxes, history, rtol=1e-3)
