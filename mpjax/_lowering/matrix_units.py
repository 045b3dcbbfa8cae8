"""Which dtype a matrix unit multiplies, read from what a compiler emits."""

import collections
import re

from mpjax._hardware.targets import Target
from mpjax._lowering.compiled import Compiled, Gemm
from mpjax._lowering.hlo import CompiledProduct, bits

# Names of HLO and of opcodes.
DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e4m3": "float8_e4m3fn",
    "bf8": "float8_e5m2",
    "f4e2m1fn": "float4_e2m1fn",
    "c64": "complex64",
    "c128": "complex128",
    "s4": "int4",
    "s8": "int8",
    "u8": "uint8",
    "s32": "int32",
    "u32": "uint32",
    "pred": "bool",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "tf32": "tf32",
}
_VMATMUL = re.compile(r"\bvmatmul((?:\.\w+)*)")
_VMATPUSH = re.compile(r"\bvmatpush\d?((?:\.\w+)*)")
_MMA = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.([\w.]+)")
_TCGEN05 = re.compile(r"\btcgen05\.mma[\w.:]*kind::(\w+)(\.block_scale)?")


def unit_of(
    target: Target, gemm: Gemm, product: CompiledProduct, compiled: Compiled
) -> tuple[str, str, bool]:
    """Reads in which dtype a product runs.

    Args:
      target: the device.
      gemm: how a GPU multiplies.
      product: the product.
      compiled: the program that it is in.

    Returns:
      The dtype of the matrix unit, what shows it, and whether the unit applies the
      scales of blocks.
    """
    names = [DTYPES.get(dtype, dtype) for dtype in product.operands]
    operands = " x ".join(dict.fromkeys(names))
    call = product.instruction.call
    if target.platform == "tpu":
        return _tpu_unit(product, operands, compiled.code.get(product.kernel.name))
    if target.platform == "cpu":
        return operands, call or product.instruction.opcode, False
    if call:
        if names[0] == "float32" and not product.instruction.highest:
            operands = "tf32"
        return operands, call, "blockScaled" in call
    kernel = compiled.code.get(re.sub(r"\W", "_", product.kernel.name))
    if gemm == "triton" and kernel is not None:
        return _ptx_unit(operands, kernel)
    return "", f"{product.kernel.opcode} of dot", False


def _tpu_unit(
    product: CompiledProduct, operands: str, code: str | None
) -> tuple[str, str, bool]:
    """Reads the opcodes of both operands: the one pushed, and the one streamed past it.

    The unit rounds the wider operand to the dtype of the other, but never to 8 bits.
    """
    if code is None:
        return "", "", False
    moves = _own(product, _VMATMUL.findall(code))
    stays = _own(product, _VMATPUSH.findall(code)) or moves
    if not moves:
        return "", "no vmatmul", False
    units = sorted((DTYPES[moves], DTYPES[stays]), key=bits)
    unit = units[1] if bits(units[0]) == 8 else units[0]
    if unit == "bfloat16" and "f32" in product.operands and product.instruction.highest:
        unit = "float32"  # in several parts of 16 bits each
    if bits(unit) == 8 and all(bits(o) == 8 for o in product.operands):
        unit = operands
    same = len({*units}) == 1
    return unit, f"vmatmul.{moves}" + ("" if same else f" of vmatpush.{stays}"), False


def _own(product: CompiledProduct, opcodes: list[str]) -> str:
    """The dtype that most opcodes of a product have.

    A kernel may hold several products, and a few opcodes for the remainder of a shape.
    """
    counts: collections.Counter[str] = collections.Counter()
    for suffixes in opcodes:
        names = suffixes.split(".")
        if "lsf" not in names:  # pushes the same operand again
            counts[next((name for name in names if name in DTYPES), "f32")] += 1
    own = [d for d in counts if DTYPES[d] in map(DTYPES.get, product.operands)]
    return (own or [d for d, _ in counts.most_common(1)] or [""])[0]


def _ptx_unit(operands: str, kernel: str) -> tuple[str, str, bool]:
    for instruction in re.findall(r"\b(?:wgmma|mma|tcgen05)\.[\w.:]+", kernel):
        if found := _TCGEN05.match(instruction):
            kind, scaled = found[1], bool(found[2])
            wide = {"tf32": "tf32", "i8": "int8", "f16": "bfloat16"}
            if kind in wide and not (kind == "f16" and operands == "float16"):
                return wide[kind], f"tcgen05.mma {kind}", scaled
            return operands, f"tcgen05.mma {kind}", scaled
        if found := _MMA.match(instruction):
            dtypes = [d for d in found[1].split(".") if d in DTYPES]
            pair = dtypes[1:3]
            unit = " x ".join(dict.fromkeys(DTYPES[d] for d in pair))
            return unit, "mma " + ".".join(pair), False
    return "", "no mma", False
