"""The ladder of imports, and the public ways that everything keeps to."""

import ast
import pathlib

import mpjax

ROOT = pathlib.Path(mpjax.__file__).parent
LADDER = [
    [
        "_typing",
        "_numerics/casts",
        "_tree",
        "_hardware/targets",
        "_inspection/steps",
        "_printing/text",
    ],
    ["_lowering/compiler_worker", "_lowering/orphan_guard", "_numerics/scales"],
    [
        "_numerics/qarray",
        "_recipes/scalings",
        "_policies/policy",
        "_loss_scaling/transform",
        "_layers/attention",
        "_products/xla_cpu",
    ],
    ["_inspection/products", "_lowering/hlo", "_inspection/detectors"],
    ["_recipes/recipe", "_recipes/named", "_loss_scaling/loss", "_printing/table"],
    [
        "_products/operands",
        "_products/observations",
        "_products/multiply",
        "_products/dot_general",
        "_products/einsum",
        "_products/conv",
    ],
    [
        "_scaling_states/export",
        "_scaling_states/weights",
        "_policies/rule",
        "_policies/lookup",
        "_layers/multiplier",
        "_layers/functions",
    ],
    ["_scaling_states/update", "_linen/states", "_nnx/scaling"],
    [
        "_linen/recipes",
        "_nnx/recipes",
        "_nnx/parameters",
        "_nnx/scope_names",
        "_layers/serialization",
    ],
    ["_nnx/classes"],
    ["_linen/attention", "_linen/parameters", "_linen/cache_keys", "_linen/attributes"],
    ["_linen/wrapper", "_nnx/mixed_precision", "_nnx/functional"],
    ["_inspection/tracing"],
    ["_lowering/compiler", "_inspection/census"],
    [
        "_lowering/matrix_units",
        "_lowering/pairing",
        "_lowering/verdicts",
        "_lowering/report",
    ],
    ["_lowering/assertion", "_lowering/support"],
    ["linen", "nnx", "lowering", "__init__", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LADDER) for name in names}
FILES = [
    path
    for path in ROOT.rglob("*.py")
    if path.parent == ROOT or path.name != "__init__.py"
]


def place(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "mpjax":
                yield from (f"mpjax.{alias.name}" for alias in node.names)
            elif (node.module or "").startswith("mpjax."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_a_place_on_the_ladder():
    assert {place(path) for path in FILES} <= LEVEL.keys()


def test_imports_go_up_the_ladder():
    for path in FILES:
        for name in imports(path):
            if name.startswith("mpjax."):
                below = name.removeprefix("mpjax.").replace(".", "/")
                if below in LEVEL:
                    assert LEVEL[below] <= LEVEL[place(path)], (path, name)
            if name.split(".")[0] == "flax":
                assert LEVEL[place(path)] >= LEVEL["_linen/states"], (path.name, name)
    # The front ends do not know each other.
    assert not any("nnx" in name for name in imports(ROOT / "_linen/wrapper.py"))
    assert not any(
        "linen" in name for name in imports(ROOT / "_nnx/mixed_precision.py")
    )


def test_only_public_ways():
    private = ("jax._src", "flax.core", "jax.interpreters", "optax._src")
    for path in FILES:
        found = [name for name in imports(path) if name.startswith(private)]
        assert not found, path


def test_every_public_name_is_documented():
    for name, value in vars(mpjax).items():
        if not name.startswith("_") and callable(value):
            doc = value.__doc__ or ""
            documented = "Example:" in doc or "Attributes:" in doc
            assert documented or doc.count("\n") == 0 < len(doc), name
