"""Censuses and reports of NNX models: paths of modules, and whole steps."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import mpjax
import mpjax.lowering
import mpjax.nnx

F32, BF16 = jnp.float32, jnp.bfloat16
X = jax.ShapeDtypeStruct((8, 16), F32)
PRODUCT = 2 * 8 * 16 * 16
census = mpjax.lowering.census


def linear(rngs):
    return nnx.Linear(16, 16, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = linear(rngs), linear(rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Containers(nnx.Module):
    """Has its layers in containers, and reaches for one inside of another."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.heads = nnx.Dict(a=nnx.Sequential(linear(rngs), nnx.relu, linear(rngs)))
        self.embed = nnx.Embed(16, 16, rngs=rngs)
        self.tail = Block(rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.attend(self.heads["a"](x)) + self.tail.up(x)

    def attend(self, x):
        return self.embed.attend(x)


class Scanned(nnx.Module):
    """Its layers are one, stacked."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Block)(rngs.split(3))
        self.out = linear(rngs)

    def __call__(self, x):
        axes = dict(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = nnx.scan(lambda x, layer: layer(x), **axes)(x, self.layers)
        return self.out(x)


class RematBlock(Block):
    @nnx.remat
    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Transformed(nnx.Module):
    """Its layers run in transformations, which give the methods others of them."""

    def __init__(self, rngs):
        self.kept, self.lonely = RematBlock(rngs), Block(rngs)
        self.jitted = linear(rngs)
        self.twins = nnx.List([RematBlock(rngs), RematBlock(rngs)])

    def __call__(self, x):
        x = nnx.jit(lambda layer, x: layer(x))(self.jitted, self.kept(x))
        x = nnx.remat(lambda block, x: block(x))(self.lonely, x)
        for twin in self.twins:
            x = twin(x)
        return x


PATHS = {
    Containers: [
        *(f"blocks/{i}/{layer}" for i in (0, 1) for layer in ("up", "down")),
        *("heads/a/layers/0", "heads/a/layers/2", "embed.attend", "tail/up"),
    ],
    Scanned: ["layers/up", "layers/down", "out"],
    Transformed: [
        *("kept/up", "kept/down", "jitted", "lonely/up", "lonely/down"),
        *(f"twins/{i}/{layer}" for i in (0, 1) for layer in ("up", "down")),
    ],
}


def mean_square(model, x):
    return jnp.mean(model(x).astype(F32) ** 2)


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
@pytest.mark.parametrize("kind", PATHS)
def test_paths_of_modules(kind, policy):
    model = nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
    dtype = "float32"
    if policy is not None:
        model, dtype = mpjax.nnx.mixed_precision(model, policy), "bfloat16"
    bare = {path: type(node) for path, node in nnx.iter_graph(model)}
    paths = {f"{kind.__name__}/{path}" for path in PATHS[kind]}
    for fn in (nnx.grad(mean_square), jax.jit(mean_square)):
        made = census(fn, model, X)
        assert made.flops_by_path().keys() == paths
        assert made.flops_by_dtype() == {dtype: made.flops}
    forward = census(model, X)
    times = {f"Scanned/layers/{layer}": 3 for layer in ("up", "down")}
    assert forward.flops_by_path() == {p: times.get(p, 1) * PRODUCT for p in paths}
    # What was given is as it was.
    assert bare == {path: type(node) for path, node in nnx.iter_graph(model)}


def test_methods_and_modules_that_are_left_alone():
    model = Containers(nnx.Rngs(0))
    assert census(model.attend, X).flops_by_path() == {
        "Containers.attend/embed.attend": PRODUCT
    }
    policy = mpjax.Policy(jnp.float32, BF16, F32)
    only = mpjax.nnx.mixed_precision(model, [mpjax.Rule("blocks/1.*", policy)])
    made = census(only, X)
    assert {p.removeprefix("Containers/") for p in made.flops_by_path()} == {
        *PATHS[Containers]
    }
    (product,) = [p for p in made.products if p.path == "Containers/tail/up"]
    assert product.lhs == "float32"
    (product,) = [p for p in made.products if p.path == "Containers/blocks/1/up"]
    assert product.lhs == "bfloat16"


def test_mixed_models_have_names_however_they_come():
    model = mpjax.nnx.mixed_precision(Containers(nnx.Rngs(0)), "mixed_bfloat16")
    graph, state = nnx.split(model)
    paths = {f"Containers/{path}" for path in PATHS[Containers]}
    for fn, *args in (
        (lambda x: model(x), X),
        (lambda state, x: nnx.merge(graph, state)(x), state, X),
    ):
        assert census(fn, *args).flops_by_path().keys() == paths


def test_promotions_have_paths():
    class Positions(Block):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.up.dtype = self.down.dtype = BF16
            self.positions = nnx.Param(jnp.zeros((1, 16), F32))
            self.norm = nnx.LayerNorm(16, dtype=BF16, rngs=rngs)

        def __call__(self, x):
            x = self.up(x) + self.positions
            for _ in range(2):
                x += self.down(self.norm(x))
            return x

    model = nnx.eval_shape(lambda: nnx.Sequential(Positions(nnx.Rngs(0))))
    with jax.numpy_dtype_promotion("standard"):
        found, *_ = census(model, X).findings
    assert (found.kind, found.path) == ("promotion", "Sequential/layers/0")
    assert found.detail == "bfloat16 becomes float32 and leaves its module in float32"


@pytest.mark.parametrize("jit", [nnx.jit, functools.partial(nnx.jit, donate_argnums=0)])
def test_a_step_is_reported_with_what_it_writes(jit):
    model = mpjax.nnx.mixed_precision(Containers(nnx.Rngs(0)), "mixed_bfloat16")
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    before = jax.tree.leaves(nnx.state(model))

    @jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(mean_square)(model, x)
        optimizer.update(model, grads)
        return loss

    made = mpjax.lowering.report(step, model, optimizer, X, target="h100")
    # All but the gradient of the inputs, by the two layers that these enter.
    products = 3 * len(PATHS[Containers]) - 1
    assert len(made.products) == products
    assert not [p for p in made.products if p.verdict == "removed"]
    assert made.flops_by_dtype() == {"bfloat16": products * PRODUCT}
    assert all(p.traced.path.startswith("Containers/") for p in made.products)
    weights = sum(leaf.nbytes for leaf in before)
    assert made.memory.output >= weights
    assert (made.memory.aliased >= weights) == (jit is not nnx.jit)
    after = jax.tree.leaves(nnx.state(model))
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert int(optimizer.step[...]) == 0
