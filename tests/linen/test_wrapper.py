"""``mpjax.linen``: unmodified Linen models under a policy."""

import functools
import inspect
import operator
import threading

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxprs import count_converts, dots

import mpjax
import mpjax.linen
import mpjax.nnx
from mpjax.linen import MixedPrecision

BF16 = jnp.dtype(jnp.bfloat16)
KEY = jax.random.key(0)


def normal(*shape):
    return jax.random.normal(jax.random.key(7), shape)


# Each model can be told a dtype by hand. Wrapped, it is told nothing.


class Norm(nn.Module):
    """A stock norm as a careful author writes it: float32 inside, 16 bits outside."""

    kind: type
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, **kwargs):
        norm = self.kind(dtype=self.dtype and jnp.float32, name="norm", **kwargs)
        y = norm(x if self.dtype is None else x.astype(jnp.float32))
        return y if self.dtype is None else y.astype(self.dtype)


class Compact(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, dtype=self.dtype)(x)
        x = x + Norm(nn.LayerNorm, self.dtype)(x)
        x = nn.DenseGeneral((4, 4), dtype=self.dtype)(nn.gelu(x))
        x = nn.DenseGeneral(8, axis=(-2, -1), dtype=self.dtype)(x)
        return nn.Einsum((8, 8), "bsd,de->bse", dtype=self.dtype)(x)


class SetupStyle(nn.Module):
    dtype: jnp.dtype | None = None

    def setup(self):
        self.layers = [nn.Dense(8, dtype=self.dtype) for _ in range(2)]
        self.shift = self.param("shift", nn.initializers.normal(), (8,))

    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x + self.encode(x)

    def encode(self, x):
        shift = self.shift if self.dtype is None else self.shift.astype(self.dtype)
        return self.layers[0](x) + shift[None, None]


class Shared(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, dtype=self.dtype)
        return layer(nn.tanh(layer(x)))


class Tied(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        tokens = jnp.argmax(x if self.dtype is None else x.astype(self.dtype), -1)
        embed = nn.Embed(12, 8, dtype=self.dtype)
        x = nn.Dense(8, dtype=self.dtype)(embed(tokens))
        return embed.attend(x) + x @ embed.embedding.T.astype(x.dtype)


def attention_by_hand(q, k, v, mask, dtype):
    q = q / jnp.sqrt(q.shape[-1]).astype(dtype)
    logits = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k), jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Attention(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        by_hand = {} if self.dtype is None else {"attention_fn": attention_by_hand}
        attention = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, **by_hand)
        return attention(x, x, mask=nn.make_causal_mask(x[..., 0]))


class ResidualCNN(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=True):
        x = x[..., None] if self.dtype is None else x[..., None].astype(self.dtype)
        x = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
        for _ in range(2):
            y = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
            y = Norm(nn.BatchNorm, self.dtype)(y, use_running_average=not train)
            x = x + nn.relu(y)
        x = nn.ConvTranspose(4, (2, 2), dtype=self.dtype)(x)
        x = Norm(functools.partial(nn.GroupNorm, 2), self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(x.mean((-3, -2)))


class Recurrent(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(8, dtype=self.dtype))(x)
        x = nn.Bidirectional(
            nn.RNN(nn.GRUCell(4, dtype=self.dtype)),
            nn.RNN(nn.LSTMCell(4, dtype=self.dtype)),
        )(x)
        return nn.Dense(3, dtype=self.dtype)(x)


class OwnParams(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        def read(*args):
            value = self.param(*args)
            return value if self.dtype is None else value.astype(self.dtype)

        x = x if self.dtype is None else x.astype(self.dtype)
        x = x + read("pos_embedding", nn.initializers.normal(), x.shape[1:])[None]
        kernel = read("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 8))
        return nn.Dense(8, dtype=self.dtype)(x @ kernel)


class Block(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(8, dtype=self.dtype)(Norm(nn.RMSNorm, self.dtype)(x))
        scale = self.param("scale", nn.initializers.ones, (8,))
        scale = scale if self.dtype is None else scale.astype(self.dtype)
        return x + scale[None, None] * nn.Dense(8, dtype=self.dtype)(nn.silu(y)), None


class Scanned(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype)(x)
        block = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(self.dtype)(x, None)[0]


class Vmapped(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return heads(self.dtype)(nn.Dense(8, dtype=self.dtype)(x))[0]


class Jitted(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype)(x)
        return nn.jit(Block)(self.dtype)(nn.jit(Block)(self.dtype)(x)[0])[0]


class DropoutModel(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8, dtype=self.dtype)(x))
        return nn.Dense(8, dtype=self.dtype)(x)


class Outer(nn.Module):
    """Holds a module that it is given, as ``nn.Sequential`` does."""

    module: nn.Module

    def __call__(self, x):
        return self.module(x)


def attributes(dtype=None):
    layers = [nn.Dense(8, dtype=dtype), nn.tanh, nn.Dense(8, dtype=dtype)]
    return Outer(Outer(nn.Sequential([*layers, Block(dtype), lambda *x: x[0]])))


MODELS = [
    attributes,
    Compact,
    SetupStyle,
    Shared,
    Tied,
    Attention,
    ResidualCNN,
    Recurrent,
    OwnParams,
    Scanned,
    Vmapped,
    Jitted,
    DropoutModel,
]
X = normal(2, 6, 8)
RNGS = {"params": KEY, "dropout": jax.random.key(1)}


def run(model, variables, x=X):
    """Outputs in float32 and the updated statistics."""
    mutable = ["batch_stats"]
    y, stats = model.apply(
        variables, x, rngs={"dropout": jax.random.key(2)}, mutable=mutable
    )
    return y.astype(jnp.float32), stats


def gradient(model, variables):
    def loss(params):
        y, _ = run(model, {**variables, "params": params})
        return jnp.mean(y**2)

    return jax.grad(loss)(variables["params"])


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(autouse=True)
def promotion(request):
    # Flax's own cells mix their float32 carry with 16-bit gates.
    name = request.node.callspec.id if hasattr(request.node, "callspec") else ""
    with jax.numpy_dtype_promotion("standard" if "Recurrent" in name else "strict"):
        yield


@pytest.mark.parametrize("cls", MODELS)
def test_same_variables_as_the_bare_model(cls):
    bare, wrapped = cls(), MixedPrecision(cls(), "mixed_bfloat16")
    variables = bare.init(RNGS, X)
    assert_trees_equal(wrapped.init(RNGS, X), variables)
    half = MixedPrecision(cls(), "bfloat16").init(RNGS, X)
    assert_trees_equal(half["params"], mpjax.cast_floating(variables["params"], BF16))
    assert_trees_equal(half.get("batch_stats", {}), variables.get("batch_stats", {}))


@pytest.mark.parametrize("cls", MODELS)
def test_same_numbers_and_dots_as_the_model_written_by_hand(cls):
    variables = cls().init(RNGS, X)
    by_hand, wrapped = cls(BF16), MixedPrecision(cls(), "mixed_bfloat16")
    expected, actual = (jax.jit(functools.partial(run, m)) for m in (by_hand, wrapped))
    assert_trees_equal(actual(variables), expected(variables))

    jaxpr = jax.make_jaxpr(functools.partial(gradient, wrapped))(variables)
    by_hand_jaxpr = jax.make_jaxpr(functools.partial(gradient, by_hand))(variables)
    found = dots(jaxpr)
    assert found
    assert all((d.lhs, d.rhs) == (BF16, BF16) for d in found)
    assert len(found) == len(dots(by_hand_jaxpr))
    assert count_converts(jaxpr) <= count_converts(by_hand_jaxpr)


@pytest.mark.parametrize("cls", [Compact, ResidualCNN, Scanned])
def test_program_costs_no_more_than_by_hand(cls):
    variables = cls().init(RNGS, X)
    costs = []
    for model in (cls(BF16), MixedPrecision(cls(), "mixed_bfloat16")):
        step = jax.jit(functools.partial(gradient, model)).lower(variables).compile()
        text = step.as_text()
        bytes_accessed = step.cost_analysis()["bytes accessed"]
        costs.append((bytes_accessed, text.count(" convert("), text.count(" dot(")))
    by_hand, wrapped = costs
    assert all(ours <= theirs for ours, theirs in zip(wrapped, by_hand, strict=True))


@pytest.mark.parametrize("cls", [Compact, ResidualCNN, OwnParams])
def test_float32_policy_is_the_bare_model(cls):
    variables = cls().init(RNGS, X)
    actual = run(MixedPrecision(cls(), "float32"), variables)
    assert_trees_equal(actual, run(cls(), variables))


def test_residual_stream_stays_in_16_bits():
    seen = {}

    def watch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if context.module.scope is not None and isinstance(y, jax.Array):
            seen["/".join(context.module.path)] = y.dtype
        return y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + self.param("pos_embedding", nn.initializers.normal(), x.shape)
            for _ in range(2):
                x = Block()(x)[0]
                x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return nn.Dense(4)(x)

    model = MixedPrecision(Model(), "mixed_bfloat16")
    variables = model.init(KEY, X)
    # Entered first, hence wrapped around nothing but the method: it sees layers bare.
    with nn.intercept_methods(watch):
        y = model.apply(variables, X)
    assert y.dtype == jnp.float32
    stream = {p: d for p, d in seen.items() if p and "Norm" not in p}
    assert len(stream) > 10
    assert set(stream.values()) == {BF16}


class Head(nn.Module):
    """Two layers under a block, and a head of its own policy."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="body")(x)
        return nn.Dense(4, name="head")(x)


def test_first_matching_rule_decides():
    rules = [mpjax.Rule("head", "float32"), "mixed_bfloat16"]
    model = MixedPrecision(Head(), rules)
    variables = model.init(KEY, X)
    body, head = dots(jax.make_jaxpr(model.apply)(variables, X))
    assert (body.lhs, body.rhs) == (BF16, BF16)
    assert (head.lhs, head.rhs) == (np.float32, np.float32)

    rules = [mpjax.Rule("head", None), mpjax.Rule(".*", "float16", module_type=Head)]
    by_type = MixedPrecision(Head(), [*rules, mpjax.Rule("body", "c=bf16")])
    with jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(by_type.apply)(variables, X)
    assert [d.lhs for d in dots(jaxpr)] == [BF16, np.float32]


def test_borders_between_policies_cast_and_nothing_else_does():
    rules = [mpjax.Rule("head", "p=f32,c=f32,o=f16"), mpjax.Rule(policy="c=bf16")]
    model = MixedPrecision(Head(), rules)
    variables = model.init(KEY, X)
    jaxpr = jax.make_jaxpr(model.apply)(variables, X)
    assert jaxpr.out_avals[0].dtype == BF16  # f16 at the head, bf16 at the model
    body, head = variables["params"]["body"], variables["params"]["head"]
    y = nn.Dense(8, dtype=BF16).apply({"params": body}, X.astype(BF16))
    y = nn.Dense(4).apply({"params": head}, y.astype(jnp.float32))
    np.testing.assert_array_equal(
        model.apply(variables, X), y.astype(jnp.float16).astype(BF16)
    )


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ([mpjax.Rule("haed", "f32"), "f16"], "matches no module.*'head'"),
        (
            ["mixed_float16", mpjax.Rule("head", "f32")],
            r"taken by Rule\(path='.\*', policy='p=f32,c=f16,o=f32'",
        ),
        ([mpjax.Rule("hea", "f32"), "f16"], "whole path"),
        ([mpjax.Rule("head", "f32", module_type=nn.Conv), "f16"], "types.*are Dense"),
    ],
)
def test_a_rule_that_decides_nothing_raises(rules, match):
    model = MixedPrecision(Head(), rules)
    with pytest.raises(ValueError, match=match):
        model.init(KEY, X)
    with pytest.raises(ValueError, match=match):
        model.apply(Head().init(KEY, X), X)


def test_optional_rules_may_match_nothing():
    rules = [mpjax.Rule("haed", "f32", optional=True), "mixed_float16"]
    MixedPrecision(Head(), rules).init(KEY, X)


@pytest.mark.parametrize("rules", [[], "mixed_int8", "float8_e4m3fn", 3, [3], "f=f32"])
def test_bad_rules_raise_at_construction(rules):
    with pytest.raises((ValueError, TypeError)):
        MixedPrecision(Head(), rules)


def test_only_linen_modules_are_wrapped():
    with pytest.raises(TypeError, match="instance"):
        MixedPrecision(Head, "mixed_bfloat16")


def test_a_dtype_in_the_model_gives_way_and_integers_stay():
    class Model(nn.Module):
        dtype: jnp.dtype = jnp.float32
        token_dtype: jnp.dtype = jnp.int32

        @nn.compact
        def __call__(self, x, mask, key):
            assert mask.dtype == jnp.bool_ and self.token_dtype == jnp.int32
            noise = jax.random.normal(key, x.shape, self.dtype)
            return nn.Dense(4, dtype=self.dtype)(jnp.where(mask, x, noise))

    model = MixedPrecision(Model(), "c=f16")
    y, _ = model.init_with_output(KEY, X, X > 0, jax.random.key(3))
    assert y.dtype == jnp.float16


def test_methods_of_the_model_are_methods_of_the_wrapper():
    model = MixedPrecision(SetupStyle(), "c=bf16")
    variables = model.init(KEY, X)
    bare = SetupStyle(BF16).bind(variables).encode(X.astype(BF16))
    for y in (
        model.apply(variables, X, method="encode"),
        model.apply(variables, X, method=SetupStyle.encode),
        model.apply(variables, X, method=model.encode),
        model.apply(variables, X, method=lambda m, x: m.encode(x)),
        model.bind(variables).encode(X),
    ):
        np.testing.assert_array_equal(y, bare)
        assert y.dtype == BF16
    with pytest.raises(AttributeError):
        model.decode(X)


@pytest.mark.parametrize("cls", [Compact, Jitted, Tied])
def test_a_policy_applied_twice_is_applied_once(cls):
    once = MixedPrecision(cls(), "mixed_bfloat16")
    twice = MixedPrecision(once, "mixed_bfloat16")
    variables = once.init(KEY, X)
    assert_trees_equal(twice.init(KEY, X), variables)
    assert twice == once
    assert_trees_equal(run(twice, variables), run(once, variables))


def test_a_wrapper_inside_a_model_keeps_the_variables():
    class Model(nn.Module):
        wrap: bool

        @nn.compact
        def __call__(self, x):
            block = Block(name="block")
            x = (MixedPrecision(block, "mixed_bfloat16") if self.wrap else block)(x)[0]
            return nn.Dense(4)(x.astype(jnp.float32))

    variables = Model(False).init(KEY, X)
    assert_trees_equal(Model(True).init(KEY, X), variables)
    found = dots(jax.make_jaxpr(Model(True).apply)(variables, X))
    assert [d.lhs for d in found] == [BF16, BF16, np.float32]


class WrapperInside(nn.Module):
    """A block, twice the same, wrapped or not, under a transformation or not."""

    wrap: bool
    lift: str

    def setup(self):
        lift = {"none": lambda cls: cls, "remat": nn.remat, "jit": nn.jit}[self.lift]
        if self.wrap:
            self.block = lift(MixedPrecision)(Block(), "mixed_bfloat16")
        else:
            self.block = lift(Block)()
        self.given = Outer(Block())
        wrapped = MixedPrecision(self.given, "mixed_bfloat16")
        self.run_given = wrapped if self.wrap else self.given

    def __call__(self, x):
        return self.run_given(self.block(self.block(x)[0])[0])[0]


@pytest.mark.parametrize("lift", ["none", "remat", "jit"])
def test_wrappers_in_setup_and_under_transformations(lift):
    variables = WrapperInside(False, lift).init(KEY, X)
    model = WrapperInside(True, lift)
    assert_trees_equal(model.init(KEY, X), variables)
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: jnp.sum(model.apply(v, X))))(variables)
    assert {(d.lhs, d.rhs) for d in dots(jaxpr)} == {(BF16, BF16)}


def test_a_scan_over_wrappers():
    def stack(wrap):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                block = Block(name="block")
                if wrap:
                    block = MixedPrecision(block, "mixed_bfloat16")
                return block(x)[0], None

        return nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )()

    variables = stack(False).init(KEY, X, None)
    assert_trees_equal(stack(True).init(KEY, X, None), variables)
    found = dots(jax.make_jaxpr(stack(True).apply)(variables, X, None))
    assert {d.lhs for d in found} == {BF16}


def test_an_inner_wrapper_has_the_last_word():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = MixedPrecision(OwnParams(), "float32")(x)
            return nn.Dense(4)(x)

    model = MixedPrecision(Model(), "mixed_float16")
    jaxpr = jax.make_jaxpr(model.apply)(model.init(KEY, X), X)
    f16, f32 = np.float16, np.float32
    assert [d.rhs for d in dots(jaxpr)] == [f16, f32, f32, f16]


POLICIES = ["mixed_bfloat16", "mixed_float16", "float32"]


@pytest.mark.parametrize("cls", [Jitted, Compact])
def test_interleaved_policies_do_not_meet_in_caches(cls):
    # One class, jitted inside: Flax would reuse the first trace for the others.
    variables = cls().init(KEY, X)
    for policy in [*POLICIES, *reversed(POLICIES)]:
        model = MixedPrecision(cls(), policy)
        jaxpr = jax.make_jaxpr(model.apply)(variables, X)
        dtype = mpjax.get_policy(policy).compute_dtype
        assert {d.lhs for d in dots(jaxpr)} == {dtype}
        bare = jax.make_jaxpr(cls().apply)(variables, X)
        assert {d.lhs for d in dots(bare)} == {np.dtype(np.float32)}


class Decorated(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


class TwoDecorated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Decorated(name="second")(Decorated(name="first")(x))


@pytest.mark.parametrize("cls", [Decorated, TwoDecorated])
@pytest.mark.parametrize("bare_first", [True, False])
def test_a_jitted_method_follows_the_policy_of_its_program(cls, bare_first):
    # Flax makes the key of nn.jit before an interceptor sees the method.
    variables = cls().init(KEY, X)
    models = {p: MixedPrecision(cls(), p) for p in POLICIES}
    models = {"bare": cls(), **models} if bare_first else {**models, "bare": cls()}
    for policy, model in [*models.items(), *models.items()]:
        found = dots(jax.make_jaxpr(model.apply)(variables, X))
        dtype = "f32" if policy == "bare" else policy
        assert {d.lhs for d in found} == {mpjax.get_policy(dtype).compute_dtype}
        assert {d.rhs for d in found} == {mpjax.get_policy(dtype).compute_dtype}


def test_jitted_methods_of_one_class_follow_their_own_rules():
    rules = [mpjax.Rule("second(/.*)?", "float32"), "mixed_float16"]
    model = MixedPrecision(TwoDecorated(), rules)
    jaxpr = jax.make_jaxpr(model.apply)(TwoDecorated().init(KEY, X), X)
    assert [d.lhs.name for d in dots(jaxpr)] == ["float16", "float32"]


def test_a_dtype_passed_on_to_an_initializer_is_the_parameters():
    class Model(nn.Module):
        dtype: jnp.dtype = jnp.float32

        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.normal(), (8, 4), self.dtype)
            return x @ kernel

    wrapped = MixedPrecision(Model(), "mixed_bfloat16")
    assert_trees_equal(wrapped.init(KEY, X), Model().init(KEY, X))


def test_jitted_layers_of_one_class_follow_their_own_rules():
    rules = [mpjax.Rule("JitBlock_0(/.*)?", "float32"), "mixed_float16"]
    model = MixedPrecision(Jitted(), rules)
    jaxpr = jax.make_jaxpr(model.apply)(model.init(KEY, X), X)
    assert [d.lhs.name for d in dots(jaxpr)] == ["float16"] * 3 + ["float32"] * 2


def test_threads_do_not_share_a_policy():
    variables = Compact().init(KEY, X)
    found = {}

    def trace(policy):
        for _ in range(3):
            jaxpr = jax.make_jaxpr(MixedPrecision(Compact(), policy).apply)
            with jax.numpy_dtype_promotion("strict"):
                found.setdefault(policy, set()).update(
                    d.lhs for d in dots(jaxpr(variables, X))
                )

    threads = [threading.Thread(target=trace, args=(p,)) for p in POLICIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {p: {mpjax.get_policy(p).compute_dtype} for p in POLICIES}


def test_equal_wrappers_do_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def forward(model, variables, x):
        traces.append(model)
        return model.apply(variables, x)

    variables = Head().init(KEY, X)
    for policy in ("mixed_bfloat16", mpjax.Rule(policy="mixed_bfloat16")):
        forward(MixedPrecision(Head(), policy), variables, X)
    assert len(traces) == 1


def test_checkpoints_and_sharded_parameters():
    def kernel_init(key, shape, dtype):
        return nn.initializers.lecun_normal()(key, shape, dtype)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(kernel_init, (None, "model"))
            x = x + self.param("pos", nn.with_partitioning(normal_init, ("model",)), 8)
            return nn.Dense(8, kernel_init=init)(x)

    def normal_init(key, size):
        return jax.random.normal(key, (1, 1, size))[:, :, :]

    bare, model = Model(), MixedPrecision(Model(), "bfloat16")
    boxed = model.init(KEY, X)
    assert isinstance(boxed["params"]["Dense_0"]["kernel"], nn.Partitioned)
    assert nn.get_partition_spec(boxed) == nn.get_partition_spec(bare.init(KEY, X))
    variables = nn.unbox(boxed)
    data = flax.serialization.to_bytes(variables)
    assert_trees_equal(flax.serialization.from_bytes(variables, data), variables)

    mesh = Mesh(np.array(jax.devices()), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    kernel = jax.device_put(variables["params"]["Dense_0"]["kernel"], sharding)
    sharded = jax.tree.map(lambda x: x, variables)
    sharded["params"]["Dense_0"]["kernel"] = kernel
    y = jax.jit(model.apply)(sharded, X)
    np.testing.assert_array_equal(y, model.apply(variables, X))


def test_vmap_over_models_and_flax_tabulate():
    model = MixedPrecision(ResidualCNN(), "mixed_bfloat16")
    keys = jax.random.split(KEY, 3)
    stacked = jax.vmap(lambda key: model.init(key, X))(keys)
    y, _ = jax.vmap(lambda v: run(model, v))(stacked)
    first, _ = run(model, jax.tree.map(lambda x: x[0], stacked))
    np.testing.assert_allclose(y[0], first, rtol=2**-7, atol=2**-7)
    assert "Total Parameters: 1,467" in model.tabulate(KEY, X)


def test_the_bare_module_is_left_as_it_was():
    model = Compact()
    before = repr(model)
    wrapped = MixedPrecision(model, "mixed_bfloat16")
    variables = wrapped.init(KEY, X)
    assert repr(model) == before
    assert {d.lhs for d in dots(jax.make_jaxpr(model.apply)(variables, X))} == {
        np.dtype(np.float32)
    }
    with pytest.raises(ZeroDivisionError):
        wrapped.apply(variables, X, method=lambda m, x: m(x) / (1 // 0))
    np.testing.assert_array_equal(
        model.apply(variables, X), Compact().apply(variables, X)
    )


def test_attention_with_dropout_sows_what_stock_attention_sows():
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    variables = layer.init(RNGS, X)
    rngs = {"dropout": jax.random.key(5)}
    y32 = layer.apply(variables, X, rngs=rngs)
    model = MixedPrecision(layer, "mixed_bfloat16")
    y, state = model.apply(
        variables, X, sow_weights=True, rngs=rngs, mutable=["intermediates"]
    )
    np.testing.assert_allclose(y, y32, atol=0.05)
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.shape == (2, 2, 6, 6)


def test_tabulate_shows_every_layer_without_computing():
    rules = [mpjax.Rule("Dense_0", "c=f32,o=bf16"), "mixed_bfloat16"]
    model = MixedPrecision(Jitted(), rules)
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for _ in range(2):  # the second time nn.jit has every trace cached
        table = mpjax.linen.tabulate(model, KEY, shapes)
        rows = {line.split()[0]: line for line in table.splitlines() if line.split()}
        assert "c=f32" in rows["Dense_0"]
        assert "c=f32,o=bf16" in rows["JitBlock_1/Norm_0/norm"]
        assert "c=bf16" in rows["JitBlock_0/Dense_1"]
        assert "72" in rows["JitBlock_0/Dense_1"]
    with pytest.raises(ValueError, match="found none"):
        mpjax.linen.tabulate(Jitted(), KEY, shapes)


def test_flax_keeps_the_ways_we_rely_on():
    """Scope flags are in nn.jit's key; a bound module may be lent attributes."""

    class Probe(nn.Module):
        @nn.compact
        def __call__(self):
            vars(self)["param"] = lambda name: name
            assert self.param("lent") == "lent"
            del vars(self)["param"]
            self.scope.flags = {**self.scope.flags, "ours": 1}
            child = nn.Dense(1)
            assert child.scope.flags["ours"] == 1
            return self.param("own", nn.initializers.ones, ())

    assert Probe().init_with_output(KEY)[0] == 1


class UsesAttention(nn.Module):
    """Calls the attention function that it is given as its author likes."""

    call: object
    attention_fn: object = nn.dot_product_attention

    @nn.compact
    def __call__(self, x, mask=None, bias=None):
        query = nn.DenseGeneral((2, 4))(x)
        return self.call(self.attention_fn, query, mask, bias).sum((-2, -1))


CAUSAL = nn.make_causal_mask(X[..., 0])
NEVER = jnp.where(
    jnp.arange(6)[None, None, :, None] > 0, 0.0, -1e9
)  # a bias; hides a whole row


@pytest.mark.parametrize(
    "call",
    [
        lambda attend, q, mask, bias: attend(q, q, q),
        lambda attend, q, mask, bias: attend(q, q, q, None, mask),
        lambda attend, q, mask, bias: attend(q, q, q, bias=bias, mask=mask),
        lambda attend, q, mask, bias: attend(q, q, q, precision="highest"),
    ],
)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_attention_takes_what_stock_attention_takes(call, policy):
    model = UsesAttention(call)
    bias = 4 * normal(2, 2, 6, 6)
    variables = model.init(KEY, X, CAUSAL, bias)
    expected = model.apply(variables, X, CAUSAL, bias)
    wrapped = MixedPrecision(model, policy)
    actual = wrapped.apply(variables, X, CAUSAL, bias)
    np.testing.assert_allclose(actual, expected, atol=0.1)
    found = dots(jax.make_jaxpr(wrapped.apply)(variables, X, CAUSAL, bias))
    low = mpjax.get_policy(policy).compute_dtype
    assert {(d.lhs, d.rhs) for d in found} == {(low, low)}


def lent_attention(function, rules):
    lent = []

    class Model(nn.Module):
        attention_fn: object

        @nn.compact
        def __call__(self, x):
            lent.append(self.attention_fn)
            return nn.Dense(8)(x)

    MixedPrecision(Model(function), rules).init(KEY, X)
    return lent[0]


def test_attention_has_the_parameters_of_stock_attention():
    stock = functools.partial(nn.dot_product_attention, precision="highest")
    fp8 = mpjax.Rule(".*", "c=bf16", mpjax.current_scaling(), attention=True)
    for function in (nn.dot_product_attention, stock):
        for rules in ("mixed_bfloat16", fp8):
            lent = lent_attention(function, rules)
            assert lent is not function
            assert inspect.signature(lent) == inspect.signature(function)
            assert lent == lent_attention(function, rules)


def test_a_bias_that_hides_a_row_leaves_no_nan_in_float16():
    model = UsesAttention(lambda attend, q, mask, bias: attend(q, q, q, bias))
    variables = model.init(KEY, X, None, NEVER)

    class Hides(nn.Module):
        @nn.compact
        def __call__(self, x):
            return UsesAttention(model.call, name="inner")(x, None, NEVER)

    y = MixedPrecision(Hides(), "mixed_float16").apply(
        {"params": {"inner": variables["params"]}}, X
    )
    np.testing.assert_allclose(y, model.apply(variables, X, None, NEVER), atol=0.05)


def test_products_of_the_users_own_do_attention():
    calls = []

    def einsum(*operands):
        calls.append([x.dtype for x in operands[1:]])
        return jnp.einsum(*operands)

    layer = nn.MultiHeadDotProductAttention(
        2,
        qk_attn_weights_einsum_cls=lambda: einsum,
        attn_weights_value_einsum_cls=lambda: einsum,
    )
    variables = layer.init(KEY, X)
    expected = layer.apply(variables, X)
    calls.clear()
    actual = MixedPrecision(layer, "mixed_bfloat16").apply(variables, X)
    np.testing.assert_allclose(actual, expected, atol=0.05)
    assert calls == [[BF16, BF16]] * 2
    fp8 = mpjax.Rule(".*", "mixed_bfloat16", mpjax.current_scaling(), attention=True)
    with pytest.raises(ValueError, match="attention products of its own"):
        MixedPrecision(layer, fp8).apply(variables, X)
    one = nn.MultiHeadDotProductAttention(2, qk_attn_weights_einsum_cls=lambda: einsum)
    with pytest.raises(ValueError, match="specified together"):
        MixedPrecision(one, "mixed_bfloat16").apply(variables, X)


@pytest.mark.parametrize("sub", [False, True])
def test_attention_with_keywords_multiplies_in_16_bits(sub):
    def own(query, key, value, mask=None, force_fp32_for_softmax=False):
        assert not force_fp32_for_softmax
        return nn.dot_product_attention(query, key, value, mask=mask)

    stock = functools.partial(nn.dot_product_attention, force_fp32_for_softmax=False)
    layer = nn.MultiHeadDotProductAttention(2, attention_fn=own if sub else stock)
    model = MixedPrecision(layer, "mixed_bfloat16")
    jaxpr = jax.make_jaxpr(model.apply)(layer.init(KEY, X), X)
    assert {(d.lhs, d.rhs) for d in dots(jaxpr)} == {(BF16, BF16)}


class InTurn(nn.Module):
    """Runs one module bare and under policies, one after the other."""

    inner: nn.Module
    order: tuple

    @nn.compact
    def __call__(self, x):
        policies = {"b": "mixed_bfloat16", "h": "mixed_float16"}
        runs = {k: MixedPrecision(self.inner, p) for k, p in policies.items()}
        return [runs.get(kind, self.inner)(x) for kind in self.order]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


class SetupPlain(nn.Module):
    def setup(self):
        self.inner = Decorated()

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize("inner", [Plain, nn.jit(Plain), Decorated, SetupPlain])
@pytest.mark.parametrize("nested", [False, True])
def test_no_policy_outlives_its_run(inner, nested):
    name = {"b": BF16, "h": np.dtype(np.float16)}
    outer = np.dtype(np.float32)
    variables = InTurn(inner(), "-").init(KEY, X)
    for order in ("b-b-", "-bh-", "hb-h", "b-hb"):
        model = InTurn(inner(), tuple(order))
        if nested:
            model, outer = MixedPrecision(model, "c=f16"), np.dtype(np.float16)
        for _ in range(2):
            found = dots(jax.make_jaxpr(model.apply)(variables, X))
            assert [d.lhs for d in found] == [name.get(kind, outer) for kind in order]


@pytest.mark.parametrize("jitted", [False, True])
def test_a_module_may_run_in_training_only(jitted):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            return nn.Dropout(0.5, name="drop")(x, deterministic=False) if train else x

    cls = nn.jit(Model, static_argnums=2) if jitted else Model
    rules = [mpjax.Rule("drop", "float32"), "mixed_bfloat16"]
    with pytest.raises(ValueError, match="optional=True"):
        MixedPrecision(cls(), rules).init(RNGS, X, False)
    model = MixedPrecision(cls(), rules)
    variables = model.init(RNGS, X, True)
    for train in (True, False, True, False):
        model.apply(variables, X, train, rngs=RNGS)


@pytest.mark.parametrize(
    "dtype", [None, "float32", jnp.float32, np.dtype(np.float32), np.float32]
)
def test_a_dtype_keeps_its_kind(dtype):
    class Model(nn.Module):
        dtype: object

        @nn.compact
        def __call__(self, x):
            kinds.append(self.dtype)
            return x * self.param("w", nn.initializers.normal(), (8,), self.dtype)

    kinds = []
    bare, model = Model(dtype or jnp.float32), MixedPrecision(Model(dtype), "c=bf16")
    variables = bare.init(KEY, X[0, 0])
    assert_trees_equal(model.init(KEY, X[0, 0]), variables)
    given, lent = kinds
    assert lent == BF16
    for kind in (str, np.dtype):
        assert isinstance(lent, kind) == isinstance(given, kind)
    if not isinstance(given, str | np.dtype):
        assert lent(0.5).dtype == BF16


def test_a_dtype_of_the_class_is_a_dtype():
    class Model(nn.Module):
        dtype = jnp.float32  # no field: no annotation

        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.normal(), (1, 8, 4), self.dtype)
            return jnp.matmul(x.astype(self.dtype), kernel)

    model = MixedPrecision(Model(), "mixed_bfloat16")
    variables = Model().init(KEY, X)
    assert_trees_equal(model.init(KEY, X), variables)
    jaxpr = jax.make_jaxpr(model.apply)(variables, X)
    assert {(d.lhs, d.rhs) for d in dots(jaxpr)} == {(BF16, BF16)}
    assert Model.dtype is jnp.float32


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "p=bf16,c=f32"])
def test_initializers_draw_as_in_the_bare_model(policy):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = x * self.param("w", nn.initializers.normal(), (1, 1, 8), x.dtype)
            narrow = nn.Dense(8, param_dtype=jnp.bfloat16, name="narrow")
            return narrow(x.astype(narrow.param_dtype))

    stored = mpjax.get_policy(policy).param_dtype
    expected = mpjax.cast_floating(Model().init(KEY, X), stored)
    with jax.numpy_dtype_promotion("standard"):
        assert_trees_equal(MixedPrecision(Model(), policy).init(KEY, X), expected)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float32"])
def test_complex_numbers_are_not_cut(policy):
    class Model(nn.Module):
        dtype: jnp.dtype | None = None

        @nn.compact
        def __call__(self, x, rotations):
            return nn.Dense(4, name="dense")(x * rotations)

    with pytest.raises(ValueError, match=r"'dense'.*complex argument.*Rule"):
        MixedPrecision(Model(), policy).init(KEY, X.astype(jnp.complex64), 1j)
    # What a module of the user does with its own is its own affair.
    rules = [mpjax.Rule("dense", None), policy]
    with jax.numpy_dtype_promotion("standard"):
        y, _ = MixedPrecision(Model(), rules).init_with_output(
            KEY, X.astype(jnp.complex64), jnp.ones((1, 1, 1), jnp.complex64)
        )
    assert y.dtype == jnp.complex64


def test_nnx_modules_inside_are_not_left_alone_silently():
    class Model(nn.Module):
        make: object

        @nn.compact
        def __call__(self, x):
            return nnx.bridge.ToLinen(self.make, (8, 4), name="bridge")(x)

    with pytest.raises(ValueError, match=r"'bridge' \(ToLinen\).*mixed_precision"):
        MixedPrecision(Model(nnx.Linear), "mixed_bfloat16").init(KEY, X)

    def make(*sizes, rngs):
        return mpjax.nnx.mixed_precision(nnx.Linear(*sizes, rngs=rngs), "c=bf16")

    rules = [mpjax.Rule("bridge", None), "c=bf16"]
    model = MixedPrecision(Model(make), rules)
    variables = model.init(KEY, X)
    assert [d.lhs for d in dots(jax.make_jaxpr(model.apply)(variables, X))] == [BF16]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "c=f16"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_simple_cell_keeps_the_dtype_of_its_carry(policy, residual):
    bare = nn.RNN(nn.SimpleCell(8, residual=residual))
    variables = bare.init(KEY, X)
    model = MixedPrecision(bare, policy)
    low = mpjax.get_policy(policy)
    assert_trees_equal(model.init(KEY, X), low.cast_to_param(variables))
    y = model.apply(variables, X)
    assert y.dtype == low.output_dtype
    expected = bare.apply(variables, X)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.05)
    found = dots(jax.make_jaxpr(model.apply)(variables, X))
    assert {d.lhs for d in found} == {low.compute_dtype}


def test_a_cell_is_wrapped_as_a_part_of_a_bare_model():
    cell = MixedPrecision(nn.LSTMCell(4), "mixed_bfloat16")
    c, h = cell.initialize_carry(KEY, (2, 8))
    assert c.shape == h.shape == (2, 4)
    bare, model = nn.RNN(nn.LSTMCell(4)), nn.RNN(cell)
    variables = bare.init(KEY, X)
    assert_trees_equal(model.init(KEY, X), variables)
    with jax.numpy_dtype_promotion("standard"):
        y = model.apply(variables, X)
    np.testing.assert_allclose(y, bare.apply(variables, X), atol=0.05)


class Base(nn.Module):
    features: int = 8

    def setup(self):
        self.dense = nn.Dense(self.features)
        self.shift = self.param("shift", nn.initializers.normal(), (8,))

    @property
    def twice(self):
        return 2 * self.features

    @staticmethod
    def prepare(x):
        return x + 1

    def encode(self, x):
        return self.dense(x)


class Derived(Base):
    def encode(self, x):
        return 2 * super().encode(x)

    def __call__(self, x):
        return self.encode(x) + self.shift[None, None]


def test_the_wrapper_has_all_that_the_module_has():
    model = MixedPrecision(Derived(), "c=bf16")
    variables = model.init(KEY, X)
    for wrapper in (model, model.bind(variables)):
        assert (wrapper.features, wrapper.twice, wrapper.prepare(3)) == (8, 16, 4)
        assert not hasattr(wrapper, "decode")
    bound = model.bind(variables)
    assert bound.shift.dtype == BF16
    with pytest.raises(AttributeError, match="method=lambda"):
        operator.attrgetter("dense")(bound)
    one = Base().bind(variables).encode(X)
    for method, expected in (
        (Base.encode, one),
        ("encode", 2 * one),
        (Derived.encode, 2 * one),
        (lambda m, x: m.dense(x), one),
        (
            lambda m, x: m.encode(m.encode(x)),
            2 * Base().bind(variables).encode(2 * one),
        ),
    ):
        y = model.apply(variables, X, method=method)
        assert y.dtype == BF16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)


class LoRA(nn.Module):
    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.normal(), (8, 2))
        return self.inner(x).astype(x.dtype) + x @ a @ a.T


@pytest.mark.parametrize("bound", [False, True])
def test_a_wrapper_may_share_its_scope(bound):
    class Model(nn.Module):
        wrap: bool

        @nn.compact
        def __call__(self, x):
            parent = self if bound else None
            dense = nn.Dense(8, parent=parent)
            if self.wrap:
                dense = MixedPrecision(dense, "c=bf16", parent=parent)
            layer = LoRA(dense)
            return layer(layer(x))

    variables = Model(False).init(KEY, X)
    assert_trees_equal(Model(True).init(KEY, X), variables)
    found = dots(jax.make_jaxpr(Model(True).apply)(variables, X))
    assert [d.lhs for d in found] == [BF16, np.float32, np.float32] * 2


def test_rules_by_type_find_both_modules_of_one_scope():
    rules = [
        mpjax.Rule(module_type=LoRA, policy="c=f16"),
        mpjax.Rule(module_type=nn.Dense, policy="c=bf16"),
    ]
    model = MixedPrecision(LoRA(nn.Dense(8)), rules)
    variables = model.init(KEY, X)
    found = dots(jax.make_jaxpr(model.apply)(variables, X))
    assert [d.lhs for d in found] == [BF16, np.float16, np.float16]
    table = mpjax.linen.tabulate(model, KEY, X)
    assert "LoRA" in table and "Dense" in table and "2 layers, 88 param" in table


def test_tabulate_takes_what_init_takes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train, *, mask=None, scale=2.0):
            assert mask is None or isinstance(mask, jax.core.Tracer)
            x = x if mask is None else jnp.where(mask, x, 0)
            return nn.Dense(4)(x) * (scale if train else 1)

    model = MixedPrecision(Model(), "mixed_bfloat16")
    shape = jax.ShapeDtypeStruct(X.shape, jnp.bool_)
    for table in (
        mpjax.linen.tabulate(model, KEY, X, True),
        mpjax.linen.tabulate(model, KEY, X, train=False, mask=shape, scale=3.0),
        mpjax.linen.tabulate(model, KEY, X, True, mask=X > 0, method=Model.__call__),
    ):
        assert "36 parameters" in table


def test_intermediates_are_captured_once():
    for capture in (True, lambda module, name: True):
        states = []
        for model in (Head(), MixedPrecision(Head(), "float32")):
            variables = model.init(KEY, X)
            _, state = model.apply(
                variables, X, capture_intermediates=capture, mutable=["intermediates"]
            )
            states.append(state)
        assert_trees_equal(*states)
