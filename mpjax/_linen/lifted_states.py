"""States of layers in a transformation that lets parameters through, and no states.

The author of ``nn.scan(Block, variable_axes={"params": 0})`` did not know of a
collection ``"scaling"``. While such a model runs under a wrapper, the states of the
layers inside are among its parameters, and are stacked, sliced and shared as those are.
Outside they are in ``variables["scaling"]["params"]``.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from mpjax._recipes.state import SCALING, ScalingState

PARAMS = "params"
# Whether the variables of the run are those of a wrapper, which takes states out again.
lifts: ContextVar[bool] = ContextVar("mpjax_lifts", default=False)


def put_in(variables: Any) -> Any:
    """Variables with the states of `take_out` among the parameters."""
    if not isinstance(variables, Mapping) or PARAMS not in variables:
        return variables
    scaling = variables.get(SCALING)
    if not isinstance(scaling, Mapping) or not scaling.get(PARAMS):
        return variables
    others = {name: tree for name, tree in scaling.items() if name != PARAMS}
    params = _merged(variables[PARAMS], scaling[PARAMS])
    return {**variables, PARAMS: params, SCALING: others}


def take_out(variables: Any) -> Any:
    """Variables with the states that are among the parameters in their collection."""
    if not isinstance(variables, Mapping) or PARAMS not in variables:
        return variables
    params, states = _split(variables[PARAMS])
    if not states:
        return variables
    scaling = {**variables.get(SCALING, {}), PARAMS: states}
    return {**variables, PARAMS: params, SCALING: scaling}


def _merged(tree: Any, states: Any) -> Any:
    if not isinstance(states, Mapping):
        return states
    tree = tree if isinstance(tree, Mapping) else {}
    return {**tree, **{key: _merged(tree.get(key), x) for key, x in states.items()}}


def _split(tree: Mapping) -> tuple[dict, dict]:
    rest, states = {}, {}
    for key, node in tree.items():
        if isinstance(node, ScalingState):
            states[key] = node
        elif isinstance(node, Mapping):
            rest[key], inner = _split(node)
            if inner:
                states[key] = inner
        else:
            rest[key] = node
    return rest, states
