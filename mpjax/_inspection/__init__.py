"""What a program computes, read from its trace.

`tracing.py` makes a jaxpr of a function, `steps.py` reads its equations, `places.py`
says which lines they come from, `products.py` describes its products, `findings.py`
lists what may be wrong, `merging.py` makes one finding of one cause, `census.py` shows
both. `promotions.py` follows float32 by `streams.py`, and leaves out what is meant:
`routers.py`, `recurrences.py`. `suggestions.py` says which rule mends a finding, by
what `modules.py` and `facts.py` know of a model.

May import: `_hardware`, `_printing`, `_policies`; `_linen` and `_nnx` only where a
program has imported these of Flax.

To add a kind of finding: a row of the table in `findings.py`, with its detector in
`detectors.py` or in a file of its own, and a function in `suggestions.py` if a rule can
mend it.
"""
