"""``Policy`` and ``get_policy``: jmp's grammar and casts, without its surprises."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpjax
from mpjax._policies.policy import policy_formats

NAMES = {
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}
SPELLINGS = {  # every way to write a dtype
    "float16": [np.float16, jnp.float16, np.dtype("float16"), "f16", "float16"],
    "bfloat16": [jnp.bfloat16, ml_dtypes.bfloat16, jnp.dtype("bfloat16"), "bf16"],
    "float32": [np.float32, jnp.float32, np.dtype("float32"), "f32", "full"],
}


@pytest.mark.parametrize("name", NAMES)
def test_one_dtype_for_all(name):
    policy = mpjax.get_policy(name)
    dtypes = {policy.param_dtype, policy.compute_dtype, policy.output_dtype}
    assert dtypes == {jnp.dtype(NAMES[name])}
    assert mpjax.get_policy(NAMES[name]) == policy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixed_bfloat16", "p=f32,c=bf16,o=f32"),
        ("mixed_bf16", "p=f32,c=bf16,o=f32"),
        ("mixed_float16", "p=f32,c=f16,o=f32"),
        ("mixed_f16", "p=f32,c=f16,o=f32"),
        ("full", "p=f32,c=f32,o=f32"),
        ("half", "p=f16,c=f16,o=f16"),
        ("c=f16", "p=f32,c=f16,o=f16"),
        ("c=bf16,o=full", "p=f32,c=bf16,o=f32"),
        ("p=f16", "p=f16,c=f16,o=f16"),
        ("o=f32,p=bf16", "p=bf16,c=bf16,o=f32"),
        ("params=float32,compute=half,output=float32", "p=f32,c=f16,o=f32"),
        (" p = f32 , c = bf16 ", "p=f32,c=bf16,o=bf16"),
        ("c=float8_e5m2,o=bf16", "p=f32,c=f8_e5m2,o=bf16"),
    ],
)
def test_grammar(text, expected):
    assert str(mpjax.get_policy(text)) == expected
    assert mpjax.get_policy(text) == mpjax.get_policy(expected)


dtypes = st.sampled_from([f.dtype for f in policy_formats() if f.bits < 64])


@given(dtypes, dtypes, dtypes)
def test_str_and_pickle_round_trip(p, c, o):
    policy = mpjax.Policy(p, c, o)
    assert mpjax.get_policy(str(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert mpjax.get_policy(policy) is policy


@pytest.mark.parametrize("name", SPELLINGS)
def test_equal_policies_hash_equal_and_do_not_retrace(name):
    policies = [
        mpjax.Policy(*dtypes) for dtypes in zip(*[SPELLINGS[name]] * 3, strict=True)
    ]
    policies += [mpjax.Policy("f32", d, "f32") for d in SPELLINGS[name]]
    assert len(set(policies[: len(SPELLINGS[name])])) == 1
    traces = []

    def cast(policy, x):
        traces.append(policy)
        return policy.cast_to_compute(x)

    jitted = jax.jit(cast, static_argnums=0)
    for policy in policies:
        assert jitted(policy, jnp.ones(2)).dtype == jnp.dtype(name)
    assert len(traces) == len(set(policies))


def test_defaults_follow():
    assert mpjax.Policy() == mpjax.get_policy("float32")
    assert mpjax.Policy(compute_dtype="bf16") == mpjax.get_policy("c=bf16")
    policy = mpjax.Policy("f32", "f16").with_output_dtype(jnp.float32)
    assert policy == mpjax.get_policy("mixed_float16")


@pytest.mark.parametrize(
    ("cast", "xp"),
    list(itertools.product(["param", "compute", "output"], [jnp, np])),
)
def test_casts_reach_every_floating_leaf_and_nothing_else(cast, xp):
    policy = mpjax.Policy("f16", "bf16", "f32")
    dtype = getattr(policy, f"{cast}_dtype")
    key = jax.random.key(0)
    untouched = {
        "int": xp.ones(2, "int16"),
        "bool": xp.ones(2, bool),
        "complex": xp.ones(2, "complex64"),
        "key": key,
        "none": None,
        "object": object(),
        "python": 2.5,
        "text": "f32",
        "struct": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    floating = {
        "array": xp.ones((2, 3), "float32"),
        "scalar": xp.ones((), "float32")[()],
        "wide": np.ones(2, np.float64),
        "struct": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    tree = (untouched, [floating])
    same, (done,) = getattr(policy, f"cast_to_{cast}")(tree)
    assert all(same[name] is leaf for name, leaf in untouched.items())
    assert {leaf.dtype for leaf in done.values()} == {dtype}
    assert jax.tree.map(jnp.shape, done) == jax.tree.map(jnp.shape, floating)
    assert isinstance(done["struct"], jax.ShapeDtypeStruct)
    assert isinstance(done["wide"], np.ndarray)


def test_casts_keep_sharding_of_shape_structs():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    struct = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)
    assert mpjax.cast_floating(struct, jnp.bfloat16).sharding == sharding


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_a_policy_does_not_remember_the_name_it_was_read_from(name):
    policy = mpjax.get_policy(name)
    spelled = mpjax.get_policy(str(policy))
    assert policy == spelled
    assert vars(policy) == vars(spelled)
    rules = {mpjax.Rule(".*", policy), mpjax.Rule(".*", spelled)}
    assert len(rules) == 1
    assert mpjax.Rule(".*", name) not in rules


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: mpjax.get_policy("compute_float16"), "Unknown policy.*Use one of"),
        (lambda: mpjax.get_policy("mixed_int8"), "Unknown policy 'mixed_int8'"),
        (lambda: mpjax.get_policy("mixed_bfloat61"), "mixed_bfloat16, mixed_float16"),
        (lambda: mpjax.get_policy("mixed_float32"), "Unknown policy"),
        (lambda: mpjax.get_policy(""), "Unknown policy ''"),
        (lambda: mpjax.Policy("f23"), "Unknown dtype 'f23'.*Use one of"),
        (lambda: mpjax.get_policy("x=f16"), "Unknown key 'x'.*p|params"),
        (lambda: mpjax.get_policy("p=f16,"), "Unknown key ''"),
        (lambda: mpjax.get_policy("p="), "Unknown dtype ''"),
        (lambda: mpjax.get_policy("p=f16=f32"), "Unknown dtype"),
        (lambda: mpjax.get_policy("p=f16,params=f32"), "twice"),
        (lambda: mpjax.get_policy(None), "made of dtypes"),
        (lambda: mpjax.Policy(jnp.int8), "real floating dtypes, got int8"),
        (lambda: mpjax.Policy("f32", jnp.complex64), "got complex64"),
        (lambda: mpjax.Policy("f32", "f32", object()), "made of dtypes"),
        (lambda: mpjax.Policy(np.float64), "jax_enable_x64"),
    ],
)
def test_bad_policies_say_what_is_right(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_float64_where_it_is_enabled():
    jax.config.update("jax_enable_x64", True)
    try:
        policy = mpjax.get_policy("c=f64")
        assert policy.cast_to_compute(jnp.ones(2, jnp.float32)).dtype == jnp.float64
    finally:
        jax.config.update("jax_enable_x64", False)
