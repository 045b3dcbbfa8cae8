"""One valid call of every public function, and junk in place of its arguments."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.lowering
import mpjax.nnx
import mpjax.optimizers

E4M3 = jnp.float8_e4m3fn
DELAYED = mpjax.delayed_scaling(history_length=2)
RULE = mpjax.Rule(".*", "mixed_bfloat16", DELAYED)
X, W = np.ones((2, 4), np.float32), np.ones((4, 3), np.float32)
IMAGES, KERNEL = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 3), np.float32)
CONTRACT = (((1,), (0,)), ((), ()))
NHWC = ("NHWC", "HWIO", "NHWC")
TX = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
PARAMS = {"w": np.ones(3, np.float32)}
OPT_STATE = TX.init(PARAMS)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
SHORT = {"w": jnp.ones(3, jnp.bfloat16)}
SHORT_STATE = mpjax.low_precision_params(MOMENTUM).init(SHORT)
STATES = {"kernel": DELAYED.init()}
SEEN = jax.tree.map(jnp.ones_like, STATES)
VARIABLES = {"params": {"kernel": W}, "scaling": STATES}
ALL = mpjax.scaled(optax.sgd(0.1))
QUANTIZED = mpjax.quantize(W, E4M3)
SCALES = DELAYED.init().scale


def square(params, *args):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


@functools.cache
def model():
    return mpjax.nnx.mixed_precision(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), RULE)


@functools.cache
def optimizer():
    return mpjax.nnx.Optimizer(model(), TX)


@functools.cache
def gradients():

    def loss_fn(model):
        return model(X).sum()

    return mpjax.nnx.value_and_grad(loss_fn, optimizer())(model())[1]


def delayed_loss(variables):
    kernel, scale = variables["params"]["kernel"], variables["scaling"]["kernel"].scale
    return mpjax.einsum("ij,jk->ik", X, kernel, recipe=DELAYED, scales=scale).sum()


def call_value_and_grad(fun, opt_state, argnums, has_aux):
    return mpjax.value_and_grad(fun, opt_state, argnums, has_aux)(PARAMS)


def call_nnx_value_and_grad(loss_fn, optimizer, argnums, has_aux):
    return mpjax.nnx.value_and_grad(loss_fn, optimizer, argnums, has_aux)(model())


def double(x):
    return x * 2


def call_autocast(dtype, rules, opt_level, output_dtype):
    """Of the call itself and of what it returns."""
    fn = mpjax.autocast(
        double, dtype, rules, opt_level=opt_level, output_dtype=output_dtype
    )
    return fn(X)


def update_dynamic(updates, state, params):
    return TX.update(updates, state, params)


def update_scaled(updates, params):
    return ALL.update(updates, ALL.init(VARIABLES), params)


def update_optimizer(model, grads):
    return optimizer().update(model, grads)


def create_state(apply_fn, params, tx, scaling):
    return mpjax.TrainState.create(
        apply_fn=apply_fn, params=params, tx=tx, scaling=scaling
    )


def apply_gradients(grads, loss_scale, ema):
    state = mpjax.TrainState.create(apply_fn=square, params=PARAMS, tx=TX, ema=PARAMS)
    return state.apply_gradients(grads=grads, loss_scale=loss_scale, ema=ema)


def accumulate(loss_fn, steps, carry_argnum, reduction):
    loss_fn = mpjax.accumulate_gradients(
        loss_fn, steps, carry_argnum=carry_argnum, reduction=reduction
    )
    return mpjax.value_and_grad(loss_fn, OPT_STATE)(PARAMS, X)


def train_with_states(inner, formats, seed):
    tx = mpjax.low_precision_state(inner, formats, seed=seed)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def train_short(inner, method, seed):
    tx = mpjax.low_precision_params(inner, method, seed=seed)
    return tx.update(SHORT, tx.init(SHORT), SHORT)


def wrap_linen(module, rules):
    return mpjax.linen.MixedPrecision(module, rules).init(jax.random.key(0), X)


# Functions without side effects on what they are given, and valid arguments by name.
CALLS = {
    mpjax.Policy: {"param_dtype": "float32", "compute_dtype": jnp.bfloat16},
    mpjax.get_policy: {"policy": "mixed_bfloat16"},
    mpjax.preset: {"name": "mixed_bfloat16"},
    mpjax.Rule: {
        "path": ".*",
        "policy": "mixed_bfloat16",
        "recipe": DELAYED,
        "module_type": nn.Dense,
        "optional": False,
        "override": False,
        "cast_inputs": True,
        "min_size": 1,
        "attention": False,
        "primitive": None,
    },
    RULE.matches: {"path": "a", "module_type": nn.Dense},
    RULE.matches_path: {"path": "a"},
    RULE.matches_type: {"module_type": nn.Dense},
    create_state: {
        "apply_fn": square,
        "params": PARAMS,
        "tx": TX,
        "scaling": STATES,
    },
    apply_gradients: {"grads": PARAMS, "loss_scale": 8.0, "ema": PARAMS},
    accumulate: {
        "loss_fn": square,
        "steps": 2,
        "carry_argnum": None,
        "reduction": "mean",
    },
    mpjax.StateRule: {
        "field": "mu",
        "format": "int8",
        "path": ".*",
        "rounding": "nearest",
        "min_size": 1,
        "optional": False,
    },
    mpjax.low_precision_state: {"inner": MOMENTUM, "formats": "8bit", "seed": 0},
    mpjax.low_precision_params: {"inner": MOMENTUM, "method": "split", "seed": 0},
    train_with_states: {"inner": MOMENTUM, "formats": "8bit", "seed": 0},
    train_short: {"inner": MOMENTUM, "method": "stochastic", "seed": 0},
    mpjax.optimizers.float32_params: {"params": SHORT, "opt_state": SHORT_STATE},
    mpjax.optimizers.with_float32_params: {
        "params": SHORT,
        "opt_state": SHORT_STATE,
        "whole": PARAMS,
    },
    mpjax.cast_floating: {"tree": PARAMS, "dtype": jnp.bfloat16},
    mpjax.select_tree: {"pred": np.bool_(True), "on_true": PARAMS, "on_false": PARAMS},
    mpjax.quantize: {
        "x": X,
        "dtype": E4M3,
        "block": (1, 2),
        "rounding": "up",
        "scale_dtype": jnp.float32,
    },
    mpjax.dequantize: {"q": QUANTIZED, "dtype": jnp.float32},
    mpjax.CurrentScaling: {"dtype": E4M3, "rounding": "up"},
    mpjax.ChannelScaling: {"dtype": E4M3, "rounding": "up"},
    mpjax.BlockScaling: {
        "dtype": E4M3,
        "rounding": "up",
        "size": 32,
        "square": False,
        "scale_dtype": "float32",
    },
    mpjax.DelayedScaling: {
        "dtype": E4M3,
        "rounding": "up",
        "history_length": 4,
        "algorithm": "max",
        "margin": 0.0,
    },
    mpjax.Recipe: {
        "lhs": DELAYED.lhs,
        "rhs": DELAYED.rhs,
        "grad": DELAYED.grad,
        "quantized": ("out",),
        "calibrated": False,
        "keep_weights": False,
    },
    DELAYED.init: {"loss_scale": 1.0},
    DELAYED.update: {
        "state": STATES["kernel"],
        "observed": np.ones(3, np.float32),
        "loss_scale": 1.0,
    },
    DELAYED.rescale: {"state": STATES["kernel"], "loss_scale": 1.0},
    DELAYED.is_supported: {"target": "h100"},
    mpjax.current_scaling: {"dtype": E4M3, "grad_dtype": E4M3, "rounding": "up"},
    mpjax.delayed_scaling: {
        "dtype": E4M3,
        "grad_dtype": E4M3,
        "history_length": 4,
        "algorithm": "max",
        "margin": 0.0,
        "rounding": "up",
        "keep_weights": False,
    },
    mpjax.delayed_weight_scaling: {
        "dtype": E4M3,
        "grad_dtype": E4M3,
        "rounding": "up",
        "keep_weights": False,
    },
    mpjax.per_channel_scaling: {"dtype": E4M3, "grad_dtype": E4M3, "rounding": "up"},
    mpjax.block_scaling: {
        "dtype": E4M3,
        "grad_dtype": E4M3,
        "size": 32,
        "rounding": "up",
    },
    mpjax.mx_scaling: {"dtype": E4M3, "grad_dtype": E4M3, "rounding": "up"},
    mpjax.scaled_dot_general: {
        "lhs": X,
        "rhs": W,
        "dimension_numbers": CONTRACT,
        "precision": None,
        "preferred_element_type": jnp.float32,
        "recipe": DELAYED,
        "scales": SCALES,
        "quantized_rhs": None,
        "out_sharding": None,
    },
    mpjax.einsum: {
        "subscripts": "ij,jk->ik",
        "lhs": X,
        "rhs": W,
        "recipe": DELAYED,
        "scales": SCALES,
        "quantized_rhs": None,
        "precision": None,
        "preferred_element_type": jnp.float32,
        "out_sharding": None,
    },
    mpjax.scaled_conv_general_dilated: {
        "lhs": IMAGES,
        "rhs": KERNEL,
        "window_strides": (1, 1),
        "padding": "SAME",
        "lhs_dilation": None,
        "rhs_dilation": None,
        "dimension_numbers": NHWC,
        "feature_group_count": 1,
        "batch_group_count": 1,
        "precision": None,
        "preferred_element_type": None,
        "recipe": DELAYED,
        "scales": SCALES,
    },
    mpjax.autocast: {
        "fn": double,
        "dtype": "bfloat16",
        "rules": None,
        "opt_level": "O1",
        "output_dtype": jnp.float16,
    },
    call_autocast: {
        "dtype": "bfloat16",
        "rules": mpjax.Rule(".*", optional=True),
        "opt_level": "O2",
        "output_dtype": None,
    },
    mpjax.full_precision: {"fn": double},
    mpjax.split_scales: {"scales": SCALES},
    mpjax.dynamic_loss_scaling: {
        "inner": optax.sgd(0.1),
        "init_scale": 2.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 10,
        "hysteresis": 1,
        "min_scale": 1.0,
        "max_scale": 2.0**20,
        "axis_name": None,
    },
    mpjax.static_loss_scaling: {
        "inner": optax.sgd(0.1),
        "scale": 2.0,
        "axis_name": None,
    },
    update_dynamic: {"updates": PARAMS, "state": OPT_STATE, "params": PARAMS},
    mpjax.scale_loss: {"loss": 1.0, "opt_state": OPT_STATE},
    call_value_and_grad: {
        "fun": square,
        "opt_state": OPT_STATE,
        "argnums": 0,
        "has_aux": False,
    },
    mpjax.loss_scale: {"opt_state": OPT_STATE},
    mpjax.last_step_finite: {"opt_state": OPT_STATE},
    mpjax.skipped_steps: {"opt_state": OPT_STATE},
    mpjax.check_training: {
        "params": PARAMS,
        "opt_state": OPT_STATE,
        "max_consecutive_skips": 3,
    },
    mpjax.scaled: {"inner": optax.sgd(0.1)},
    update_scaled: {
        "updates": {"params": {"kernel": W}, "scaling": SEEN},
        "params": VARIABLES,
    },
    mpjax.apply_updates: {"params": PARAMS, "updates": PARAMS},
    mpjax.update_scaling: {
        "states": STATES,
        "observed": SEEN,
        "opt_state": OPT_STATE,
        "params": None,
    },
    mpjax.keep_weights: {"states": STATES, "params": {"kernel": W}},
    mpjax.drop_weights: {"states": STATES},
    mpjax.calibrate: {
        "loss_fn": delayed_loss,
        "variables": VARIABLES,
        "opt_state": None,
        "has_aux": False,
    },
    mpjax.numerics.amax_to_scale: {
        "amax": np.float32(1),
        "dtype": E4M3,
        "rounding": "up",
    },
    mpjax.numerics.block_amax: {
        "x": X,
        "block": (1, 2),
        "compute_dtype": jnp.float32,
    },
    mpjax.numerics.format_info: {"dtype": E4M3},
    mpjax.numerics.quantize_with_scale: {
        "x": X,
        "scale": np.float32(1),
        "dtype": E4M3,
        "block": None,
        "compute_dtype": jnp.float32,
    },
    mpjax.numerics.round_to_format: {"x": X, "dtype": E4M3},
    mpjax.numerics.saturating_cast: {"x": X, "dtype": E4M3},
    mpjax.numerics.stochastic_round: {
        "x": X,
        "dtype": E4M3,
        "key": jax.random.key(0),
    },
    mpjax.linen.mixed_precision: {"module": nn.Dense(3), "rules": "mixed_bfloat16"},
    wrap_linen: {"module": nn.Dense(3), "rules": "mixed_bfloat16"},
    mpjax.linen.tabulate: {
        "model": mpjax.linen.MixedPrecision(nn.Dense(3), "mixed_bfloat16"),
        "rngs": jax.random.key(0),
    },
    mpjax.nnx.mixed_precision: {
        "model": nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
        "rules": "mixed_bfloat16",
    },
    mpjax.nnx.tabulate: {"model": model()},
    mpjax.nnx.Optimizer: {"model": model(), "tx": TX, "wrt": nnx.Param},
    update_optimizer: {"model": model(), "grads": gradients()},
    call_nnx_value_and_grad: {
        "loss_fn": lambda model: model(X).sum(),
        "optimizer": optimizer(),
        "argnums": 0,
        "has_aux": False,
    },
    mpjax.nnx.update_scaling: {
        "model": model(),
        "grads": gradients(),
        "opt_state": None,
    },
    mpjax.nnx.keep_weights: {"model": model()},
    mpjax.nnx.drop_weights: {"model": model()},
    mpjax.nnx.calibrate: {
        "loss_fn": lambda model: model(X).sum(),
        "model": model(),
        "optimizer": None,
        "has_aux": False,
    },
    mpjax.lowering.get_target: {"target": "h100"},
    mpjax.lowering.census: {"fn": square},
}
# Of these the errors of the function in lax are those of the call.
LIKE_LAX = (
    mpjax.scaled_dot_general,
    mpjax.einsum,
    mpjax.scaled_conv_general_dilated,
)
# What the functions of users and of Flax say about it is theirs.
OF_OTHERS = {"fun", "loss_fn", "fn", "rngs"}


def call(fn, arguments):
    """Calls a function, of which some arguments have to be given by position."""
    given = dict(arguments)
    if fn is mpjax.linen.tabulate:
        return fn(given["model"], given["rngs"], X)
    if fn is mpjax.lowering.census:
        return fn(given["fn"], X)
    first = [given.pop(name) for name in ("subscripts", "lhs", "rhs") if name in given]
    if fn is mpjax.einsum:
        return fn(*first, **given)
    return fn(**arguments)


JUNK = {
    "None": None,
    "a flag": True,
    "zero": 0,
    "minus three": -3,
    "a fraction": 0.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "an imaginary number": 1j,
    "a word": "foo",
    "an empty word": "",
    "bytes": b"ab",
    "an object": object(),
    "a function": lambda: 0,
    "an empty tuple": (),
    "a pair": (0, 0),
    "a list": [1.0, "a"],
    "a dict": {"a": 1},
    "words": np.array(["a", "b"]),
    "objects": np.array([None, object()]),
    "an array": jnp.ones(2),
    "negative numbers": -np.ones((2, 4), np.float32),
    "nans": jnp.full(3, jnp.nan),
    "integers": np.arange(3),
    "complex numbers": jnp.ones((2, 4), jnp.complex64),
    "flags": np.array([True, False]),
    "bytes of an array": jnp.ones((2, 4), jnp.int8),
    "a key": jax.random.key(0),
    "a dtype": jnp.dtype("int32"),
    "a class": int,
    "a recipe": DELAYED,
    "states": STATES,
    "a quantized array": QUANTIZED,
    "a transformation": optax.sgd(0.1),
    "a module": nn.Dense(3),
    "a module of nnx": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
}
# What is called there, and raises itself; and a word whose letters JAX counts.
RAISES_ITSELF = {
    (apply_gradients, "ema", "a module"),
    (apply_gradients, "ema", "a module of nnx"),
    (mpjax.calibrate, "variables", "states"),
    (mpjax.nnx.Optimizer, "wrt", "a function"),
    (mpjax.nnx.Optimizer, "wrt", "a module"),
    (mpjax.nnx.Optimizer, "wrt", "a module of nnx"),
    (mpjax.nnx.Optimizer, "wrt", "a transformation"),
    (mpjax.scaled_conv_general_dilated, "lhs_dilation", "an empty word"),
}
