"""Loss scaling as a wrapper of optax optimizers.

May import: `_tree`, `_typing`.

An option: in `transform.py`.
"""
