"""Which dtype a matrix unit multiplies, told from what a compiler emits."""

import collections
import re

from mpjax._compile import Compiled, Gemm
from mpjax._hlo import CompiledProduct, bits
from mpjax._targets import Target

# Names of HLO and of opcodes.
DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e4m3": "float8_e4m3fn",
    "f4e2m1fn": "float4_e2m1fn",
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
_MMA = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.([\w.]+)")
_TCGEN05 = re.compile(r"\btcgen05\.mma[\w.:]*kind::(\w+)(\.block_scale)?")


def unit_of(
    target: Target, gemm: Gemm, made: CompiledProduct, compiled: Compiled
) -> tuple[str, str, bool]:
    """The dtype of the matrix unit, what shows it, and whether blocks have scales.

    Args:
      target: the device.
      gemm: how a GPU multiplies.
      made: the product.
      compiled: the program that it is in.
    """
    names = [DTYPES.get(dtype, dtype) for dtype in made.operands]
    operands = " x ".join(dict.fromkeys(names))
    call = made.instruction.call
    if target.platform == "tpu":
        return _tpu_unit(made, operands, compiled.code.get(made.kernel.name))
    if target.platform == "cpu":
        return operands, call or made.instruction.opcode, False
    if call:
        if names[0] == "float32" and not made.instruction.highest:
            operands = "tf32"
        return operands, call, "blockScaled" in call
    kernel = compiled.code.get(re.sub(r"\W", "_", made.kernel.name))
    if gemm == "triton" and kernel is not None:
        return _ptx_unit(operands, kernel)
    return "", f"{made.kernel.opcode} of dot", False


def _tpu_unit(made, operands, code) -> tuple[str, str, bool]:
    if code is None:
        return "", "", False
    counts: collections.Counter[str] = collections.Counter()
    for suffixes in _VMATMUL.findall(code):
        known = [s for s in suffixes.split(".") if s in DTYPES]
        counts[known[0] if known else "f32"] += 1
    if not counts:
        return "", "no vmatmul", False
    # A kernel may hold several products; a few of the instructions may be for the rest
    # of a shape.
    own = [dtype for dtype in made.operands if dtype in counts]
    dtype = own[0] if own and len(counts) > 1 else counts.most_common(1)[0][0]
    unit = DTYPES[dtype]
    if bits(unit) == 8 and all(bits(o) == 8 for o in made.operands):
        unit = operands
    return unit, f"vmatmul.{dtype}", False


def _ptx_unit(operands, kernel) -> tuple[str, str, bool]:
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
