"""The table of presets: a name, its policy, and what it protects.

A preset is one entry of ``PRESETS``. `expand` makes rules of it.
"""

import dataclasses

from mpjax._recipes.named import current_scaling
from mpjax._recipes.recipe import Recipe

# Class names of normalization layers, in Linen, NNX and in models of other authors; but
# not of blocks that are called after where their norm stands (PreNorm).
NORMS = r"(?!\w*(Pre|Post|Add)Norm)\w*Norm(alization)?(_?V?\d+[dD]?)?"
# Class names of modules that choose experts, and names of layers with their logits.
ROUTERS = r"\w*(Router|Gating)\w*"
ROUTER_PATHS = r"(?i:(.*/)?(\w*router\w*|\w*(moe|expert)\w*/gat(e|ing))(/.*)?)"
# Layers that stand first or last in a model and make its inputs or outputs.
END_PATHS = (
    r"(?i:(.*/)?(?!multi|att)((\w+_)?(embed(ding)?s?|stem|head|classifier|readout)"
    r"|embedder|unembed\w*|patch(es|ify)?(_?(embed\w*|proj\w*))?"
    r"|logits\w*|\w+_logits|vocab_\w+|output_projection|predictions/decoder"
    r"|encoder/conv1)"
    r"(_\d+)?(/[^/]+){0,2})"
)
EMBEDDINGS = r"\w*Embed(ding)?s?"  # class names; their attend makes logits


@dataclasses.dataclass(frozen=True)
class Protected:
    """Modules that do not follow the policy of a preset, and have no recipe.

    Attributes:
      path: regular expression that the whole path must match.
      module_type: regular expression for the name of a class, as of ``Rule``; None: any
        type.
      compute_dtype: a dtype, or ``"compute"`` or ``"output"``: that of the policy.
      output_dtype: the same.
    """

    path: str = ".*"
    module_type: str | None = None
    compute_dtype: str = "compute"
    output_dtype: str = "output"


@dataclasses.dataclass(frozen=True)
class Preset:
    """What the name of a preset stands for.

    Attributes:
      policy: in jmp's grammar; of all modules that are not protected.
      protected: the first that matches decides.
      recipe: of the products; None: they multiply in the compute dtype.
      min_size: products that sum over fewer elements, or give fewer features, have no
        recipe; None: all have it.
    """

    policy: str
    protected: tuple[Protected, ...] = ()
    recipe: Recipe | None = None
    min_size: int | None = None


FRAGILE = (
    Protected("", NORMS, "float32", "output"),  # a model that is a norm
    Protected(".*", ROUTERS, "float32", "compute"),
    Protected(ROUTER_PATHS, None, "float32", "float32"),
    Protected(".*", NORMS, "float32", "compute"),
)
ENDS = Protected(".*", EMBEDDINGS), Protected(END_PATHS)
PRESETS = {
    "mixed_bfloat16": Preset("p=f32,c=bf16,o=f32", FRAGILE),
    "mixed_float16": Preset("p=f32,c=f16,o=f32", FRAGILE),
    "mixed_float8": Preset(
        "p=f32,c=bf16,o=f32", (*FRAGILE, *ENDS), current_scaling(), min_size=128
    ),
    "bfloat16": Preset("p=bf16,c=bf16,o=bf16", FRAGILE),
    "float16": Preset("p=f16,c=f16,o=f16", FRAGILE),
    "half": Preset("p=half,c=half,o=half", FRAGILE),
    "float32": Preset("p=f32,c=f32,o=f32"),
}
_SHORT = {
    "mixed_bf16": "mixed_bfloat16",
    "mixed_f16": "mixed_float16",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "full": "float32",
}


def full_name(text: object) -> str | None:
    """The name of a preset in full; None: this is no name of one.

    Example:
      >>> full_name("mixed_bf16"), full_name("p=f32,c=bf16")
      ('mixed_bfloat16', None)
    """
    if not isinstance(text, str):
        return None
    name = _SHORT.get(text.strip(), text.strip())
    return name if name in PRESETS else None
