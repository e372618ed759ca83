"""Several clients at once: they all work, nothing passes between them, and names and devices belong to one only."""

import contextlib
import json
import re
from collections.abc import Generator, Iterator

import pytest
from laptop import ALLOWED, CLUSTER, VPN, Laptop, at_the_kernel_exit

import peers
from peers import eventually
from pod import run
from tpvpn.lab.topology import POD_CIDR, POD_CIDR6, PODS, PODS6, SERVICE_CIDR, SERVICE_CIDR6, SERVICES, SERVICES6

SERVICES_ONLY = ("--service-cidr", SERVICE_CIDR, "--service-cidr", SERVICE_CIDR6)
PODS_ONLY = ("--pod-cidr", POD_CIDR, "--pod-cidr", POD_CIDR6)

# Another laptop at another port of the node, without any VPN.
SECOND = """
ip netns add "$1"
ip -n "$2" link add lan2 type veth peer name eth0 netns "$1"
ip -n "$2" address add 198.18.5.1/30 dev lan2
ip -n "$2" link set lan2 up
ip -n "$1" link set lo up
ip -n "$1" address add 198.18.5.2/30 dev eth0
ip -n "$1" link set eth0 up
ip -n "$1" route add default via 198.18.5.1
"""


@pytest.fixture(scope="module")
def second(laptop: Laptop) -> Iterator[Laptop]:
    namespace = f"{laptop.lab.prefix}-second"
    try:
        run("sh", "-ec", SECOND, "sh", namespace, laptop.lab.namespace("node"))
        second = Laptop(laptop.lab, namespace)
        second.settle()
        yield second
    finally:
        run("ip", "netns", "delete", namespace)


def addresses(laptop: Laptop) -> list[str]:
    """Those that the manager gave to the one session of a laptop."""
    (session,) = json.loads(laptop.tpvpn("status", "--output", "json").stdout)["sessions"]
    return session["addresses"]


def dropped(laptop: Laptop) -> dict[str, int]:
    """Packets that the manager dropped, by reason."""
    lab = laptop.lab
    metrics = lab.probe("node", [lab.manager], path="/metrics")[lab.manager]
    assert metrics
    return peers.dropped(metrics)


@contextlib.contextmanager
def nothing_changed(*laptops: Laptop) -> Generator[None]:
    before = [laptop.state() for laptop in laptops]
    yield
    for laptop, state in zip(laptops, before, strict=True):
        laptop.is_as(state)


def test_two_laptops(laptop: Laptop, second: Laptop) -> None:
    with nothing_changed(laptop, second), laptop.connected(), second.connected():
        assert not set(addresses(laptop)) & set(addresses(second))
        laptop.reaches("cluster", CLUSTER)
        second.reaches("cluster", CLUSTER)
        laptop.reaches("vpn", VPN)


def test_one_goes_and_the_other_stays(laptop: Laptop, second: Laptop) -> None:
    with second.connected():
        for _ in range(2):
            with laptop.connected():
                second.reaches("cluster", CLUSTER)
            second.reaches("cluster", CLUSTER)


def test_nothing_passes_between_them(laptop: Laptop, second: Laptop) -> None:
    """What one sends to the other's address is dropped and counted at the manager, and never comes."""
    with second.connected():
        other = addresses(second)
        assert len(other) == 2
        with laptop.connected(*ALLOWED, "--also-proxy", ",".join(other)):
            before, guarded = dropped(laptop), second.sh("nft list counters")
            for address in other:
                assert "dev tpvpn0" in laptop.sh(f"ip route get {address}")
                assert laptop.run("ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", address).returncode == 1
            assert laptop.probe(other, 0.3) == dict.fromkeys(other)
            after = dropped(laptop)
            # Three pings to each, and at least a SYN.
            assert sum(after.values()) - sum(before.values()) >= 8, (before, after)
            assert second.sh("nft list counters") == guarded
            laptop.reaches("cluster", CLUSTER)
            second.reaches("cluster", CLUSTER)


def test_two_sessions_of_one_laptop(laptop: Laptop) -> None:
    with (
        nothing_changed(laptop),
        laptop.connected(*ALLOWED, "--name", "services", wanted=SERVICES_ONLY) as services,
        laptop.connected(*ALLOWED, "--name", "pods", wanted=PODS_ONLY) as pods,
    ):
        laptop.reaches("cluster", CLUSTER)
        laptop.reaches("vpn", VPN)
        assert {one["device"] for one in sessions(laptop)} == {"tpvpn-services", "tpvpn-pods"}
        which = laptop.tpvpn("quit")
        assert which.returncode == 2
        assert "pods" in which.stderr and "services" in which.stderr
        assert laptop.tpvpn("quit", "--name", "services").returncode == 0
        assert services.wait() == 0
        eventually(lambda: len(sessions(laptop)) == 1, 3, "one session")
        laptop.reaches("cluster", (*PODS, *PODS6))
        silent = (*SERVICES, *SERVICES6)
        assert laptop.probe(silent, 0.5) == dict.fromkeys(silent)
        assert pods.process.poll() is None


def sessions(laptop: Laptop) -> list[dict[str, object]]:
    return json.loads(laptop.tpvpn("status", "--output", "json").stdout)["sessions"]


def test_a_name_is_one_sessions_only(laptop: Laptop) -> None:
    with laptop.connected() as session, nothing_changed(laptop):
        refused = laptop.connect(*ALLOWED)
        assert (refused.returncode, refused.stdout) == (2, "")
        for said in ("'default'", str(session.process.pid), "tpvpn quit", "--name"):
            assert said in refused.stderr, refused.stderr
        laptop.reaches("cluster", CLUSTER)


def test_two_at_the_same_moment(laptop: Laptop) -> None:
    """One of them gets the name."""
    with nothing_changed(laptop), laptop.start(*ALLOWED) as one, laptop.start(*ALLOWED) as other:
        eventually(lambda: None in (one.process.poll(), other.process.poll()), 1)
        eventually(lambda: {one.process.poll(), other.process.poll()} == {None, 2}, 10, "one is refused")
        winner, loser = (one, other) if other.process.poll() == 2 else (other, one)
        assert "runs already" in loser.said
        winner.wait_ready()
        laptop.reaches("cluster", CLUSTER)


@pytest.mark.parametrize("create", ["link add tpvpn0 type veth peer name other", "tuntap add tpvpn0 mode tun"])
def test_a_device_that_is_another_programs(laptop: Laptop, create: str) -> None:
    laptop.sh(f"ip {create}; ip address add 10.9.9.9/32 dev tpvpn0; ip link set tpvpn0 up")
    try:
        laptop.settle()
        with nothing_changed(laptop):
            refused = laptop.connect(*ALLOWED)
            assert (refused.returncode, refused.stdout) == (2, "")
            assert "tpvpn0 is in use" in refused.stderr
        with laptop.connected(*ALLOWED, "--name", "other"):
            laptop.reaches("cluster", CLUSTER)
    finally:
        laptop.sh("ip link delete tpvpn0")


@at_the_kernel_exit
def test_the_manager_takes_an_address_back(laptop: Laptop, second: Laptop) -> None:
    """Sessions that come and go leave nothing at the manager either."""
    with second.connected():
        node = laptop.lab.namespace("node")
        state = "ip -n $1 link; ip -n $1 route show table all; ip -n $1 -6 route show table all"

        def devices() -> list[str]:
            return re.findall(r"^\d+: (tpvpn\w*)", laptop.sh(state, node), re.MULTILINE)

        before = devices()  # those of sessions that linger too
        with laptop.connected():
            assert len(devices()) == len(before) + 1
        eventually(lambda: devices() == before, 2, "its device at the manager is gone")
