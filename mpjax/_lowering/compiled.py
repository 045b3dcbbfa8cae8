"""What a compiler returned: its program and the instructions in its dumps."""

import dataclasses
import pathlib
import re
from typing import Literal, TypeAlias

Gemm: TypeAlias = Literal["library", "triton"]
# The code after registers are allocated: of the final bundles the compiler would make
# several versions for the dump, in twice the time, with the same instructions.
_DUMPS = re.compile(r"^\d+-(.*?)-\d+-post-ra\.txt$")
_MATRIX_UNIT = re.compile(r"\bvmat[\w.]+")
_EQUIVALENT = re.compile(
    r"^key:(\S+)\n(?:.*\n)*?((?:  \S+\n)*)(?=key:|\Z)", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      text: the optimized program.
      figures: sizes of its memory in bytes, and "bytes_accessed".
      code: machine code of the kernels, by name, where the compiler shows it; of a TPU
        the opcodes of its matrix units.
    """

    text: str
    figures: dict[str, int | None]
    code: dict[str, str]


def tpu_kernels(dump: pathlib.Path) -> dict[str, str]:
    """Reads what matrix units do in each kernel of a TPU from the compiler's dumps.

    Of equal kernels the compiler shows one.
    """
    code = {}
    for path in dump.iterdir():
        if name := _DUMPS.match(path.name):
            code[name[1]] = " ".join(_MATRIX_UNIT.findall(path.read_text()))
    for path in dump.glob("*deduplication-map.txt"):
        for shown, others in _EQUIVALENT.findall(path.read_text()):
            for other in others.split() if shown in code else ():
                code.setdefault(other, code[shown])
    return code


def ptx_kernels(dump: pathlib.Path) -> dict[str, str]:
    """Reads the PTX of each kernel of a GPU; dots in names have become underscores."""
    code = {}
    for path in dump.rglob("*.ptx"):
        for kernel in re.split(r"(?=\.entry )", path.read_text())[1:]:
            name = re.match(r"\.entry (\w+)", kernel)
            code |= {name[1]: kernel} if name else {}
    return code
