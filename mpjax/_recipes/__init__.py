"""Which format and which scaling for the three tensors of a product.

May import: `_hardware`, `_numerics`, `_checks`, `_typing`.

To add a scaling: a class in `scalings.py`; `abstract.py` says what it declares. To add
a recipe: a function in `named.py`.
"""
