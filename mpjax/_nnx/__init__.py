"""The NNX front end.

May import: `_layers`, `_scaling_states`, `_loss_scaling`, `_policies`, `_products`,
`_recipes`, `_tree`, `_updates`, `_checks`, `_typing`; Flax, optax. Never `_linen`.

To add a layer: not here, but in `_layers/served.py`, for both front ends.
"""
