"""What the README shows runs."""

import pathlib
import re

import jax

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) > 4
    namespace = {}
    # As a newcomer has it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(block, namespace)
    assert "LayerNorm" in capsys.readouterr().out
    assert int(namespace["mpjax"].skipped_steps(namespace["opt_state"])) == 0
