"""The ladder of imports, and the public ways that everything keeps to."""

import ast
import pathlib

import mpjax

ROOT = pathlib.Path(mpjax.__file__).parent
LADDER = [
    ["_typing", "_numerics", "_tree", "_targets", "_jaxpr", "_text"],
    ["_compile_worker", "_guard", "_scales"],
    ["_qarray", "_scaling", "_policy", "_loss_scaling", "_attention", "_cpu_faults"],
    ["_products", "_hlo", "_findings"],
    ["_recipe", "_named_recipes", "_scaled_loss", "_table"],
    ["_operand", "_observations", "_product", "_dot_general", "_einsum", "_conv"],
    ["_export", "_weight_copies", "_rules", "_matcher", "_layer_products", "_layers"],
    ["_scaling_states", "_linen_states", "_nnx_states"],
    ["_linen_recipes", "_nnx_recipes", "_nnx_params", "_nnx_scopes", "_serialization"],
    ["_nnx_types"],
    ["_linen_attention", "_linen_params", "_linen_scopes", "_linen_layers"],
    ["_linen", "_nnx", "_nnx_trace"],
    ["_trace"],
    ["_compile", "_census"],
    ["_unit", "_match", "_lowered", "_lowering"],
    ["_native", "_support"],
    ["linen", "nnx", "lowering", "__init__", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LADDER) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "mpjax":
                yield from (f"mpjax.{alias.name}" for alias in node.names)


def test_every_file_has_a_place_on_the_ladder():
    assert {path.stem for path in ROOT.glob("*.py")} <= LEVEL.keys()


def test_imports_go_up_the_ladder():
    for path in ROOT.glob("*.py"):
        for name in imports(path):
            if name.startswith("mpjax."):
                below = name.removeprefix("mpjax.").split(".")[0]
                assert LEVEL[below] <= LEVEL[path.stem], (path.name, name)
            if name.split(".")[0] == "flax":
                assert LEVEL[path.stem] >= LEVEL["_linen_states"], (path.name, name)
    # The front ends do not know each other.
    assert not any("nnx" in name for name in imports(ROOT / "_linen.py"))
    assert not any("linen" in name for name in imports(ROOT / "_nnx.py"))


def test_only_public_ways():
    private = ("jax._src", "flax.core", "jax.interpreters", "optax._src")
    for path in ROOT.glob("*.py"):
        found = [name for name in imports(path) if name.startswith(private)]
        assert not found, path.name


def test_every_public_name_is_documented():
    for name, value in vars(mpjax).items():
        if not name.startswith("_") and callable(value):
            doc = value.__doc__ or ""
            documented = "Example:" in doc or "Attributes:" in doc
            assert documented or doc.count("\n") == 0 < len(doc), name
