"""Products of `lax` under a recipe, each with a derivative of its own.

May import: `_recipes`, `_numerics`, `_mesh`.

A product: a file of its own, over `multiply.py` and `operands.py`.
"""
