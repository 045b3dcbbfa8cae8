#!/usr/bin/env bash
# Gradients that are sums in bfloat16 stop growing on a CPU: 0.8% of a bias's gradient.
#
# jnp.sum of 65,536 bfloat16 ones is 65,536, since jnp adds in float32. The same sum as the
# gradient of a broadcast, which is what a bias of a convolution gets, is 512: JAX
# transposes the broadcast to a bfloat16 reduce, which XLA's CPU compiler adds up in
# bfloat16 with a few partial sums, each of which stalls at 256, where bfloat16 has no odd
# numbers. A row of a table that is used 8,192 times, and jax.ops.segment_sum, get 256. No
# warning; float32 parameters do not help where they are cast before they are used.
#
# Versions: jax and jaxlib 0.10.2 (Python 3.11) and 0.12.0.1 (3.13), CPU. Output seen, on both:
#   jnp.sum of 65536 ones: 65536
#   gradient of a broadcast over 65536: 512
#   gradient of a row used 8192 times: 256
#   segment_sum of 8192 ones: 256
# Exits with 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 2; }
cat >"$folder/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp

BF16 = jnp.bfloat16


def total(x):
    return x.astype(jnp.float32).sum()


images = jnp.ones((64, 32, 32, 1), BF16)
bias = jax.jit(jax.grad(lambda b, x: total(x + b)))(jnp.ones(1, BF16), images)
ids = jnp.zeros(8192, jnp.int32)
row = jax.jit(jax.grad(lambda table: total(table[ids])))(jnp.ones(1, BF16))
summed = jax.jit(lambda x: jax.ops.segment_sum(x, ids, 1))(jnp.ones(8192, BF16))
print(f"jnp.sum of 65536 ones: {float(jnp.sum(images)):.0f}")
print(f"gradient of a broadcast over 65536: {float(bias[0]):.0f}")
print(f"gradient of a row used 8192 times: {float(row[0]):.0f}")
print(f"segment_sum of 8192 ones: {float(summed[0]):.0f}")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>"$folder/log" | tee "$folder/seen" ||
    { cat "$folder/log" >&2; exit 2; }
diff "$folder/seen" - <<'SEEN'
jnp.sum of 65536 ones: 65536
gradient of a broadcast over 65536: 512
gradient of a row used 8192 times: 256
segment_sum of 8192 ones: 256
SEEN
