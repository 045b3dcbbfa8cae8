"""Mixed-precision and low-precision training for JAX and Flax."""
