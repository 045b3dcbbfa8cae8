"""Delayed scaling over the states of a whole model.

May import: `_products`, `guarded`.

What every state needs once per step: `update.py`.
"""
