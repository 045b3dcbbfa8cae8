"""What a program computes, read from its trace.

`tracing.py` makes a jaxpr of a function, `steps.py` reads its equations, `products.py`
describes its products, `findings.py` lists what may be wrong, `census.py` shows both.

May import: `_hardware`, `_printing`; `_nnx` only where a trace has NNX modules.

To add a kind of finding: a row of the table in `findings.py`, with its detector in
`detectors.py`.
"""
