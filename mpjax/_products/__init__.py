"""Products of `lax` under a recipe, each with a derivative of its own.

May import: `_recipes`, `_numerics`, `_mesh`, `_checks`, `_typing`.

To add a product: a file of its own, over `operands.py` and `multiply.py`.
"""
