"""Whole sessions in labs: `laptop` is one with a manager on its node, shared by the tests of a module."""

import os
from collections.abc import Iterator

import pytest
from laptop import Laptop

from tpvpn.lab import Lab

_labs = 0


def name() -> str:
    """A lab's name that no other has."""
    global _labs
    _labs += 1
    return f"tvs{os.getpid()}n{_labs}"


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    with Lab(name()) as lab:
        lab.start_manager()
        laptop = Laptop(lab)
        laptop.settle()
        yield laptop
