"""Which format and which scaling for the three tensors of a product.

May import: `_numerics`, `_hardware`.

A scaling: a class in `scalings.py`. A recipe: a function in `named.py`.
"""
