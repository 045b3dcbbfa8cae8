"""The Linen front end.

May import: `layers_by_path`, `_scaling_states`; never `_nnx`.

A layer: not here but in `layers_by_path`.
"""
