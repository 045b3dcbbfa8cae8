"""Scaling states and quantized arrays as arguments of programs of ``jax.export``.

A serialized program holds the structure of its arguments, and so the recipe of a state
and the blocks of an array. They are written as JSON, and made again by the constructors
of their classes, which check what they are given.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import jax.export

from mpjax._loss_scaling.state import LossScalingState
from mpjax._numerics.qarray import QArray
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.scalings import SCALINGS
from mpjax._recipes.state import ScalingState, WeightCopy

_KINDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (Recipe, *SCALINGS)
}


def register() -> None:
    """Lets programs of ``jax.export`` have states among their arguments."""
    for kind in (ScalingState, QArray, WeightCopy):
        _register(kind)
    jax.export.register_namedtuple_serialization(
        LossScalingState, serialized_name="mpjax.LossScalingState"
    )


def _write(node: Any) -> Any:
    """What JSON has for a recipe and what is in it."""
    if dataclasses.is_dataclass(node):
        name = type(node).__name__
        if _KINDS.get(name) is not type(node):
            raise TypeError(
                "A program is serialized with recipes made of the scalings of mpjax, "
                f"got a {name}, which other programs cannot read. Give the exported "
                "function the arrays of the state instead."
            )
        fields = (field.name for field in dataclasses.fields(node))
        return {"kind": name, **{key: _write(getattr(node, key)) for key in fields}}
    return getattr(node, "name", node)  # of a dtype


def _read(fields: dict[str, Any]) -> Any:
    """The dataclass of which ``_write`` has made an object of JSON."""
    name = fields.pop("kind", "")
    kind = _KINDS.get(name)
    if kind is None or not fields.keys() <= inspect.signature(kind).parameters.keys():
        raise ValueError(
            f"This serialized program has a recipe with {name}({', '.join(fields)}), "
            "which this version of mpjax does not know. Read it with the version that "
            "has written it, or export the program again."
        )
    return kind(**{key: _tuples(value) for key, value in fields.items()})


def _tuples(value: Any) -> Any:
    """Of all that JSON has, only tuples come back as another type."""
    return tuple(value) if isinstance(value, list) else value


def _register(kind: type) -> None:
    def write(static: tuple) -> bytes:
        return json.dumps([_write(value) for value in static]).encode()

    def read(data: bytes) -> tuple:
        return tuple(map(_tuples, json.loads(data, object_hook=_read)))

    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"mpjax.{kind.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=read,
    )
