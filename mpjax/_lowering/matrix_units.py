"""Which dtype a matrix unit multiplies, read from what a compiler emits."""

import collections
import re

from mpjax._hardware.targets import Target
from mpjax._lowering.compiled import Compiled, Gemm
from mpjax._lowering.hlo import CompiledProduct, bits
from mpjax._numerics.formats import all_formats

# Names of HLO that are not those of a format.
_OTHER_DTYPES = {
    "c64": "complex64",
    "c128": "complex128",
    "u8": "uint8",
    "s32": "int32",
    "u32": "uint32",
    "pred": "bool",
}
# Names of dtypes in opcodes that are not those of HLO.
_IN_OPCODES = {
    "f8e4m3": "float8_e4m3fn",
    "bf8": "float8_e5m2",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "tf32": "tf32",
}
_VMATMUL = re.compile(r"\bvmatmul((?:\.\w+)*)")
_VMATPUSH = re.compile(r"\bvmatpush\d?((?:\.\w+)*)")
_MMA = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.([\w.]+)")
_TCGEN05 = re.compile(r"\btcgen05\.mma[\w.:]*kind::(\w+)(\.block_scale)?")


def dtype_of_hlo(name: str) -> str | None:
    """The dtype that HLO calls so.

    Example:
      >>> dtype_of_hlo("f8e4m3fn"), dtype_of_hlo("s8")
      ('float8_e4m3fn', 'int8')
    """
    formats = {fmt.hlo_name: fmt.name for fmt in all_formats()}
    return formats.get(name) or _OTHER_DTYPES.get(name)


def _dtype_of_opcode(name: str) -> str:
    """The dtype that a part of an opcode names, or ""."""
    return _IN_OPCODES.get(name) or dtype_of_hlo(name) or ""


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
    names = [dtype_of_hlo(dtype) or dtype for dtype in product.operands]
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
    units = sorted((_dtype_of_opcode(moves), _dtype_of_opcode(stays)), key=bits)
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
            counts[next(filter(_dtype_of_opcode, names), "f32")] += 1
    operands = [dtype_of_hlo(dtype) for dtype in product.operands]
    own = [d for d in counts if _dtype_of_opcode(d) in operands]
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
            pair = [d for d in found[1].split(".") if _dtype_of_opcode(d)][1:3]
            unit = " x ".join(dict.fromkeys(map(_dtype_of_opcode, pair)))
            return unit, "mma " + ".".join(pair), False
    return "", "no mma", False
