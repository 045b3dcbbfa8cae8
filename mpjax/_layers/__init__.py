"""What the layers of both front ends need.

May import: `_policies`, `_products`, `_recipes`, `_printing`, `_numerics`, `_tree`,
`_mesh`, `_typing`; Flax.

To add a layer: a row of `LAYERS` in `served.py`.
"""
