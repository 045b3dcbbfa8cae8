"""The function that wraps a Linen module, named as that of NNX."""

import flax.linen as nn

from mpjax._linen.wrapper import MixedPrecision
from mpjax._policies.rule import Rules


def mixed_precision(module: nn.Module, rules: Rules) -> MixedPrecision:
    """Makes a module that runs under a policy, or under rules that give each layer one.

    ``mpjax.nnx.mixed_precision`` does the same for models of NNX.

    Args:
      module: a Linen module; it is not changed. Of a ``MixedPrecision`` its own rules
        come first.
      rules: a policy, its name, or a list of ``mpjax.Rule``, the first match of which
        decides.

    Returns:
      A `MixedPrecision` with the methods, the fields and the parameters of ``module``.

    Raises:
      TypeError: ``module`` is no instance of a Linen module, or ``rules`` are no rules.
      ValueError: there is no rule, or a policy cannot be read. Later, when the model
        runs: a rule decides for no module, or a layer cannot follow its policy.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mpjax.linen
      >>> model = mpjax.linen.mixed_precision(nn.Dense(3), "p=f32,c=bf16")
      >>> y, variables = model.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
      >>> y.dtype.name, variables["params"]["kernel"].dtype.name
      ('bfloat16', 'float32')
    """
    return MixedPrecision(module, rules)
