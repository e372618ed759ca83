"""Stranded connections in a real kernel: who waits on one hears of it at once, all others go on.

laptop ── eth0 192.0.2.1, fd00:2::1 ═══ 192.0.2.2, fd00:2::2 eth0 ── cluster ── lo 10.130.0.80, fd00:130::80, …
          own  246.0.0.9, fd00:246::9
"""

import contextlib
import errno
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from peers import eventually
from pod import inside, namespace, run
from tpvpn import sockdiag
from tpvpn.route.prefix import Prefix
from tpvpn.sockdiag import reset

SUBNET4, SUBNET6 = Prefix.parse("10.130.0.0/16"), Prefix.parse("fd00:130::/64")
SERVICE4, SERVICE6, OTHER4 = "10.130.0.80", "fd00:130::80", "10.99.0.1"
LAN4, LAN6, OWN4, OWN6 = "192.0.2.1", "fd00:2::1", "246.0.0.9", "fd00:246::9"
OWN = (OWN4, OWN6)
PORT = 80


@pytest.fixture
def laptop() -> Iterator[str]:
    with namespace("laptop") as laptop, namespace("cluster") as cluster:
        run("ip", "-n", laptop, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", cluster)
        addresses = {
            laptop: {"eth0": ("192.0.2.1/24", "fd00:2::1/64", "246.0.0.9/32", "fd00:246::9/128")},
            cluster: {"eth0": ("192.0.2.2/24", "fd00:2::2/64"), "lo": (SERVICE4, SERVICE6, OTHER4)},
        }
        for name, devices in addresses.items():
            for device, some in devices.items():
                for address in some:
                    flags = ["nodad"] if ":" in address else []
                    run("ip", "-n", name, "addr", "add", address, "dev", device, *flags)
            run("ip", "-n", name, "link", "set", "eth0", "up")
        there, back = ("192.0.2.2", "fd00:2::2"), ("192.0.2.1", "fd00:2::1")
        for name, (via4, via6) in ((laptop, there), (cluster, back)):
            run("ip", "-n", name, "route", "add", "default", "via", via4, "dev", "eth0")
            run("ip", "-n", name, "route", "add", "default", "via", via6, "dev", "eth0")
        with inside(cluster), socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True):
            yield laptop


Connect = Callable[..., socket.socket]


@pytest.fixture
def connect(laptop: str) -> Iterator[Connect]:
    """Connects from a local address of the laptop."""
    with contextlib.ExitStack() as stack:

        def connect(source: str, target: str, kind: int = socket.SOCK_STREAM, device: str = "") -> socket.socket:
            family = socket.AF_INET6 if ":" in target else socket.AF_INET
            with inside(laptop):
                made = stack.enter_context(socket.socket(family, kind))
            if device:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            made.settimeout(5)
            made.bind((source, 0))
            made.connect((target, PORT))
            return made

        yield connect


def reset_in(name: str, **change) -> int:
    with inside(name):
        return reset(change.get("withdrawn", ()), change.get("routed", ()), change.get("own", OWN))


def dead(connection: socket.socket) -> int:
    """The error that a reader has; 0 when there is none."""
    connection.setblocking(False)
    try:
        connection.recv(1)
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or 0
    return 0


MAPPED = "::ffff:"
STRANDED = [
    ({"withdrawn": [SUBNET4]}, OWN4, SERVICE4),
    ({"withdrawn": [SUBNET4]}, MAPPED + OWN4, MAPPED + SERVICE4),
    ({"withdrawn": [SUBNET6]}, OWN6, SERVICE6),
    ({"withdrawn": [Prefix(4, 0, 0), Prefix(6, 0, 0)]}, OWN4, OTHER4),
    ({"routed": [SUBNET4]}, LAN4, SERVICE4),
    ({"routed": [SUBNET4]}, MAPPED + LAN4, MAPPED + SERVICE4),
    ({"routed": [SUBNET6, SUBNET4]}, LAN6, SERVICE6),
    ({"routed": [SUBNET4], "own": ()}, OWN4, SERVICE4),
]
UNTOUCHED = [
    ({"withdrawn": [SUBNET4]}, LAN4, SERVICE4),
    ({"withdrawn": [SUBNET4]}, OWN4, OTHER4),
    ({"withdrawn": [SUBNET6]}, OWN4, SERVICE4),
    ({"withdrawn": [SUBNET4], "own": [OWN6]}, OWN4, SERVICE4),
    ({"routed": [SUBNET4]}, OWN4, SERVICE4),
    ({"routed": [SUBNET4]}, MAPPED + OWN4, MAPPED + SERVICE4),
    ({"routed": [SUBNET4]}, LAN4, OTHER4),
    ({}, LAN4, SERVICE4),
]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize(("change", "source", "target"), STRANDED)
def test_what_lost_its_way_ends(
    laptop: str, connect: Connect, kind: int, change: dict, source: str, target: str
) -> None:
    connection = connect(source, target, kind)
    assert reset_in(laptop, **change) == 1
    assert dead(connection) == errno.ECONNABORTED


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize(("change", "source", "target"), UNTOUCHED)
def test_what_kept_its_way_goes_on(
    laptop: str, connect: Connect, kind: int, change: dict, source: str, target: str
) -> None:
    connection = connect(source, target, kind)
    assert reset_in(laptop, **change) == 0
    assert dead(connection) == 0


def test_whoever_waits_is_woken(laptop: str, connect: Connect) -> None:
    connection = connect(LAN4, SERVICE4)
    waited: list[tuple[int | None, float]] = []

    def read() -> None:
        try:
            connection.recv(1)
        except OSError as error:
            waited.append((error.errno, time.monotonic()))

    reader = threading.Thread(target=read)
    reader.start()
    start = time.monotonic()
    assert reset_in(laptop, routed=[SUBNET4]) == 1
    reader.join(5)
    ((number, end),) = waited
    assert number == errno.ECONNABORTED
    assert end - start < 1


def test_one_that_is_bound_to_a_device_keeps_it(laptop: str, connect: Connect) -> None:
    connection = connect(LAN4, SERVICE4, device="eth0")
    assert reset_in(laptop, routed=[SUBNET4]) == 0
    assert dead(connection) == 0


def test_one_still_connecting_ends(laptop: str) -> None:
    run("ip", "-n", laptop, "route", "add", "10.130.7.0/24", "via", "192.0.2.77", "dev", "eth0", "onlink")
    run("ip", "-n", laptop, "neigh", "add", "192.0.2.77", "lladdr", "02:00:00:00:00:77", "dev", "eth0")
    with inside(laptop):
        connection = socket.socket()
    with connection:
        connection.setblocking(False)
        assert connection.connect_ex(("10.130.7.7", PORT)) == errno.EINPROGRESS
        assert reset_in(laptop, routed=[SUBNET4]) == 1
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


def test_listeners_and_the_hosts_own_addresses_are_left_alone(laptop: str, connect: Connect) -> None:
    run("ip", "-n", laptop, "addr", "add", "10.130.0.1/32", "dev", "lo")
    with inside(laptop), socket.create_server(("10.130.0.1", PORT)) as server:
        connection = connect("10.130.0.1", "10.130.0.1")
        assert reset_in(laptop, routed=[SUBNET4], withdrawn=[SUBNET4]) == 0
        assert dead(connection) == 0
        server.accept()[0].close()


def test_other_namespaces_are_left_alone(laptop: str, connect: Connect) -> None:
    connection = connect(LAN4, SERVICE4)
    with namespace("other") as other:
        assert reset_in(other, routed=[SUBNET4]) == 0
    assert dead(connection) == 0


THOUSAND = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    pairs = []
    for _ in range(500):
        pairs += [socket.create_connection(server.getsockname()), server.accept()[0]]
    print("connected", flush=True)
    sys.stdin.read()
"""


@pytest.mark.alone
def test_ten_thousand_connections_are_looked_through_in_a_moment(laptop: str, connect: Connect) -> None:
    connection = connect(LAN4, SERVICE4)
    argv = ["ip", "netns", "exec", laptop, sys.executable, "-c", THOUSAND]
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert (output := stack.enter_context(process).stdout) is not None and output.readline() == "connected\n"
        start = time.monotonic()
        assert reset_in(laptop, routed=[SUBNET4]) == 1
        seconds = time.monotonic() - start
        start = time.monotonic()
        destroyed = reset_in(laptop, withdrawn=[Prefix.parse("127.0.0.0/8")], own=["127.0.0.1"])
        print(f"10,000 looked through in {seconds * 1000:.0f} ms, destroyed in {time.monotonic() - start:.3f} s")
        # Each takes its other end along, when its reset arrives first.
        assert 5000 <= destroyed <= 10_000
        assert seconds < 0.5
    assert dead(connection) == errno.ECONNABORTED


def test_without_the_right_nothing_is_done(laptop: str, connect: Connect) -> None:
    connection = connect(LAN4, SERVICE4)
    script = f"""
import errno
from tpvpn.route.prefix import Prefix
from tpvpn.sockdiag import reset
assert reset([], [Prefix.parse("172.16.0.0/12")], []) == 0
try:
    reset([], [Prefix.parse("{SUBNET4}")], [])
except OSError as error:
    assert error.errno == errno.EPERM
    print("refused")
"""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert run("ip", "netns", "exec", laptop, *nobody, sys.executable, "-c", script) == "refused\n"
    assert dead(connection) == 0


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockdiag, "_NETLINK_SOCK_DIAG", 31)  # a protocol that no kernel has
    assert reset([SUBNET4], [SUBNET4], OWN) == 0


@pytest.mark.parametrize(
    ("source", "target", "shown"),
    [(OWN4, SERVICE4, SERVICE4), (OWN6, SERVICE6, SERVICE6), (MAPPED + OWN4, MAPPED + SERVICE4, SERVICE4)],
)
def test_what_goes_through_the_tunnel_is_told_with_its_bytes(
    laptop: str, connect: Connect, source: str, target: str, shown: str
) -> None:
    connect(LAN4, OTHER4)
    connection = connect(source, target)
    connection.sendall(bytes(1000))
    with inside(laptop):
        eventually(lambda: sum(flow.sent for flow in sockdiag.flows(OWN)) > 1000, 5, "all bytes are acknowledged")
        (flow,) = sockdiag.flows(OWN)
        assert (flow.address, flow.port, flow.sent, flow.received) == (shown, PORT, 1001, 0)  # a SYN counts as one
        assert sockdiag.flows(["246.0.0.8"]) == []


def test_a_kernel_that_lists_no_sockets_has_no_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockdiag, "_NETLINK_SOCK_DIAG", 31)
    assert sockdiag.flows(OWN) == []
