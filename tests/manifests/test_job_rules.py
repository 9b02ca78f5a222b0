import pytest

from tests.manifests.job_rules import action, starts_again
from tests.manifests.samples import job

RULES = {
    "rules": [
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}},
        {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [1, 75]}},
    ]
}
JOB = job(podFailurePolicy=RULES)


@pytest.mark.parametrize(("code", "expected"), [(75, "Ignore"), (1, "Count"), (2, "FailJob")])
def test_the_first_rule_that_matches_decides(code: int, expected: str) -> None:
    assert action(JOB, code) == expected


@pytest.mark.parametrize(
    ("code", "num_failures", "expected"),
    [(75, 9, True), (1, 0, True), (1, 1, True), (1, 2, False), (2, 0, False)],
)
def test_a_pod_is_replaced_while_its_index_has_failures_left(
    code: int, num_failures: int, expected: bool
) -> None:
    assert starts_again(JOB, code, num_failures) == expected
