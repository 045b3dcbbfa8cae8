"""What the pages of the documentation show runs, and the reference is complete."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import types

import jax
import pytest

import mpjax

DOCS = pathlib.Path(__file__).parent.parent / "docs"
# A block of Python, and right below it what it prints.
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
BLOCKS = {
    path.relative_to(DOCS).as_posix(): BLOCK.findall(path.read_text())
    for path in DOCS.rglob("*.md")
}
SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DOORS = ["mpjax"] + [
    f"mpjax.{module.name}"
    for module in pkgutil.iter_modules(mpjax.__path__)
    if not module.name.startswith("_")
]


def public_names(door):
    module = importlib.import_module(door)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name in vars(module) if not name.startswith("_")]
    values = {name: getattr(module, name) for name in names}
    return sorted(n for n, v in values.items() if not isinstance(v, types.ModuleType))


@pytest.mark.parametrize("page", sorted(page for page in BLOCKS if BLOCKS[page]))
def test_the_python_of_a_page_runs_and_prints_what_it_shows(page, capsys):
    namespace = {}
    # As a newcomer has it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for code, shown in BLOCKS[page]:
            exec(compile(code, page, "exec"), namespace)
            printed = capsys.readouterr().out
            matches = doctest.OutputChecker().check_output(shown, printed, SHOWN)
            assert matches, f"{code}\nprints\n{printed}\nnot\n{shown}"


def test_every_block_of_python_is_among_those_that_run():
    for page, blocks in BLOCKS.items():
        assert (DOCS / page).read_text().count("```python") == len(blocks), page
    guides = {"policies.md", "loss_scaling.md", "eight_bits.md", "lowering.md"}
    guides |= {"distribution.md"}
    assert guides <= {page for page in BLOCKS if BLOCKS[page]}


@pytest.mark.parametrize("door", DOORS)
def test_the_reference_has_every_public_name_once_and_no_other(door):
    page = DOCS / "api" / f"{door.split('.')[-1]}.md"
    listed = re.findall(rf"^::: {re.escape(door)}\.(\w+)$", page.read_text(), re.M)
    assert sorted(listed) == public_names(door)
