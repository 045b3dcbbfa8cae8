"""Errors of JAX that come of a policy, with the module and the rule they come from."""

import re

from mpjax._policies.policy import Policy

_DTYPE = re.compile(r"\b(bfloat16|float16|float32|float64)\b")


def mixed_dtypes(
    error: TypeError, path: str, kind: type, policy: Policy, rule: str, below: str
) -> TypeError | None:
    """Says of an error of JAX in which module arrays of several dtypes have met.

    Args:
      error: raised while a method of the module has run.
      path: of the module.
      kind: its class.
      policy: of the module.
      rule: the rule that gives it, or the policy, as text.
      below: a regular expression for the paths of the module and of what is in it.

    Returns:
      An error to raise from the other; None: that is about something else, or says it
      already.
    """
    text = str(error)
    compute, found = policy.compute_dtype.name, set(_DTYPE.findall(text))
    if compute not in found or len(found) < 2 or "mpjax." in text:
        return None
    others = " and ".join(sorted(found - {compute}))
    return TypeError(
        f"Module {path!r} ({kind.__name__}) follows {rule} and computes in {compute}. "
        f"Its own code has arrays of {others} as well, and JAX wants one dtype "
        f"here:\n\n{text}\n\nA policy casts what enters and leaves modules, and the "
        "parameters in them, but not what a module computes between these: arrays and "
        "variables that it makes, arguments under cast_inputs=False, results of layers "
        "whose rule returns another dtype. Cast such an array to the dtype of what it "
        "meets, as in jnp.zeros(shape, x.dtype); or make the body of a loop a module "
        "of its own, which returns its carry in the dtype in which it came; or let the "
        f"module compute in float32, by mpjax.Rule({below!r}, 'float32') before the "
        "other rules."
    )


def no_pytree(kind: type, path: str, result: str, policy: Policy) -> TypeError:
    """The error of a module whose result cannot be cast.

    Args:
      kind: class of the module.
      path: of the module.
      result: name of the class of the result.
      policy: of the module.
    """
    return TypeError(
        f"Module {path!r} ({kind.__name__}) returns a {result}, which is no pytree, so "
        f"that the arrays in it are not cast to {policy.output_dtype.name}, the output "
        f"dtype of {policy}. Register the class, with jax.tree_util.register_dataclass "
        "or flax.struct.dataclass; or give the module a rule with cast_outputs=False, "
        "which leaves its results as they are."
    )
