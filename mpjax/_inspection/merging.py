"""Makes one finding of all suspicious steps that have one cause."""

import collections
import re
from collections.abc import Hashable, Mapping, Sequence

from mpjax._inspection.facts import Facts
from mpjax._inspection.findings import KINDS, Finding, suspicious_steps
from mpjax._inspection.places import author, where
from mpjax._inspection.primitives import name_of
from mpjax._inspection.steps import Step


def findings_in(
    program: Sequence[Step], modules: Mapping[str, type]
) -> tuple[Finding, ...]:
    """Merges the suspicious steps of a program by their causes, in its order.

    Args:
      program: the steps.
      modules: the classes of its modules, by the paths that rules have for them.
    """
    facts = Facts(program, modules)
    causes: dict[tuple[str, Hashable], dict[int, str]] = collections.defaultdict(dict)
    for index, kind, detail in suspicious_steps(program):
        causes[kind, _cause(program[index], kind)].setdefault(index, detail)
    found = []
    for (kind, _), details in causes.items():
        # The forward pass is what the user wrote; of equals the first.
        shown = min(
            details, key=lambda i: (program[i].backward, -_elements(program[i]), i)
        )
        rule, line = KINDS[kind].rule(facts, sorted(details)), where(program[shown])
        what = KINDS[kind].edit or KINDS[kind].remedy
        what = f"{line.split(' in ')[0]}: {what}" if line else what
        finding = Finding(
            kind,
            path=program[shown].path,
            where=line,
            backward=program[shown].backward,
            detail=details[shown],
            count=len(details),
            elements=_elements(program[shown]),
            paths=tuple(dict.fromkeys(program[i].path for i in sorted(details))),
            rule=rule,
            modules=() if rule is None else facts.matched_by(rule),
            edit=what if rule is None else "",
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
