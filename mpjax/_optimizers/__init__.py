"""States of optimizers in few bits.

May import: `_numerics`, `_kernels`, `_tree`, `_updates`, `_mesh`, `_checks`, `_typing`;
optax.

`codes.py` is how an array is stored, `rules.py` which array is stored how, `noise.py`
the random bits of stochastic rounding, and `low_precision.py` the wrapper.
`parameters.py` is for parameters in 16 bits, and `halves.py` how they are kept.
`fused.py` is the update of any of them in one pass, and `shards.py` on many devices.

To add a code: a class in `codes.py` and an entry of its `CODES`.
"""
