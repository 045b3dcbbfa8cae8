"""``python -m mpjax targets``: which recipe runs natively where."""

import argparse
import sys

from mpjax._lowering.compiler import LoweringError
from mpjax._lowering.support import COMPILED, matrix, verify


def main(args: list[str] | None = None) -> int:
    """Prints the table; returns 1 if a compiler disagrees with it, 2 if it is missing.

    Args:
      args: of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m mpjax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    targets = commands.add_parser(
        "targets", help="the table that Recipe.is_supported answers from"
    )
    targets.add_argument(
        "--verify",
        nargs="*",
        metavar="TARGET",
        choices=[*COMPILED, []],
        help=f"ask the compilers of these targets, or of all: {', '.join(COMPILED)}",
    )
    options = parser.parse_args(args)
    print(matrix())
    if options.verify is None:
        return 0
    try:
        return int(any([_differs(target) for target in options.verify or COMPILED]))
    except (ImportError, LoweringError) as error:
        print(error, file=sys.stderr)
        return 2


def _differs(target: str) -> bool:
    """Prints what a compiler says; returns whether it is not what the table says."""
    cells = verify(target)
    wrong = [cell for cell in cells if cell.table != cell.compiled]
    print(f"{target}: {len(cells) - len(wrong)} of {len(cells)} cells as compiled")
    for cell in wrong:
        says = "native" if cell.table else "not native"
        print(f"  {cell.what}: {says} in the table, compiled {cell.shown}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
