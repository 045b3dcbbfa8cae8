"""What each layer of a wrapped Linen model will do."""

from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from mpjax._checks import check_instance
from mpjax._layers.table import layer_table, notes_of
from mpjax._linen.run import Run, recording


def tabulate(model: nn.Module, rngs: Any, *args: Any, **kwargs: Any) -> str:
    """Shows what each layer of a wrapped model will do, before a step is run.

    Nothing is computed: the model is traced with shapes only.

    Args:
      model: a ``MixedPrecision``, or a module with some inside.
      rngs: as for ``model.init``.
      *args: as for ``model.init``; arrays may be ``jax.ShapeDtypeStruct``.
      **kwargs: likewise.

    Returns:
      A table with a row a module: path, type, policy, the recipe of its products ("-":
      none uses it), the dtypes and number of the parameters of its own, and, of a
      module that is an exception for its role (``Rule.role``), why it is.

    Raises:
      TypeError: ``model`` is no module of Linen.
      ValueError: there is no ``MixedPrecision`` in the model.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax.linen
      >>> model = mpjax.linen.MixedPrecision(nn.Dense(3), "mixed_bfloat16")
      >>> table = mpjax.linen.tabulate(model, jax.random.key(0), jnp.ones((2, 4)))
      >>> "p=f32,c=bf16,o=f32" in table
      True
    """
    check_instance(
        "model",
        model,
        nn.Module,
        "is a Linen module",
        "for a model of NNX use mpjax.nnx.tabulate",
    )
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def init(rngs, arrays):
        traced = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, traced)
        return model.init(rngs, *args, **kwargs)

    record: dict[tuple[str, ...], Run] = {}
    token = recording.set(record)
    try:
        variables = jax.eval_shape(init, rngs, arrays)
    finally:
        recording.reset(token)
    if not record:
        raise ValueError(
            "tabulate shows what mpjax.linen.MixedPrecision does, and found none in "
            f"{type(model).__name__}."
        )
    params = flatten_dict(variables.get("params", {}))
    rows = []
    for root, run in record.items():
        last = dict(run.seen.keys())  # two may share a path, and its parameters
        for (path, kind), structure in run.seen.items():
            full = (*root, *filter(None, path.split("/")))
            named = [
                (names[-1], leaf)
                for names, boxed in params.items()
                for leaf in jax.tree.leaves(boxed)
                if names[:-1] == full and last[path] is kind
            ]
            own = [leaf for _, leaf in named]
            decision = run.rules.decision(path, kind, structure)
            recipe = decision.recipe if decision and run.served.get(path) else None
            inside = f"{path}/" if path else ""
            has_modules = any(p != path and p.startswith(inside) for p in last)
            refused = sorted(run.refused.get(path, {}).items())
            notes = [f"{product}: {why}" for product, why in refused]
            notes += notes_of(kind, decision, named, has_modules)
            rows.append(("/".join(full), kind, decision, recipe, own, notes))
    return layer_table(rows)
