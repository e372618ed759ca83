"""Routing cases: the text of iproute2 in, verdicts and operations out; one file each in tests/route/cases."""

from pathlib import Path

import pytest
from textview import DEVICE, TABLE, apply, plan_of, read_case, render

from tpvpn.route.operations import operations

CASES = sorted((Path(__file__).parent / "cases").glob("*.txt"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    view, command, expected = read_case(path)
    plan = plan_of(view, command)
    warnings = [line.split()[1:] for line in expected if line.startswith("warning ")]
    assert render(plan, view) == [line for line in expected if not line.startswith("warning ")]
    assert len(plan.warnings) == len(warnings), plan.warnings
    for words, warning in zip(warnings, plan.warnings, strict=True):
        assert all(word in warning for word in words), warning
    assert bool(plan.fixes) == any(subnet.remaining for subnet in plan.subnets)
    steps = operations(plan, view, TABLE, DEVICE)
    after = apply(view, steps)
    assert operations(plan, after, TABLE, DEVICE) == []
    assert plan_of(after, command) == plan, "what is ours changes no verdict"
    undone = apply(after, [step.inverse() for step in reversed(steps)])
    assert undone.rules == view.rules and set(undone.routes) == set(view.routes)


def test_there_are_cases() -> None:
    assert len(CASES) >= 20
