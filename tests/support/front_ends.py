"""Both front ends behind one small interface, for what they have in common.

A trainer is a model under rules with its scaling states and its optimizer, stepped as
the documentation of its front end steps it. A model is a name out of the tables of
``linen_models`` and ``nnx_models``, or a module.
"""

import functools

import jax
import jax.numpy as jnp
import linen_models
import nnx_models
import optax
from flax import nnx

import mpjax
import mpjax.linen
import mpjax.nnx

BF16 = jnp.dtype(jnp.bfloat16)
CURRENT, DELAYED = mpjax.current_scaling(), mpjax.delayed_scaling(history_length=4)
WRT = nnx.DiffState(0, nnx.Any(nnx.Param, mpjax.nnx.ScalingStat))


def rule(recipe, policy="mixed_bfloat16", **kwargs):
    """One rule for all modules."""
    return mpjax.Rule(".*", policy, recipe, **kwargs)


def weigh(out):
    """A loss with another gradient for each output."""
    weights = jnp.linspace(-1, 1, out.size, dtype=out.dtype).reshape(out.shape)
    return jnp.sum(out * weights)


def amax(x):
    """Of the bfloat16 numbers that a layer multiplies."""
    return jnp.abs(x.astype(BF16)).max().astype(jnp.float32)


def by_path(tree):
    """{path: leaf}, of a tree whose scaling states are leaves."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_state)
    paths = ("/".join(str(key.key) for key in path) for path, _ in flat)
    leaves = (leaf for _, leaf in flat)
    return dict(zip(paths, leaves, strict=True))


def scales(tree):
    """What stands in place of the scales, as {path: [lhs, rhs, grad]}."""
    if isinstance(tree, nnx.Module | nnx.State):
        tree = _pure(tree, mpjax.nnx.ScalingStat)
    return {
        path.removesuffix("_scaling"): state.scale
        for path, state in by_path(tree).items()
    }


@nnx.jit
def loss_and_gradients(model, x):
    """Of a mixed model of NNX; the gradient has one for its states as well."""
    return nnx.value_and_grad(lambda model: weigh(model(x)), argnums=WRT)(model)


def _is_state(node):
    return isinstance(node, mpjax.ScalingState)


def _pure(tree, kind):
    return nnx.to_pure_dict(nnx.state(tree, kind))


def _write(node, kind, tree):
    state = nnx.state(node, kind)
    nnx.replace_by_pure_dict(state, tree)
    nnx.update(node, state)


def _with_states(tree, states):
    """The tree, with other states in the order of their paths."""
    return jax.tree.structure(tree, is_leaf=_is_state).unflatten(states.values())


def _has_loss_scale(opt_state):
    return isinstance(opt_state, mpjax.LossScalingState)


def _known(opt_state):
    """What update_scaling is given of an optimizer."""
    counts = isinstance(opt_state, optax.MultiStepsState)
    return opt_state if _has_loss_scale(opt_state) or counts else None


class LinenTrainer:
    """``mpjax.linen`` with variables, optimizer and steps as functions of values."""

    def __init__(self, model, rules, *inputs, tx=None, loss=weigh):
        model = linen_models.NAMED[model]() if isinstance(model, str) else model
        self.model, self.loss = mpjax.linen.MixedPrecision(model, rules), loss
        # Compiled, so that nothing is computed but the variables.
        variables = jax.jit(self.model.init)(jax.random.key(0), *inputs)
        self.variables = {"scaling": {}, **variables}
        self.tx = optax.sgd(0.0) if tx is None else tx
        self.opt_state, self.traces = self.tx.init(variables["params"]), 0
        self._gradients, self._step = jax.jit(self._grads), jax.jit(self._make_step)

    def _grads(self, variables, opt_state, *inputs):
        def loss_fn(params, scaling):
            # A model without states has no such collection.
            given = {**variables, "params": params, "scaling": scaling}
            given = {name: tree for name, tree in given.items() if tree}
            return self.loss(self.model.apply(given, *inputs))

        take = jax.value_and_grad
        if _has_loss_scale(opt_state):
            take = functools.partial(mpjax.value_and_grad, opt_state=opt_state)
        take = take(loss_fn, argnums=(0, 1))
        loss, (grads, seen) = take(variables["params"], variables["scaling"])
        return loss, grads, seen

    def _make_step(self, variables, opt_state, *inputs):
        self.traces += 1
        _, grads, seen = self._grads(variables, opt_state, *inputs)
        updates, opt_state = self.tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        scaling = variables["scaling"]
        scaling = mpjax.update_scaling(scaling, seen, _known(opt_state))
        return {**variables, "params": params, "scaling": scaling}, opt_state, seen

    def apply(self, *inputs):
        """The outputs."""
        given = {name: tree for name, tree in self.variables.items() if tree}
        return self.model.apply(given, *inputs)

    def gradient_trees(self, *inputs):
        """The loss and its gradients, as trees of variables."""
        return self._gradients(self.variables, self.opt_state, *inputs)

    def gradients(self, *inputs):
        """The loss, its gradients for parameters and for states; nothing changes."""
        loss, grads, seen = self.gradient_trees(*inputs)
        return loss, by_path(grads), scales(seen)

    def step(self, *inputs):
        """One step; what was observed in it."""
        self.variables, self.opt_state, seen = self._step(
            self.variables, self.opt_state, *inputs
        )
        return scales(seen)

    def trace(self, *inputs):
        """The jaxpr of the outputs."""
        given = {name: tree for name, tree in self.variables.items() if tree}
        return jax.make_jaxpr(self.model.apply)(given, *inputs)

    def trace_gradients(self, *inputs):
        """The jaxpr of the gradients."""
        return jax.make_jaxpr(self._grads)(self.variables, self.opt_state, *inputs)

    @property
    def params(self):
        """{path: array}."""
        return by_path(self.variables["params"])

    @params.setter
    def params(self, tree):
        self.variables = {**self.variables, "params": tree}

    @property
    def states(self):
        """{path: ScalingState}."""
        states = by_path(self.variables["scaling"])
        return {path.removesuffix("_scaling"): s for path, s in states.items()}

    @states.setter
    def states(self, states):
        scaling = _with_states(self.variables["scaling"], states)
        self.variables = {**self.variables, "scaling": scaling}

    @property
    def everything(self):
        """All that a checkpoint has to hold."""
        return {"variables": self.variables, "opt_state": self.opt_state}

    @everything.setter
    def everything(self, tree):
        self.variables, self.opt_state = tree["variables"], tree["opt_state"]


class NnxTrainer:
    """``mpjax.nnx`` with a model and an optimizer that change in place."""

    def __init__(self, model, rules, *_, tx=None, loss=weigh):
        model = nnx_models.NAMED[model]() if isinstance(model, str) else model
        self.model, self.loss = mpjax.nnx.mixed_precision(model, rules), loss
        tx = optax.sgd(0.0) if tx is None else tx
        self.optimizer, self.traces = mpjax.nnx.Optimizer(self.model, tx), 0
        self._gradients, self._step = nnx.jit(self._grads), nnx.jit(self._make_step)

    def _grads(self, model, optimizer, *inputs):
        def loss_fn(model):
            return self.loss(model(*inputs))

        return mpjax.nnx.value_and_grad(loss_fn, optimizer)(model)

    def _make_step(self, model, optimizer, *inputs):
        self.traces += 1
        _, grads = self._grads(model, optimizer, *inputs)
        optimizer.update(model, grads)
        return grads

    def apply(self, *inputs):
        """The outputs."""
        return self.model(*inputs)

    def gradients(self, *inputs):
        """The loss, its gradients for parameters and for states; nothing changes."""
        loss, grads = self._gradients(self.model, self.optimizer, *inputs)
        return loss, by_path(_pure(grads, nnx.Param)), scales(grads)

    def step(self, *inputs):
        """One step; what was observed in it."""
        return scales(self._step(self.model, self.optimizer, *inputs))

    def trace(self, *inputs):
        """The jaxpr of the outputs."""
        graph, state = nnx.split(self.model)
        run = jax.make_jaxpr(lambda state, *args: nnx.merge(graph, state)(*args))
        return run(state, *inputs)

    def trace_gradients(self, *inputs):
        """The jaxpr of the gradients."""
        graph, state = nnx.split((self.model, self.optimizer))

        def run(state, *inputs):
            return self._grads(*nnx.merge(graph, state), *inputs)

        return jax.make_jaxpr(run)(state, *inputs)

    @property
    def opt_state(self):
        """Of the optimizer."""
        return self.optimizer.opt_state

    @property
    def params(self):
        """{path: array}."""
        return by_path(_pure(self.model, nnx.Param))

    @params.setter
    def params(self, tree):
        _write(self.model, nnx.Param, tree)

    @property
    def states(self):
        """{path: ScalingState}."""
        states = by_path(_pure(self.model, mpjax.nnx.ScalingStat))
        return {path.removesuffix("_scaling"): s for path, s in states.items()}

    @states.setter
    def states(self, states):
        tree = _with_states(_pure(self.model, mpjax.nnx.ScalingStat), states)
        _write(self.model, mpjax.nnx.ScalingStat, tree)

    @property
    def everything(self):
        """All that a checkpoint has to hold."""
        return _pure((self.model, self.optimizer), ...)

    @everything.setter
    def everything(self, tree):
        _write((self.model, self.optimizer), ..., tree)


FRONT_ENDS = {"linen": LinenTrainer, "nnx": NnxTrainer}
