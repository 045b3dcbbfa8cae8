"""Mixed precision for any JAX function, by operation.

`function.py` traces a function, has its jaxpr rewritten and evaluates it.
`categories.py` is the table that says which precision an operation wants, `settings.py`
applies levels and rules to it, `scopes.py` reads the names around an operation.
`body.py` writes a jaxpr in which no value (`values.py`) is cast twice; `rewriting.py`
goes through the equations, by `operations.py` and `products.py` for what computes,
`calls.py` for what runs a program, `derivatives.py` for what has a derivative of its
own.

May import: `_policies`, `_products`, `_checks`, `_typing`.

To add a primitive: its name in a row of the table in `categories.py`.
"""
