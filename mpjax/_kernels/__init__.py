"""Kernels of Pallas for programs that compilers run in several passes.

May import: `_typing`.

`programs.py` reads a traced function, `tiles.py` computes what of it is elementwise on
a part of its arrays, and `one_pass.py` makes a kernel for a TPU of that.
"""
