"""Roles of modules, by the structure and the names of layers of public models."""

import pytest

import mpjax
from mpjax._policies.lookup import Matcher
from mpjax._policies.roles import (
    ROLES,
    UNKNOWN,
    Structure,
    may_be_gate,
    may_be_in_router,
    may_be_norm,
    numbers_of_experts,
    out_of_reach,
    router_around,
)
from mpjax._policies.rule import read_rules

SCALE = Structure(is_leaf=True, axes=1)
BARE = Structure(is_leaf=True, axes=0)
BLOCK = Structure(is_leaf=False, axes=0)
KERNEL = Structure(is_leaf=True, axes=2)


def kind(name, base=object, module="model"):
    return type(name, (base,), {"__module__": module})


def layer(takes, gives, parent="Block", experts=None, config=None, router=None):
    return Structure(
        features=(takes, gives),
        parent=kind(parent),
        experts=experts,
        experts_of_config=config,
        router=router,
    )


# Path, class and structure of layers; their role, under the rules of a preset.
NORMS = [
    # transformers
    ("encoder/layer/0/output/LayerNorm", "LayerNorm", SCALE, "norm"),
    ("block/0/layer/0/layer_norm", "FlaxT5LayerNorm", SCALE, "norm"),
    ("model/layers/0/input_layernorm", "FlaxLlamaRMSNorm", SCALE, "norm"),
    ("model/layers/0/input_layernorm", "FlaxGemmaRMSNorm", SCALE, "norm"),
    ("encoder/layers/0", "FlaxWav2Vec2EncoderLayerStableLayerNorm", BLOCK, None),
    ("encoder", "FlaxWav2Vec2StableLayerNormEncoder", BLOCK, None),
    ("conv_layers/0", "FlaxWav2Vec2LayerNormConvLayer", BLOCK, None),
    ("encoder/layer/0", "FlaxRobertaPreLayerNormLayer", BLOCK, None),
    ("layers/0/norm", "FlaxMistralRMSNorm", SCALE, "norm"),
    # T5X, maxtext, EasyLM, Gemma
    ("encoder/layers_0/pre_attention_layer_norm", "LayerNorm", SCALE, "norm"),
    ("decoder/layers/pre_self_attention_norm", "RMSNorm", SCALE, "norm"),
    ("decoder/layers/mlp/norm", "Normalize", SCALE, None),
    ("transformer/h/0/attention_norm", "RMSNorm", SCALE, "norm"),
    ("layer_0/pre_ffw_norm", "RMSNorm", SCALE, "norm"),
    ("layer_0/attn/query_norm", "QKNorm", SCALE, "norm"),
    # big_vision, vision models, diffusion
    ("Transformer/encoder_norm", "LayerNorm", SCALE, "norm"),
    ("root_block/gn_root", "GroupNorm", SCALE, "norm"),
    ("stage1/norm", "LayerNorm2d", SCALE, "norm"),
    ("bn1", "BatchNormAct2d", Structure(is_leaf=False, axes=1), None),
    ("bn1", "SyncBatchNorm", SCALE, "norm"),
    ("stage2/grn", "GRN", SCALE, "norm"),
    ("layers_0", "PreNorm", BLOCK, None),
    ("layers_0", "PostNorm", BLOCK, None),
    ("layers_0", "AddNorm", BLOCK, None),
    ("block_0/norm1", "AdaLayerNorm", Structure(is_leaf=False, axes=1), None),
    ("adaln", "AdaLN", BLOCK, None),
    ("blocks_0", "NormFormer", BLOCK, None),
    ("blocks_0", "ResidualNorm", BLOCK, None),
    ("pixel_norm", "PixelNorm", BARE, "norm"),
    ("proj", "DenseWithWeightNorm", KERNEL, None),
    ("norm", "EvoNorm2d", SCALE, "norm"),
    ("layer_scale", "LayerScale", SCALE, None),
]
ROUTERS = [
    # The gate of SwiGLU, whatever its size and wherever it stands.
    ("model/layers/0/mlp/gate_proj", "Dense", layer(4096, 11008), None),
    ("mlp/Expert_0/gate", "Dense", layer(128, 256, "Expert"), None),
    ("mlp/experts/gate", "Dense", layer(2048, 512, "Experts"), None),
    ("moe/expert_3/gate", "Dense", layer(7168, 256, "MLP"), None),
    ("moe/shared_experts/gate", "Dense", layer(2048, 512, "SharedExpert"), None),
    ("layer_0/mlp/gate", "Dense", layer(512, 1024, "GemmaMLP"), None),
    ("layer_0/mlp/gating", "Dense", layer(512, 512, "MLP"), None),
    ("layers/0/feed_forward/w1", "Dense", layer(512, 1024, "FeedForward"), None),
    # Routers of mixtures: Switch, Mixtral, Qwen, DeepSeek, maxtext, V-MoE.
    ("mlp/gate", "Dense", layer(128, 2, "SparseMLP"), "router_layer"),
    ("layers/0/mlp/gate", "Linear", layer(2048, 128, "MLP"), "router_layer"),
    ("layers/0/mlp/gate", "Linear", layer(16, 8, "Qwen3MoeBlock"), "router_layer"),
    ("block_sparse_moe/gate", "Linear", layer(4096, 8), "router_layer"),
    ("mlp/router/classifier", "Dense", layer(768, 8, router="router"), "router_layer"),
    ("decoder/layers/MoeBlock_0/gate", "GateLogit", layer(512, 8), "router"),
    ("mlp/router", "NoisyTopExpertsPerItemRouter", BLOCK, "router"),
    ("router/router_weights/w", "Dense", layer(768, 8, router="r"), "router_layer"),
    ("mlp/gate", "DeepseekV3TopkRouter", BLOCK, "router"),
    ("ffn/gate", "TopKGating", BLOCK, "router"),
    ("ffn/gate", "Top2Gating", BLOCK, "router"),
    ("ffn/gate", "MoEGate", BLOCK, "router"),
    ("ffn/gate/Dense_0", "Dense", layer(64, 4, "TopKGating"), "router_layer"),
    ("moe/wg", "Dense", layer(64, 4, "MoELayer"), "router_layer"),
    ("moe/switch", "Dense", layer(64, 4, "SwitchFFN"), "router_layer"),
    ("moe/Dense_0", "Dense", layer(64, 4, "MoE", experts=4), "router_layer"),
    ("moe/Dense_1", "Dense", layer(64, 128, "MoE", experts=4), None),
    ("moe/gate_logits", "Dense", layer(64, 4, "Layer", experts=4), "router_layer"),
    ("moe/logits", "Dense", layer(64, 4, "MoE", experts=4), "router_layer"),
    # As many features as there are experts, by chance.
    ("mlp/gate", "Dense", layer(16, 8, config=8), "router_layer"),
    ("moe/Dense_0", "Dense", layer(16, 8, "SparseMoeBlock", config=8), "router_layer"),
    ("attention/lora_a", "Dense", layer(64, 8, "Attention", config=8), None),
    ("attention/k_proj", "Dense", layer(64, 8, "Attention", config=8), None),
    ("self_attn/Dense_0", "Dense", layer(64, 8, "Layer", experts=8), None),
    ("moe/lora_a", "Dense", layer(64, 8, "MoeBlock", experts=8), None),
    ("mlp/lora/Dense_0", "Dense", layer(64, 8, "LoRA", config=8), None),
    ("moe/q_rope", "Dense", layer(64, 8, "MoeBlock", experts=8), None),
    ("moe/up_proj", "Dense", layer(64, 8, "MoeBlock", experts=8), None),
    ("moe/experts/0/down", "Dense", layer(64, 8, "MLP", config=8), None),
    ("moe/experts/0/gate", "Linear", layer(64, 8, "MLP", config=8), None),
    ("adapter/down", "Dense", layer(64, 8, "Adapter", config=8), None),
    ("layers_0/mix", "Dense", layer(64, 8, "DecoderLayer", config=8), None),
    ("head", "Dense", layer(64, 8, "MoETransformer", config=8), "end"),
    ("head", "Dense", layer(64, 8, "MoETransformer", experts=8), "end"),
    # Modules that are called after the router in them.
    ("routing", "RoutingTransformer", BLOCK, None),
    ("routing/mlp", "Dense", layer(64, 64, "RoutingTransformer"), None),
    ("token_router", "MoELayer", BLOCK, None),
    ("token_router/up", "Dense", layer(64, 64, "MoELayer"), None),
    ("token_router/gate", "Dense", layer(64, 4, "MoELayer"), "router_layer"),
    ("router/expert_0", "Dense", layer(64, 64, router="router"), None),
    ("router/up", "Dense", layer(64, 256, router="router"), None),
    ("router", "MLP", BLOCK, "router_layer"),
    (
        "ffn/Dense_0",
        "Dense",
        layer(64, 8, "ExpertChoiceFFN", experts=8),
        "router_layer",
    ),
    # Units that are called after gates and route nothing.
    ("blocks_0/sgu", "SpatialGatingUnit", BLOCK, None),
    ("blocks_0", "GatingMlpBlock", BLOCK, None),
    ("blocks_0/mlp", "GatedMLP", BLOCK, None),
    ("blocks_0/grid_gating", "GridGatingUnit", BLOCK, None),
    ("blocks_0", "BlockGatingUnit", BLOCK, None),
    ("unit/gate", "Dense", layer(64, 64, "SpatialGatingUnit"), None),
    ("attention/gate", "Dense", layer(512, 8, "Attention"), None),
    ("attn/gate", "Dense", layer(512, 8, "GatedDeltaNet"), None),
    ("mlp/shared_expert_gate", "Dense", layer(2048, 1, "MoeBlock"), None),
    ("highway/gate", "Dense", layer(64, 64, "Highway"), None),
    ("cell/forget_gate", "Dense", layer(64, 8, "LSTMCell"), None),
    ("moe", "RoutedMoE", BLOCK, None),
    ("router_encoder/layers_0/Dense_0", "Dense", layer(64, 64), None),
    ("RoutingTransformer_0/Dense_0", "Dense", layer(64, 64), None),
    ("moe/TopKRouter_0/Dense_0", "Dense", layer(64, 8, "TopKRouter"), "router_layer"),
    ("layers/0/ffn/gate", "Gate", layer(7168, 256, "MoE"), "router_layer"),
    ("moe", "RouterMoeBlock", BLOCK, None),
]
ENDS = [
    ("lm_head", "Dense", UNKNOWN, "end"),
    ("embeddings/patch_embeddings/projection", "Conv", UNKNOWN, "end"),
    ("cls/predictions/decoder", "Dense", UNKNOWN, "end"),
    ("decoder/logits_dense", "DenseGeneral", UNKNOWN, "end"),
    ("token_embedder", "Embed", UNKNOWN, "embedding"),
    ("embedder", "Embedder", UNKNOWN, "end"),
    ("shared", "FlaxSharedEmbedding", UNKNOWN, "embedding"),
    ("stem/conv1/Conv_0", "Conv", UNKNOWN, "end"),
    ("MAPHead_0/MultiHeadDotProductAttention_0/out", "DenseGeneral", UNKNOWN, None),
    ("multi_head_attention/out", "Dense", UNKNOWN, None),
    ("text_embedder/layers_0/Dense_0", "Dense", UNKNOWN, None),
    ("head/blocks_0/Dense_0", "Dense", UNKNOWN, None),
    ("embed/encoder/Dense_0", "Dense", UNKNOWN, None),
    ("layers_3/mlp/up", "Dense", UNKNOWN, None),
]


def role(rules, path, name, structure, **options):
    """Of a module under a preset: that of the first rule with one that matches."""
    module_type = kind(name, **options)
    for rule in rules:
        if rule.path and rule.role and rule.matches(path, module_type, structure):
            return rule.role
    return None


@pytest.mark.parametrize("table", [NORMS, ROUTERS, ENDS])
def test_roles_of_layers_of_public_models(table):
    rules = mpjax.preset("mixed_float8")
    found = [(*row[:3], role(rules, *row[:3])) for row in table]
    assert found == table


def test_a_class_derived_from_a_larger_one_is_larger():
    base = kind("MoELayer")
    assert role(mpjax.preset("half"), "router", "Mine", BLOCK, base=base) is None
    assert router_around([("router", kind("Mine", base))]) is None


def test_the_table_has_sixty_names():
    assert len({row[:2] for row in (*NORMS, *ROUTERS, *ENDS)}) >= 60


@pytest.mark.parametrize(
    "api", ["flax.linen.normalization", "flax.nnx.nn.normalization"]
)
def test_a_norm_of_flax_is_one_by_its_class(api):
    base = kind("BatchNorm", module=api)
    for module_type in (base, kind("Calm", base)):
        assert not may_be_norm(module_type)
        for structure in (UNKNOWN, BLOCK, SCALE):
            assert ROLES["norm"]("a", module_type, structure) == (
                "norm: BatchNorm of Flax"
            )
    assert ROLES["norm"]("a", kind("BatchNorm"), BLOCK) is None


def test_where_structure_is_not_known_names_decide():
    for name, path, expected in (
        ("LayerNorm", "a", "norm"),
        ("EncoderLayerStableLayerNorm", "a", None),
        ("PreNorm", "a", None),
        ("Dense", "block_sparse_moe/gate", "router_layer"),
        ("Dense", "mlp/gate", None),
        ("Dense", "moe_experts/gate", None),
    ):
        assert role(mpjax.preset("mixed_bfloat16"), path, name, UNKNOWN) == expected


def test_only_ambiguous_names_ask_for_structure():
    asked = "FlaxT5LayerNorm", "EncoderLayerStableLayerNorm", "PreNorm", "AdaLN"
    assert all(may_be_norm(kind(name)) for name in asked)
    assert not any(may_be_norm(kind(name)) for name in ("Dense", "Block", "Normalize"))
    gates = "mlp/gate", "gating", "moe/gate_logits", "a/expert_gate", "wg", "Switch_0"
    assert all(map(may_be_gate, gates))
    assert may_be_in_router("moe/router/out") and not may_be_in_router("moe/router")
    others = "mlp/gate_proj", "forget_gate", "up", "gate/Dense_0", "head_gate"
    assert not any(map(may_be_gate, others))


def test_decisions_say_why():
    found = Matcher(read_rules("mixed_bfloat16"))
    for path, name, structure, reason in (
        ("a", "RMSNorm", SCALE, "norm: RMSNorm with parameters of one axis"),
        ("a", "RMSNorm", BARE, "norm: RMSNorm with no parameters"),
        ("a", "LayerNorm", UNKNOWN, "norm by name: LayerNorm"),
        ("a", "TopKRouter", UNKNOWN, "router by name: TopKRouter"),
        ("a/router/out", "Dense", UNKNOWN, "router by name: router"),
        ("a/out", "Dense", layer(8, 4, "TopKGating"), "router: in TopKGating"),
        ("a/gate", "Dense", layer(8, 2), "router: 2 of 8 features, called gate"),
        (
            "a/out",
            "Dense",
            layer(8, 2, experts=2),
            "router: 2 of 8 features, one for each expert",
        ),
        ("a/out", "Dense", layer(8, 2), None),
    ):
        assert found.decision(path, kind(name), structure).reason == reason
    ends = Matcher(read_rules("mixed_float8"))
    assert ends.decision("lm_head", kind("Dense")).reason == "first or last by name"
    assert ends.decision("a", kind("Embed")).reason == "embedding: Embed"


class Config:
    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 2}, (8, None)),
        ({"config": Config(n_routed_experts=64)}, (None, 64)),
        ({"cfg": {"num_local_experts": 4}, "n_experts": 2}, (2, 4)),
        ({"num_experts": 1}, (None, None)),
        ({"experts": [object()]}, (None, None)),
        ({"num_experts": None, "config": Config(num_experts="8")}, (None, None)),
        ({"num_heads": 8, "config": 3}, (None, None)),
    ],
)
def test_the_number_of_experts_is_a_field_of_the_module_around(fields, counts):
    assert tuple(numbers_of_experts(fields).values()) == counts


@pytest.mark.parametrize(
    ("around", "router"),
    [
        ("router:MLP moe:MoE", "router"),
        ("layers:list mlp:MLP router:Module moe:MoE", "router"),
        ("mlp:MLP routing:RoutingTransformer", None),
        ("up:MLP token_router:MoELayer", None),
        ("expert_0:MLP router:Module", None),
        ("layers_0:EncoderLayer router:Module", None),
        ("mlp:MLP block:Block", None),
        ("router:TopKExpertsRouter", "router"),
        ("router:RouterBlock", "router"),
        ("router:RouterMoEBlock", None),
    ],
)
def test_a_router_is_around_unless_larger_modules_are_between(around, router):
    pairs = (pair.split(":") for pair in around.split())
    assert router_around((name, kind(of)) for name, of in pairs) == router


@pytest.mark.parametrize(
    ("name", "shapes", "has_modules", "notes"),
    [
        ("AdaLayerNorm", {}, True, ["a norm by name only"]),
        ("AdaLayerNorm", {"scale": (8,)}, False, []),
        ("FlaxEncoderLayerStableLayerNorm", {}, True, []),
        ("PreNorm", {}, True, []),
        ("Block", {"kernel": (8, 8)}, True, []),
        ("Block", {"router_weights": (2, 64, 8)}, True, ["parameter router_weights"]),
        ("SparseMoeBlock", {"gate": (64, 8)}, False, ["parameter gate"]),
        ("SparseMoeBlock", {"gate": (64, 128)}, False, []),
        ("MoE", {"gate": (8, 64, 8), "wi": (64, 8)}, False, []),
        ("MLP", {"gate": (64, 8)}, False, []),
    ],
)
def test_what_no_role_reaches_is_told(name, shapes, has_modules, notes):
    found = list(out_of_reach(kind(name), shapes, has_modules))
    assert [note.removesuffix(" in 16 bits") for note in found] == notes


def test_rules_may_ask_for_a_role():
    rules = [mpjax.Rule(role="norm", policy="f32"), "c=bf16"]
    found = Matcher(read_rules(rules))
    assert (
        str(found.decision("a", kind("RMSNorm"), SCALE).policy) == "p=f32,c=f32,o=f32"
    )
    assert "c=bf16" in str(found.decision("a", kind("RMSNorm"), BLOCK).policy)
    assert str(rules[0]).endswith("role='norm')")
    with pytest.raises(ValueError, match=r"one of 'norm', .* or None, got 'norms'"):
        mpjax.Rule(role="norms", policy="f32")
    with pytest.raises(ValueError, match="got 3"):
        mpjax.Rule(role=3, policy="f32")
