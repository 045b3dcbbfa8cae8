"""Numbers in few bits: formats, casts, scales, quantized arrays.

May import: `_checks`, `_typing`.

To add a format: a row of `FORMATS` in `formats.py`.
"""
