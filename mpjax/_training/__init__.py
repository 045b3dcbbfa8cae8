"""The state of a training run: a step that happens whole or not at all.

May import: `_scaling_states`, `_loss_scaling`, `_policies`, `_recipes`, `_tree`,
`_checks`, `_typing`; optax, Flax for the class that `TrainState` is one of.

`state.py` is the state of a Linen model, `collections.py` checks what is beside its
parameters; `optimizer.py` gives its optimizer what Flax gives one.
"""
