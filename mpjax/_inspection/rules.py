"""Makes one list of the rules of several findings."""

import collections
import dataclasses
import re
from collections.abc import Iterable

from mpjax._policies.policy import Policy, get_policy
from mpjax._policies.rule import Rule


def pasted(rule: Rule) -> str:
    """Writes a rule as code.

    Example:
      >>> pasted(Rule("head", "float32"))
      "mpjax.Rule(path='head', policy='float32')"
    """
    return f"mpjax.{rule}"


def pasted_lines(rule: Rule, note: str, width: int) -> str:
    """Writes a rule as an entry of a list, over several lines if it is long.

    Example:
      >>> print(pasted_lines(Rule("head", "float32"), "rule 1", 40))
        mpjax.Rule(  # rule 1
            path='head',
            policy='float32',
        ),
    """
    line = f"  {pasted(rule)},  # {note}"
    if len(line) <= width:
        return line
    start, _, arguments = pasted(rule)[:-1].partition("(")
    lines = (f"      {argument}," for argument in arguments.split(", "))
    return "\n".join((f"  {start}(  # {note}", *lines, "  ),"))


def merged(suggestions: Iterable[tuple[Rule, Iterable[str]]]) -> list[Rule]:
    """Lists rules so that all take effect.

    Args:
      suggestions: rules with policies spelled out, each with the paths of the modules
        that it is for.

    Returns:
      The rules without repetitions. A module for which they differ has one of its own,
      before them.

    Example:
      >>> first, second = Rule("a|b", "c=f32"), Rule("b", "p=f32,c=bf16,o=f32")
      >>> for rule in merged([(first, ["a", "b"]), (second, ["b"]), (first, ["a"])]):
      ...     print(rule)
      Rule(path='b', policy='p=f32,c=f32,o=f32')
      Rule(path='a|b', policy='p=f32,c=f32,o=f32')
    """
    rules: dict[str, list[Rule]] = collections.defaultdict(list)
    paths: dict[Rule, list[str]] = collections.defaultdict(list)
    for rule, modules in suggestions:
        for path in modules:
            paths[rule].append(path)
            if rule not in rules[path]:
                rules[path].append(rule)
    apart = {path: several for path, several in rules.items() if len(several) > 1}
    first = [_widest(re.escape(path), several) for path, several in apart.items()]
    return first + [rule for rule, own in paths.items() if not apart.keys() >= {*own}]


def _widest(path: str, rules: list[Rule]) -> Rule:
    policies = [get_policy(rule.policy) for rule in rules if rule.policy is not None]
    fields = (field.name for field in dataclasses.fields(Policy))
    policy = Policy(
        *(
            max((getattr(p, name) for p in policies), key=lambda dtype: dtype.itemsize)
            for name in fields
        )
    )
    return dataclasses.replace(
        rules[0],
        path=path,
        policy=policy,
        cast_inputs=all(rule.cast_inputs for rule in rules),
    )
