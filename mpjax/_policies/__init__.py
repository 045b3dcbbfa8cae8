"""Which dtypes, and which module of a model gets them.

May import: `_recipes`, `_tree`.

A preset: an entry of the table in `presets.py`.
"""
