"""Writes the tables of ``benchmarks/README.md`` from ``benchmarks/results/*.json``.

    python benchmarks/tables.py            # after a benchmark has run with --json
    python benchmarks/tables.py --check    # fails if the README has other tables

A table stands between ``<!-- table:NAME -->`` and ``<!-- end -->``; the functions below
make them by these names. A cell without a row, or without a figure in it, says "not
measured".
"""

import argparse
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import _results

README = pathlib.Path(__file__).with_name("README.md")
JAX = "0.12.0.1"  # the version whose rows the tables show
_TABLE = re.compile(r"(<!-- table:(\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)

Figures: TypeAlias = dict[str, Any]
Show: TypeAlias = Callable[[Figures], str]
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a function that makes the table of its name."""
    TABLES[function.__name__] = function
    return function


class Column(NamedTuple):
    """A column: what it adds to the case of a line, and how figures are shown."""

    header: str
    case: dict[str, Any]
    show: Show


def figures(benchmark: str, jax: str = JAX, **case: Any) -> Figures:
    """The figures of a case; none if it was not measured."""
    row = _results.find(_results.read(benchmark), jax, **case)
    return row.figures if row else {}


def cell(show: Show, found: Figures) -> str:
    """Shows figures, or that one of them is missing."""
    try:
        return show(found)
    except KeyError:
        return "not measured"


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of cells."""
    every = ["| " + " | ".join(line) + " |" for line in (header, *lines)]
    every.insert(1, re.sub(r"[^|]+", "---", every[0].replace("||", "| |")))
    return "\n".join(every) + "\n"


def grid(
    benchmark: str, corner: str, lines: dict[str, dict], columns: Iterable[Column]
) -> str:
    """A table of the cases that lines and columns have together."""
    columns = list(columns)
    cells = [
        [label, *(cell(c.show, figures(benchmark, **case, **c.case)) for c in columns)]
        for label, case in lines.items()
    ]
    return markdown([corner, *(column.header for column in columns)], cells)


def ratio(key: str) -> Show:
    """As .794, or 1.000."""
    return lambda found: f"{found[key]:.3f}".removeprefix("0")


def scaled(key: str, unit: float, digits: int) -> Show:
    """In another unit."""
    return lambda found: f"{found[key] / unit:.{digits}f}"


def form(template: str) -> Show:
    """In a template that has their names."""
    return lambda found: template.format(**found)


# -- policies.py -----------------------------------------------------------------------


@table
def policies() -> str:
    ways = {
        "by hand with `dtype=`": "by hand",
        "by hand, norms and softmax in float32": "with float32",
        "mpjax": "mpjax",
        "cast tree, as with jmp": "cast tree",
    }
    lines = {
        f"{model}, {label}": {"model": model, "way": way}
        for model in ("Linen transformer", "Linen CNN", "NNX transformer")
        for label, way in ways.items()
    }

    def moved(found):
        same = " =" if found["same_as_with_float32"] else ""
        return f"{found['bytes'] / 1e6:.1f}{same}"

    tracing = form("{tracing_ratio_to_by_hand:.2f}")
    columns = [
        Column("tracing", {"target": "tracing"}, tracing),
        Column("converts (CPU)", {"target": "cpu"}, form("{converts}")),
        Column("CPU Mbytes", {"target": "cpu"}, moved),
    ]
    for target in "tpu7x", "v5e":
        columns.append(Column(f"{target} Mbytes", {"target": target}, moved))
        columns.append(Column("kcycles", {"target": target}, scaled("cycles", 1e3, 0)))
    return grid("policies", "", lines, columns)


# -- loss_scaling.py -------------------------------------------------------------------

MODELS = {
    "mlp 512": "mlp 512x2048, 4 layers",
    "mlp 768": "mlp 768x3072, 2 layers",
    "mlp 1024": "mlp 1024x4096, 1 layer",
    "mlp 2048": "mlp 2048x4096, 2 layers",
    "tr. 320": "transformer 320, 4 layers",
    "tr. 512": "transformer 512, 2 layers",
    "tr. 768": "transformer 768, 2 layers",
    "tr. 1024": "transformer 1024, 1 layer",
}


@table
def loss_scaling() -> str:
    methods = ["mpjax", "Flax DynamicScale", "jmp", "optax.apply_if_finite"]
    metrics = {
        "tpu7x cycles": ("1.01", "tpu7x", "cycles_ratio_to_plain"),
        "tpu7x bytes": ("1.00", "tpu7x", "bytes_ratio_to_plain"),
        "v5e cycles": ("1.01", "v5e", "cycles_ratio_to_plain"),
        "v5e bytes": ("1.00", "v5e", "bytes_ratio_to_plain"),
        "H100 bytes": ("1.00", "h100", "bytes_ratio_to_plain"),
        "CPU, processor time": ("1.00", "cpu", "processor_ratio_to_plain"),
        "CPU, against pinned gradients": ("", "cpu", "processor_ratio_to_pinned"),
    }
    lines = []
    for label, (goal, target, key) in metrics.items():
        lines.append([label, goal])
        for method in methods:
            case = {"target": target, "method": method, "clip": True}
            models = map(MODELS.get, ("mlp 512", "mlp 1024", "tr. 320"))
            every = (figures("loss_scaling", model=model, **case) for model in models)
            lines[-1].append(" / ".join(cell(ratio(key), found) for found in every))
    return markdown(["", "goal", *methods], lines)


@table
def loss_scaling_models() -> str:
    case = {"target": "tpu7x", "method": "mpjax", "clip": True}
    every = [figures("loss_scaling", model=model, **case) for model in MODELS.values()]
    lines = []
    for figure in "cycles", "bytes":
        key = f"{figure}_ratio_to_plain"
        values = [found[key] for found in every if key in found]
        measured = len(values) == len(every)
        mean = {key: statistics.geometric_mean(values)} if measured else {}
        cells = (cell(ratio(key), found) for found in (*every, mean))
        lines.append([figure, *cells])
    return markdown(["tpu7x", *MODELS, "geometric mean"], lines)


# -- fp8.py ----------------------------------------------------------------------------

ONE_LAYER = {"layers": 1, "bias": False, "tokens": "16x256"}
WAYS = {
    "bf16": "bf16",
    "current": "mpjax current",
    "current, exact scales": "mpjax current, exact",
    "current, delayed weights": "mpjax current, delayed weights",
    "current, weights kept": "mpjax current, weights kept",
    "delayed, not calibrated": "mpjax delayed, not calibrated",
    "delayed": "mpjax delayed",
    "delayed, weights kept": "mpjax delayed, weights kept",
    "per channel": "mpjax per channel",
    "Flax Fp8DirectDotGeneral": "Flax Fp8Direct",
    "qwix": "qwix",
}


@table
def fp8_tpu7x() -> str:
    lines = {label: {"target": "tpu7x", "way": way} for label, way in WAYS.items()}
    columns = []
    for header, options in {
        "one layer": ONE_LAYER,
        "two layers": ONE_LAYER | {"layers": 2},
        "one, with biases": ONE_LAYER | {"bias": True},
    }.items():
        columns.append(Column(header, options, scaled("cycles", 1e6, 3)))
        columns.append(Column("", options, ratio("cycles_ratio_to_bf16")))
    return grid("fp8", "tpu7x", lines, columns)


@table
def fp8_tokens() -> str:
    ways = {label: WAYS[label] for label in ("current", "delayed")}
    ways = {"bf16, operands materialized": "bf16, operands materialized", **ways}
    ways["Flax Fp8DirectDotGeneral"] = "Flax Fp8Direct"
    lines = {label: {"target": "tpu7x", "way": way} for label, way in ways.items()}
    columns = []
    for tokens in "8x512", "4x1024", "32x128":
        case = ONE_LAYER | {"tokens": tokens}
        base = figures("fp8", target="tpu7x", way="bf16", **case)
        million = cell(scaled("cycles", 1e6, 3), base)
        header = f"{tokens.replace('x', ' x ')} (bf16: {million})"
        columns.append(Column(header, case, ratio("cycles_ratio_to_bf16")))
    return grid("fp8", "tpu7x, one layer", lines, columns)


@table
def fp8_gpus() -> str:
    lines = {
        label: ONE_LAYER | {"way": way}
        for label, way in WAYS.items()
        if label != "qwix"
    }
    columns = []
    for target in "h100", "b200":
        case = {"target": target}
        show = ratio("bytes_ratio_to_bf16")
        columns.append(Column(f"{target.upper()} bytes", case, show))
        columns.append(Column("kernels", case, form("{kernels}")))
    return grid("fp8", "one layer", lines, columns)


@table
def fp8_cpu() -> str:
    columns = [
        Column(label, {"way": way, "target": "cpu"}, ratio("processor_ratio_to_bf16"))
        for label, way in WAYS.items()
        if label in ("current", "delayed", "delayed, weights kept")
        or label.startswith("Flax")
    ]
    lines = {"Dense": {"layers": 1}, "two layers": {"layers": 2}}
    return grid("fp8", "", lines, columns)


# -- lowering.py, models.py ------------------------------------------------------------


@table
def lowering() -> str:
    lines = {
        "`train_lm.py`, fp8": "train_lm",
        "`train_digits.py` (NNX), float16": "train_digits",
        "`nn.scan`, `nn.remat`, 2 x 2 devices": "sharded, nn.scan, nn.remat",
        "transformer, scanned": "billion, scanned",
        "transformer, unrolled (20 layers)": "billion, unrolled",
    }

    def size(found):
        for unit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if found["parameters"] >= unit:
                return f"{found['parameters'] / unit:.3g} {prefix}"
        return str(found["parameters"])

    times = form("{wall_seconds:.1f} / {compiler_processor_seconds:.1f}")
    columns = [
        Column("parameters", {"target": "v7x", "quick": False}, size),
        Column("H100", {"target": "h100", "quick": False}, times),
        Column("v7x", {"target": "v7x", "quick": False}, times),
        Column("v7x, `quick=True`", {"target": "v7x", "quick": True}, times),
    ]
    return grid("lowering", "", {k: {"case": v} for k, v in lines.items()}, columns)


@table
def models() -> str:
    lines = {}
    for row in _results.read("models"):
        if row.case["way"] == "mixed" and row.versions["jax"] == JAX:
            case = {"package": row.case["package"], "model": row.case["model"]}
            features = (row.notes or {}).get("features", "")
            lines["{package} {model}: ".format(**case) + features] = case

    def cast(found):
        counts = form("{both_bfloat16}/{both_products}")
        return "raises" if found["raises"] else counts(found)

    mixed = {"way": "mixed"}
    columns = [
        Column("forward", mixed, form("{forward_bfloat16}/{forward_products}")),
        Column("and backward", mixed, form("{both_bfloat16}/{both_products}")),
        Column("FLOPs", mixed, form("{both_flops_share:.1%}")),
        Column("output error", mixed, form("{output_error:.1e}")),
        Column("gradient error", mixed, form("{gradient_error:.1e}")),
        Column("cast", {"way": "cast"}, cast),
    ]
    return grid("models", "model", lines, columns)


# -- autocast.py -----------------------------------------------------------------------


@table
def autocast() -> str:
    lines = {
        f"{layers} layers, {kind}": {"layers": layers, "kind": kind}
        for layers in (24, 96)
        for kind in ("loss", "loss and gradient")
    }
    times = form("{trace_processor_seconds:.2f} + {lower_processor_seconds:.2f} s")
    columns = [
        Column("bare: trace + lower", {"way": "bare"}, times),
        Column("autocast", {"way": "autocast"}, times),
        Column("ratio", {"way": "autocast"}, form("{ratio_to_bare:.2f}")),
    ]
    return grid("autocast", "", lines, columns)


@table
def autocast_compiled() -> str:
    lines = {
        way: {"target": "tpu7x", "layers": 2, "way": way}
        for way in ("bare", "by hand", "autocast")
    }
    columns = [
        Column("casts in the trace", {}, form("{casts}")),
        Column("bytes", {}, form("{bytes:,}")),
        Column("cycles", {}, form("{cycles:,}")),
    ]
    return grid("autocast", "", lines, columns)


@table
def autocast_models() -> str:
    lines = {}
    for row in _results.read("models"):
        if row.case["way"] == "autocast" and row.versions["jax"] == JAX:
            case = {"package": row.case["package"], "model": row.case["model"]}
            lines["{package} {model}".format(**case)] = case
    columns = [
        Column(f"{way}: {name}", {"way": way}, form(text))
        for name, text in (
            ("products", "{both_bfloat16}/{both_products}"),
            ("FLOPs", "{both_flops_share:.1%}"),
            ("output error", "{output_error:.1e}"),
            ("gradient error", "{gradient_error:.1e}"),
        )
        for way in ("autocast", "mixed")
    ]
    return grid("models", "model", lines, columns)


# -- examples/train_lm.py --------------------------------------------------------------


def accuracy(run: str, base: str, jax: str) -> str:
    """The loss of a run, how far it is from another's, and the steps it skipped."""
    of = {"example": "train_lm", "seed": 0}
    found = figures("train_lm", jax, run=run, **of)
    other = figures("train_lm", jax, run=base, **of)

    def show(found):
        loss, reference = found["loss_nats_per_byte"], other["loss_nats_per_byte"]
        skipped = f", {n}" if (n := found.get("skipped_steps")) else ""
        if run == base:
            return f"{loss:.4f}"
        return f"{loss:.4f} ({loss / reference - 1:+.2%}){skipped}"

    return cell(show, found)


@table
def train_lm() -> str:
    runs = "float32", "mixed_bfloat16", "mixed_float16"
    lines = [
        [f"jax {jax}", *(accuracy(run, "float32", jax) for run in runs)]
        for jax in (JAX, "0.10.2")
    ]
    return markdown(["", *runs[:2], "mixed_float16, steps skipped"], lines)


@table
def train_lm_fp8() -> str:
    recipes = "current", "delayed", "per_channel", "block", "mx"
    bfloat16 = "mixed_bfloat16"
    line = [accuracy(bfloat16, bfloat16, JAX)]
    line += [accuracy(f"mixed_float8 {r}", bfloat16, JAX) for r in recipes]
    return markdown([bfloat16, *recipes], [line])


@table
def optimizer_accuracy() -> str:
    rows = _results.read("optimizer_accuracy")
    schemes = list(dict.fromkeys(row.case["scheme"] for row in rows))
    lm: dict[str, Any] = {"task": "lm", "batch": 16, "steps": 500}
    columns: dict[str, dict[str, Any]] = {
        f"LM, seed {seed}": lm | {"seed": seed} for seed in range(3)
    }
    columns["digits"] = {"task": "digits", "steps": 500, "seed": 0}
    columns["LM, 5000 steps"] = lm | {"batch": 4, "steps": 5000, "seed": 0}
    lines = []
    for scheme in schemes:
        base = "float32, small rate" if scheme.endswith("small rate") else "float32"
        lines.append([scheme])
        for case in columns.values():
            found, of = (
                figures("optimizer_accuracy", scheme=name, **case).get("loss_nats")
                for name in (scheme, base)
            )
            text = "" if found is None else f"{found:.4f}"
            if found is not None and of is not None and scheme != base:
                text = f"{found / of - 1:+.2%}"
            lines[-1].append(text)
        case: dict[str, Any] = columns["digits"] | {"scheme": scheme}
        accuracy = figures("optimizer_accuracy", **case).get("test_accuracy_percent")
        lines[-1].append("" if accuracy is None else f"{accuracy:.2f}")
    return markdown(["parameters, moments", *columns, "digits, test"], lines)


def render(text: str) -> str:
    """The README with its tables made again.

    Args:
      text: the README.

    Returns:
      The text, other than between the markers as it was.

    Raises:
      ValueError: a marker names no table, or a table has no marker.
    """
    named = [name for _, name in _TABLE.findall(text)]
    if sorted(named) != sorted(TABLES):
        raise ValueError(
            f"README.md has to have each table of tables.py once, got {sorted(named)} "
            f"for {sorted(TABLES)}. Put it between '<!-- table:NAME -->' and "
            "'<!-- end -->', or remove its function"
        )
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]](), text)


def main(argv: list[str] | None = None) -> int:
    """Rewrites the README; with ``--check``, returns 1 if that would change it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    text = README.read_text()
    made = render(text)
    if not args.check:
        README.write_text(made)
    elif made != text:
        print("benchmarks/README.md is not what its JSON gives; run tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
