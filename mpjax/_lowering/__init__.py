"""What a compiler makes of a program.

`pipeline.py` goes from a function to a `Report` in seven steps:

1. trace: `_inspection/tracing.py` makes a jaxpr of a function of shapes.
2. tag: `_inspection/tags.py` numbers the products in the names that compilers keep.
3. compile: `compiler.py` sends it to the target's compiler, in a process of its own
   (`compiler_worker.py`) that ends with the caller (`orphan_guard.py`); `compiled.py`
   is what comes back, `failures.py` says why nothing did.
4. parse: `hlo.py` reads the kernels and the products of the emitted program.
5. pair: `pairing.py` finds the compiled products of each traced one.
6. judge: `verdicts.py` says whether each runs in the dtypes as traced, which
   `matrix_units.py` reads from the emitted instructions.
7. report: `report.py` adds up, prints and asserts, with the messages of `assertion.py`.

`support.py` compares the answers of ``Recipe.is_supported`` with those of compilers.

May import: `_inspection`, `_products`, `_recipes`, `_numerics`, `_printing`,
`_hardware`, `_typing`.

To add a verdict: `Verdict` and `_verdict` in `verdicts.py`.
"""
