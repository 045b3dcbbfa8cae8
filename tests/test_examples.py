"""The examples, as a user runs them, reach what float32 reaches."""

import functools

import jax
import numpy as np
import pytest

from examples import EXAMPLES, load


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    # The schedules and bias corrections of optax promote dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.long
def test_train_lm(tmp_path, capsys):
    plot = tmp_path / "plot.png"
    policies = ["mixed_float16", "mixed_float8"]
    arguments = ["--steps", "150", "--plot", str(plot), "--policy", *policies]
    runs = load("train_lm").main([*arguments, "--recipe", "delayed"])
    float32, float16, float8 = runs
    names = ["float32", "mixed_float16", "mixed_float8 delayed"]
    assert [run.name for run in runs] == names
    assert all(np.isfinite(run.losses).all() for run in runs)
    assert float32.losses[0] > 5 > 2.5 > float32.final_loss
    assert float16.final_loss == pytest.approx(float32.final_loss, rel=0.01)
    assert float8.final_loss == pytest.approx(float32.final_loss, rel=0.01)
    # The same batches in the same order: the first losses differ by rounding alone.
    assert float16.losses[0] == pytest.approx(float32.losses[0], rel=2**-8)
    assert float32.skipped == float8.skipped == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Block_0/Dense_0" in printed
    assert "mixed_float16" in printed


def test_autocast_anything(capsys):
    runs = load("autocast_anything").main(["--steps", "40"])
    assert len(runs) == 8
    for float32, bfloat16 in zip(runs[::2], runs[1::2], strict=True):
        assert (float32.low_share, bfloat16.low_share) == (0, 1)
        assert bfloat16.losses[0] == pytest.approx(float32.losses[0], rel=0.01)
        assert float32.losses != bfloat16.losses
        for run in (float32, bfloat16):
            assert np.mean(run.losses[-5:]) < 0.8 * run.losses[0]
    assert "haiku" in capsys.readouterr().out


@pytest.mark.long
def test_train_lm_has_the_bytes_of_optimizer_states(tmp_path, monkeypatch, capsys):
    example = load("train_lm")
    small = functools.partial(example.Transformer, width=256, depth=1)
    monkeypatch.setattr(example, "Transformer", small)
    states = ["8bit", "split-8bit", "stochastic-8bit"]
    arguments = ["--steps", "3", "--plot", str(tmp_path / "plot.png"), "--policy"]
    runs = example.main([*arguments, "--optimizer-state", *states])
    assert [run.name for run in runs] == ["float32", *states]
    sizes = [run.bytes for run in runs]
    np.testing.assert_allclose(sizes, [12, 6.1, 6.1, 4.1], atol=0.05)
    losses = np.array([run.losses for run in runs])
    np.testing.assert_allclose(losses, losses[:1].repeat(4, 0), rtol=0.02)
    assert "bytes" in capsys.readouterr().out


@pytest.mark.long
def test_train_distributed_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    plot = tmp_path / "plot.png"
    arguments = ["--devices", "2", "--steps", "8", "--kill-at", "7"]
    whole, killed = load("train_distributed").main([*arguments, "--plot", str(plot)])
    assert [whole.name, killed.name] == ["fsdp", "fsdp, killed"]
    assert len(whole.losses) == 8 and np.isfinite(whole.losses).all()
    assert whole.losses[-1] < whole.losses[0] - 0.5
    assert (killed.losses, killed.scales) == (whole.losses, whole.scales)
    assert killed.killed_at == 7 and killed.resumed_from in (0, 1, 5)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "True" in capsys.readouterr().out


@pytest.mark.long
def test_train_digits_survives_a_poisoned_batch(capsys):
    policies = ["mixed_float16"]
    runs = load("train_digits").main(["--poison", "--policy", *policies])
    assert [policy for policy, *_ in runs] == ["float32", *policies]
    float32 = runs[0][1]
    assert float32 > 0.97
    for policy, accuracy, skipped, scale in runs:
        assert accuracy == pytest.approx(float32, abs=0.005)
        assert skipped == 1
        # In float16 the loss itself is NaN, which says nothing about its scale.
        assert scale == 2.0 ** (16 if policy == "mixed_float16" else 15)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("bit for bit as before: True") == 2
