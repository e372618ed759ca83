"""The test cluster (tests/cluster), which stays up for all that need it and is taken down at the end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "session")]
pytest.register_assert_rewrite("laptop", "kubernetes_laptop")


@pytest.fixture(scope="session")
def cluster() -> Iterator["Kubernetes"]:
    """A real Kubernetes of two nodes; it was up already where KEEP_CLUSTER is set, and stays so, as kind's does."""
    if os.environ.get("TPVPN_KIND"):
        yield Kubernetes()
        return
    subprocess.run([HERE.parent / "cluster" / "up"], check=True, timeout=1800)
    try:
        yield Kubernetes()
    finally:
        if not os.environ.get("KEEP_CLUSTER"):
            subprocess.run([HERE.parent / "cluster" / "down"], check=True, timeout=120)


from kubernetes_lab import Kubernetes  # noqa: E402
