"""The NNX front end.

May import: `_layers`, `_scaling_states`; never `_linen`.

A layer: not here but in `_layers`.
"""
