"""Faults under traffic: `laptop` is a lab's with a manager whose sessions linger; the helpers are tests/session's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "session"))
pytest.register_assert_rewrite("laptop", "faults", "traffic")

from laptop import Laptop, lab_with_manager  # noqa: E402


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    with lab_with_manager() as laptop:
        yield laptop
