"""Flax models of other authors, in small sizes, as their packages ship them.

``MODELS`` lists them. A builder imports its package when it is called, so that what is
not installed costs one row of a table and no more.
"""

# pyright: reportMissingImports=false

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of a package.

    Attributes:
      package: its name on PyPI.
      name: the class.
      features: what there is in it that a policy could stumble over.
      build: returns the module, and the arguments and keyword arguments of a call.
    """

    package: str
    name: str
    features: str
    build: Callable[[], tuple[Any, tuple, dict]]


MODELS: list[Model] = []


def _model(package: str, name: str, features: str):
    def register(build):
        MODELS.append(Model(package, name, features, build))
        return build

    return register


def _ids(*shape: int, high: int = 64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, high, shape), jnp.int32)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def _positions(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)


# -- Linen: transformers ---------------------------------------------------------------

_SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
)


def _transformers(module: str, name: str, config, **fields):
    models = importlib.import_module(f"transformers.models.{module}")
    return getattr(models, name)(config, **fields)


@_model("transformers", "FlaxBertForMaskedLM", "dtype fields, tied head by sharing")
def _bert():
    from transformers import BertConfig

    ids = _ids(2, 16)
    module = _transformers(
        "bert.modeling_flax_bert", "FlaxBertForMaskedLMModule", BertConfig(**_SMALL)
    )
    mask, types = jnp.ones_like(ids), jnp.zeros_like(ids)
    return module, (ids, mask, types, _positions(2, 16), None), {}


@_model("transformers", "FlaxGPT2LMHead", "own Conv1D, tied head by sharing")
def _gpt2():
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    module = _transformers("gpt2.modeling_flax_gpt2", "FlaxGPT2LMHeadModule", config)
    ids = _ids(2, 16)
    return module, (ids, jnp.ones_like(ids), _positions(2, 16)), {}


@_model("transformers", "FlaxLlamaForCausalLM", "own RMSNorm, rotary, setup style")
def _llama():
    from transformers import LlamaConfig

    module = _transformers(
        "llama.modeling_flax_llama", "FlaxLlamaForCausalLMModule", LlamaConfig(**_SMALL)
    )
    ids = _ids(2, 16)
    return module, (ids, jnp.ones_like(ids), _positions(2, 16)), {}


@_model("transformers", "FlaxCLIP", "class token and logit scale by self.param")
def _clip():
    from transformers import CLIPConfig

    vision = {**_SMALL, "image_size": 16, "patch_size": 4}
    config = CLIPConfig(
        text_config={**_SMALL, "eos_token_id": 63},
        vision_config=vision,
        projection_dim=16,
    )
    module = _transformers("clip.modeling_flax_clip", "FlaxCLIPModule", config)
    ids, pixels = _ids(2, 16), _normal(2, 16, 16, 3)
    return module, (ids, pixels, jnp.ones_like(ids), _positions(2, 16)), {}


@_model("transformers", "FlaxWav2Vec2", "weight-normed convolution by self.param")
def _wav2vec2():
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config(
        **{**_SMALL, "vocab_size": 32},
        conv_dim=(16, 16),
        conv_kernel=(8, 4),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    module = _transformers(
        "wav2vec2.modeling_flax_wav2vec2", "FlaxWav2Vec2Module", config
    )
    return module, (_normal(2, 400),), {}


@_model("transformers", "FlaxWhisperForConditionalGeneration", "nn.remat, tied head")
def _whisper():
    from transformers import WhisperConfig

    config = WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    module = _transformers(
        "whisper.modeling_flax_whisper",
        "FlaxWhisperForConditionalGenerationModule",
        config,
        gradient_checkpointing=True,
    )
    ids = _ids(2, 16)
    args = (_normal(2, 16, 32), ids, jnp.ones_like(ids), _positions(2, 16))
    return module, args, {}


@_model("transformers", "FlaxResNetForImageClassification", "BatchNorm in training")
def _resnet():
    from transformers import ResNetConfig

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_labels=10,
        layer_type="basic",
    )
    module = _transformers(
        "resnet.modeling_flax_resnet",
        "FlaxResNetForImageClassificationModule",
        config,
    )
    return module, (_normal(8, 32, 32, 3),), {"deterministic": False}


# -- Linen: others ---------------------------------------------------------------------


@_model("diffusers", "FlaxUNet2DConditionModel", "convolutions, cross attention")
def _unet():
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    module = FlaxUNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    return module, (_normal(1, 4, 8, 8), jnp.array([3]), _normal(1, 4, 16)), {}


@_model("flaxdiff", "SimpleDiT", "fields without a default dtype, Fourier features")
def _dit():
    from flaxdiff.models.simple_dit import SimpleDiT

    module = SimpleDiT(patch_size=4, emb_features=32, num_layers=2, num_heads=4)
    args = (_normal(2, 16, 16, 3), jnp.array([0.3, 0.4]), _normal(2, 4, 16))
    return module, args, {}


@_model("flaxmodels", "ResNet18", "own BatchNorm, dtype as a string, not training")
def _flaxmodels_resnet():
    import flaxmodels

    module = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=10)
    return module, (_normal(2, 32, 32, 3),), {"train": False}


@_model("bottleneck-transformer-flax", "BoTNet", "BatchNorm, relative positions")
def _botnet():
    from bottleneck_transformer_flax import BoTNet, BoTNetConfig

    config = BoTNetConfig(
        stage_sizes=(1, 1, 1, 1),
        num_classes=10,
        num_heads=2,
        head_dim=8,
        initial_filters=8,
    )
    return BoTNet(config), (_normal(8, 64, 64, 3),), {"train": True}


@_model("transformer-in-transformer-flax", "TransformerInTransformer", "self.param")
def _tnt():
    from transformer_in_transformer_flax import TNTConfig, TransformerInTransformer

    config = TNTConfig(
        num_classes=10,
        depth=2,
        image_size=16,
        patch_size=4,
        transformed_patch_size=2,
        inner_dim=16,
        inner_heads=2,
        inner_dim_head=8,
        outer_dim=32,
        outer_heads=4,
        outer_dim_head=8,
    )
    return TransformerInTransformer(config), (_normal(2, 16, 16, 3),), {}


@_model("local-attention-flax", "LocalAttention", "Dense without a dtype, einsum")
def _local_attention():
    from local_attention_flax import LocalAttention

    module = LocalAttention(dim=32, window_size=8, heads=2, dim_head=16)
    return module, (_normal(32, 32),), {}


@_model("nano-moe-jax", "NanoMoE", "position embedding and experts by self.param")
def _nano_moe():
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=64, d_model=32, n_heads=4, n_layers=2, block_size=16
    )
    return NanoMoE(config), (_ids(2, 16),), {}


@_model("flax-gated-linear-rnn", "GatedLinearRNN", "nn.scan, carry made by the model")
def _gated_linear_rnn():
    from flax_gated_linear_rnn.gated_linear_rnn import GatedLinearRNN

    module = GatedLinearRNN(d_model=16, d_h=16, use_true_recurrence=True)
    return module, (_normal(2, 8, 16),), {}


@_model("long-range-models", "S5Layer", "complex state matrices, module as a field")
def _s5():
    from long_range_models.s5 import S5Layer
    from long_range_models.sequence_models import SequenceModel

    module = SequenceModel(S5Layer(16, 8), num_tokens=64, emb_dim=16)
    return module, (_ids(2, 16),), {}


@_model("jaxfvld", "StructureModule", "modules called eight times, 3-d geometry")
def _structure_module():
    from jaxfvld.model.structure_module import StructureModule

    module = StructureModule(c_s=32, c_z=16, n_layer=4, n_head=4)
    return module, (_normal(12, 32), _normal(12, 12, 16), jnp.ones(12)), {}


@_model("bwetaf", "Model", "nn.scan over blocks, casts to bfloat16 by hand")
def _bwetaf():
    from BwETAF.model.model import Model as Transformer

    module = Transformer(
        num_heads=4,
        attention_dim=32,
        vocab_size=64,
        num_blocks=2,
        ff_dim=64,
        dropout_rate=0.0,
        num_experts=4,
        top_k=2,
        capacity=2.0,
    )
    return module, (_ids(2, 16), jnp.ones((2, 16))), {"training": False}


# -- NNX -------------------------------------------------------------------------------


@_model("canvit-nnx", "CanViT", "nnx.Param read directly, asserts float32 inputs")
def _canvit():
    import canvit_nnx
    from canvit_core.config import CanViTConfig

    config = CanViTConfig(
        backbone_name="vits16",
        canvas_num_heads=2,
        canvas_head_dim=16,
        num_canvas_registers=2,
        num_backbone_registers=2,
    )
    module = canvit_nnx.CanViT(config, rngs=_rngs())
    kwargs = dict(
        glimpse=_normal(1, 32, 32, 3),
        state=module.init_state(batch_size=1, canvas_grid_size=4),
        viewpoint=canvit_nnx.Viewpoint.full_scene(batch_size=1),
    )
    return module, (), kwargs


@_model("heal-swin-nnx", "HealSwin", "windows, learned rotary frequencies")
def _heal_swin():
    from heal_swin_nnx import HealSwin, HealSwinParams

    params = HealSwinParams(
        nside=8,
        in_channels=3,
        out_channels=5,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        dtype="float32",
    )
    return HealSwin(params, rngs=_rngs()), (_normal(1, params.npix, 3),), {}


@_model("heal-swin-nnx", "HealConv", "depthwise convolution by einsum")
def _heal_conv():
    from heal_swin_nnx import HealConv, HealConvParams

    params = HealConvParams(
        nside=8,
        in_channels=3,
        out_channels=5,
        embed_dim=16,
        depths=(2, 2),
        dtype="float32",
    )
    return HealConv(params, rngs=_rngs()), (_normal(1, params.npix, 3),), {}


@_model("mamba2-jax", "Mamba2ForCausalLM", "state space, tied head by transposing")
def _mamba2():
    from mamba2_jax.modeling import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(Mamba2Config.tiny(), rngs=_rngs()), (_ids(2, 32),), {}


@_model("mamba3-jax", "Mamba3ForCausalLM", "state space, rotary states, lax.scan")
def _mamba3():
    from mamba3_jax.modeling import Mamba3Config, Mamba3ForCausalLM

    return Mamba3ForCausalLM(Mamba3Config.tiny(), rngs=_rngs()), (_ids(2, 32),), {}


@_model("dantinox", "Transformer", "pytree=False modules in plain lists, tied head")
def _dantinox():
    from dantinox.core.config import ModelConfig
    from dantinox.core.model import Transformer

    config = ModelConfig(dim=32, n_heads=4, num_blocks=2, vocab_size=64, max_context=16)
    return Transformer(config, rngs=_rngs()), (_ids(2, 16),), {}


@_model("jraphx", "GAT", "nnx.Param read directly, scatter")
def _gat():
    from jraphx.nn.models import GAT

    module = GAT(8, 16, 2, out_features=4, norm="layer_norm", rngs=_rngs())
    return module, (_normal(10, 8), _ids(2, 30, high=10)), {}


@_model("vitax", "VisionTransformer", "stock attention, sharded parameters")
def _vitax():
    from vitax.models.vit import VisionTransformer

    module = VisionTransformer(
        num_classes=10,
        img_size=16,
        patch_size=4,
        num_layers=2,
        num_heads=4,
        mlp_dim=64,
        hidden_size=32,
        fsdp=False,
        rngs=_rngs(),
    )
    module.eval()
    return module, (_normal(2, 16, 16, 3),), {}


def _tunix_lm(family: str, name: str, **fields):
    module = importlib.import_module(f"tunix.models.{family}.model")
    config = module.ModelConfig(
        num_layers=2,
        vocab_size=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        remat_config=module.RematConfig.BLOCK,
        **fields,
    )
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((16, 16), bool)), (2, 16, 16))
    args = (_ids(2, 16), _positions(2, 16), None, mask)
    return getattr(module, name)(config, rngs=_rngs()), args, {}


@_model("google-tunix", "Llama3", "own Einsum and RMSNorm, nnx.remat")
def _tunix_llama3():
    return _tunix_lm("llama3", "Llama3")


@_model("google-tunix", "Qwen3", "dtype field, tied head, nnx.remat")
def _tunix_qwen3():
    return _tunix_lm("qwen3", "Qwen3", use_tied_embedding=True)


# -- Linen: gemma, last, since it replaces nn.Module.param for the rest of the process -


@_model("gemma", "gm.nn.Transformer", "nn.jit, own Einsum and RMSNorm, tied head")
def _gemma():
    from gemma import gm
    from gemma.gm.nn import _config, _modules

    config = _config.TransformerConfig(
        num_embed=64,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        sliding_window_size=8,
        attention_types=(
            _modules.AttentionType.LOCAL_SLIDING,
            _modules.AttentionType.GLOBAL,
        ),
    )
    module = gm.nn.Transformer(config=config, dtype=jnp.float32)
    return module, (_ids(2, 16),), {}


@_model("gemma", "SigLiPFromPatches", "nn.jit, a dtype field called dtype_mm")
def _siglip():
    from gemma.gm.nn.vision import _vision, _vision_utils

    module = _vision.SigLiPFromPatches(
        siglip_encoder=_vision_utils.ViTModel(
            patch_size=(4, 4), width=32, depth=2, mlp_dim=64, num_heads=4
        ),
        siglip_exit=_vision.VisionExit(output_length=4),
        num_mm_tokens_per_image_prepool=16,
        num_mm_tokens_per_image=4,
        image_height=16,
        image_width=16,
        apply_stop_gradient=False,
    )
    return module, (), {"patches": _normal(2, 1, 16, 48), "is_training": False}
