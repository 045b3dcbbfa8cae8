"""Rows of ``benchmarks/results/*.json``, from which the README's tables are made.

A file is a list of rows, one a line:

- ``case`` identifies what was measured: the target, the model, the options;
- ``figures`` has a unit or a kind in every name (``cycles``, ``wall_seconds``,
  ``bytes_ratio_to_bf16``);
- ``deterministic`` is true of what a compiler or a trace says, which the same versions
  say again, and false of times and of results that depend on the processor;
- ``versions``, ``device``, ``date``, ``commit`` (the last that changed ``mpjax/``, with
  a "+" if files there have changed since) and ``command`` say how it was measured;
- ``notes`` has what else is worth knowing, as the load of the machine;
- ``measured`` is in rows that were copied from the README as it was before it was made
  of these files: they have the README's rounding, and lack what it did not say.

A row takes the place of the one with its case and its version of jax.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "results"
_ROOT = FOLDER.parent.parent
_COMPILERS = ("libtpu", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured, of what and how; see the module's documentation."""

    case: dict[str, Any]
    figures: dict[str, Any]
    deterministic: bool
    versions: dict[str, str]
    device: str | None = None
    date: str | None = None
    commit: str | None = None
    command: str | None = None
    notes: dict[str, Any] | None = None
    measured: str | None = None

    def replaces(self, other: "Row") -> bool:
        """Whether this is the same measurement as another, made again."""
        versions = self.versions.get("jax"), other.versions.get("jax")
        return self.case == other.case and versions[0] == versions[1]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with ``--json``, which says where `save` puts rows."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        type=pathlib.Path,
        const=FOLDER / f"{name}.json",
        help=f"merge rows into FILE (default: benchmarks/results/{name}.json)",
    )
    return made


def save(
    path: pathlib.Path | None,
    case: dict[str, Any],
    figures: dict[str, Any],
    *,
    deterministic: bool,
    device: str | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Merges one row into a file, or does nothing if there is none.

    Args:
      path: what ``--json`` was given; None writes nothing.
      case: identifies the row.
      figures: a unit or a kind in every name; values of None are left out.
      deterministic: whether the same versions give the same figures again.
      device: the device they hold for; this processor, with its load, by default.
      notes: what else is worth knowing.
    """
    if path is None:
        return
    if device is None:
        notes = {"load": round(os.getloadavg()[0], 1)} | (notes or {})
    row = Row(
        case,
        {name: figure for name, figure in figures.items() if figure is not None},
        deterministic,
        versions=_versions(),
        device=device or f"{os.cpu_count()} x {_processor()}",
        date=datetime.date.today().isoformat(),
        commit=_commit(),
        command=command(sys.argv),
        notes=notes,
    )
    write(path, merge(read(path), [row]))


def merge(rows: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The rows, with those replaced that were measured again, and the new ones."""
    rows = list(rows)
    for row in new:
        old = next((i for i, r in enumerate(rows) if row.replaces(r)), len(rows))
        rows[old : old + 1] = [row]
    return rows


def read(path: pathlib.Path | str) -> list[Row]:
    """The rows of a file, given by its path or by the benchmark's name."""
    path = FOLDER / f"{path}.json" if isinstance(path, str) else path
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Writes rows one a line, without the fields that are unknown."""
    lines = [
        json.dumps({k: v for k, v in vars(row).items() if v is not None})
        for row in rows
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def find(rows: Iterable[Row], jax: str, **case: Any) -> Row | None:
    """The row of a case and a version of jax, if there is one."""
    wanted = Row(case, {}, False, {"jax": jax})
    return next((row for row in rows if wanted.replaces(row)), None)


def command(argv: Sequence[str]) -> str:
    """What to type at the root of the repository to measure again."""
    script, *rest = argv
    kept = []
    while rest:
        word = rest.pop(0)
        if word == "--json":
            del rest[: bool(rest) and not rest[0].startswith("-")]
        elif not word.startswith("--json="):
            kept.append(word)
    script = f"benchmarks/{pathlib.Path(script).name}"
    return shlex.join(["python", script, *kept, "--json"])


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", *_COMPILERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", *words, "--", "mpjax"], cwd=_ROOT, capture_output=True, text=True
        )
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = git("log", "-1", "--format=%h")
    return commit + "+" * bool(git("status", "--porcelain")) if commit else None
