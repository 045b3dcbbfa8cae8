"""The ladder of folders, and the public ways that everything keeps to."""

import ast
import pathlib
import re

import pytest

import mpjax

ROOT = pathlib.Path(mpjax.__file__).parent
# A folder, or a file of the root, imports only what stands below it.
LADDER = [
    ["_typing", "_hardware", "_checks"],
    ["_numerics", "_tree", "_mesh"],
    ["_recipes", "_printing", "_updates", "numerics"],
    ["_products", "_policies", "_loss_scaling"],
    ["_scaling_states", "_optimizers", "_autocast"],
    ["_layers", "_training", "_checkpoints", "optimizers"],
    ["_linen", "_nnx", "__init__", "checkpoints"],
    ["_inspection", "linen", "nnx"],
    ["_lowering"],
    ["lowering", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LADDER) for name in names}
MAY_IMPORT_FLAX = ("_layers", "_linen", "_nnx", "_training", "_checkpoints")
DOORS = (
    "__init__",
    "checkpoints",
    "linen",
    "nnx",
    "lowering",
    "numerics",
    "optimizers",
)
PRIVATE = ("jax._src", "jax.interpreters", "flax.core", "optax._src")
LONGEST = 350  # lines of a file
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text())
    for path in ROOT.rglob("*.py")
}


def imports(tree, types=True):
    """Full names of what a file imports; `types`: also for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = node.body if types else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_imported(name, types=True):
    """The files of mpjax that a file imports, by their names in `FILES`."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for imported in imports(tree, types):
        first, *parts = imported.split(".")
        if first != "mpjax":
            continue
        for end in range(len(parts), -1, -1):
            file = "/".join(parts[:end]) or "__init__"
            if file in FILES or f"{file}/__init__" in FILES:
                yield file if file in FILES else f"{file}/__init__"
                break


def room(file):
    return file.split("/")[0]


def upward_arrows():
    for file in FILES:
        for other in files_imported(file):
            here, there = room(file), room(other)
            if here != there and LEVEL[there] >= LEVEL[here]:
                yield f"{file} imports {other}"


def circle():
    """Files that import one another, or None."""
    graph = {file: list(files_imported(file, types=False)) for file in FILES}
    done, path = set(), []

    def visit(file):
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return None
        path.append(file)
        found = next(filter(None, map(visit, graph[file])), None)
        path.pop()
        done.add(file)
        return found

    return next(filter(None, map(visit, graph)), None)


def test_every_file_has_a_place_on_the_ladder():
    assert {room(file) for file in FILES} == LEVEL.keys()
    assert len(LADDER) <= 10


def test_no_import_runs_up_the_ladder():
    assert list(upward_arrows()) == []


def test_no_files_import_one_another():
    assert circle() is None


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("_numerics/casts", "from mpjax._recipes import recipe", "upward"),
        ("_numerics/formats", "from mpjax._numerics import scales", "circle"),
        ("_products/conv", "from mpjax._policies.policy import Policy", "upward"),
        ("_tree", "import mpjax.nnx", "upward"),
    ],
)
def test_the_ladder_is_enforced(file, line, complaint, tmp_path, monkeypatch):
    for path in ROOT.rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (tmp_path / f"{file}.py").open("a") as changed:
        changed.write(f"\n{line}\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = {"upward": bool(list(upward_arrows())), "circle": circle() is not None}
    assert found[complaint]


def test_each_folder_says_what_it_is_and_what_it_may_import():
    for folder in {room(file) for file in FILES if "/" in file}:
        tree = FILES[f"{folder}/__init__"]
        assert len(tree.body) == 1, f"{folder} has code in its __init__"
        doc = ast.get_docstring(tree) or ""
        (paragraph,) = (p for p in doc.split("\n\n") if p.startswith("May import:"))
        allowed = set(re.findall(r"`(_\w+)`", paragraph.split("Never")[0]))
        assert allowed <= LEVEL.keys()
        used = {
            room(other)
            for file in FILES
            if room(file) == folder
            for other in files_imported(file)
        }
        assert used - {folder} == allowed, folder


def test_flax_is_imported_where_it_may_be():
    for file, tree in FILES.items():
        if any(name.split(".")[0] == "flax" for name in imports(tree)):
            assert room(file) in MAY_IMPORT_FLAX, file
    # The front ends do not know each other.
    for one, other in (("_linen", "nnx"), ("_nnx", "linen")):
        for file, tree in FILES.items():
            if room(file) == one:
                assert not any(other in name.split(".") for name in imports(tree))


def test_only_public_ways():
    for file, tree in FILES.items():
        found = [name for name in imports(tree) if name.startswith(PRIVATE)]
        assert not found, file


def test_files_are_short():
    lengths = {
        file: len((ROOT / f"{file}.py").read_text().splitlines()) for file in FILES
    }
    assert max(lengths.values()) <= LONGEST
    assert sorted(lengths.values())[len(lengths) // 2] <= 130, "the median file"
