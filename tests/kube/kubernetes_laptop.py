"""A laptop with a kubeconfig: sessions as tests/session has them, by way of an API server."""

import contextlib
import json
import os
import subprocess
from collections.abc import Generator, Sequence
from typing import Any

from kubernetes_lab import ADMIN, IMAGE, TPVPN, Kubernetes
from laptop import Laptop, Session

from tpvpn import rundir

PATIENCE = 60.0
"""Seconds for a manager to be there, on a machine that runs tests."""


class KubernetesLaptop(Laptop):
    """A laptop in network namespace `netns`, whose user is the cluster's admin; `manager`: words of every connect."""

    program: Sequence[str] = TPVPN

    def __init__(self, cluster: Kubernetes, netns: str, *manager: str) -> None:
        self.cluster, self.namespace, self.manager = cluster, netns, manager
        self.inode = os.stat(f"/run/netns/{netns}").st_ino
        self.directory = rundir.base() / str(self.inode)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on the laptop."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "env", f"KUBECONFIG={ADMIN}", *argv]

    def connect_command(self, *options: str, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """`tpvpn connect` as it is typed."""
        return (*self.program, "connect", *self.manager, "--image", IMAGE, *wanted, *options)

    def connect(self, *options: str, wanted: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run `tpvpn connect` to its end: it is refused, or has a command."""
        return super().connect(*options, wanted=wanted)

    @contextlib.contextmanager
    def start(self, *options: str, wanted: Sequence[str] = ()) -> Generator[Session]:
        """`tpvpn connect`, perhaps not ready yet."""
        with super().start(*options, wanted=wanted) as session:
            yield session

    @contextlib.contextmanager
    def connected(self, *options: str, wanted: Sequence[str] = ()) -> Generator[Session]:
        """A session that is ready."""
        with self.start(*options, wanted=wanted) as session:
            session.wait_ready(PATIENCE)
            yield session

    def status(self, name: str = "default") -> dict[str, Any]:
        """A session as `tpvpn status` shows it."""
        shown = json.loads(self.tpvpn("status", "--output", "json").stdout)["sessions"]
        (found,) = (one for one in shown if one["name"] == name)
        return found
