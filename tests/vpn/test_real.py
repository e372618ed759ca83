"""Sessions beside real VPNs, split and full: OpenVPN, WireGuard (wg-quick) and strongSwan, which come and go."""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from laptop import ALLOWED, CLUSTER, CLUSTER4, VPN, WANTED, WANTED4, Laptop, lab_with_manager

from peers import eventually
from tpvpn.lab import Vpn
from tpvpn.lab.topology import NODE, PODS, SERVICE_CIDR, SERVICES, TWINS, TWINS6

LAN = "192.0.2.0/24"
SILENT = dict.fromkeys(CLUSTER)


class Kind(NamedTuple):
    """A VPN: its device, whose it is, where its private routes are; none when it takes everything by a default."""

    vpn: Vpn
    device: str
    owner: str
    table: int | None

    @property
    def full(self) -> bool:
        return self.vpn.endswith("-full")


KINDS = (
    Kind("openvpn", "tun0", "openvpn", 254),
    Kind("openvpn-full", "tun0", "openvpn", 254),
    Kind("wireguard", "wg0", "wireguard", 254),
    Kind("wireguard-full", "wg0", "wireguard", None),
    Kind("strongswan", "ipsec0", "strongswan", 220),
)


class Beside(NamedTuple):
    """A laptop on a VPN that is up."""

    laptop: Laptop
    kind: Kind

    def reaches_all(self) -> None:
        self.laptop.reaches("cluster", CLUSTER)
        self.laptop.reaches("vpn", VPN)

    def way(self, address: str) -> str:
        """The device that the laptop's kernel chooses."""
        found = re.search(r" dev (\S+)", self.laptop.sh(f"ip route get {address}"))
        assert found
        return found[1]

    def ours(self) -> set[str]:
        """What is routed into our tunnel."""
        routes = self.laptop.sh("ip route show table all proto 116; ip -6 route show table all proto 116")
        return {line.split()[0] for line in routes.splitlines() if " dev tpvpn" in line}


def beside(kind: Kind) -> Iterator[Beside]:
    with lab_with_manager(kind.vpn) as laptop:
        laptop.reaches("vpn", VPN)
        yield Beside(laptop, kind)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.vpn)
def every(request: pytest.FixtureRequest) -> Iterator[Beside]:
    yield from beside(request.param)


@pytest.fixture(scope="module", params=[kind for kind in KINDS if not kind.full], ids=lambda kind: kind.vpn)
def split(request: pytest.FixtureRequest) -> Iterator[Beside]:
    """Their manager is reached with and without them."""
    yield from beside(request.param)


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind.full], ids=lambda kind: kind.vpn)
def full(request: pytest.FixtureRequest) -> Iterator[Beside]:
    yield from beside(request.param)


# -- a VPN that is there -----------------------------------------------------------------------------------------------


def test_a_conflict_is_refused_and_its_owner_named(every: Beside) -> None:
    laptop, kind = every
    before = laptop.state()
    planned = laptop.tpvpn("plan", "--output", "json", *WANTED)
    refused = laptop.connect("--", "true")
    assert planned.returncode == refused.returncode == (0 if kind.table is None else 3), refused.stderr
    for subnet in json.loads(planned.stdout)["subnets"]:
        found = {(one["owner"], one["device"]) for one in subnet["conflicts"]}
        assert found == (set() if kind.table is None else {(kind.owner, kind.device)})
        if ":" not in subnet["cidr"]:
            assert [one["table"] for one in subnet["conflicts"]] == ([] if kind.table is None else [kind.table])
    laptop.is_as(before)
    laptop.reaches("vpn", VPN)


def test_allowed_the_cluster_appears_and_nothing_disappears(every: Beside) -> None:
    laptop = every.laptop
    before, theirs = laptop.state(), laptop.theirs()
    twins = [*TWINS, *TWINS6]
    laptop.reaches("cluster", twins)
    assert laptop.probe(CLUSTER, 0.5) == SILENT
    with laptop.connected() as session:
        every.reaches_all()
        laptop.reaches("cluster", twins)
        assert laptop.theirs() == theirs
        assert "shadowed" not in session.said
    assert laptop.probe(CLUSTER, 0.5) == SILENT
    laptop.reaches("vpn", VPN)
    laptop.is_as(before)


def test_strict_about_return_paths(every: Beside) -> None:
    """RFC 3704, strict mode, on every device that there is or will be."""
    laptop = every.laptop
    devices = ["all", "default", "eth1", every.kind.device]
    try:
        for device in devices:
            laptop.lab.sysctl("laptop", f"net/ipv4/conf/{device}/rp_filter", 1)
        laptop.reaches("vpn", VPN)
        with laptop.connected():
            assert laptop.sh("cat /proc/sys/net/ipv4/conf/tpvpn0/rp_filter") == "1\n"
            every.reaches_all()
    finally:
        for device in devices:
            laptop.lab.sysctl("laptop", f"net/ipv4/conf/{device}/rp_filter", 0)


def test_a_manager_in_a_routed_subnet_keeps_its_path(every: Beside) -> None:
    """Or the tunnel's own packets would go into the tunnel."""
    before = every.way(NODE)
    options = (*ALLOWED, "--also-proxy", LAN, "--allow-conflicting-subnets", LAN)
    with every.laptop.connected(*options):
        every.reaches_all()
        assert every.way(NODE) == before
        assert every.way("192.0.2.99").startswith("tpvpn")
        bulk(every.laptop)
        every.laptop.reaches("cluster", CLUSTER)


def bulk(laptop: Laptop) -> None:
    done = laptop.run("iperf3", "--client", PODS[0], "--bytes", "20M")
    assert done.returncode == 0, done.stdout + done.stderr


# -- a full tunnel -----------------------------------------------------------------------------------------------------


def test_a_full_tunnel_carries_ours(full: Beside) -> None:
    """The session's connection has the VPN's address, and its bytes are counted on the VPN's device."""
    laptop, device = full.laptop, full.kind.device

    def sent() -> int:
        (link,) = json.loads(laptop.sh(f"ip -s -j link show dev {device}"))
        return link["stats64"]["tx"]["bytes"]

    with laptop.connected():
        connections = json.dumps(laptop.sh("ss --tcp --numeric --no-header state established dst 192.0.2.10"))
        assert "10.8.0.2:" in connections and "198.51.100.2:" not in connections
        before = sent()
        bulk(laptop)
        assert sent() - before > 15_000_000, "of 20 MiB; a sender's queue may be left over"
        full.reaches_all()


# -- a VPN that comes and goes -----------------------------------------------------------------------------------------


def test_a_vpn_that_comes_gets_its_routes(split: Beside) -> None:
    """Connected first; a VPN's routes are its own again at once, and the subnets return when it leaves."""
    laptop, lab = split.laptop, split.laptop.lab
    lab.vpn_down()
    before, theirs = laptop.state(), laptop.theirs()
    with laptop.connected("--on-conflict", "fail") as session:
        routed = split.ours()
        assert len(routed) == 4
        for turn in (1, 2):
            laptop.reaches("cluster", CLUSTER)
            lab.vpn_up()
            eventually(lambda: split.ours() == set(), 1.5, "withdrawn")
            laptop.reaches("vpn", VPN)
            assert laptop.probe(CLUSTER, 0.5) == SILENT
            lab.vpn_down()
            eventually(lambda: split.ours() == routed, 1.5, "back")
            assert session.said.count(f"{SERVICE_CIDR} is now conflict: 10.0.0.0/8 on {split.kind.device}") == turn
        laptop.reaches("cluster", CLUSTER)
        assert laptop.theirs() == theirs
    laptop.is_as(before)
    lab.vpn_up()


def test_a_vpn_that_comes_where_it_is_allowed(split: Beside) -> None:
    lab = split.laptop.lab
    lab.vpn_down()
    with split.laptop.connected():
        routed = split.ours()
        lab.vpn_up()
        # strongSwan's rule comes in front of ours, which is then placed anew.
        eventually(lambda: split.way(SERVICES[0]).startswith("tpvpn"), 1.5, "in front again")
        split.reaches_all()
        assert split.ours() == routed


def test_a_vpn_that_leaves_and_returns(split: Beside) -> None:
    """It was there first: what is allowed stays where it is throughout."""
    laptop, lab = split.laptop, split.laptop.lab
    with laptop.connected(*ALLOWED, wanted=WANTED4) as session:
        routed = split.ours()
        lab.vpn_down()
        laptop.reaches("cluster", CLUSTER4)
        lab.vpn_up()
        eventually(lambda: split.way(SERVICES[0]).startswith("tpvpn"), 1.5, "in front again")
        laptop.reaches("cluster", CLUSTER4)
        laptop.reaches("vpn", VPN)
        assert split.ours() == routed
        assert session.process.poll() is None


def test_a_vpn_that_leaves_makes_room(split: Beside) -> None:
    """Skipped at first, then routed, then skipped again."""
    laptop, lab = split.laptop, split.laptop.lab
    with laptop.connected("--on-conflict", "skip"):
        assert split.ours() == set()
        laptop.reaches("vpn", VPN)
        lab.vpn_down()
        eventually(lambda: len(split.ours()) == 4, 1.5, "routed")
        laptop.reaches("cluster", CLUSTER)
        lab.vpn_up()
        eventually(lambda: split.ours() == set(), 1.5, "withdrawn")
        laptop.reaches("vpn", VPN)
