"""States that are not finite are neither saved nor resumed, unless they may be."""

import re
from collections.abc import Mapping
from typing import Any

from mpjax._checkpoints.layout import Path
from mpjax._checks import wrong
from mpjax._loss_scaling.checks import not_finite, shortened


def check_allowed(allow_non_finite: Any) -> None:
    """Raises unless it is a flag or a regular expression."""
    if isinstance(allow_non_finite, str):
        try:
            re.compile(allow_non_finite)
        except re.error as error:
            raise ValueError(
                f"allow_non_finite is a flag or a regular expression, got "
                f"{allow_non_finite!r}: {error}."
            ) from error
    elif not isinstance(allow_non_finite, bool):
        raise wrong(
            "allow_non_finite",
            "is a flag or a regular expression",
            allow_non_finite,
            "pass True, or the paths of leaves that may be",
        )


def check_finite(
    what: str, leaves: Mapping[Path, Any], allow_non_finite: bool | str
) -> None:
    """Raises a ValueError that names leaves which are not finite.

    Args:
      what: the state that is looked at, in the error.
      leaves: arrays and numbers, by path.
      allow_non_finite: whether all may be, or which.
    """
    if allow_non_finite is True:
        return
    bad = not_finite({"/".join(path): x for path, x in leaves.items()}, what)
    if isinstance(allow_non_finite, str):
        allowed = re.compile(allow_non_finite)
        bad = {path: x for path, x in bad.items() if not allowed.fullmatch(path)}
    if bad:
        raise ValueError(
            f"{what} has a state that is not finite: {shortened([*bad.values()])}. "
            "A run does not recover from it: go back to a checkpoint without. Where it "
            "is meant to be so, pass allow_non_finite=True, or a regular expression of "
            "the paths that may be."
        )
