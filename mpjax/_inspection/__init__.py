"""What a program computes, read from its trace.

May import: `_hardware`, `_printing`; `_nnx` only where a trace has NNX modules.

A finding: its kind and remedy in `findings.py`, its detector beside the others.
"""
