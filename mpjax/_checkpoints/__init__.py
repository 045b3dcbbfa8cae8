"""Checkpoints of a training run, by orbax.

May import: `_scaling_states`, `_optimizers`, `_loss_scaling`, `_recipes`, `_checks`,
`_typing`; orbax, NNX for the variables of modules.

`layout.py` is which arrays a state has, by path; `leaves.py` how one of them is read;
`matching.py` which array of a checkpoint is read for which of a state; `states.py`
makes the scaling states that a checkpoint lacks, or has of another recipe;
`few_bits.py` makes arrays in few bits of others, and others of them; `finite.py`
refuses what is not finite; `store.py` is all that is asked of orbax; `saving.py` and
`restoring.py` put these together.
"""
