"""What the layers of both front ends need.

May import: `_policies`, `_products`, `_recipes`, `_optimizers`, `_printing`,
`_numerics`, `_mesh`, `_tree`, `_typing`; Flax.

To add a layer: a row of `LAYERS` in `served.py`.
"""
