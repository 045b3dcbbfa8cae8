"""Text and tables, for terminals and notebooks.

May import: the standard library and rich.

A table: its rows belong to who prints it; only the drawing is here.
"""
