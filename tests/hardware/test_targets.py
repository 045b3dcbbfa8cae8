"""The table of targets is what their compilers say."""

import pathlib

import pytest

import mpjax
from mpjax import __main__ as command
from mpjax._hardware import targets
from mpjax._lowering import support

GPUS = ["a100", "h100", "b200"]


@pytest.mark.parametrize(
    "target",
    [
        *GPUS,
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in support.compiled_targets()
            if name not in GPUS
        ),
    ],
)
def test_the_table_is_what_compilers_say(target):
    cells = support.verify(target, size=256)
    assert [c for c in cells if c.table != c.compiled] == []
    assert [c.what for c in cells[-len(support.RECIPES) :]] == list(support.RECIPES)
    assert all(c.shown for c in cells)


def test_the_command_prints_the_table_and_the_differences(monkeypatch, capsys):
    assert command.main(["targets"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert header.split() == ["recipe", *targets.TARGETS]
    for name, recipe in support.RECIPES.items():
        (row,) = [row for row in rows if row.strip().startswith(f"{name} ")]
        answers = row.strip().removeprefix(name).split()
        expected = [recipe.is_supported(target)[0] for target in targets.TARGETS]
        assert [answer == "yes" for answer in answers] == expected

    cells = [support.Cell("int8 x int8", True, True, "int8 as int8")]
    monkeypatch.setattr(command, "verify", lambda target: cells)
    assert command.main(["targets", "--verify", "h100"]) == 0
    assert "h100: 1 of 1 cells as compiled" in capsys.readouterr().out
    cells.append(support.Cell("mx_scaling()", True, False, "e4m3fn as bf16"))
    assert command.main(["targets", "--verify", "v6e"]) == 1
    shown = capsys.readouterr().out
    assert "mx_scaling(): native in the table, compiled e4m3fn as bf16" in shown

    def missing(target):
        raise ImportError("pip install 'mpjax[lowering]'")

    monkeypatch.setattr(command, "verify", missing)
    assert command.main(["targets", "--verify"]) == 2
    assert "mpjax[lowering]" in capsys.readouterr().err


def test_targets_by_any_name():
    for name in ("v7x", "tpu7x", "TPU-v7x"):
        assert targets.get_target(name) is targets.TARGETS["v7x"]
    assert targets.get_target(targets.TARGETS["h100"]).name == "h100"
    with pytest.raises(ValueError, match=r"Known targets are cpu, a100.*got 'gtx'"):
        targets.get_target("gtx")
    with pytest.raises(FileNotFoundError):
        targets.get_target("no_such.txtpb")


def test_a_target_is_one_row(monkeypatch, capsys):
    int8 = ((targets.INT8, targets.INT8),)
    row = targets.Target("v9", "tpu", int8, aliases=("tpu-v9",), chip="v9", axes=2)
    monkeypatch.setitem(targets.TARGETS, "v9", row)
    assert targets.get_target("TPU-v9") is row
    assert mpjax.current_scaling("int8", "int8").is_supported("v9")[0]
    assert not mpjax.current_scaling().is_supported("tpu-v9")[0]
    assert row.topology(4) == ("v9:2x2", {"chips_per_host_bounds": [2, 2, 1]})
    assert "v9" in support.compiled_targets()
    assert command.main(["targets"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[-1] == "v9"
    native = [row.split()[0] for row in rows if row.split()[-1:] == ["yes"]]
    assert native == ["current_scaling('int8',"]
    with pytest.raises(ValueError, match=r"v9, tpu-v9.*got 'gtx'"):
        targets.get_target("gtx")


def test_the_page_shows_the_table():
    page = pathlib.Path(__file__).parents[2] / "docs" / "lowering.md"
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text().partition("## Which recipe")[2].splitlines()
        if line.startswith("|")
    ]
    names = [name for name in targets.TARGETS if name != "cpu"]
    assert header == ["recipe", *names]
    assert rows == [
        [f"`{what}`", *("yes" * recipe.is_supported(name)[0] for name in names)]
        for what, recipe in support.RECIPES.items()
    ]


def test_figures_of_gpus_are_package_data():
    folder = pathlib.Path(mpjax.__file__).parent / "_hardware" / "gpus"
    assert {path.stem for path in folder.glob("*.txtpb")} == set(GPUS)
    for name in GPUS:
        assert "cuda_compute_capability" in targets.TARGETS[name].config


@pytest.mark.parametrize(
    ("target", "devices", "topology"),
    [
        ("v4", 1, "v4:1x1x1"),
        ("v4", 4, "v4:2x2x1"),
        ("v5p", 16, "v5p:2x2x4"),
        ("v5e", 1, "v5e:1x1"),
        ("v6e", 4, "v6e:2x2"),
        ("v6e", 8, "v6e:2x4"),
        ("v7x", 2, "tpu7x:1x1x1"),
        ("v7x", 4, "tpu7x:2x2x1"),
        ("v7x", 16, "tpu7x:2x2x2"),
    ],
)
def test_slices_with_enough_chips(target, devices, topology):
    name, options = targets.TARGETS[target].topology(devices)
    assert name == topology
    assert len(options["chips_per_host_bounds"]) == 3
    shape = topology.split(":")[1]
    assert targets.TARGETS[target].topology(devices, shape)[0] == topology


def test_nodes_of_gpus():
    h100 = targets.TARGETS["h100"]
    assert h100.topology(4)[1]["topology"] == "1x1x4"
    assert h100.topology(16)[1]["topology"] == "1x2x8"


def test_own_gpus_multiply_what_those_of_their_capability_do(tmp_path):
    h100 = targets.TARGETS["h100"].config
    own = tmp_path / "h200.txtpb"
    own.write_text(h100)
    recipe = mpjax.current_scaling()
    assert recipe.is_supported(str(own))[0]
    assert recipe.is_supported(str(own))[1].startswith("h200")
    own.write_text(h100.replace("major: 9", "major: 8\n minor: 9"))
    with pytest.raises(ValueError, match=r"not known here[\s\S]*report tells"):
        recipe.is_supported(str(own))
    own.write_text("")
    with pytest.raises(ValueError, match=r"Figures of a GPU[\s\S]*h200.txtpb has not"):
        recipe.is_supported(str(own))


@pytest.mark.parametrize("topology", ["abc", "1x1", "1x1x1x1", "1x1x2"])
def test_topologies_that_are_none_or_too_small(topology):
    for name in ("v4", "h100"):
        with pytest.raises(ValueError, match="for 4 devices"):
            targets.TARGETS[name].topology(4, topology)
