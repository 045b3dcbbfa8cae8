"""What the layers of both front ends need.

May import: `_products`, `_policies`, and Flax where it is common to both.

A layer: its row in the table of layers.
"""
