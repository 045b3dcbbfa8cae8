"""Scaling states in Linen: variables of the layers, in a collection of their own.

A product writes the scales that it hands on into the variable, where the next use of
the layer finds them, so that what several uses observe is merged by its maximum.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import get_opaque_trace_state

from mpjax._layers.multiplier import state_of_another_recipe
from mpjax._linen.lifted_states import PARAMS, lifts
from mpjax._recipes.recipe import Recipe
from mpjax._recipes.state import SCALING, ScalingState
from mpjax._scaling_states.weights import refreshed_copy, state_name
from mpjax._typing import Array


class StateOwner:
    """A module that has the states of the layers inside of it, beside its variables.

    Those of Flax here map all variables of these layers, and would take states for
    weights.
    """

    kinds = nn.WeightNorm, nn.SpectralNorm

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self._trace = get_opaque_trace_state()

    def name_of(self, path: str, layer: nn.Module, product: str) -> str:
        """The name of a state: that of a variable of the layer, seen from here."""
        if get_opaque_trace_state() != self._trace:
            kind = type(self.module).__name__
            raise ValueError(
                f"Module {path!r} has delayed scaling and runs in a transformation "
                f"inside of a {kind}, which cannot keep its state there. Transform "
                f"the {kind} instead, or give the module a rule without delayed "
                "scaling."
            )
        inside = len(self.module.layer_instance.path) - 1
        return "/".join((*layer.path[inside:], state_name(product)))


class StateStore:
    """The states of the layers that run, in one run of a wrapper.

    A variable cannot be written where its collection is not mutable, in ``bind`` or in
    a wrapper inside another module, and where the model calls a layer in a function
    that it gives to a transformation of JAX. What is handed on is then kept here for
    later uses in the same trace; what is observed in several traces JAX adds up.

    Attributes:
      owner: has the states of the module that runs; None: it has its own.
    """

    def __init__(self):
        self.owner: StateOwner | None = None
        self._handed_on: dict[tuple, list[tuple[Any, Array]]] = {}

    def read(
        self,
        layer: nn.Module,
        path: str,
        recipe: Recipe,
        name: str,
        weight: Array | None,
    ) -> ScalingState:
        """The state of a product of a layer, with the scales for its next use.

        Args:
          layer: bound.
          path: of the layer in the model.
          recipe: of the layer.
          name: of the product.
          weight: that a copy may serve for; None: the product reads none.

        Raises:
          ValueError: there is no state for it, or one of another recipe.
        """
        param = name
        owner, name = self._place(layer, path, name)
        state = _state(owner, path, recipe, name)
        is_made = layer.is_initializing() and owner is layer
        if weight is not None and recipe.keep_weights and is_made:
            state = _keep_copy(layer, param, weight.shape, state)
        for trace, scales in self._handed_on.get((owner.path, name), ()):
            if trace == get_opaque_trace_state():
                return replace(state, scale=scales)
        return state

    def write(self, layer: nn.Module, path: str, name: str, scales: Array) -> None:
        """Keeps the scales that a product hands on."""
        if layer.is_initializing():
            return
        owner, name = self._place(layer, path, name)
        trace = get_opaque_trace_state()
        if _is_writable(owner) and owner.has_variable(SCALING, name):
            state = owner.get_variable(SCALING, name)
            owner.put_variable(SCALING, name, replace(state, scale=scales))
            return
        kept = self._handed_on.setdefault((owner.path, name), [])
        kept[:] = [(other, old) for other, old in kept if other != trace]
        kept.append((trace, scales))

    def _place(self, layer: nn.Module, path: str, name: str) -> tuple[nn.Module, str]:
        """The module that has a state, and the name of the state there."""
        if self.owner is None:
            return layer, state_name(name)
        return self.owner.module, self.owner.name_of(path, layer, name)


def _state(owner: nn.Module, path: str, recipe: Recipe, name: str) -> ScalingState:
    collection = _collection(owner, name)
    if not owner.has_variable(collection, name):
        if not owner.is_mutable_collection(collection):
            raise ValueError(
                f"Module {path!r} has delayed scaling and finds no state. Give "
                f"apply the collection {SCALING!r} that init makes beside "
                "'params', and name it to the transformations of the model: "
                f"nn.scan(..., variable_axes={{'params': 0, {SCALING!r}: 0}}), the "
                "axis that params has. Where that cannot be, in a model that is not "
                "yours or a module that the model applies by itself, give the module "
                "a rule with mpjax.current_scaling()."
            )
        with jax.ensure_compile_time_eval():  # in whatever trace the layer runs first
            owner.put_variable(collection, name, recipe.init(loss_scale=0))
    state = owner.get_variable(collection, name)
    if not state.recipe.agrees_with(recipe):
        raise state_of_another_recipe(path, state.recipe, recipe)
    return state


def _collection(owner: nn.Module, name: str) -> str:
    """The collection of a state; parameters, where its own is not let through."""
    if owner.has_variable(SCALING, name) or owner.is_mutable_collection(SCALING):
        return SCALING
    made = lifts.get() and owner.is_initializing()
    made = made and owner.is_mutable_collection(PARAMS)
    return PARAMS if made or owner.has_variable(PARAMS, name) else SCALING


def _keep_copy(
    layer: nn.Module, name: str, shape: tuple[int, ...], state: ScalingState
) -> ScalingState:
    """A state that is being made, with a copy of the parameter of its name, if any."""
    param = nn.unbox(layer.get_variable("params", name))
    if state.weight is not None or getattr(param, "shape", None) != shape:
        return state
    if _is_writable(layer):
        state = refreshed_copy(state, param)
        layer.put_variable(SCALING, state_name(name), state)
    return state


def _is_writable(owner: nn.Module) -> bool:
    root: Any = owner.scope
    at_top = root.root.trace_level == get_opaque_trace_state()
    return owner.is_mutable_collection(SCALING) and at_top
