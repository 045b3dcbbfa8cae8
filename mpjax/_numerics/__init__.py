"""Numbers in few bits: formats, casts, scales, quantized arrays.

May import: `_typing`.

A format: a row of the table in `formats.py`.
"""
