"""The lab's laptop as tests of whole sessions use it: `tpvpn` as it is typed, what it changed, and sockets inside."""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from peers import eventually
from pod import inside
from tpvpn import rundir
from tpvpn.lab import Exit, Lab, Vpn, Where
from tpvpn.lab.topology import (
    POD_CIDR,
    POD_CIDR6,
    PODS,
    PODS6,
    SERVICE_CIDR,
    SERVICE_CIDR6,
    SERVICES,
    SERVICES6,
    VPN_HOSTS,
    VPN_HOSTS6,
)

TPVPN = (sys.executable, "-m", "tpvpn")
WANTED4 = ("--service-cidr", SERVICE_CIDR, "--pod-cidr", POD_CIDR)
WANTED = (*WANTED4, "--service-cidr", SERVICE_CIDR6, "--pod-cidr", POD_CIDR6)
ALLOWED = ("--allow-conflicting-subnets", f"{SERVICE_CIDR},{POD_CIDR},{SERVICE_CIDR6},{POD_CIDR6}")
CLUSTER4, CLUSTER6 = (*SERVICES, *PODS), (*SERVICES6, *PODS6)
CLUSTER = (*CLUSTER4, *CLUSTER6)
VPN = (*VPN_HOSTS, *VPN_HOSTS6)

EXIT: Exit = "socket" if os.environ.get("TPVPN_TEST_EXIT") == "socket" else "kernel"
"""The manager's exit: `TPVPN_TEST_EXIT=socket` tries every session with that."""
at_the_kernel_exit = pytest.mark.skipif(EXIT != "kernel", reason="a session has a device there")
PATIENCE = 10.0
STATE = """
echo rules; ip rule; ip -6 rule
echo routes; ip route show table all; ip -6 route show table all
echo links; ip link; ip address
echo nft; nft list ruleset
echo files; find "$1" 2>/dev/null | sort
echo names; find /etc -maxdepth 1 -name 'resolv.conf*' | sort; cat /etc/resolv.conf
"""
"""Everything on the laptop that a session could change, as its usual tools show it."""


class Session:
    """A running `tpvpn connect`, in the foreground of nobody."""

    def __init__(self, process: subprocess.Popen[bytes], ready_fd: int, said: Path) -> None:
        self.process, self._ready_fd, self._said = process, ready_fd, said

    @property
    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self._said.read_text()

    def wait_ready(self, seconds: float = PATIENCE) -> None:
        """Wait for the line that says so; it must come."""
        readable, _, _ = select.select([self._ready_fd], [], [], seconds)
        assert readable, f"not ready:\n{self.said}"
        assert os.read(self._ready_fd, 100) == b"ready\n", f"ended:\n{self.said}"

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def signal(self, number: signal.Signals) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.wait()

    def says(self, text: str, seconds: float = 3) -> None:
        """Wait until it has written something."""
        eventually(lambda: text in self.said, seconds, f"{text!r} in\n{self.said}")


class Laptop:
    """A laptop of a lab: its own, or another one in network namespace `netns`, with the same files."""

    def __init__(self, lab: Lab, netns: str | None = None) -> None:
        self.lab, self.namespace = lab, netns or lab.namespace("laptop")
        self.inode = os.stat(f"/run/netns/{self.namespace}").st_ino
        self.directory = rundir.base() / str(self.inode)
        self.link = ("--manager", f"tcp://{lab.manager}", "--token-file", str(lab.token_file))

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on the laptop."""
        command = self.lab.command("laptop", argv)
        return [f"--net=/run/netns/{self.namespace}" if word == "--net" else word for word in command]

    def run(self, *argv: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        return subprocess.run(self.command(argv), capture_output=True, text=True, timeout=seconds)

    def sh(self, script: str, *arguments: str) -> str:
        """What a script that must succeed printed."""
        done = self.run("sh", "-ec", script, "sh", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tpvpn(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `tpvpn` to its end."""
        return self.run(*TPVPN, *arguments)

    def connect(self, *options: str, wanted: Sequence[str] = WANTED) -> subprocess.CompletedProcess[str]:
        """Run `tpvpn connect` to its end: it is refused, or has a command."""
        return self.run(*self.connect_command(*options, wanted=wanted))

    def connect_command(self, *options: str, wanted: Sequence[str] = WANTED) -> tuple[str, ...]:
        """`tpvpn connect` as it is typed."""
        return (*TPVPN, "connect", *self.link, *wanted, *options)

    @contextlib.contextmanager
    def start(self, *options: str, wanted: Sequence[str] = WANTED, under: Sequence[str] = ()) -> Generator[Session]:
        """`tpvpn connect`, perhaps not ready yet, and what it is to run under.

        If it still runs in the end, SIGTERM must end it with 0.
        """
        ready_fd, theirs = os.pipe()
        connect = self.connect_command("--ready-fd", str(theirs), *options, wanted=wanted)
        with tempfile.NamedTemporaryFile(prefix="tpvpn-session-") as said:
            command = self.command((*under, *connect))
            process = subprocess.Popen(command, stderr=said, stdin=subprocess.DEVNULL, pass_fds=[theirs])
            os.close(theirs)
            session = Session(process, ready_fd, Path(said.name))
            try:
                yield session
                if process.poll() is None:
                    assert session.signal(signal.SIGTERM) == 0, session.said
                assert "Traceback" not in session.said, session.said
            finally:
                os.close(ready_fd)
                if process.poll() is None:
                    process.kill()
                    process.wait()

    @contextlib.contextmanager
    def connected(self, *options: str, wanted: Sequence[str] = WANTED) -> Generator[Session]:
        """A session that is ready; by default all conflicts are allowed."""
        with self.start(*(options or ALLOWED), wanted=wanted) as session:
            session.wait_ready()
            yield session

    def state(self) -> str:
        """All that a session could change."""
        return self.sh(STATE, str(self.directory))

    def theirs(self) -> list[str]:
        """All rules, routes, devices, addresses and nft objects that are not ours."""
        shows = ("ip -j rule", "ip -j -6 rule", "ip -j route show table all", "ip -j -6 route show table all")
        shows += ("ip -j address", "nft -j list ruleset")
        objects = [found for show in shows for found in _objects(self.sh(show))]
        return [json.dumps(found) for found in objects if not _is_ours(found)]

    def settle(self) -> None:
        """Wait until the kernel has finished with new addresses (RFC 4862): from then on nothing changes by itself."""
        eventually(lambda: not self.sh("ip -6 address show tentative"), 5, "duplicate address detection")

    def is_as(self, before: str, seconds: float = 1.0) -> None:
        """Wait until all is as it was."""
        deadline = time.monotonic() + seconds
        while (now := self.state()) != before:
            if time.monotonic() > deadline:
                assert now == before
            time.sleep(0.02)

    def process(self, where: Where, word: str) -> int:
        """The process id of the one process in a namespace of the lab that has the word in its command line."""
        inode = os.stat(self.lab.netns(where)).st_ino
        found = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal() and _is(one, inode, word)]
        assert len(found) == 1, found
        return found[0]

    def probe(self, targets: Sequence[str], deadline: float = 2.0, wait: bool = False) -> dict[str, str | None]:
        """Who answers HTTP, asked from here, as `Lab.probe`."""
        probe = (sys.executable, "-m", "tpvpn.lab.probe", "--deadline", str(deadline), *(["--wait"] if wait else []))
        asked = self.run(*probe, *targets)
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout)

    def reaches(self, who: str, targets: Sequence[str]) -> None:
        """All of the targets must answer, as `who`."""
        expected = {target: f"{who} {target}" for target in targets}
        assert self.probe(targets, 5, wait=True) == expected

    def socket(self, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this laptop."""
        with inside(self.namespace):
            return socket.socket(family, kind)


_labs = itertools.count()


@contextlib.contextmanager
def lab_with_manager(
    vpn: Vpn = "routes", *, ipv6: bool = True, forwarding: bool = True, exit: Exit = EXIT
) -> Generator[Laptop]:
    """The laptop of a new lab with a manager on its node."""
    with Lab(f"tvs{os.getpid()}n{next(_labs)}", vpn=vpn, ipv6=ipv6, forwarding=forwarding, exit=exit) as lab:
        lab.start_manager()
        laptop = Laptop(lab)
        laptop.settle()
        yield laptop


def _objects(shown: str) -> list[dict[str, object]]:
    """What `ip -j` or `nft -j` printed; ip prints nothing when there is nothing."""
    found = json.loads(shown or "[]")
    return found if isinstance(found, list) else found["nftables"]


def _is_ours(found: dict[str, object]) -> bool:
    """By our protocol number, on our device, or in our nft table."""
    inner = next((value for value in found.values() if isinstance(value, dict)), found)
    names = [inner.get(key) for key in ("dev", "ifname", "table", "name")]
    return found.get("protocol") == "116" or any(str(name).startswith("tpvpn") for name in names)


def _is(process: Path, inode: int, word: str) -> bool:
    try:
        if (process / "ns" / "net").stat().st_ino != inode:
            return False
        return word.encode() in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is nobody's to look into
        return False
