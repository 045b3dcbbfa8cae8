"""Delayed scaling over the states of a whole model.

May import: `_loss_scaling`, `_recipes`, `_numerics`, `_mesh`, `_tree`, `_updates`,
`_checks`, `_typing`; optax.

`optimizer.py` is the way in for users, `update.py` what a step does to each state,
`calibrate.py` and `weights.py` make states faster before training.
"""
