"""Parameters in 16 bits whose small updates are not lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax._checks import (
    check_arrays,
    check_same_shapes,
    check_same_structure,
    check_transformation,
    whole_number,
    wrong,
)
from mpjax._optimizers.halves import METHODS, Method, is_short, joined, method_of, split
from mpjax._optimizers.low_precision import LowPrecisionState
from mpjax._optimizers.noise import random_bits, salt_of
from mpjax._optimizers.rules import path_name
from mpjax._optimizers.trees import check_floating_leaves, has_arrays
from mpjax._tree import widen
from mpjax._typing import Array, ArrayTree
from mpjax._updates import NewValue, OfStoredParams, with_updates


class LowPrecisionParamsState(NamedTuple):
    """State of `low_precision_params`.

    Attributes:
      inner_state: that of the optimizer, which works in float32.
      rest: what 16-bit parameters lack, by the method: a tree like the parameters, of
        the float32 parameter, its lower 16 bits as int16, or the bfloat16 rest;
        elsewhere ``optax.MaskedNode``.
      seed: uint32[], from which the random bits of the next step are made.

    Example:
      >>> import jax.numpy as jnp, mpjax, optax
      >>> tx = mpjax.low_precision_params(optax.sgd(1.0))
      >>> print(tx.init(jnp.ones(2, jnp.bfloat16)).rest)
      {'split': Array([0, 0], dtype=int16)}
    """

    inner_state: optax.OptState
    rest: dict[Method, ArrayTree]
    seed: Array


def low_precision_params(
    inner: optax.GradientTransformation, method: Method = "split", *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Trains 16-bit parameters without losing what is smaller than their last bit.

    A bfloat16 number has 8 bits of significand: adding less than 1/512 of it changes
    nothing. ``inner`` sees float32 parameters instead, and after its update they are
    stored by one of these methods:

    ==============  =========  ====================================================
    ``method``      bytes      what is beside the 16-bit parameter
    ==============  =========  ====================================================
    ``"float32"``   2 + 4      the float32 parameter
    ``"split"``     2 + 2      its other 16 bits: together they are the float32
                               parameter, bit for bit
    ``"kahan"``     2 + 2      the rest of the last rounding, in bfloat16
    ``"stochastic"``  2        nothing: rounded up or down at random, so that the
                               expected value is right
    ==============  =========  ====================================================

    The first two train as float32 does, bit for bit. Updates of 16-bit parameters are
    new values, which `mpjax.apply_updates`, `TrainState` and ``mpjax.nnx.Optimizer``
    put in their place, and optax refuses to add. Parameters of other dtypes are
    updated as by ``inner``. It goes around all but loss scaling:
    ``dynamic_loss_scaling(low_precision_params(low_precision_state(tx)))``.

    Args:
      inner: an optimizer of optax.
      method: one of the above; "split" and "kahan" for bfloat16 alone.
      seed: of the random bits of "stochastic"; around `low_precision_state` those of
        that are shared.

    Returns:
      A transformation whose state is a `LowPrecisionParamsState`, and whose ``update``
      needs ``params``.

    Raises:
      TypeError: ``inner`` is no transformation.
      ValueError: there is no such method. From ``init``: no parameter has 16 bits, or
        one is of a dtype that the method does not serve. From ``update``: ``params`` is
        missing.

    Example:
      >>> import jax.numpy as jnp, mpjax.optimizers, optax
      >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
      >>> tx = mpjax.low_precision_params(optax.sgd(1.0))
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update({"w": jnp.full(3, -1e-3)}, state, params)
      ...     params = mpjax.apply_updates(params, updates)
      >>> print(params["w"], mpjax.optimizers.float32_params(params, state)["w"])
      [1.00781 1.00781 1.00781] [1.0040002 1.0040002 1.0040002]

    References:
      Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192 (the last two).
    """
    check_transformation(inner, lambda value: False)
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}.")
    seed = whole_number("seed", seed) % 2**32
    inner = optax.with_extra_args_support(inner)

    def rest_of(p):
        if not is_short(p):
            return optax.MaskedNode()
        if isinstance(p, jax.ShapeDtypeStruct):
            p = jnp.zeros(p.shape, p.dtype)
        return split(p.astype(jnp.float32), p.dtype, method)[1]

    def init(params):
        rest = params  # of placeholders, for optax.tree.map_params
        if has_arrays(params):
            check_floating_leaves(params)
            check_dtypes(params, method)
            rest = jax.tree.map(rest_of, params)
        return LowPrecisionParamsState(
            inner.init(widen(params)), {method: rest}, jnp.array(seed, jnp.uint32)
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "low_precision_params makes new parameters from the old ones: call "
                "update(grads, opt_state, params)."
            )
        if not _is_state(state):
            raise wrong(
                "state",
                "is a LowPrecisionParamsState",
                state,
                "pass what the init or update of this optimizer returned",
            )
        given = params.fast if isinstance(params, optax.LookaheadParams) else params
        check_same_shapes("updates and params", updates, given)
        _check_same_tree(params, state, method)
        whole = joined(params, state.rest)
        wide, inner_state = inner.update(
            widen(updates), state.inner_state, whole, **extra_args
        )
        new = with_updates(whole, wide)
        # A parameter and its moments share random bits, which are then made once.
        inner_states = state.inner_state
        shares = isinstance(inner_states, LowPrecisionState)
        own_seed = inner_states.seed if shares else state.seed
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        out, rests = [], []
        for (path, p), x, u in zip(
            leaves,
            jax.tree.leaves(new),
            structure.flatten_up_to(wide),
            strict=True,
        ):
            if not is_short(p):
                out.append(u)
                rests.append(optax.MaskedNode())
                continue
            salt = salt_of(path_name(path))
            bits = random_bits(x, own_seed, salt)
            value, rest = split(x, p.dtype, method, bits)
            out.append(NewValue.of(p, value))
            rests.append(rest)
        return structure.unflatten(out), LowPrecisionParamsState(
            inner_state,
            {method: structure.unflatten(rests)},
            state.seed + jnp.uint32(0x9E3779B9),
        )

    return OfStoredParams(init, update)


def float32_params(params: ArrayTree, opt_state: ArrayTree) -> ArrayTree:
    """The parameters that `low_precision_params` trains, in float32.

    For a checkpoint, an evaluation, or to go on in float32.

    Args:
      params: the 16-bit parameters.
      opt_state: any tree with one `LowPrecisionParamsState`.

    Returns:
      A tree like ``params``. By "float32" and "split" exactly what float32 training
      has; by "kahan" to 16 bits of significand; by "stochastic" the parameters, cast.

    Raises:
      ValueError: there is no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, mpjax.optimizers, optax
      >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
      >>> state = mpjax.low_precision_params(optax.sgd(1.0)).init(params)
      >>> mpjax.optimizers.float32_params(params, state)["w"].dtype.name
      'float32'
    """
    check_arrays("params", params)
    state = _find_state(opt_state)
    _check_same_tree(params, state)
    return joined(params, state.rest)


def with_float32_params(
    params: ArrayTree, opt_state: ArrayTree, whole: ArrayTree
) -> tuple[ArrayTree, ArrayTree]:
    """Parameters and a state for float32 parameters, of a checkpoint or an init.

    Args:
      params: 16-bit parameters, for their dtypes.
      opt_state: any tree with one `LowPrecisionParamsState`.
      whole: f32[...], a tree like ``params``.

    Returns:
      New ``params`` and ``opt_state``. By "float32" and "split" nothing is lost; the
      parameters are rounded to nearest.

    Raises:
      ValueError: there is no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, mpjax.optimizers, optax
      >>> params, whole = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.full(3, 1.001)}
      >>> state = mpjax.low_precision_params(optax.sgd(1.0)).init(params)
      >>> params, state = mpjax.optimizers.with_float32_params(params, state, whole)
      >>> print(mpjax.optimizers.float32_params(params, state)["w"])
      [1.001 1.001 1.001]
    """
    state = _find_state(opt_state)
    check_arrays("params", params)
    check_arrays("whole", whole)
    check_same_shapes("params and whole", params, whole)
    (method, old), *_ = state.rest.items()
    leaves, structure = jax.tree.flatten(params)
    halves = [
        split(jnp.asarray(x, jnp.float32), p.dtype, method_of(r, method))
        if is_short(p)
        else (jnp.asarray(x, p.dtype), r)
        for p, x, r in zip(
            leaves,
            structure.flatten_up_to(whole),
            structure.flatten_up_to(old),
            strict=True,
        )
    ]
    values, rests = zip(*halves, strict=True)
    new = state._replace(rest={method: structure.unflatten(rests)})
    opt_state = jax.tree.map(
        lambda node: new if _is_state(node) else node, opt_state, is_leaf=_is_state
    )
    return structure.unflatten(values), opt_state


def check_dtypes(params: ArrayTree, method: Method) -> None:
    found = {leaf.dtype.name for leaf in jax.tree.leaves(params) if is_short(leaf)}
    if not found:
        raise ValueError(
            "low_precision_params trains parameters in bfloat16 or float16, got none: "
            'give the model a policy such as "p=bf16,c=bf16,o=f32", and put the '
            "wrapper around all but loss scaling. That stands right around it: where "
            "something is in between, it gives float32 copies."
        )
    if method in ("split", "kahan") and found != {"bfloat16"}:
        raise ValueError(
            f'method="{method}" is for bfloat16, the upper half of a float32, got '
            f'float16 parameters: take "float32" or "stochastic".'
        )


def _find_state(opt_state: ArrayTree) -> LowPrecisionParamsState:
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_state)
    found = [leaf for leaf in leaves if _is_state(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"There is one state of low_precision_params in a state, got {len(found)}."
        )
    return found[0]


def _check_same_tree(
    params: ArrayTree, state: LowPrecisionParamsState, wanted: Method | None = None
) -> None:
    """Raises a ValueError unless a state is that of parameters, and of a method."""
    (method, rest), *_ = state.rest.items()
    if wanted not in (None, method):
        raise ValueError(
            f'The state was made with method="{method}", and this is "{wanted}": '
            "convert it by mpjax.optimizers.float32_params and with_float32_params."
        )
    check_same_structure("params and those of the state", params, rest, _is_leaf)
    leaves, rests = (jax.tree.leaves(tree, is_leaf=_is_leaf) for tree in (params, rest))
    for p, r in zip(leaves, rests, strict=True):
        if not _is_leaf(r) and (not is_short(p) or np.shape(p) != np.shape(r)):
            raise ValueError(
                f"The state was made for a 16-bit parameter of shape {np.shape(r)}, "
                f"got {jax.typeof(p)}: begin with the state of a new init."
            )


def _is_leaf(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_state(node: Any) -> bool:
    return isinstance(node, LowPrecisionParamsState)
