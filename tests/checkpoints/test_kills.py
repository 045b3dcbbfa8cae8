"""A process that is killed goes on from the state of a run that was not."""

import importlib
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
kills = importlib.import_module("kills")


@pytest.mark.long
@pytest.mark.parametrize("front_end", kills.FRONT_ENDS)
def test_a_killed_run_resumes_bit_for_bit(front_end, capsys):
    assert kills.run(front_end, kills=2, seed=1, steps=10) == 2
    assert "2 kills in 1 runs" in capsys.readouterr().out
