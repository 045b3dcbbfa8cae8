"""Delayed scaling over the states of a whole model.

May import: `_products`, `_loss_scaling`.

What every state needs once per step: `update.py`.
"""
