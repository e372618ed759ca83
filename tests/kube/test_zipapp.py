"""The manager's zipapp, as it is put into a ConfigMap."""

import subprocess
import sys
from pathlib import Path

from tpvpn.kube.manifest import Ephemeral, config_map
from tpvpn.kube.zipapp import build

OWNER = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"uid": "u"}}


def test_it_is_the_same_each_time_small_and_runs_on_the_standard_library(tmp_path: Path) -> None:
    data = build()
    assert data == build()
    assert len(config_map(Ephemeral("m", "n"), data, OWNER)["binaryData"]["manager.pyz"]) < 1 << 20
    path = tmp_path / "manager.pyz"
    path.write_bytes(data)
    shown = subprocess.run([sys.executable, "-I", "-S", path, "--help"], capture_output=True, text=True, check=True)
    assert "--until-idle" in shown.stdout
