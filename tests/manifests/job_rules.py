"""What the Job controller does about a pod that has ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Action = Literal["Ignore", "Count", "FailJob"]


def action(job: Mapping[str, Any], exit_code: int) -> Action:
    """What the first matching rule of the Job's podFailurePolicy says about an exit code other
    than 0. The pod was deleted by name at most, which is no disruption.
    """
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule and _matches(rule["onExitCodes"], exit_code):
            chosen: Action = rule["action"]
            return chosen
    return "Count"


def _matches(rule: Mapping[str, Any], exit_code: int) -> bool:
    is_listed = exit_code in rule["values"]
    return is_listed if rule["operator"] == "In" else not is_listed


def starts_again(job: Mapping[str, Any], exit_code: int, num_failures: int) -> bool:
    """Whether another pod takes the place of one that has ended with `exit_code`, of whose index
    `num_failures` pods have failed, this one not included.
    """
    match action(job, exit_code):
        case "Ignore":
            return True
        case "Count":
            return num_failures < int(job["spec"]["backoffLimitPerIndex"])
        case "FailJob":
            return False
