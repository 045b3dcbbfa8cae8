"""Which dtypes, and which module of a model gets them.

May import: `_recipes`, `_tree`.

What a policy's name protects: in `presets.py`.
"""
