"""Its place makes the modules beside it importable; those of whole sessions too."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "session")]
pytest.register_assert_rewrite("laptop")
