"""The Linen front end.

May import: `_layers`, `_scaling_states`, `_policies`, `_products`, `_recipes`,
`_tree`, `_checks`, `_typing`; Flax. Never `_nnx`.

To add a layer: not here, but in `_layers/served.py`, for both front ends.
"""
