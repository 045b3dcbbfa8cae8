"""Text and tables, for terminals and notebooks.

May import: `_numerics`, for the names of dtypes; rich.

A table: its rows belong to who prints it; only the drawing is here.
"""
