"""Devices that a program can be compiled for, and what their matrix units multiply."""

import dataclasses
import math
import os
import pathlib
import re
from typing import Literal, TypeAlias

Platform: TypeAlias = Literal["cpu", "tpu", "cuda", "rocm"]

E4M3, E5M2, INT8 = "float8_e4m3fn", "float8_e5m2", "int8"

# Pairs of 8-bit formats a product of which may be native somewhere.
PAIRS = ((E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2), (INT8, INT8))


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, as compilers know it.

    Attributes:
      name: what it is called here.
      platform: of XLA.
      native: pairs of 8-bit formats, in either order, that its matrix units multiply as
        they are; all others are cast to a wider format first. None: not known.
      block_scaled: whether its matrix units apply scales of the MX formats, blocks of
        32 float8 with a float8_e8m0fnu.
      aliases: other names of it.
      chip: of a TPU, its name in XLA.
      axes: of a TPU, the dimensions of its network.
      cores: of a TPU, devices of JAX a chip.
      config: of a GPU, its figures as an XLA ``GpuTargetConfigProto`` in text form.
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
          lhs: name of a dtype.
          rhs: name of a dtype.

        Raises:
          ValueError: it is a GPU of the user's, and none here has its capability.
        """
        if self.native is None:
            raise ValueError(
                f"What {self.name} multiplies is not known here: no GPU of the table "
                "has its cuda_compute_capability. mpjax.lowering.report tells."
            )
        return (lhs, rhs) in self.native or (rhs, lhs) in self.native

    def topology(self, devices: int, topology: str | None = None) -> tuple[str, dict]:
        """The name and the options by which JAX describes some of these devices.

        Args:
          devices: how many a program runs on.
          topology: chips along each axis, "4x4" or "2x2x4"; found out if left out.

        Raises:
          ValueError: the topology is none, or too small.
        """
        axes = 3 if self.platform == "cuda" else self.axes
        if topology is not None:
            numbers = str(topology).split("x")
            shaped = len(numbers) == axes and all(n.isdecimal() for n in numbers)
            if not shaped or math.prod(map(int, numbers)) * self.cores < devices:
                raise ValueError(
                    f"A topology of {self.name} is {axes} numbers such as "
                    f"{'x'.join('2' * axes)!r}, here for {devices} devices of JAX, "
                    f"{self.cores} a chip; got {topology!r}. Leave it out to have one "
                    "found."
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


def _gpu(name: str, native=(), **options) -> Target:
    path = pathlib.Path(__file__).parent / "gpus" / f"{name}.txtpb"
    return Target(name, "cuda", native, config=path.read_text(), **options)


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
_NAMES = TARGETS | {alias: target for target in _ALL for alias in target.aliases}
_CAPABILITY = re.compile(r"cuda_compute_capability\s*\{([^}]*)\}")


def _own_gpu(path: pathlib.Path) -> Target:
    """One that multiplies what the GPU of the same capability does."""
    config = path.read_text()
    if "gpu_device_info" not in config or not (own := _capability(config)):
        raise ValueError(
            "Figures of a GPU have a gpu_device_info and a cuda_compute_capability, as "
            f"mpjax/targets/h100.txtpb has; {path} has not."
        )
    for known in _ALL:
        if known.platform == "cuda" and _capability(known.config) == own:
            return dataclasses.replace(known, name=path.stem, aliases=(), config=config)
    return Target(path.stem, "cuda", None, config=config)


def _capability(config: str) -> dict[str, str]:
    """Its major and minor number."""
    found = _CAPABILITY.search(config)
    numbers = re.findall(r"(major|minor):\s*(\d+)", found[1]) if found else ()
    return {name: n for name, n in numbers if n != "0"}


def get_target(target: "str | pathlib.Path | Target") -> Target:
    """Finds a device.

    Args:
      target: a name such as "h100" or "tpu-v5e", in any case; the path of a file of
        figures of another NVIDIA GPU, ending in ".txtpb" and laid out like those in
        `mpjax/targets`; or a target, which is returned.

    Raises:
      TypeError: it is neither a name nor a path nor a target.
      ValueError: there is none of that name, or the file has no figures.

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
    name = str(target).lower()
    if name not in _NAMES:
        raise ValueError(
            f"Known targets are {', '.join(_NAMES)}, or the path of a GPU's figures "
            f"ending in .txtpb; got {str(target)!r}."
        )
    return _NAMES[name]
