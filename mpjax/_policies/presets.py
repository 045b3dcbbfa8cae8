"""The table of presets: a name, its policy, and what it protects.

A preset is one entry of ``PRESETS``. `expand` makes rules of it.
"""

import dataclasses

from mpjax._recipes.named import current_scaling
from mpjax._recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Protected:
    """Modules that do not follow the policy of a preset, and have no recipe.

    Attributes:
      path: regular expression that the whole path must match.
      module_type: regular expression for the name of a class, as of ``Rule``; None: any
        type.
      role: of `roles.ROLES`; None: any.
      compute_dtype: a dtype, or ``"compute"`` or ``"output"``: that of the policy.
      output_dtype: the same.
    """

    path: str = ".*"
    module_type: str | None = None
    role: str | None = None
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
    Protected("", None, "norm", "float32", "output"),  # a model that is a norm
    Protected(".*", None, "router", "float32", "compute"),
    Protected(".*", None, "router_layer", "float32", "float32"),
    Protected(".*", None, "norm", "float32", "compute"),
)
ENDS = Protected(role="embedding"), Protected(role="end")
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
