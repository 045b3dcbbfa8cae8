"""The benchmarks' tables are what their JSON gives, and that is what compilers say."""

import importlib
import json
import pathlib
import sys

import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

_results = importlib.import_module("_results")
fp8 = importlib.import_module("fp8")
tables = importlib.import_module("tables")

ROW = _results.Row({"target": "h100", "way": "bf16"}, {"bytes": 3}, True, {"jax": "1"})


def test_readme_has_the_tables_of_the_json(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_check_fails_for_another_figure(tmp_path, monkeypatch, capsys):
    text = tables.README.read_text()
    readme = tmp_path / "README.md"
    monkeypatch.setattr(tables, "README", readme)
    changed = text.replace("| bf16 | 7.3", "| bf16 | 8.3")
    assert changed != text
    readme.write_text(changed)
    assert tables.main(["--check"]) == 1
    assert "run tables.py" in capsys.readouterr().out
    assert readme.read_text() == changed
    assert tables.main([]) == 0
    assert readme.read_text() == text
    assert tables.main(["--check"]) == 0


def test_a_table_without_a_marker_raises():
    text = tables.README.read_text().replace("<!-- table:fp8_cpu -->", "")
    with pytest.raises(ValueError, match="has to have each table"):
        tables.render(text)
    with pytest.raises(ValueError, match="fp8_cpu"):
        tables.render(text + "<!-- table:fp9_cpu -->\n<!-- end -->\n")


def test_a_cell_without_a_figure_says_so():
    show = tables.ratio("bytes_ratio_to_bf16")
    assert tables.cell(show, {}) == "not measured"
    assert tables.cell(show, {"bytes_ratio_to_bf16": 0.7944}) == ".794"
    assert tables.cell(show, {"bytes_ratio_to_bf16": 1.0}) == "1.000"


def test_a_row_takes_the_place_of_its_case_and_version():
    other_case = _results.Row({"target": "b200", "way": "bf16"}, {}, True, {"jax": "1"})
    other_jax = _results.Row(ROW.case, {}, True, {"jax": "2"})
    again = _results.Row(ROW.case, {"bytes": 4}, True, {"jax": "1", "libtpu": "0"})
    rows = _results.merge([ROW, other_case], [other_jax, again])
    assert rows == [again, other_case, other_jax]
    assert _results.find(rows, "1", way="bf16", target="h100") is again
    assert _results.find(rows, "3", way="bf16", target="h100") is None


def test_rows_are_saved_with_what_measured_them(tmp_path, monkeypatch):
    path = tmp_path / "made" / "fp8.json"
    monkeypatch.setattr(sys, "argv", ["/x/fp8.py", "--ways", "a b", "--json", "f.json"])
    _results.save(None, ROW.case, ROW.figures, deterministic=True, device="h100")
    assert not path.exists()
    figures = {"bytes": 3, "cycles": None}
    _results.save(path, ROW.case, figures, deterministic=True, device="h100")
    _results.save(path, {"target": "cpu"}, {"wall_seconds": 1}, deterministic=False)
    counted, timed = _results.read(path)
    assert (counted.case, counted.figures) == (ROW.case, {"bytes": 3})
    assert counted.deterministic and counted.device == "h100"
    assert counted.versions["jax"] == jax.__version__
    assert counted.command == "python benchmarks/fp8.py --ways 'a b' --json"
    assert counted.notes is None and counted.measured is None
    assert not timed.deterministic and timed.notes is not None
    assert timed.notes["load"] >= 0
    lines = path.read_text().splitlines()
    assert [lines[0], lines[-1], len(lines)] == ["[", "]", 4]
    assert "null" not in path.read_text()


@pytest.mark.parametrize("path", sorted(_results.FOLDER.glob("*.json")))
def test_rows_are_complete_and_stand_once(path):
    rows = _results.read(path)
    assert rows
    cases = [json.dumps([row.case, row.versions["jax"]]) for row in rows]
    assert len(set(cases)) == len(rows)
    for row in rows:
        assert row.case and row.figures and row.command
        # Who did not measure it says where it is from.
        assert row.measured or (row.date and row.device and "jaxlib" in row.versions)
        if row.deterministic and row.measured is None:
            assert row.device == row.case["target"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "way", "figures"),
    [
        ("tpu7x", "mpjax delayed", ["cycles", "bytes"]),
        ("h100", "mpjax delayed", ["bytes", "kernels"]),
    ],
)
def test_a_layer_costs_what_the_table_says(target, way, figures):
    case = fp8.case_of(target, way)
    row = _results.find(_results.read("fp8"), jax.__version__, **case)
    assert row is not None, (
        f"benchmarks/results/fp8.json has no row for jax {jax.__version__}. Add it: "
        f"python benchmarks/fp8.py --targets {target} --layers 1 --ways '{way}' --json"
    )
    assert row.deterministic
    # optax's schedules and bias corrections promote dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = fp8.program_of(target, way)
    measured = {name: getattr(program, name) for name in figures}
    recorded = {name: row.figures[name] for name in figures}
    assert measured == pytest.approx(recorded, rel=0.01)
