#!/usr/bin/env bash
# nn.with_partitioning makes no parameter within jax.set_mesh of a mesh with explicit axes.
#
# A box of Flax Linen constrains its value to the sharding that it names, by
# lax.with_sharding_constraint. On a mesh of explicit axes that is an assertion about the
# sharding which the value has by its type, and a value that an initializer has just made is
# replicated by its type: init raises an AssertionError, also where it is only evaluated for
# its shapes. Outside of jax.set_mesh, under jit with out_shardings of the same mesh, init makes
# the parameter where it is to be, and apply runs within jax.set_mesh.
#
# Versions: jax 0.10.2 and flax 0.12.8 (Python 3.11), 0.12.0.1 and 0.12.12 (3.13), CPU.
# Output seen, on both:
#   within jax.set_mesh: AssertionError
#   outside of it: P('data', None)
# Exits with 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.4.6 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 2; }
cat >"$folder/run.py" <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", None))
net, key, x = nn.Dense(8, kernel_init=init), jax.random.key(0), jnp.ones((4, 16))
with jax.set_mesh(mesh):
    try:
        jax.eval_shape(net.init, key, x)
        print("within jax.set_mesh: no error")
    except AssertionError:
        print("within jax.set_mesh: AssertionError")
specs = nn.get_partition_spec(jax.eval_shape(net.init, key, x))
shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P)
)
variables = jax.jit(net.init, out_shardings=shardings)(key, x)
kernel = variables["params"]["kernel"].value
print(f"outside of it: {kernel.sharding.spec}")
with jax.set_mesh(mesh):
    jax.jit(net.apply)(variables, jax.device_put(x, NamedSharding(mesh, P("data"))))
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 \
    "$folder/venv/bin/python" "$folder/run.py" 2>"$folder/log" | tee "$folder/seen" ||
    { cat "$folder/log" >&2; exit 2; }
diff "$folder/seen" - <<'SEEN'
within jax.set_mesh: AssertionError
outside of it: P('data', None)
SEEN
