"""A pod and a cluster in network namespaces: where the kernel exit and the firewall tables are tried for real.

     session's TUN ──┐
                     ├─ pod ── eth0 10.132.0.5, fd00:132::5 ═══ 10.132.0.9, fd00:132::9 ── cluster ── lo 10.130.0.1
     session's TUN ──┘

The cluster has no route to a session's address: what is answered was masqueraded.
"""

import contextlib
import ctypes
import itertools
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

POD4, POD6 = "10.132.0.5", "fd00:132::5"
CLUSTER4, CLUSTER6, SERVICE4 = "10.132.0.9", "fd00:132::9", "10.130.0.1"

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def run(*command: str) -> str:
    """What the command printed; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def namespace(role: str) -> Iterator[str]:
    """A network namespace of its own, with `lo` up."""
    name = f"tvk{os.getpid()}-{next(_numbers)}-{role}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        run("ip", "netns", "del", name)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread works in the namespace; what it opens there stays there."""
    with open("/proc/thread-self/ns/net") as outside, open(f"/run/netns/{name}") as there:
        assert _libc.setns(there.fileno(), _CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert _libc.setns(outside.fileno(), _CLONE_NEWNET) == 0


NO_TUN = "mount -t tmpfs tmpfs /dev/net; mount -o remount,ro /dev/net"
"""For a shell in a mount namespace of its own: /dev/net/tun is not there, and cannot be made."""


@contextlib.contextmanager
def without_tun() -> Iterator[None]:
    """This thread, and what it starts, has no /dev/net/tun and cannot make it."""
    here = Path.cwd()
    with open("/proc/thread-self/ns/mnt") as outside:
        assert _libc.unshare(_CLONE_NEWNS) == 0
        try:
            run("mount", "--make-rslave", "/")
            run("sh", "-ec", NO_TUN)
            yield
        finally:
            assert _libc.setns(outside.fileno(), _CLONE_NEWNS) == 0
            os.chdir(here)


def sysctl(name: str, key: str, value: str | None = None) -> str:
    """Read, or set, a key below /proc/sys/net in a namespace."""
    with inside(name):
        path = Path("/proc/sys/net") / key
        if value is not None:
            path.write_text(value)
        return path.read_text().strip()


@contextlib.contextmanager
def pod_and_cluster() -> Iterator[tuple[str, str]]:
    """The two namespaces of the drawing, with forwarding off in the pod, as a CNI leaves it."""
    with namespace("pod") as pod, namespace("cluster") as cluster:
        run("ip", "-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", cluster)
        for name, four, six in ((pod, POD4, POD6), (cluster, CLUSTER4, CLUSTER6)):
            run("ip", "-n", name, "addr", "add", f"{four}/16", "dev", "eth0")
            run("ip", "-n", name, "addr", "add", f"{six}/64", "dev", "eth0", "nodad")
            run("ip", "-n", name, "link", "set", "eth0", "up")
        sysctl(pod, "ipv4/ip_forward", "0")  # a new namespace has what the first one has
        run("ip", "-n", cluster, "addr", "add", f"{SERVICE4}/32", "dev", "lo")
        run("ip", "-n", pod, "route", "add", "default", "via", CLUSTER4)
        run("ip", "-n", pod, "-6", "route", "add", "default", "via", CLUSTER6)
        yield pod, cluster


@contextlib.contextmanager
def filtering(name: str, *rules: str) -> Iterator[None]:
    """A firewall in a namespace, with these rules of nft for what comes in."""
    chain = "add table inet filtering; add chain inet filtering input { type filter hook input priority 0; }"
    for words in (chain, *(f"add rule inet filtering input {rule}" for rule in rules)):
        run("ip", "netns", "exec", name, "nft", words)
    try:
        yield
    finally:
        run("ip", "netns", "exec", name, "nft", "delete table inet filtering")


@contextlib.contextmanager
def udp_server(name: str, address: str, port: int) -> Iterator[socket.socket]:
    """A bound UDP socket in a namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(name):
        server = socket.socket(family, socket.SOCK_DGRAM)
    with server:
        server.settimeout(2)
        server.bind((address, port))
        yield server


def readable(descriptors: list[int], seconds: float) -> list[int]:
    """Those that have something to read within the time."""
    return select.select(descriptors, [], [], seconds)[0]
