"""The ways from the laptop to the cluster: plain routing, tpvpn, and (in `peers`) other tunnels.

Each way has an address of the cluster's servers for itself, so that all are up at once and can be measured in turns.
"""

import functools
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tpvpn.lab import Lab
from tpvpn.lab.lab import MANAGER
from tpvpn.lab.topology import NODE, POD_CIDR, PODS, SERVICE_CIDR, SERVICES, TWINS, Exit

TIMEOUT = 20.0  # seconds until a tunnel must be ready


class Place(Protocol):
    """Where ways are measured: a lab, or what stands for one."""

    def run(
        self, where: Any, argv: Sequence[str], *, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end."""
        ...

    def popen(self, where: Any, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside."""
        ...

    def log(self, name: str) -> Path:
        """The file for what a process says."""
        ...


class Way:
    """Plain routing through the node; and what every tunnel has."""

    name = "direct"
    address = TWINS[0]
    lab: Place

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @classmethod
    def missing(cls) -> str | None:
        """The program that this way needs and this machine has not."""
        return None

    def start(self) -> dict[str, float]:
        """Bring the way up, or up anew; what was measured by that."""
        return {}

    def ends(self) -> dict[str, list[int]]:
        """The processes at each end, "laptop" and "node"."""
        return {}


class Tpvpn(Way):
    """tpvpn as a user starts it, with the kernel exit over plain TCP; it routes the subnet of its address alone."""

    name = "tpvpn"
    address = PODS[0]
    exit: Exit = "kernel"
    listen = MANAGER
    subnet = ("--pod-cidr", POD_CIDR)

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._manager: subprocess.Popen[Any] | None = None
        self._connect: subprocess.Popen[Any] | None = None

    def start(self) -> dict[str, float]:
        """Start the manager once, and `tpvpn connect` anew; the seconds from its start until it is ready."""
        self._manager = manager(self._lab, self.exit, self.listen)
        end(self._connect)
        self._connect, took = self._begin()
        return {"connect_s": took}

    def _begin(self) -> tuple[subprocess.Popen[Any], float]:
        return ready(self.lab, f"connect-{self.name}", ["--name", self.exit, *self._options()])

    def _options(self) -> list[str]:
        link = ["--manager", f"tcp://{self.listen}", "--token-file", str(self._lab.token_file)]
        return [*link, *self.subnet, "--allow-conflicting-subnets", self.subnet[1]]

    def ends(self) -> dict[str, list[int]]:
        """connect with its helper, and the manager."""
        assert self._connect and self._manager
        return {"laptop": descendants(self._connect.pid), "node": descendants(self._manager.pid)}


class TpvpnSocket(Tpvpn):
    """The same with the socket exit, whose manager has no privilege."""

    name = "tpvpn-socket"
    address = SERVICES[1]
    exit: Exit = "socket"
    listen = f"{NODE}:7071"
    subnet = ("--service-cidr", SERVICE_CIDR)


class TpvpnRun(Tpvpn):
    """`tpvpn run` with the kernel exit, measured by commands that join the one that it runs."""

    name = "tpvpn-run"
    address = PODS[1]

    def _begin(self) -> tuple[subprocess.Popen[Any], float]:
        words, pipe = ["run", *self._options(), "--", "sh", "-c", "echo $$; exec cat"], os.pipe()
        process, told, took = started(self._lab, self.name, words, pipe, stdin=subprocess.PIPE, stdout=pipe[1])
        self.lab = Sandbox(self._lab, int(told))
        return process, took

    def ends(self) -> dict[str, list[int]]:
        """run, the process that made the sandbox with the command in it, and the manager."""
        assert isinstance(self.lab, Sandbox)
        found = super().ends()
        return found | {"laptop": sorted({*found["laptop"], *self.lab.processes()})}


class Sandbox:
    """Where a command of `tpvpn run` is, as another place on the laptop."""

    def __init__(self, lab: Lab, pid: int) -> None:
        self._lab, self._pid = lab, pid

    def run(
        self, where: Any, argv: Sequence[str], *, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end."""
        return self._lab.run(where, self._inside(argv), check=check, **options)

    def popen(self, where: Any, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside."""
        return self._lab.popen(where, self._inside(argv), **options)

    def log(self, name: str) -> Path:
        """The file for what a process says."""
        return self._lab.log(name)

    def processes(self) -> list[int]:
        """All that are in its network namespace."""
        pgrep = ["pgrep", "--ns", str(self._pid), "--nslist", "net"]
        return [int(pid) for pid in subprocess.run(pgrep, capture_output=True, text=True, check=True).stdout.split()]

    def _inside(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self._pid), "--net", *argv]


@functools.cache
def manager(lab: Lab, exit: Exit, listen: str) -> subprocess.Popen[Any]:
    """The manager with this exit, which the ways that have it share: a node has one kernel exit."""
    return lab.start_manager(exit=exit, listen=listen, name=f"manager-{exit}")


def ready(place: Place, name: str, words: Sequence[str]) -> tuple[subprocess.Popen[Any], float]:
    """Start `tpvpn connect` with these words on the laptop; the process, and the seconds from its start until ready."""
    pipe = os.pipe()
    process, _, took = started(place, name, ["connect", *words, "--ready-fd", str(pipe[1])], pipe, pass_fds=[pipe[1]])
    return process, took


def started(
    place: Place, name: str, words: Sequence[str], pipe: tuple[int, int], **options: Any
) -> tuple[subprocess.Popen[Any], bytes, float]:
    """Start `tpvpn` on the laptop; the process, what it says on the pipe when it is ready, and the seconds until then.

    `options`, as for subprocess.Popen, have what gives it the pipe, which is closed here.
    """
    (readable, announce), said = pipe, place.log(name)
    began = time.perf_counter()
    with said.open("wb") as log:
        usual: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = place.popen("laptop", [sys.executable, "-m", "tpvpn", *words], **(usual | options))
    os.close(announce)
    told = os.read(readable, 100) if select.select([readable], [], [], TIMEOUT)[0] else b""
    took = time.perf_counter() - began
    os.close(readable)
    if not told:
        raise RuntimeError(f"tpvpn {words[0]} is not ready: {said.read_text().strip().rpartition(chr(10))[2]}")
    return process, told, took


def end(process: subprocess.Popen[Any] | None) -> None:
    """End it, and wait until it has."""
    if process is not None:
        process.terminate()
        process.wait(TIMEOUT)


def descendants(root: int) -> list[int]:
    """A process and all that descend from it."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found
