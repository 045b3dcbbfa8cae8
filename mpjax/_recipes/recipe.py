"""Which format and which scaling for the three tensors of a product."""

import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp

from mpjax._checks import check_amount, check_flag, check_floating, wrong
from mpjax._hardware.targets import get_target
from mpjax._numerics.formats import format_info
from mpjax._recipes.abstract import Scaling
from mpjax._recipes.state import TENSORS, ScalingState, TensorName, for_grad
from mpjax._typing import Array

ProductName: TypeAlias = Literal["out", "lhs_grad", "rhs_grad"]
# What each product multiplies.
OPERANDS: dict[ProductName, tuple[TensorName, TensorName]] = {
    "out": ("lhs", "rhs"),
    "lhs_grad": ("grad", "rhs"),
    "rhs_grad": ("lhs", "grad"),
}
PRODUCTS: tuple[ProductName, ...] = tuple(OPERANDS)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Formats and scalings of a product ``out = lhs @ rhs`` and of its two gradients.

    ::

        out       lhs   with rhs
        lhs_grad  grad  with rhs
        rhs_grad  lhs   with grad

    Equal recipes hash equal, so a recipe is a static argument that never retraces.

    Attributes:
      lhs: the scaling of the first operand, usually activations.
      rhs: the scaling of the second operand, usually weights.
      grad: the scaling of the gradient of the output.
      quantized: the products that use low precision; the others run in the operands'
        own dtype. ``dataclasses.replace(recipe, quantized=("out", "lhs_grad"))`` keeps
        the weight gradient in high precision.
      calibrated: of delayed scaling: a promise that ``update`` has been called, so that
        no product has to wait for the current amax; see `calibrate`. A scale that is
        still unknown, of a tensor that was all zeros, is then 1 for a step.
        ``"when_known"``: `value_and_grad` makes the promise in each step in which all
        scales are known, see `delayed_scaling`.
      keep_weights: whether the states of layers hold their weights in 8 bits, written
        where the optimizer writes the weights; see `keep_weights`.

    Raises:
      TypeError: one of the three is no scaling.
      ValueError: the scalings cannot go together.

    Example:
      >>> import jax.numpy as jnp, mpjax
      >>> e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
      >>> recipe = mpjax.Recipe(
      ...     mpjax.CurrentScaling(e4m3),
      ...     mpjax.CurrentScaling(e4m3),
      ...     mpjax.CurrentScaling(e5m2),
      ... )
      >>> recipe == mpjax.current_scaling()
      True
    """

    lhs: Scaling
    rhs: Scaling
    grad: Scaling
    quantized: tuple[ProductName, ...] = PRODUCTS
    calibrated: bool | Literal["when_known"] = False
    keep_weights: bool = False

    def __post_init__(self):
        for name, scaling in self.scalings.items():
            if not isinstance(scaling, Scaling):
                raise TypeError(
                    f"{name} of a recipe is a scaling such as CurrentScaling(dtype), "
                    f"got {scaling!r}."
                )
        for name in ("calibrated", "keep_weights"):
            value = getattr(self, name)
            is_word = name == "calibrated" and isinstance(value, str)
            if not is_word or value != "when_known":
                object.__setattr__(self, name, check_flag(name, value))
        names = self.quantized
        several = isinstance(names, tuple | list | set | frozenset)
        if not several or not all(name in PRODUCTS for name in map(str, names)):
            raise ValueError(
                f"quantized is a tuple of names out of {PRODUCTS}, got "
                f"{self.quantized!r}."
            )
        ordered = tuple(name for name in PRODUCTS if name in self.quantized)
        object.__setattr__(self, "quantized", ordered)
        scalings = self.scalings.values()
        lengths = {s.history_length for s in scalings if s.is_delayed}
        if len(lengths) > 1:
            raise ValueError(
                "The delayed scalings of a recipe share one history_length, got "
                f"{sorted(lengths)}."
            )
        is_kept = self.rhs.is_delayed and format_info(self.rhs.dtype).is_float8
        if self.keep_weights and not is_kept:
            raise ValueError(
                "keep_weights keeps weights in fp8 by scales of the step before: rhs "
                f"has a delayed scaling in fp8, got {self.rhs} {self.rhs.dtype.name}."
            )
        sizes = {s.block_size for s in scalings if s.block_size is not None}
        if len(sizes) > 1:
            raise ValueError(
                "Blocks of both operands of a product cover the same elements: all "
                f"block scalings of a recipe have one size, got {sorted(sizes)}."
            )

    def __str__(self):
        scalings = self.scalings.values()
        kinds = dict.fromkeys(str(scaling) for scaling in scalings)
        names = (format_info(scaling.dtype).brief_name for scaling in scalings)
        return f"{', '.join(kinds)} {'/'.join(names)}"

    @property
    def scalings(self) -> dict[TensorName, Scaling]:
        """The scalings by the names of their tensors."""
        return {"lhs": self.lhs, "rhs": self.rhs, "grad": self.grad}

    @property
    def stateful(self) -> bool:
        """Whether a product under this recipe reads scales from a ``ScalingState``."""
        return any(scaling.is_delayed for scaling in self.scalings.values())

    @property
    def serves_convolutions(self) -> bool:
        """Whether a convolution can be computed under this recipe."""
        return all(scaling.serves_convolutions for scaling in self.scalings.values())

    def init(self, loss_scale: float = 1.0) -> ScalingState:
        """The state of a product that has seen nothing.

        Its first step, and every step until the first ``update``, scales by the current
        amax.

        Args:
          loss_scale: that of the first step; 0 if it is not known.

        Returns:
          A state.

        Raises:
          ValueError: no scaling of this recipe is delayed, so there is no state, or the
            loss scale is negative or not finite.
          TypeError: the loss scale is no number.

        Example:
          >>> import mpjax
          >>> mpjax.delayed_scaling(history_length=16).init().history.shape
          (3, 16)
        """
        if not self.stateful:
            raise ValueError("Only a recipe with a DelayedScaling has a state.")
        check_amount("loss_scale", loss_scale, ())
        length = max(scaling.history_length for scaling in self.scalings.values())
        return ScalingState(
            scale=jnp.zeros(3, jnp.float32),
            history=jnp.zeros((3, length), jnp.float32),
            loss_scale=jnp.full((), loss_scale, jnp.float32),
            recipe=self,
        )

    def update(
        self,
        state: ScalingState,
        observed: Array,
        loss_scale: Array | float | None = None,
    ) -> ScalingState:
        """Updates a state with the amaxes of one optimizer step. Call it once per step.

        The scale of the next step comes from the maximum of the history, or its last
        entry. An amax that is 0 or not finite tells nothing: it never enters the
        history, and when no other is left the scale stays what it was. The scale of the
        gradient follows the loss scale, so that a change of that saturates nothing.

        Args:
          state: of the product.
          observed: f32[..., 3], the gradient with respect to ``state.scale``: the
            amaxes of lhs, rhs and output gradient. Merge those of microbatches, or of
            several uses of a layer, by ``jnp.maximum`` (or `split_scales`).
          loss_scale: f32[], the loss scale of the step to come; None: the loss is not
            scaled. While that of the last step is not known, nothing is entered.

        Returns:
          The state for the next step.

        Raises:
          TypeError: ``state`` is no ``ScalingState``, or one of the others no number.
          ValueError: ``observed`` has another shape, or a number is negative or not
            finite.

        Example:
          >>> import jax.numpy as jnp, mpjax
          >>> recipe = mpjax.delayed_scaling()
          >>> state = recipe.update(recipe.init(), jnp.array([448.0, 44.8, jnp.inf]))
          >>> state.scale
          Array([1.   , 0.125, 0.   ], dtype=float32)
        """
        _check_state(state)
        if loss_scale is not None:
            check_amount("loss_scale", loss_scale, state.loss_scale.shape)
        observed = check_floating("observed", observed)
        if observed.shape != state.scale.shape:
            raise ValueError(
                "observed is the gradient with respect to state.scale, of shape "
                f"{state.scale.shape}, got {observed.shape}."
            )
        last = state.loss_scale
        if loss_scale is None:
            last, loss_scale = jnp.where(last > 0, last, 1.0), 1.0
        amaxes = observed / for_grad(jnp.where(last > 0, last, 1.0))
        known = jnp.isfinite(amaxes) & (amaxes > 0) & (last[..., None] > 0)
        amaxes = jnp.where(known, amaxes, 0.0)
        history = jnp.concatenate([state.history[..., 1:], amaxes[..., None]], axis=-1)
        scales = []
        for i, name in enumerate(TENSORS):
            unit = last if name == "grad" else 1.0
            scaling, scale = self.scalings[name], state.scale[..., i]
            scales.append(scaling.next_scale(scale, history[..., i, :], unit))
        entered = dataclasses.replace(
            state, scale=jnp.stack(scales, axis=-1), history=history, loss_scale=last
        )
        return self.rescale(entered, loss_scale)

    def rescale(self, state: ScalingState, loss_scale: Array | float) -> ScalingState:
        """The state for a step with another loss scale, as after a skipped step.

        Args:
          state: of the product.
          loss_scale: f32[], that of the step to come.

        Returns:
          The same history, and a scale of the gradient that follows the loss scale.

        Raises:
          TypeError: ``state`` is no ``ScalingState``, or the loss scale no number.
          ValueError: the loss scale is negative or not finite.

        Example:
          >>> import jax.numpy as jnp, mpjax
          >>> recipe = mpjax.delayed_scaling()
          >>> state = recipe.update(recipe.init(8.0), jnp.full(3, 448.0), 8.0)
          >>> recipe.rescale(state, 4.0).scale / state.scale
          Array([1. , 1. , 0.5], dtype=float32)
        """
        _check_state(state)
        check_amount("loss_scale", loss_scale, state.loss_scale.shape)
        last = state.loss_scale
        ratio = jnp.where(last > 0, loss_scale / jnp.where(last > 0, last, 1.0), 1.0)
        scale = jnp.clip(state.scale * for_grad(ratio), 2.0**-126, 2.0**126)
        # An array of its own for each state, which may be donated with the optimizer's.
        coming = jnp.array(jnp.broadcast_to(loss_scale, last.shape), last.dtype)
        return dataclasses.replace(
            state, scale=jnp.where(state.scale > 0, scale, 0.0), loss_scale=coming
        )

    @property
    def promises_scales(self) -> bool:
        """Whether all scales are known, so that no product waits for an amax."""
        return self.calibrated is True

    def agrees_with(self, other: "Recipe") -> bool:
        """Whether states of one serve the other: all but ``calibrated`` is equal."""
        return dataclasses.replace(other, calibrated=self.calibrated) == self

    @property
    def signature(self) -> str:
        """What the numbers of a state mean: format, rounding and margin by tensor.

        Checkpoints have it beside the numbers, as a part of names.
        """
        parts = []
        for name, scaling in self.scalings.items():
            margin = getattr(scaling, "margin", 0.0)
            words = [name, str(scaling), scaling.dtype.name, scaling.rounding]
            words += [f"margin {margin:g}"] if margin else []
            parts.append(" ".join(words))
        return "-".join(parts).replace(" ", "_").replace(".", "p")

    def fnuz(self) -> "Recipe":
        """The same recipe in the fnuz formats of AMD's MI300.

        Example:
          >>> import mpjax
          >>> mpjax.current_scaling().fnuz().grad.dtype.name
          'float8_e5m2fnuz'
        """
        scalings = {
            field: dataclasses.replace(s, dtype=format_info(s.dtype).fnuz)
            for field, s in self.scalings.items()
        }
        return dataclasses.replace(self, **scalings)

    def is_supported(self, target: str) -> tuple[bool, str]:
        """Whether a device multiplies the formats of every quantized product natively.

        Where it does not, the product is emulated: the same numbers, no speed-up.

        Args:
          target: a name such as ``"h100"`` or ``"v5e"`` of those that
            ``python -m mpjax targets`` lists, or the path of a file of figures of
            another GPU.

        Returns:
          The answer and the reason.

        Raises:
          ValueError: the target is unknown.

        Example:
          >>> import mpjax
          >>> mpjax.current_scaling().is_supported("v6e")
          (False, 'v6e multiplies no float8_e4m3fn with float8_e4m3fn (product out)')
        """
        device = get_target(target)
        for product in self.quantized:
            pair = [self.scalings[tensor] for tensor in OPERANDS[product]]
            lhs, rhs = (scaling.dtype.name for scaling in pair)
            names = f"{lhs} with {rhs} (product {product})"
            blocked = any(scaling.block_size is not None for scaling in pair)
            native = device.block_scaled and all(s.has_mx_products for s in pair)
            if blocked and not native:
                return False, f"{device.name} has no scales within a product of {names}"
            if not device.multiplies(lhs, rhs):
                return False, f"{device.name} multiplies no {names}"
        return True, f"{device.name} has units for every quantized product"


def _check_state(state: ScalingState) -> None:
    if not isinstance(state, ScalingState):
        raise wrong(
            "state", "is a ScalingState", state, "pass what recipe.init returns"
        )
