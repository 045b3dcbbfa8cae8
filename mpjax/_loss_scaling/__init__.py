"""Loss scaling as a wrapper of optax optimizers.

May import: `_recipes`, for the states that a loss scale rescales; `_tree`, `_updates`,
`_mesh`, `_checks`, `_typing`; optax.

To add an option: an argument of `dynamic_loss_scaling` in `transform.py`.
"""
