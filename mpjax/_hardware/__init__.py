"""What devices multiply: measured facts.

May import: nothing of mpjax.

To add a target: a row of `TARGETS` in `targets.py`, and for a GPU its figures in
`gpus/`.
"""
