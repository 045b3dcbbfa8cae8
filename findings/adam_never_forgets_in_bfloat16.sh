#!/usr/bin/env bash
# optax.adam with bfloat16 parameters never forgets a large gradient.
#
# optax keeps the second moment nu in the dtype of the parameters. Its decay, b2 = 0.999, is
# 1.0 in bfloat16, and even in float32 a change of a thousandth is less than half of
# bfloat16's spacing: nu only grows. One gradient of 1 (a bad batch, the first step of a
# run) makes every later step of that parameter small for good, and the loss does not tell:
# after 5,000 steps without a gradient nu is what it was, where float32 has 0.7% of it left,
# and 2,000 gradients of 0.001 later a step is 25 times smaller than float32's. There is
# mu_dtype, which moves the first moment alone.
#
# Versions: optax 0.2.8, jax and jaxlib 0.10.2 (Python 3.11), CPU; jax 0.12.0.1 (3.13) gives the
# same. Output seen:
#   float32: nu 1.00e-03, after 5000 zeros 6.72e-06, a step then -7.5e-04
#   bfloat16: nu 9.99e-04, after 5000 zeros 9.99e-04, a step then -3.1e-05
# Exits with 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 2; }
cat >"$folder/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

for dtype in (jnp.float32, jnp.bfloat16):
    params, tx = jnp.zeros(1, dtype), optax.adam(1e-3)

    @jax.jit
    def run(state, grads):
        def step(state, grad):
            updates, state = tx.update(grad, state, params)
            return state, updates

        return jax.lax.scan(step, state, grads[:, None].astype(dtype))

    state, _ = run(tx.init(params), jnp.ones(1))
    first = float(optax.tree.get(state, "nu")[0])
    state, _ = run(state, jnp.zeros(5000))
    later = float(optax.tree.get(state, "nu")[0])
    _, updates = run(state, jnp.full(2000, 1e-3))
    print(
        f"{jnp.dtype(dtype).name}: nu {first:.2e}, after 5000 zeros {later:.2e}, "
        f"a step then {float(updates[-1, 0]):.1e}"
    )
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>"$folder/log" | tee "$folder/seen" ||
    { cat "$folder/log" >&2; exit 2; }
diff "$folder/seen" - <<'SEEN'
float32: nu 1.00e-03, after 5000 zeros 6.72e-06, a step then -7.5e-04
bfloat16: nu 9.99e-04, after 5000 zeros 9.99e-04, a step then -3.1e-05
SEEN
