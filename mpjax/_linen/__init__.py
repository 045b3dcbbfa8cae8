"""The Linen front end.

May import: `_layers`, `_scaling_states`; never `_nnx`.

A layer: not here but in `_layers`.
"""
