"""What each layer of a mixed NNX model will do."""

import jax
from flax import nnx

from mpjax._layers.table import layer_table, notes_of
from mpjax._nnx.classes import decision_of
from mpjax._nnx.hooks import bare_type
from mpjax._nnx.layers import layers_by_path
from mpjax._nnx.parameters import own_params


def tabulate(model: nnx.Module) -> str:
    """Shows what each layer of a model will do, before a step is run.

    Args:
      model: a model from ``mixed_precision``; its parameters may be
        ``jax.ShapeDtypeStruct``, from ``nnx.eval_shape``.

    Returns:
      A table with a row a module: path, type, policy ("-": left alone), the recipe of
      its products ("-": none uses it), the dtypes and number of the parameters of its
      own, and, of a module that is an exception for its role (``Rule.role``), why it
      is. The model is not run: of a layer whose kernel another module reads and
      multiplies with, the recipe is shown and not used; ``mpjax.lowering`` sees that.

    Raises:
      TypeError: ``model`` is not an NNX module.

    Example:
      >>> from flax import nnx
      >>> import mpjax.nnx
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> print(mpjax.nnx.tabulate(mpjax.nnx.mixed_precision(model, "mixed_bfloat16")))
      1 layers, 15 parameters in 60 bytes
        path   type     policy               recipe   dtypes   params
       ───────────────────────────────────────────────────────────────
               Linear   p=f32,c=bf16,o=f32   -        f32          15
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "mpjax.nnx.tabulate takes a flax.nnx.Module, got one of type "
            f"{type(model).__name__}. For a Linen module use mpjax.linen.tabulate."
        )
    rows = []
    layers = layers_by_path(model)
    for path, nodes in layers.items():
        named = [
            (name.rpartition("/")[2], leaf)
            for node in nodes
            for name, param in own_params(node)
            for leaf in jax.tree.leaves(param.get_raw_value())
            if hasattr(leaf, "shape")
        ]
        arrays = [leaf for _, leaf in named]
        inside = f"{path}/" if path else ""
        has_modules = any(p != path and p.startswith(inside) for p in layers)
        decision = decision_of(nodes[0])
        recipe = None if decision is None else decision.recipe
        notes = list(notes_of(bare_type(nodes[0]), decision, named, has_modules))
        rows.append((path, type(nodes[0]), decision, recipe, arrays, notes))
    return layer_table(rows)
