"""Text and tables, for terminals and notebooks.

May import: `_numerics`, for short names of dtypes; rich.

To add a table: its rows belong to who prints it, only the drawing is here.
"""
