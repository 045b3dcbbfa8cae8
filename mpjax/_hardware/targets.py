"""Devices that a program can be compiled for, and what their matrix units multiply."""

import dataclasses
import math
import os
import pathlib
import re
from typing import Literal, TypeAlias

Platform: TypeAlias = Literal["cpu", "tpu", "cuda", "rocm"]

E4M3, E5M2, INT8 = "float8_e4m3fn", "float8_e5m2", "int8"

# Pairs of 8-bit formats whose product is native on some target.
PAIRS = ((E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2), (INT8, INT8))


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, as compilers know it.

    Attributes:
      name: what it is called here.
      platform: XLA's name of its kind.
      native: pairs of 8-bit formats, in either order, that its matrix units multiply as
        they are; all others are cast to a wider format first. None if not known.
      block_scaled: whether its matrix units apply scales of the MX formats, blocks of
        32 float8 with a float8_e8m0fnu.
      aliases: other names of it.
      chip: of a TPU, its name in XLA.
      axes: of a TPU, the number of axes of the network between chips: 2 or 3.
      cores: of a TPU, the number of JAX devices per chip.
      config: of a GPU, its figures as an XLA ``GpuTargetConfigProto`` in text form.

    Example:
      >>> import mpjax.lowering
      >>> v5e = mpjax.lowering.get_target("v5e")
      >>> v5e.platform, v5e.multiplies("int8", "int8"), v5e.block_scaled
      ('tpu', True, False)
    """

    name: str
    platform: Platform
    native: tuple[tuple[str, str], ...] | None = ()
    block_scaled: bool = False
    aliases: tuple[str, ...] = ()
    chip: str = ""
    axes: int = 0
    cores: int = 1
    config: str = ""

    def multiplies(self, lhs: str, rhs: str) -> bool:
        """Whether its matrix units multiply two formats without casting them.

        Args:
          lhs: name of a dtype of 8 bits.
          rhs: name of a dtype of 8 bits.

        Returns:
          Whether the pair, in either order, is among `native`.

        Raises:
          ValueError: it is a GPU given by its figures, and no GPU of the table has its
            compute capability.
        """
        if self.native is None:
            raise ValueError(
                f"What {self.name} multiplies is not known here: no GPU of the table "
                "has its cuda_compute_capability. mpjax.lowering.report tells."
            )
        return (lhs, rhs) in self.native or (rhs, lhs) in self.native

    def topology(self, devices: int, topology: str | None = None) -> tuple[str, dict]:
        """Describes some of these devices to JAX.

        Args:
          devices: how many a program runs on.
          topology: chips along each axis, "4x4" or "2x2x4"; by default the smallest
            that has enough.

        Returns:
          The name and the options of a topology in JAX.

        Raises:
          ValueError: the topology has another number of axes, or is too small.
        """
        axes = 3 if self.platform == "cuda" else self.axes
        if topology is not None:
            numbers = str(topology).split("x")
            shaped = len(numbers) == axes and all(n.isdecimal() for n in numbers)
            if not shaped or math.prod(map(int, numbers)) * self.cores < devices:
                raise ValueError(
                    f"A topology of {self.name} is {axes} numbers such as "
                    f"{'x'.join('2' * axes)!r}, here for {devices} devices of JAX, "
                    f"{self.cores} per chip; got {topology!r}. Leave it out to have "
                    "one found."
                )
        if self.platform == "cuda":
            hosts = math.ceil(devices / 8)
            each = topology or f"1x{hosts}x{math.ceil(devices / hosts)}"
            return self.name, {"topology": each, "target_config": self.config}
        shape = topology or "x".join(map(str, self._chips(devices)))
        chips = [int(n) for n in shape.split("x")]
        host = [min(n, 2) for n in chips[:2]] + [1] * (self.axes - 2)
        host += [1] * (3 - len(host))
        return f"{self.chip}:{shape}", {"chips_per_host_bounds": host}

    def _chips(self, devices: int) -> list[int]:
        """The smallest slice with enough chips: 1, then powers of two, 2x2 and up."""
        chips = math.ceil(devices / self.cores)
        if chips == 1:
            return [1] * self.axes
        shape = [2, 2] + [1] * (self.axes - 2)
        while math.prod(shape) < chips:
            smallest = min(shape)
            shape[-1 - shape[::-1].index(smallest)] *= 2
        return shape


def _gpu(
    name: str, native: tuple[tuple[str, str], ...], block_scaled: bool = False
) -> Target:
    path = pathlib.Path(__file__).parent / "gpus" / f"{name}.txtpb"
    return Target(name, "cuda", native, block_scaled, config=path.read_text())


_E5M2_OR_INT8 = ((E5M2, E5M2), (INT8, INT8))
# cuBLASLt has no product of e5m2 with itself.
_CUBLAS = ((E4M3, E4M3), (E4M3, E5M2), (INT8, INT8))
_FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz")

# What compilers made of single products ahead of time, which `python -m mpjax targets
# --verify` asks them again; mi300 after AMD's manual.
_ALL = (
    Target("cpu", "cpu"),
    _gpu("a100", ((INT8, INT8),)),
    _gpu("h100", _CUBLAS),
    _gpu("b200", _CUBLAS, block_scaled=True),
    Target(
        "mi300",
        "rocm",
        tuple((a, b) for a in _FNUZ for b in _FNUZ),
        aliases=("mi300x",),
    ),
    Target("v4", "tpu", (), aliases=("tpu-v4",), chip="v4", axes=3),
    Target(
        "v5e",
        "tpu",
        _E5M2_OR_INT8,
        aliases=("tpu-v5e", "v5litepod"),
        chip="v5e",
        axes=2,
    ),
    Target("v5p", "tpu", _E5M2_OR_INT8, aliases=("tpu-v5p",), chip="v5p", axes=3),
    Target("v6e", "tpu", _E5M2_OR_INT8, aliases=("tpu-v6e",), chip="v6e", axes=2),
    Target(
        "v7x",
        "tpu",
        ((E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2)),
        aliases=("tpu-v7x", "tpu7x"),
        chip="tpu7x",
        axes=3,
        cores=2,
    ),
)
TARGETS = {target.name: target for target in _ALL}
_CAPABILITY = re.compile(r"cuda_compute_capability\s*\{([^}]*)\}")


def _own_gpu(path: pathlib.Path) -> Target:
    """Reads the figures of a GPU, which multiplies what others of its capability do."""
    config = path.read_text()
    if "gpu_device_info" not in config or not (own := _capability(config)):
        raise ValueError(
            "Figures of a GPU have a gpu_device_info and a cuda_compute_capability, as "
            f"mpjax/_hardware/gpus/h100.txtpb has; {path} has not."
        )
    for known in TARGETS.values():
        if known.platform == "cuda" and _capability(known.config) == own:
            return dataclasses.replace(known, name=path.stem, aliases=(), config=config)
    return Target(path.stem, "cuda", None, config=config)


def _capability(config: str) -> dict[str, str]:
    """The major and the minor number of a GPU's compute capability."""
    found = _CAPABILITY.search(config)
    numbers = re.findall(r"(major|minor):\s*(\d+)", found[1]) if found else ()
    return {name: n for name, n in numbers if n != "0"}


def get_target(target: "str | pathlib.Path | Target") -> Target:
    """Finds a device by its name.

    Args:
      target: a name such as "h100" or "tpu-v5e", in upper or lower case, of those that
        ``python -m mpjax targets`` lists; the path of a file of
        figures of another NVIDIA GPU, ending in ".txtpb" and laid out like those in
        `mpjax/_hardware/gpus`; or a target, which is returned.

    Returns:
      Its row of the table; of a file, a row of its own.

    Raises:
      TypeError: it is neither a name nor a path nor a target.
      FileNotFoundError: there is no file of that path.
      ValueError: there is no target of that name, or the file has no figures.

    Example:
      >>> import mpjax.lowering
      >>> mpjax.lowering.get_target("tpu-v6e").name
      'v6e'
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, str | os.PathLike):
        raise TypeError(
            "A target is one name such as 'h100', a path or a Target; got "
            f"{target!r}, of {type(target).__name__}."
        )
    path = pathlib.Path(target)
    if path.suffix == ".txtpb":
        return _own_gpu(path)
    names = {name: t for t in TARGETS.values() for name in (t.name, *t.aliases)}
    name = str(target).lower()
    if name not in names:
        raise ValueError(
            f"Known targets are {', '.join(names)}, or the path of a GPU's figures "
            f"ending in .txtpb; got {str(target)!r}."
        )
    return names[name]
