"""``python -m mpjax targets``: which recipe runs natively where."""

import argparse
import sys

from mpjax._lowering.compiler import LoweringError
from mpjax._lowering.support import compiled_targets, matrix, verify


def main(args: list[str] | None = None) -> int:
    """Prints the table and, with ``--verify``, where compilers disagree with it.

    Args:
      args: those of the command line by default.

    Returns:
      The exit status: 1 if a compiler disagrees, 2 if one is missing or fails.
    """
    compiled = compiled_targets()
    parser = argparse.ArgumentParser(prog="python -m mpjax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    targets = commands.add_parser(
        "targets", help="the table that Recipe.is_supported answers from"
    )
    targets.add_argument(
        "--verify",
        nargs="*",
        metavar="TARGET",
        choices=[*compiled, []],
        help=f"ask the compilers of these targets, or of all: {', '.join(compiled)}",
    )
    options = parser.parse_args(args)
    print(matrix())
    if options.verify is None:
        return 0
    try:
        return int(any([_differs(target) for target in options.verify or compiled]))
    except (ImportError, LoweringError) as error:
        print(error, file=sys.stderr)
        return 2


def _differs(target: str) -> bool:
    """Prints what a compiler says; returns whether it differs from the table."""
    cells = verify(target)
    wrong = [cell for cell in cells if cell.table != cell.compiled]
    print(f"{target}: {len(cells) - len(wrong)} of {len(cells)} cells as compiled")
    for cell in wrong:
        says = "native" if cell.table else "not native"
        print(f"  {cell.what}: {says} in the table, compiled {cell.shown}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
