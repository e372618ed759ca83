"""Sessions beside real VPNs: `laptop` is in tests/session, the format of the zoo's files in tests/route."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "session"), str(TESTS / "route")]
pytest.register_assert_rewrite("laptop")
