"""Laptops as they are found: without IPv6, without a default route, strict about return paths, with containers behind
them, on VPNs that come and go, beside programs that touch our rules; and a node that does not forward."""

import json
import os
import re
from collections.abc import Iterator

import pytest
from laptop import ALLOWED, CLUSTER, CLUSTER4, CLUSTER6, EXIT, VPN, Laptop, at_the_kernel_exit, lab_with_manager

from peers import eventually
from pod import run
from tpvpn.lab import Lab
from tpvpn.lab.topology import PODS, PODS6, SERVICE_CIDR, SERVICES, SERVICES6, VPN_HOSTS

CONTAINER, CONTAINER6 = "172.18.0.2", "fd18::2"


@pytest.fixture
def own() -> Iterator[Laptop]:
    """A lab of the test's own, to be changed as it likes."""
    with lab_with_manager() as laptop:
        yield laptop


def reaches_all(laptop: Laptop) -> None:
    laptop.reaches("cluster", CLUSTER)
    laptop.reaches("vpn", VPN)


# -- as it is found ----------------------------------------------------------------------------------------------------


def test_ipv6_switched_off(own: Laptop) -> None:
    """It degrades: what is IPv4 works, and the rest is named."""
    for which in ("all", "default"):
        own.lab.sysctl("laptop", f"net/ipv6/conf/{which}/disable_ipv6", 1)
    before = own.state()
    assert "inet6" not in before
    with own.connected() as session:
        own.reaches("cluster", CLUSTER4)
        own.reaches("vpn", VPN_HOSTS)
        assert "IPv6 is switched off" in own.tpvpn("status").stdout
        assert "inet6" not in own.state()
        assert "fd74" not in session.said
    own.is_as(before)


def test_ipv6_switched_off_everywhere() -> None:
    with lab_with_manager(ipv6=False) as laptop:
        before = laptop.state()
        with laptop.connected():
            laptop.reaches("cluster", CLUSTER4)
        laptop.is_as(before)


def test_a_manager_without_ipv6() -> None:
    """What it does not carry stays where it is."""
    with Lab(f"tv{os.getpid()}six", exit=EXIT) as lab:
        lab.sysctl("node", "net/ipv6/conf/all/disable_ipv6", 1)
        lab.start_manager()
        laptop = Laptop(lab)
        with laptop.connected():
            laptop.reaches("cluster", CLUSTER4)
            laptop.reaches("vpn", VPN)
            status = laptop.tpvpn("status").stdout
            assert "the manager carries no IPv6" in status
            assert re.search(r"excluded +fd10:130::/112", status)
            assert "dev tpvpn0" not in laptop.sh(f"ip -6 route get {SERVICES6[0]}")


def test_a_manager_without_ping() -> None:
    """A pod's net.ipv4.ping_group_range leaves its process out: said, and not faked; all else works."""
    with Lab(f"tv{os.getpid()}mute", vpn="none", exit="socket") as lab:
        lab.sysctl("node", "net/ipv4/ping_group_range", "1 0")
        lab.start_manager()
        laptop = Laptop(lab)
        with laptop.connected() as session:
            assert "warning: no ping over IPv4 and IPv6" in session.said
            laptop.reaches("cluster", CLUSTER4)
            assert "Packet filtered" in laptop.run("ping", "-c", "1", "-W", "2", CLUSTER4[0]).stdout
            said = laptop.tpvpn("status").stdout
            assert "ping      unsupported over ipv4: the manager's pod would need" in said
            assert "ping      unsupported over ipv6: the manager's pod would need" in said
            (shown,) = json.loads(laptop.tpvpn("status", "--output", "json").stdout)["sessions"]
            assert shown["manager"]["ping"] == {"ipv4": False, "ipv6": False}


def test_no_default_route(own: Laptop) -> None:
    own.sh("ip route delete default; ip -6 route delete default")
    before = own.state()
    with own.connected():
        reaches_all(own)
    own.is_as(before)


def test_strict_about_return_paths(own: Laptop) -> None:
    """Strict reverse path filtering (RFC 3704) everywhere, on our device too."""
    for device in ("all", "default", "eth0", "tun0"):
        own.lab.sysctl("laptop", f"net/ipv4/conf/{device}/rp_filter", 1)
    with own.connected(*ALLOWED, "--never-proxy", f"{PODS[1]}/32"):
        assert own.sh("cat /proc/sys/net/ipv4/conf/tpvpn0/rp_filter") == "1\n"
        own.reaches("cluster", [one for one in CLUSTER if one != PODS[1]])
        own.reaches("vpn", VPN)
        assert "1480 bytes from" in own.sh(f"ping -n -c 1 -W 3 -s 1472 {PODS[0]}")


# -- containers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def container(laptop: Laptop) -> Iterator[Laptop]:
    """A container on a bridge of the laptop, which forwards for it."""
    namespace = f"{laptop.lab.prefix}-container"
    build = """
    ip netns add "$1"
    ip -n "$2" link add docker0 type bridge
    ip -n "$2" link add port type veth peer name eth0 netns "$1"
    ip -n "$2" link set port master docker0 up
    ip -n "$2" link set docker0 up
    ip -n "$2" address add 172.18.0.1/16 dev docker0
    ip -n "$2" address add fd18::1/64 dev docker0 nodad
    ip -n "$1" link set lo up
    ip -n "$1" link set eth0 up
    ip -n "$1" address add 172.18.0.2/16 dev eth0
    ip -n "$1" address add fd18::2/64 dev eth0 nodad
    ip -n "$1" route add default via 172.18.0.1
    ip -n "$1" route add default via fd18::1
    """
    try:
        for switch in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            laptop.lab.sysctl("laptop", switch, 1)
        run("sh", "-ec", build, "sh", namespace, laptop.lab.namespace("laptop"))
        laptop.settle()
        container = Laptop(laptop.lab, namespace)
        container.settle()
        yield container
    finally:
        run("ip", "netns", "delete", namespace)


def test_a_container_uses_the_tunnel(laptop: Laptop, container: Laptop) -> None:
    """Masqueraded to our address, since that is the only one that the manager takes."""
    before = laptop.state()
    with laptop.connected():
        container.reaches("cluster", CLUSTER)
        for pod in (PODS[0], PODS6[0], SERVICES[1], SERVICES6[0]):
            assert " 0% packet loss" in container.sh(f"ping -n -c 3 -i 0.1 -W 3 {pod}")
        # More than the MTU, in fragments, through two devices.
        assert "3008 bytes from" in container.sh(f"ping -n -c 1 -W 3 -s 3000 {PODS[0]}")
    assert container.probe(CLUSTER, 0.5) == dict.fromkeys(CLUSTER)
    laptop.is_as(before)


def test_a_container_carries_bulk(laptop: Laptop, container: Laptop) -> None:
    with laptop.connected():
        for way in ((), ("--reverse",)):
            done = container.run("iperf3", "--client", PODS[0], "--bytes", "100M", *way)
            assert done.returncode == 0, done.stdout


@at_the_kernel_exit
def test_nothing_new_comes_in_to_a_container(laptop: Laptop, container: Laptop) -> None:
    """The node, which could route to it, gets nowhere."""
    lab = laptop.lab
    with laptop.connected() as session:
        found = re.search(r"has (\S+) and (\S+),", session.said)
        assert found
        (device,) = re.findall(r"^\d+: (tpvpn[^:@]*)", lab.run("node", ["ip", "link"]).stdout, re.MULTILINE)
        lab.run("node", ["ip", "route", "add", CONTAINER, "dev", device])
        for target in (found[1], found[2], CONTAINER):
            assert lab.run("node", ["ping", "-c", "2", "-i", "0.1", "-W", "1", target], check=False).returncode == 1
        # The pump has dropped what is for another address; what is for ours, the guard drops and counts.
        guard = laptop.sh("nft list counters")
        assert re.search(r"new_flow \{\s+packets 4 ", guard), guard
        container.reaches("cluster", [PODS[0]])


# -- what comes and goes -----------------------------------------------------------------------------------------------

VPN_UP = """
ip link add tun0 type veth peer name tun0 netns "$1"
ip -n "$1" link set tun0 up
ip -n "$1" address add 10.8.0.1/24 dev tun0
ip link set tun0 up
ip address add 10.8.0.2/24 dev tun0
ip route add 10.0.0.0/8 via 10.8.0.1
"""


@pytest.fixture(scope="module")
def at_home() -> Iterator[Laptop]:
    """A laptop on no VPN yet."""
    with lab_with_manager("none") as laptop:
        yield laptop


def vpn_up(laptop: Laptop) -> None:
    """The VPN starts; its routes are there when this returns."""
    laptop.sh(VPN_UP, laptop.lab.namespace("vpn"))


def vpn_down(laptop: Laptop) -> None:
    laptop.sh("ip link delete tun0")


def ours(laptop: Laptop, version: int = 4) -> set[str]:
    """What is routed into the tunnel."""
    return {line.split()[0] for line in laptop.sh(f"ip -{version} route show table all proto 116").splitlines()}


def test_a_vpn_that_comes_and_goes(at_home: Laptop) -> None:
    """Its private routes are its own again within a second; when it leaves, the subnets return."""
    laptop = at_home
    before = laptop.state()
    with laptop.connected("--on-conflict", "fail") as session:
        all4, all6 = ours(laptop, 4), ours(laptop, 6)
        assert len(all4) == len(all6) == 2
        for _ in range(2):
            laptop.reaches("cluster", CLUSTER)
            vpn_up(laptop)
            eventually(lambda: ours(laptop) == set(), 1.5, "withdrawn")
            laptop.reaches("vpn", VPN_HOSTS)
            laptop.reaches("cluster", CLUSTER6)
            assert laptop.probe(CLUSTER4, 0.5) == dict.fromkeys(CLUSTER4)
            session.says(f"{SERVICE_CIDR} is now conflict: 10.0.0.0/8 on tun0")
            assert ours(laptop, 6) == all6
            vpn_down(laptop)
            eventually(lambda: ours(laptop) == all4, 1.5, "back")
        laptop.reaches("cluster", CLUSTER)
        assert session.said.count(f"{SERVICE_CIDR} is now routed") == 2
        assert session.process.poll() is None
    laptop.is_as(before)


def test_a_vpn_that_comes_where_it_is_allowed(at_home: Laptop) -> None:
    with at_home.connected("--allow-conflicting-subnets", "10.128.0.0/9"):
        routed = ours(at_home)
        vpn_up(at_home)
        try:
            at_home.reaches("vpn", VPN_HOSTS)
            at_home.reaches("cluster", CLUSTER4)
            assert ours(at_home) == routed
        finally:
            vpn_down(at_home)


def test_a_route_that_one_of_two_meets(at_home: Laptop) -> None:
    """Only what conflicts is withdrawn: a host route inside of the services."""
    with at_home.connected("--on-conflict", "fail"):
        routed = ours(at_home)
        at_home.sh("ip route add 10.130.7.7/32 via 192.0.2.10")
        eventually(lambda: ours(at_home) == routed - {SERVICE_CIDR}, 1.5, "withdrawn")
        at_home.reaches("cluster", PODS)
        at_home.sh("ip route delete 10.130.7.7/32")
        eventually(lambda: ours(at_home) == routed, 1.5, "back")
        at_home.reaches("cluster", CLUSTER)


@pytest.mark.parametrize("version", [4, 6])
def test_our_rule_is_put_back(laptop: Laptop, version: int) -> None:
    """Another program deletes it, or a rule comes in front of it that would take the packets away."""
    before = laptop.state()

    def rules() -> list[str]:
        return [line.split("\t")[1] for line in laptop.sh(f"ip -{version} rule").splitlines()]

    with laptop.connected():
        placed = rules()
        assert "proto 116" in placed[1]
        preference = laptop.sh(f"ip -{version} rule").splitlines()[1].partition(":")[0]
        laptop.sh(f"ip -{version} rule delete preference {preference}")
        eventually(lambda: rules() == placed, 1.5, "put back")
        reaches_all(laptop)
        laptop.sh(f"ip -{version} rule add preference 5 table main")
        eventually(lambda: "proto 116" in rules()[1] and len(rules()) == len(placed) + 1, 1.5, "in front again")
        reaches_all(laptop)
        laptop.sh(f"ip -{version} rule delete preference 5")
    laptop.is_as(before)


def test_our_routes_are_put_back(laptop: Laptop) -> None:
    before = laptop.state()
    with laptop.connected():
        routed, routed6 = ours(laptop, 4), ours(laptop, 6)
        laptop.sh("ip route flush table all proto 116; ip -6 route flush table all proto 116")
        eventually(lambda: (ours(laptop, 4), ours(laptop, 6)) == (routed, routed6), 1.5, "put back")
        reaches_all(laptop)
    laptop.is_as(before)


# -- the node ----------------------------------------------------------------------------------------------------------


def test_a_node_that_does_not_forward() -> None:
    """The manager switches on what its sessions need, and off again when it ends."""
    with lab_with_manager(forwarding=False) as laptop:
        assert laptop.lab.run("node", ["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"
        with laptop.connected():
            laptop.reaches("cluster", CLUSTER)
            laptop.reaches("vpn", VPN)
