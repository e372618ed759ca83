"""The test cluster as its tests use it: the laptop beside it, kubectl, users with few rights."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAPTOP = "tvkube-laptop"
CACHE = Path(
    os.environ.get("TPVPN_CLUSTER_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tpvpn-cluster"
)
ADMIN = CACHE / "state" / "pki" / "admin.kubeconfig"
IMAGE = "tpvpn.test/python:1"
TPVPN = (sys.executable, "-m", "tpvpn")


class Kubernetes:
    """The cluster that is up."""

    def laptop(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop to its end."""
        environment = {**os.environ, "KUBECONFIG": str(ADMIN)} | options.pop("env", {})
        command = ["nsenter", f"--net=/run/netns/{LAPTOP}", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)

    def kubectl(self, *words: str, input: str | None = None) -> str:
        """What kubectl printed; it must succeed."""
        done = self.laptop(str(CACHE / "bin" / "kubectl"), *words, input=input)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def objects(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        """The objects of a kind in a namespace."""
        return json.loads(self.kubectl("get", kind, "--namespace", namespace, "--output", "json"))["items"]

    @contextlib.contextmanager
    def namespace(self, name: str, **labels: str) -> Iterator[str]:
        """A namespace for one test, with labels such as pod_security."""
        self.kubectl("create", "namespace", name)
        for key, value in labels.items():
            self.kubectl("label", "namespace", name, f"{key.replace('__', '/').replace('_', '-')}={value}")
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def tpvpn(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run tpvpn to its end."""
        return self.laptop(*TPVPN, *words, **options)

    @contextlib.contextmanager
    def connected(self, *words: str, patience: float = 60.0) -> Iterator[subprocess.Popen[str]]:
        """A session that is ready."""
        ready, announce = os.pipe()
        command = [
            "nsenter",
            f"--net=/run/netns/{LAPTOP}",
            *TPVPN,
            "connect",
            "--image",
            IMAGE,
            "--ready-fd",
            str(announce),
            *words,
        ]
        environment = {**os.environ, "KUBECONFIG": str(ADMIN)}
        process = subprocess.Popen(command, env=environment, pass_fds=[announce], stderr=subprocess.PIPE, text=True)
        os.close(announce)
        try:
            began = time.monotonic()
            told = os.read(ready, 1)
            assert told, process.communicate()[1]
            assert time.monotonic() - began < patience
            yield process
        finally:
            os.close(ready)
            process.terminate()
            process.communicate(timeout=30)
