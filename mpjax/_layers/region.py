"""The policy of the module whose method runs."""

import jax

# The policy of the module whose method runs; None outside of models. JAX has it in the
# key of its caches of traced functions, and each thread has its own.
running_policy = jax.make_user_context(None)
