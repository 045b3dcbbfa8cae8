"""Every public name, at every door, is documented alike."""

import importlib
import inspect
import re
import typing

import pytest

DOORS = [
    "mpjax",
    "mpjax.checkpoints",
    "mpjax.linen",
    "mpjax.lowering",
    "mpjax.nnx",
    "mpjax.numerics",
    "mpjax.optimizers",
]
NAMES = [
    (door, name) for door in DOORS for name in importlib.import_module(door).__all__
]


def sections(doc):
    return set(re.findall(r"^ *(Args|Attributes|Returns|Raises|Example):$", doc, re.M))


def wanted(value):
    """The sections that the docstring of a public function or class has."""
    if inspect.isclass(value):
        return {"Example"} | ({"Raises"} if "__post_init__" in vars(value) else set())
    signature = inspect.signature(value)
    nothing = signature.return_annotation is None
    return (
        {"Example", "Raises"}
        | ({"Args"} if signature.parameters else set())
        | (set() if nothing else {"Returns"})
    )


@pytest.mark.parametrize(("door", "name"), NAMES)
def test_a_public_name_is_documented(door, name):
    value = getattr(importlib.import_module(door), name)
    doc = inspect.getdoc(value) or ""
    assert wanted(value) <= sections(doc)
    assert ">>>" in doc
    first = doc.splitlines()[0]
    assert first.endswith("."), first


@pytest.mark.parametrize(("door", "name"), NAMES)
def test_parameters_of_a_public_name_have_types(door, name):
    value = getattr(importlib.import_module(door), name)
    functions = [value]
    if inspect.isclass(value):
        functions = [
            method
            for key, method in vars(value).items()
            if inspect.isfunction(method) and not key.startswith("_")
        ]
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name != "self":
                assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_the_top_door_is_small():
    assert len(importlib.import_module("mpjax").__all__) <= 47


@pytest.mark.parametrize("door", DOORS)
def test_a_door_exports_what_it_lists(door):
    module = importlib.import_module(door)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(module.__all__)
    assert module.__all__ == sorted(module.__all__)
    assert all(typing.get_origin(getattr(module, n)) is None for n in module.__all__)
