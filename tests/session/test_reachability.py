"""Every network that was reachable before and may not be overridden stays reachable: before, during and after.

The matrix is each host of the VPN and each address of the cluster, of both families, beside plain routes and beside a
real OpenVPN.
"""

import contextlib
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping

import pytest
from laptop import ALLOWED, CLUSTER, VPN, Laptop, lab_with_manager

from tpvpn.lab.topology import TWINS, TWINS6

V4, V6 = socket.AF_INET, socket.AF_INET6
NOBODY_IN_THE_CLUSTER = dict.fromkeys(CLUSTER)
EVERYONE_IN_THE_VPN = {host: f"vpn {host}" for host in VPN}
EVERYONE_IN_THE_CLUSTER = {address: f"cluster {address}" for address in CLUSTER}
TWINS_OF_CLUSTER = {twin: f"cluster {twin}" for twin in (*TWINS, *TWINS6)}
BEFORE = EVERYONE_IN_THE_VPN | NOBODY_IN_THE_CLUSTER | TWINS_OF_CLUSTER
DURING = EVERYONE_IN_THE_VPN | EVERYONE_IN_THE_CLUSTER | TWINS_OF_CLUSTER


@pytest.fixture(scope="module", params=["routes", "openvpn"])
def laptop(request: pytest.FixtureRequest) -> Iterator[Laptop]:
    """Beside each kind of VPN."""
    with lab_with_manager(vpn=request.param) as laptop:
        laptop.reaches("vpn", VPN)
        yield laptop


def is_reached(laptop: Laptop, expected: Mapping[str, str | None]) -> None:
    """Who answers where: those who should have time for it, the others less."""
    answering = [target for target, who in expected.items() if who]
    silent = [target for target, who in expected.items() if not who]
    assert laptop.probe(answering, 3) == {target: expected[target] for target in answering}
    if silent:
        assert laptop.probe(silent, 0.5) == dict.fromkeys(silent)


def test_the_cluster_appears_and_nothing_disappears(laptop: Laptop) -> None:
    state = laptop.state()
    is_reached(laptop, BEFORE)
    with laptop.connected():
        is_reached(laptop, DURING)
        assert laptop.state() != state
    is_reached(laptop, BEFORE)
    laptop.is_as(state)


def test_as_much_space_as_leaves_the_vpn_its_hosts(laptop: Laptop) -> None:
    """Half of the VPN's block may be taken; what is routed is the cluster alone, so the hosts in that half answer."""
    allow = ("--allow-conflicting-subnets", "10.128.0.0/9", "--allow-conflicting-subnets", "fd10:100::/24")
    with laptop.connected(*allow):
        is_reached(laptop, DURING)
    is_reached(laptop, BEFORE)


def test_only_what_is_routed_and_not_excepted_is_lost(laptop: Laptop) -> None:
    """Hosts of the VPN in space that the user gives away are the cluster's from then on, and only until the end."""
    given = ("10.128.0.0/9", "fd10:100::/24")
    lost = {"10.200.0.9", "fd10:129::7"}  # 10.129.0.7 is excepted
    also = ("--also-proxy", ",".join(given), "--allow-conflicting-subnets", ",".join(given))
    with laptop.connected(*ALLOWED, *also, "--never-proxy", "10.129.0.0/24"):
        is_reached(laptop, DURING | dict.fromkeys(lost))
    is_reached(laptop, BEFORE)


@pytest.mark.parametrize("options", [(), ("--on-conflict", "skip")], ids=["fail", "skip"])
def test_what_is_not_allowed_changes_nothing(laptop: Laptop, options: tuple[str, ...]) -> None:
    done = laptop.connect(*options, "--", "true")
    assert done.returncode == (0 if options else 3), done.stderr
    is_reached(laptop, BEFORE)
    if options:
        with laptop.connected(*options):
            is_reached(laptop, BEFORE)


def test_the_vpn_stays_reachable_at_every_moment(laptop: Laptop) -> None:
    """Sessions come and go; no ping is lost, and connections that were there before go on."""
    pings = [
        laptop.lab.popen("laptop", ["ping", "-n", "-q", "-i", "0.02", host], stdout=subprocess.PIPE, text=True)
        for host in VPN
    ]
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(laptop.socket(V6 if ":" in host else V4)) for host in VPN]
        for connection, host in zip(kept, VPN, strict=True):
            connection.settimeout(5)
            connection.connect((host, 80))
        for _ in range(2):
            assert all(map(asked, kept))
            with laptop.connected():
                assert all(map(asked, kept))
        assert all(map(asked, kept))
    for ping in pings:
        ping.send_signal(signal.SIGINT)
        summary, _ = ping.communicate(timeout=5)
        counted = re.search(r"(\d+) packets transmitted, (\d+) received", summary)
        # The last one may be on its way.
        assert counted and int(counted[1]) - int(counted[2]) <= 1 and int(counted[2]) > 20, summary


def asked(connection: socket.socket) -> bool:
    """Whether a server of the VPN answers on a connection that stays."""
    connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return b" 200 OK" in connection.recv(1000)
