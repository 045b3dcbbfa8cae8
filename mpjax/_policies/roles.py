"""Roles: the parts that modules play in a model, whoever wrote them and in which API.

A role is decided by structure where structure tells, and by names where nothing else
can. What a front end knows of a module beside its path and class it says in a
`Structure`; each function here reads one and says why a module has the role, or None.

What becomes of a value after a layer has made it, softmax or top-k say, is not known
when the layer runs: a router is recognized by the small number of its features.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Of a layer whose name alone does not say that it is a router: it gives at most this
# part of the features that it takes. Gates of experts give a quarter or more.
_FEW = 4
_ROUTER = re.compile(
    r"(?i)\w*rout(er|ing)"
    r"(_?(logits?|weights?|scores?|probs?|kernel|net(work)?|mlp|proj|dense|linear"
    r"|layer|gate|fn))?(_?\d+)?"
)
# Layers with such a name may choose experts, or may be gates of any other kind.
_GATE = re.compile(
    r"(?i)((moe|experts?|mlp|ffn?|top_?k|token|model|mixture)_?)?"
    r"(gat(e|ing)|switch|selector|dispatch(er)?|wg)"
    r"(_?(logits?|scores?|weights?|probs?|network|fn|layer|linear|dense))?(_?\d+)?"
)
_MIXTURE = re.compile(r"(?i)\w*(moe|mixture|sparse|switch|experts)\w*")
_MODEL = re.compile(r"\w*(Transformer|Encoder|Decoder|Model|For[A-Z]|LM)\w*")
_EXPERT = re.compile(
    r"(?i)(?!\w*(mixture|sparse|choice|moe(layer|block|mlp)?$))\w*expert\w*"
)
_ATTENTION = re.compile(r"(?i)\w*(att(entio)?n|mha)\w*|\w*([mg]qa|mla)(_?\d+)?")
# Layers of as few features as there are experts, or are asked for in a gate.
_LOW_RANK = re.compile(r"(?i)\w*(lora|adapter|rope|rotary)\w*")
_PROJECTION = re.compile(r"(?i)\w*proj\w*")
# Classes of modules that are called routers after what is in them.
_WHOLE = re.compile(
    r"(?i)\w*(moe|mixture|sparse|switch|experts?|transformer|encoder|decoder|model"
    r"|attention|routed)\w*"
    r"|(?!\w*router)\w*(block|ffn|feed_?forward|mixer|backbone)\w*"
)
_ROUTER_CLASS = re.compile(
    r"(?!\w*(M[oO]E|M[lL][pP]|Block|Transformer|Encoder|Decoder|Model|Attention))"
    r"\w*Router\w*"
    r"|\w*(Top\w*|Expert\w*|M[oO]E\w*|Noisy\w*|Switch\w*|Softmax)Gat(e|ing)\w*"
    r"|Gating(Network|Layer|Function|Fn)?|GateLogits?"
)
_NORM_CLASS = re.compile(r"\w*Norm(alization)?(_?V?\d+[dD]?)?|\w*LN|RMS|GRN")
# Blocks that are called after the norms in them, where their structure is not known.
_BLOCK_CLASS = re.compile(
    r"\w*(Pre|Post|Add)Norm.*|\w*(Encoder|Decoder|Block|Transformer|Attention"
    r"|M[lL][pP]|FeedForward|FFN|Model|Residual)\w*"
)
_STOCK_NORMS = frozenset(
    "LayerNorm RMSNorm BatchNorm GroupNorm InstanceNorm WeightNorm SpectralNorm".split()
)
_EMBEDDING_CLASS = re.compile(r"\w*Embed(ding)?s?")  # whose attend makes logits
# Layers that stand first or last in a model and make its inputs or outputs, but not the
# layers of a stack that is inside of such a module.
_END = re.compile(
    r"(?i:(.*/)?(?!multi|att)((\w+_)?(embed(ding)?s?|stem|head|classifier|readout)"
    r"|embedder|unembed\w*|patch(es|ify)?(_?(embed\w*|proj\w*))?"
    r"|logits\w*|\w+_logits|vocab_\w+|output_projection|predictions/decoder"
    r"|encoder/conv1)"
    r"(_\d+)?(/(?!(layers?|blocks?|h)(_?\d+)?(/|$)|\w*(att(entio)?n|transformer"
    r"|encoder|mixer)\w*)[^/]+){0,2})"
)


@dataclass(frozen=True)
class Structure:
    """What is known of a module beside its path and class; of all, None: not known.

    Structures are values: the same module has equal ones in every run.

    Attributes:
      is_leaf: whether no module is in it.
      axes: how many axes longer than 1 the largest of its own parameters has; 0: it has
        none.
      features: how many features it takes and gives, if it is a layer with a kernel.
      parent: the class of the module around it.
      experts: how many experts a field of the module around it says that there are.
      experts_of_config: the same, of the configuration that the module around it has,
        which many modules of a model share.
      router: the name of a module around it that is called a router, and is one.
    """

    is_leaf: bool | None = None
    axes: int | None = None
    features: tuple[int, int] | None = None
    parent: type | None = None
    experts: int | None = None
    experts_of_config: int | None = None
    router: str | None = None


UNKNOWN = Structure()


def is_norm(path: str, kind: type, structure: Structure) -> str | None:
    """A normalization layer: of Flax, or one by name that has the structure of one."""
    for base in kind.__mro__:
        if base.__name__ in _STOCK_NORMS and _is_of_flax(base):
            return f"norm: {base.__name__} of Flax"
    named = next((t for t in kind.__mro__ if _NORM_CLASS.fullmatch(t.__name__)), None)
    if named is None:
        return None
    if structure.is_leaf is None or structure.axes is None:
        of_block = _BLOCK_CLASS.fullmatch(kind.__name__)
        return None if of_block else f"norm by name: {named.__name__}"
    if not structure.is_leaf or structure.axes > 1:
        return None
    has = "parameters of one axis" if structure.axes else "no parameters"
    return f"norm: {named.__name__} with {has}"


def is_router(path: str, kind: type, structure: Structure) -> str | None:
    """A module that chooses experts, by the name of its class."""
    return f"router by name: {kind.__name__}" if is_router_class(kind) else None


def is_router_layer(path: str, kind: type, structure: Structure) -> str | None:
    """A layer with the logits of experts."""
    *above, name = path.split("/")
    above = [part for part in above if not part.isdigit()]  # places in a list
    if _ROUTER.fullmatch(name) and not _is_whole(kind):
        return f"router by name: {name}"
    if structure.parent is not None and is_router_class(structure.parent):
        return f"router: in {structure.parent.__name__}"
    parent = structure.parent.__name__ if structure.parent else ""
    around = [*above[-1:], parent]
    if any(map(_is_other, (name, *around))):
        return None
    router = structure.router
    if router is None and structure.parent is None:  # nothing tells but names
        router = next(filter(_ROUTER.fullmatch, above[-1:]), None)
    takes, gives = structure.features or (1, 0)
    if router is not None and gives <= takes:
        return f"router by name: {router}"
    in_mixture = any(map(_MIXTURE.fullmatch, around))
    if structure.features is None:
        is_named = _GATE.fullmatch(name) and above and _MIXTURE.fullmatch(above[-1])
        return f"router by name: {name}" if is_named else None
    if not 1 < gives < takes:  # a softmax over one is constant
        return None
    said = f"{gives} of {takes} features"
    is_gate = _GATE.fullmatch(name) is not None
    is_sparse = _MIXTURE.fullmatch(parent) and not _MODEL.fullmatch(parent)
    is_end = _END.fullmatch(name) and not is_sparse
    is_free = is_gate or not (is_end or _PROJECTION.fullmatch(name))
    # A configuration is shared by modules with experts and without.
    if is_free and (
        gives == structure.experts
        or (gives == structure.experts_of_config and (is_gate or is_sparse))
    ):
        return f"router: {said}, one for each expert"
    if is_gate and (in_mixture or gives * _FEW <= takes):
        return f"router: {said}, called {name}"
    return None


def is_end(path: str, kind: type, structure: Structure) -> str | None:
    """A layer that makes the inputs or the outputs of a model."""
    return "first or last by name" if _END.fullmatch(path) else None


def is_embedding(path: str, kind: type, structure: Structure) -> str | None:
    """A table that may make logits as well."""
    names = (base.__name__ for base in kind.__mro__)
    named = next(filter(_EMBEDDING_CLASS.fullmatch, names), None)
    return None if named is None else f"embedding: {named}"


ROLES: dict[str, Callable[[str, type, Structure], str | None]] = {
    "norm": is_norm,
    "router": is_router,
    "router_layer": is_router_layer,
    "embedding": is_embedding,
    "end": is_end,
}


def may_be_norm(kind: type) -> bool:
    """Whether its structure decides if a class is one of norms."""
    is_named = any(_NORM_CLASS.fullmatch(base.__name__) for base in kind.__mro__)
    return is_named and is_norm("", kind, Structure(is_leaf=False, axes=0)) is None


def out_of_reach(
    kind: type, shapes: Mapping[str, tuple[int, ...]], has_modules: bool
) -> Iterator[str]:
    """What a module in 16 bits has of a norm or a router that no role reaches.

    Args:
      kind: its class.
      shapes: of its own parameters, by name.
      has_modules: whether there are modules in it.

    Example:
      >>> list(out_of_reach(type("MoE", (), {}), {"router": (64, 8)}, False))
      ['parameter router in 16 bits']
    """
    if has_modules and may_be_norm(kind) and not _BLOCK_CLASS.fullmatch(kind.__name__):
        yield "a norm by name only"
    in_mixture = _MIXTURE.fullmatch(kind.__name__)
    for name, shape in shapes.items():
        is_gate = in_mixture and len(shape) == 2 and shape[1] * _FEW <= shape[0]
        if _ROUTER.fullmatch(name) or (is_gate and _GATE.fullmatch(name)):
            yield f"parameter {name} in 16 bits"


def may_be_gate(path: str) -> bool:
    """Whether its structure decides if a layer is a router."""
    return _GATE.fullmatch(path.rpartition("/")[2]) is not None


def may_be_in_router(path: str) -> bool:
    """Whether the modules around decide if a layer is a router."""
    return any(map(_ROUTER.fullmatch, path.split("/")[:-1]))


def router_around(around: Iterable[tuple[str, type]]) -> str | None:
    """The name of a router among the modules around a layer.

    Args:
      around: names and classes, the nearest first.
    """
    for name, kind in around:
        if _is_whole(kind) or _is_other(name):
            return None
        if _ROUTER.fullmatch(name):
            return name
    return None


def numbers_of_experts(fields: dict[str, object]) -> dict[str, int | None]:
    """How many experts the fields of a module, and of its configuration, say there are.

    Returns:
      As the fields of a `Structure`.

    Example:
      >>> numbers_of_experts({"num_experts": 8, "num_experts_per_tok": 2})
      {'experts': 8, 'experts_of_config': None}
    """
    config = next((fields[name] for name in _CONFIGS if name in fields), None)
    inner = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return {"experts": _count(fields), "experts_of_config": _count(inner)}


def _count(fields: Any) -> int | None:
    for name in _COUNTS:
        count = fields.get(name)
        if isinstance(count, int) and count > 1:
            return int(count)
    return None


_COUNTS = (
    "num_experts",
    "n_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "n_expert",
    "experts",
)
_CONFIGS = "config", "cfg", "hparams"


def is_router_class(kind: type) -> bool:
    """Whether the name of a class says that its modules choose experts."""
    return any(_ROUTER_CLASS.fullmatch(base.__name__) for base in kind.__mro__)


def _is_whole(kind: type) -> bool:
    """Whether a class is one of larger modules, which may have a router in them."""
    is_named = any(_WHOLE.fullmatch(base.__name__) for base in kind.__mro__)
    return is_named and not is_router_class(kind)


def _is_other(name: str) -> bool:
    """Whether a name, of a layer or a module around it, is that of something else."""
    return any(p.fullmatch(name) for p in (_EXPERT, _ATTENTION, _LOW_RANK))


def _is_of_flax(kind: type) -> bool:
    return kind.__module__.startswith(("flax.linen", "flax.nnx"))
