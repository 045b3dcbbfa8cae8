"""Tables of a mixed model."""

from nnx_models import MLP, OwnParams, rngs

import mpjax
import mpjax.nnx
from mpjax.nnx import mixed_precision


def test_tabulate():
    rules = [mpjax.Rule("head", None), "mixed_bfloat16"]
    model = mixed_precision(MLP(rngs()), rules)
    lines = mpjax.nnx.tabulate(model).splitlines()
    assert lines[0] == "5 layers, 123 parameters in 492 bytes"
    rows = [line.split() for line in lines[3:]]
    assert rows[1:] == [
        ["dropout", "Dropout", "p=f32,c=bf16,o=f32", "-", "0"],
        ["head", "Linear", "-", "-", "f32", "27"],
        ["linear", "Linear", "p=f32,c=bf16,o=f32", "-", "f32", "72"],
        [
            *("norm", "BatchNorm", "p=f32,c=f32,o=bf16", "-", "f32", "16"),
            *("norm:", "BatchNorm", "of", "Flax"),
        ],
    ]
    assert rows[0] == ["MLP", "p=f32,c=bf16,o=f32", "-", "f32", "8"]
    table = mpjax.nnx.tabulate(mixed_precision(OwnParams(None, rngs()), "bf16"))
    assert len(table.splitlines()) == 4 and "1 layers" in table
