"""What a compiler makes of a program.

May import: `_inspection`, `_recipes`.

A verdict: in `verdicts.py`.
"""
