"""Which dtypes, and which module of a model gets them.

May import: `_recipes`, `_numerics`, `_tree`, `_checks`, `_typing`.

To add a preset: an entry of `PRESETS` in `presets.py`.
"""
