"""Makes one finding of all suspicious steps that have one cause."""

import collections
import re
from collections.abc import Hashable, Sequence

from mpjax._inspection.findings import Finding, suspicious_steps
from mpjax._inspection.places import author, where
from mpjax._inspection.primitives import name_of
from mpjax._inspection.steps import Step


def findings_in(program: Sequence[Step]) -> tuple[Finding, ...]:
    """Merges the suspicious steps of a program by their causes, in its order."""
    causes: dict[tuple[str, Hashable], dict[int, str]] = collections.defaultdict(dict)
    for index, kind, detail in suspicious_steps(program):
        causes[kind, _cause(program[index], kind)].setdefault(index, detail)
    found = []
    for (kind, _), details in causes.items():
        # The forward pass is what the user wrote; of equals the first.
        shown = min(
            details, key=lambda i: (program[i].backward, -_elements(program[i]), i)
        )
        finding = Finding(
            kind,
            path=program[shown].path,
            where=where(program[shown]),
            backward=program[shown].backward,
            detail=details[shown],
            count=len(details),
            elements=_elements(program[shown]),
            paths=tuple(dict.fromkeys(program[i].path for i in sorted(details))),
        )
        found.append((min(details), finding))
    return tuple(finding for _, finding in sorted(found, key=lambda pair: pair[0]))


def _cause(step: Step, kind: str) -> Hashable:
    """What tells the causes of suspicious steps apart.

    A line of the user's is one cause, whoever runs it and in whichever pass. A line
    that runs layers of a library is one for all layers of a stack. And gradients that
    such layers add up in 16 bits, wherever they are, do so for one reason: the policy.
    """
    if author(step) == "user":
        return where(step) or step.path
    if kind == "reduction" and step.backward:
        return name_of(step.eqn)
    return where(step), re.sub(r"\d+", "", step.path)


def _elements(step: Step) -> int:
    return max((getattr(v.aval, "size", 0) for v in step.eqn.invars), default=0)
