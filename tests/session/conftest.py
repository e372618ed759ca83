"""Whole sessions in labs: `laptop` is one with a manager on its node, shared by the tests of a module."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("laptop")

from laptop import Laptop, lab_with_manager  # noqa: E402


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    with lab_with_manager() as laptop:
        yield laptop
