"""What a run's arms and nodes are, as names and texts, and how they differ."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from epfuse.input_file import DEEPEST
from epfuse.profiling.text import printable
from epfuse.serving.plan import point_environment
from epfuse.serving.point import Image, PointJob

LONGEST_FACT = 300
"""Characters of a value of versions.json that are shown."""
MOST_FACTS = 5000
ABSENT = "(not there)"
"""In place of a fact that one arm has and another has not: a variable, a package."""
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
HIDDEN = "(hidden)"
"""A page is read by more people than a run's folder: variables with such names are only said to be set."""
UNKNOWN = "(unknown)"
"""The name in a group of facts that could not be asked for (`epfuse.serving.job`), and the value of each of them."""


def flat(found: Mapping[str, Any], before: str = "", depth: int = 0) -> dict[str, str]:
    """A nested object as one level of texts, keys joined by dots.

    Args:
        found: of a JSON file.
        before: what keys begin with.
        depth: of the object in the file.
    """
    facts: dict[str, str] = {}
    for key, value in found.items():
        name = f"{before}{printable(str(key))}"
        if isinstance(value, dict) and depth < DEEPEST:
            facts |= flat(value, f"{name}.", depth + 1)
        else:
            facts[name] = _fact(str(value))
        if len(facts) > MOST_FACTS:
            break
    return facts


def asked(job: PointJob) -> dict[str, str]:
    """What each arm was asked to run, as facts: how epfuse is put in, variables, and words beside the baseline's.

    The point's own variables are left out: they are the same in all arms, and others at each point.

    Args:
        job: of the point.
    """
    own = point_environment(job.point, job.client)
    names = sorted({name for arm in job.arms for name, value in arm.server.env.items() if own.get(name) != value})
    baseline = job.arms[0].server.argv
    facts = {}
    for arm in job.arms:
        at = f"arms.{arm.name}."
        changes = SequenceMatcher(None, baseline, arm.server.argv, autojunk=False).get_opcodes()
        added = [word for kind, _, _, start, end in changes if kind != "equal" for word in arm.server.argv[start:end]]
        left = [word for kind, start, end, _, _ in changes if kind != "equal" for word in baseline[start:end]]
        facts[f"{at}arguments.added"] = _fact(shlex.join(added) or ABSENT)
        facts[f"{at}arguments.left out"] = _fact(shlex.join(left) or ABSENT)
        facts[f"{at}epfuse put in"] = arm.epfuse.value
        where = arm.environment.reference if isinstance(arm.environment, Image) else arm.environment.path
        facts[f"{at}runs in"] = _fact(where or "the environment of the job")
        for name in names:
            value = arm.server.env.get(name, ABSENT)
            facts[f"{at}variable.{name}"] = (
                HIDDEN if SECRET.search(name) and value != ABSENT else _fact(value) or "(empty)"
            )
    return facts


def _arm_of(name: str, arms: Sequence[str]) -> tuple[str, str]:
    """Arm and rest of a fact's name; an arm's name may have dots."""
    if not name.startswith("arms."):
        return "", name
    rest = name.removeprefix("arms.")
    known = next((arm for arm in sorted(arms, key=len, reverse=True) if rest.startswith(f"{arm}.")), None)
    return (
        (known, rest.removeprefix(f"{known}."))
        if known is not None
        else (rest.partition(".")[0], rest.partition(".")[2])
    )


def differences(
    points: Iterable[tuple[str, Sequence[str], Mapping[str, str]]],
) -> tuple[dict[str, str], list[tuple[str, dict[str, list[str]]]]]:
    """The environment: facts that are the same in all points and arms, and those that are not.

    Args:
        points: name, arms and facts of each.

    Returns:
        Name -> value, and for each other name its values with who has them.
    """
    told: dict[str, dict[str, str]] = {}
    for point, arms, facts in points:
        for name, value in facts.items():
            arm, rest = _arm_of(name, arms)
            told.setdefault(f"{point} {arm}".strip(), {})[rest] = value
    missing = {
        who: {_group(name): UNKNOWN if UNKNOWN in name else ABSENT for name in facts} for who, facts in told.items()
    }
    values: dict[str, dict[str, list[str]]] = {}
    for name in dict.fromkeys(name for facts in told.values() for name in facts if UNKNOWN not in name):
        for who, facts in told.items():
            found = facts.get(name, missing[who].get(_group(name)))  # nothing of a whole group: it is not asked there
            if found is not None:
                values.setdefault(name, {}).setdefault(found, []).append(who)
    common = {name: next(iter(of)) for name, of in values.items() if len(of) == 1}
    return common, [(name, of) for name, of in values.items() if len(of) > 1]


def _group(name: str) -> str:
    return name.partition(".")[0]


def _fact(text: str) -> str:
    return printable(text)[:LONGEST_FACT]
