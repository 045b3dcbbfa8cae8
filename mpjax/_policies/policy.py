"""Which dtype parameters, computation and outputs have."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._checks import check_dtype
from mpjax._numerics.formats import Format, all_formats, find_format
from mpjax._policies.presets import PRESETS, full_name
from mpjax._tree import cast_floating, convert_floating
from mpjax._typing import ArrayTree, DType

_KEYS = {
    "p": "param_dtype",
    "params": "param_dtype",
    "c": "compute_dtype",
    "compute": "compute_dtype",
    "o": "output_dtype",
    "output": "output_dtype",
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes in which parameters are kept, layers compute and a model answers.

    Policies are values: equal ones hash equal, whatever spelling of a dtype they were
    made from, so that they can be static arguments of ``jax.jit`` without retracing. A
    front end takes a policy literally: what is fragile in few bits is protected by the
    presets, which are lists of rules, see `preset`.

    Attributes:
      param_dtype: parameters and their initial values; float32 unless given.
      compute_dtype: operands of the layers; follows ``param_dtype`` unless given.
      output_dtype: what comes out; follows ``compute_dtype`` unless given. Carries and
        state that a module takes and returns keep their own.

    Raises:
      ValueError: a dtype is unknown, not a real floating dtype, or float64 while
        ``jax_enable_x64`` is off.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> policy = mpjax.Policy(compute_dtype=jnp.bfloat16, output_dtype="float32")
      >>> str(policy)
      'p=f32,c=bf16,o=f32'
      >>> policy.cast_to_compute({"w": jnp.ones(2), "step": 3})["w"].dtype.name
      'bfloat16'

    References:
      Micikevicius et al., Mixed Precision Training, https://arxiv.org/abs/1710.03740;
      the shape of the class is that of https://github.com/google-deepmind/jmp.
    """

    param_dtype: DType = None
    compute_dtype: DType = None
    output_dtype: DType = None

    def __post_init__(self):
        previous = np.float32
        for field in ("param_dtype", "compute_dtype", "output_dtype"):
            given = getattr(self, field)
            previous = _floating_dtype(previous if given is None else given)
            object.__setattr__(self, field, previous)

    def cast_to_param(self, tree: ArrayTree) -> ArrayTree:
        """Casts the floating leaves of a tree to ``param_dtype``.

        Args:
          tree: any pytree, as of `cast_floating`.

        Returns:
          The tree, its other leaves as they are.
        """
        return cast_floating(tree, self.param_dtype)

    def cast_to_compute(self, tree: ArrayTree) -> ArrayTree:
        """Casts the floating leaves of a tree to ``compute_dtype``.

        Args:
          tree: any pytree, as of `cast_floating`.

        Returns:
          The tree, its other leaves as they are.
        """
        if self.param_dtype.itemsize == 1:  # parameters that it stores in eight bits
            return convert_floating(tree, self.compute_dtype)
        return cast_floating(tree, self.compute_dtype)

    def cast_to_output(self, tree: ArrayTree) -> ArrayTree:
        """Casts the floating leaves of a tree to ``output_dtype``.

        Args:
          tree: any pytree, as of `cast_floating`.

        Returns:
          The tree, its other leaves as they are.
        """
        return cast_floating(tree, self.output_dtype)

    def with_output_dtype(self, output_dtype: DType) -> "Policy":
        """The same policy with another output dtype.

        Args:
          output_dtype: a floating dtype, or its name.

        Returns:
          A new policy.

        Raises:
          ValueError: as of ``Policy``.
        """
        return dataclasses.replace(self, output_dtype=output_dtype)

    def __str__(self):
        formats = {f.dtype: f.short_name for f in policy_formats()}
        p, c, o = (
            formats[dtype]
            for dtype in (self.param_dtype, self.compute_dtype, self.output_dtype)
        )
        return f"p={p},c={c},o={o}"


def check_loss_is_scaled(policies: Iterable[Policy | None]) -> None:
    """Raises a ValueError if float16 gradients would flush to zero.

    Args:
      policies: of a model whose optimizer scales no loss.
    """
    for policy in policies:
        if policy is not None and policy.compute_dtype == jnp.float16:
            raise ValueError(
                f"The model computes in float16 ({policy}), where gradients below 6e-8 "
                "are zero, and its optimizer scales no loss: pass "
                "tx=mpjax.dynamic_loss_scaling(tx)."
            )


def get_policy(policy: str | Policy | DType) -> Policy:
    """Reads a policy from a name, from jmp's grammar, or from one dtype for all.

    - ``"mixed_bfloat16"``, ``"mixed_float16"``: parameters and outputs in float32,
      computation in 16 bits; ``p=f32,c=bf16,o=f32`` for the first.
    - ``"mixed_float8"``: ``p=f32,c=bf16,o=f32``; the recipe is not in the policy.
    - ``"float32"``, ``"f32"``, ``"full"``: all in float32; likewise other dtypes.
    - ``"half"``: all in bfloat16 on a TPU, else all in float16.
    - ``"p=f32,c=bf16"``: the keys are ``p`` or ``params``, ``c`` or ``compute``, and
      ``o`` or ``output``. Parameters are float32 unless given, computation follows
      parameters, outputs follow computation. Spaces are allowed.

    Of a preset, which these names are to a front end, this is the policy alone, and not
    what `preset` protects: ``Rule(policy=get_policy("mixed_bfloat16"))`` is literal.

    Args:
      policy: a string as above, a dtype, or a ``Policy``, which is returned as it is.

    Returns:
      A ``Policy``; ``get_policy(str(policy)) == policy``.

    Raises:
      ValueError: a name, key or dtype is unknown, or a key stands twice.

    Example:
      >>> import mpjax
      >>> str(mpjax.get_policy("params=float32, compute=float16"))
      'p=f32,c=f16,o=f16'
    """
    if isinstance(policy, Policy):
        return policy
    if policy is None:
        raise ValueError("A policy is made of dtypes, got None.")
    if not isinstance(policy, str):
        return Policy(policy)
    name = full_name(policy)
    if name is not None:
        policy = PRESETS[name].policy
    if "=" in policy:
        return _parse_policy(policy)
    if policy.strip() not in _dtypes_by_name():
        raise ValueError(
            f"Unknown policy {policy!r}. Use one of {', '.join(PRESETS)}, or spell it "
            "out, as in 'p=f32,c=bf16,o=f32'."
        )
    return Policy(parse_dtype(policy.strip()))


def _parse_policy(policy: str) -> Policy:
    dtypes = {}
    for part in policy.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in _KEYS:
            raise ValueError(
                f"Unknown key {key!r} in policy {policy!r}: the keys are p|params, "
                "c|compute and o|output, as in 'p=f32,c=bf16,o=f32'."
            )
        if _KEYS[key] in dtypes:
            raise ValueError(f"Policy {policy!r} gives {key!r} twice; give it once.")
        dtypes[_KEYS[key]] = parse_dtype(value)
    return Policy(**dtypes)


def is_spelled_out(text: str) -> bool:
    """Whether a string begins as a policy in jmp's grammar does."""
    return "=" in text and text.partition("=")[0].strip() in _KEYS


def policy_formats() -> list[Format]:
    """The formats that a policy may have: floats of 16 bits and more, and fp8."""
    return [f for f in all_formats() if f.is_float8 or f.bits > 8]


def _dtypes_by_name() -> dict[str, np.dtype]:
    dtypes = {n: f.dtype for f in policy_formats() for n in (f.short_name, f.name)}
    return {**dtypes, "full": jnp.dtype(jnp.float32)}


def parse_dtype(name: str) -> np.dtype:
    """Reads a dtype from its name or short form, or ``full`` or ``half``.

    Raises:
      ValueError: the name is not one of the table's.

    Example:
      >>> parse_dtype("bf16").name
      'bfloat16'
    """
    if name == "half":
        is_tpu = jax.default_backend() == "tpu"
        return jnp.dtype(jnp.bfloat16 if is_tpu else jnp.float16)
    dtypes = _dtypes_by_name()
    if name not in dtypes:
        raise ValueError(
            f"Unknown dtype {name!r} in a policy. Use one of "
            f"{', '.join([*dtypes, 'half'])}."
        )
    return dtypes[name]


def spelled_like(given: DType, dtype: np.dtype) -> DType:
    """A dtype as a name, a scalar type or a ``np.dtype``, as the model wrote its own.

    Models call it, ``self.dtype(0.5)``, or look it up, ``getattr(jnp, self.dtype)``.
    """
    if isinstance(given, str):
        return dtype.name
    return dtype if isinstance(given, np.dtype) else getattr(jnp, dtype.name)


def _floating_dtype(dtype: DType) -> np.dtype:
    """The dtype of a policy, or a ValueError."""
    if isinstance(dtype, str):
        return parse_dtype(dtype)
    try:
        dtype = check_dtype("dtype", dtype)
    except TypeError as error:
        raise ValueError(f"A policy is made of dtypes, got {dtype!r}.") from error
    if find_format(dtype.name) not in policy_formats():
        raise ValueError(
            f"A policy is made of real floating dtypes, got {dtype.name}. Use one of "
            f"{', '.join(f.name for f in policy_formats())}."
        )
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "A policy in float64 needs jax.config.update('jax_enable_x64', True); "
            "without it JAX would compute in float32."
        )
    return dtype
