"""What devices multiply: measured facts.

May import: the standard library.

A target: a row of `TARGETS` in `targets.py`, and for a GPU its figures in `gpus/`.
"""
