"""`socket_exits`, a real manager with its clients, is in tests/manager."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "manager"))
pytest.register_assert_rewrite("socket_exits")
