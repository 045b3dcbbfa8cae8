"""Traces a function of arrays or shapes, ready to be read or sent to a compiler."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from mpjax._inspection.modules import modules_of
from mpjax._inspection.primitives import inner
from mpjax._inspection.steps import steps


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced program, ready to be read or compiled.

    Attributes:
      jaxpr: of the function, with the arrays among its arguments as inputs.
      args: their shapes, dtypes and shardings.
      donated: the positions of the arguments whose memory may be reused.
      modules: the classes of the modules of its models, by their paths as rules have
        them.
    """

    jaxpr: Any
    args: tuple[jax.ShapeDtypeStruct, ...]
    donated: tuple[int, ...]
    modules: Mapping[str, type]

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the axes over which arguments are sharded; empty on one device.

        Raises:
          ValueError: they are sharded over several meshes.
        """
        shardings = [arg.sharding for arg in self.args if arg.sharding is not None]
        meshes = list(dict.fromkeys(s.mesh.shape_tuple for s in shardings))
        if len(meshes) > 1:
            raise ValueError(
                "Arguments of what is reported on lie on one mesh; got meshes of "
                f"{' and '.join(str(dict(mesh)) for mesh in meshes)} devices. Give all "
                "a NamedSharding of the same mesh."
            )
        return dict(meshes[0]) if meshes else {}


def trace(fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Traced:
    """Traces a function without making an array.

    Args:
      fn: any function ``jax.jit`` or ``nnx.jit`` takes, jitted or not.
      args: pytrees of arrays, ``jax.ShapeDtypeStruct`` or NNX modules; what else is in
        them is handed to the function as it is.
      kwargs: the same, by name.

    Returns:
      The program.

    Raises:
      ValueError: the function closes over values that another transformation traces.
    """
    with modules_of(fn, args, kwargs) as modules:
        return _trace(fn, args, kwargs, modules)


def _trace(
    fn: Callable, args: tuple, kwargs: Mapping[str, Any], modules: dict[str, type]
) -> Traced:
    """As `trace`; `modules` grows while the function runs."""
    if "flax.nnx" in sys.modules:  # or no argument can be a module
        from mpjax._nnx.functional import as_function_of_arrays

        fn, args, kwargs = as_function_of_arrays(fn, args, kwargs)
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def flat(*values: Any) -> Any:
        new = leaves.copy()
        for i, value in zip(arrays, values, strict=True):
            new[i] = value
        args, kwargs = jax.tree.unflatten(tree, new)
        return fn(*args, **kwargs)

    structs = [_struct(leaves[i]) for i in arrays]
    try:
        jaxpr = jax.jit(flat).trace(*structs).jaxpr
    except RuntimeError as error:
        if "cuDNN" in str(error):
            error.add_note("To trace a function of cuDNN it has to be installed.")
        raise
    consts = getattr(jaxpr, "consts", ())
    if len(inner(jaxpr).invars) > len(structs) or any(
        isinstance(value, Tracer) for value in consts
    ):
        raise ValueError(
            "A function that is reported on cannot close over values that another "
            "transformation traces, as inside of jax.jit or jax.grad; got one that "
            "does. Hand them over as arguments."
        )
    invars = inner(jaxpr).invars
    donated = set()
    for eqn in inner(jaxpr).eqns if len(inner(jaxpr).eqns) == 1 else ():
        # The function was jitted: its options for its arguments hold.
        if not {"donated_invars", "in_shardings"} <= eqn.params.keys():
            continue
        says = eqn.params["donated_invars"], eqn.params["in_shardings"]
        for var, donate, sharding in zip(eqn.invars, *says, strict=True):
            donated |= {var} if donate else set()
            if isinstance(sharding, NamedSharding) and var in invars:
                i = invars.index(var)
                structs[i] = structs[i].update(sharding=sharding)
    meshes = () if any(s.sharding for s in structs) else _meshes(jaxpr)
    for mesh in meshes[:1]:  # the arguments lie on all of its devices
        everywhere = NamedSharding(mesh, PartitionSpec())
        structs = [struct.update(sharding=everywhere) for struct in structs]
    positions = tuple(i for i, var in enumerate(invars) if var in donated)
    return Traced(jaxpr, tuple(structs), positions, modules)


def _meshes(jaxpr: Any) -> list[Any]:
    """The meshes of more than one device that a program itself names."""
    found = []
    for step in steps(jaxpr, "tpu"):
        for eqn in (*step.calls, step.eqn):
            sharding = eqn.params.get("sharding")
            found += [eqn.params.get("mesh"), getattr(sharding, "mesh", None)]
    return [mesh for mesh in found if mesh is not None and mesh.size > 1]


def _is_array(leaf: Any) -> bool:
    # Classes of scalars, such as np.float32, have descriptors of these names.
    is_type = isinstance(leaf, type)
    return not is_type and hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding if isinstance(sharding, NamedSharding) else None
    dtype = leaf.dtype
    if isinstance(leaf, np.ndarray | np.generic):  # as jax.jit takes it
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(
        leaf.shape,
        dtype,
        sharding=sharding,
        weak_type=getattr(leaf, "weak_type", False),
    )
