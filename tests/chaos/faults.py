"""What happens to the connection between a laptop and its manager: real faults, each undone in the end."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from laptop import Laptop, Session

LAPTOP, ELSEWHERE, NODE, PORT = "192.0.2.2", "192.0.2.77", "192.0.2.10", 7070
_SILENT = """
table ip chaos {
  chain input { type filter hook input priority -300; tcp dport 7070 drop; }
  chain output { type filter hook output priority -300; tcp sport 7070 drop; }
}
"""


def cut(laptop: Laptop) -> None:
    """The laptop's end of each connection is aborted."""
    laptop.sh(f"ss -K dst {NODE} dport = {PORT}")


def reset(laptop: Laptop) -> None:
    """The manager's end is, which sends RST."""
    node = laptop.lab.namespace("node")
    laptop.sh(f"ip netns exec {node} ss -K sport = {PORT}")


@contextlib.contextmanager
def silence(laptop: Laptop) -> Iterator[None]:
    """Nothing gets through, and nobody says so."""
    node = ("ip", "netns", "exec", laptop.lab.namespace("node"), "nft")
    laptop.sh('echo "$1" | ip netns exec "$2" nft -f -', _SILENT, laptop.lab.namespace("node"))
    try:
        yield
    finally:
        laptop.run(*node, "delete", "table", "ip", "chaos")


@contextlib.contextmanager
def stopped(process: int) -> Iterator[None]:
    """The process does nothing, as if its machine slept."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def moved(laptop: Laptop) -> Iterator[None]:
    """The laptop has another address: what the old one had open is dead."""
    _readdress(laptop, LAPTOP, ELSEWHERE)
    try:
        yield
    finally:
        _readdress(laptop, ELSEWHERE, LAPTOP)


def _readdress(laptop: Laptop, before: str, after: str) -> None:
    routes = laptop.sh("ip -4 route show dev eth0 | grep -v 'proto kernel' || true").splitlines()
    laptop.sh(f"ip address del {before}/24 dev eth0; ip address add {after}/24 dev eth0")
    for route in routes:
        laptop.sh(f"ip route replace {route.strip()} dev eth0")


def replace_manager(laptop: Laptop) -> None:
    """It is killed, and another one takes its place."""
    os.kill(laptop.process("node", "manager"), signal.SIGKILL)
    laptop.lab.start_manager()


def wait(seconds: float) -> float:
    """Let the fault last; when it ends."""
    time.sleep(seconds)
    return time.monotonic()


def detected(session: Session, since: float, seconds: float = 10) -> float:
    """How long after that time the session said that it connects again."""
    session.says("connecting again", seconds)
    return time.monotonic() - since
