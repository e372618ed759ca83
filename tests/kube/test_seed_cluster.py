"""The seed scenario on a real cluster, whose API server answers through a real OpenVPN alone.

                203.0.113.0/30                198.51.100.0/30                   10.131.0.0/24
    laptop eth0 ============== eth0 internet eth1 =========== eth1 vpn eth0 ============ br0 API server, nodes
      |     .2                 .1             .2               .1   |    .90
      | tun0 10.8.0.2, private route 10.0.0.0/8                tun0 | 10.8.0.1, masquerades; office host 10.1.2.3
      +-------------------------------------------------------------+

The private route covers the API server (10.131.0.11), the services (10.130.0.0/16), the pods (10.132.0.0/23) and the
office alike; what the VPN knows no way to it says so (ICMP unreachable).
"""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes_lab import TPVPN, Kubernetes
from kubernetes_laptop import KubernetesLaptop

from peers import eventually
from pod import namespace, run, sysctl
from tpvpn.lab.openvpn import OpenVpn
from tpvpn.lab.processes import Processes
from tpvpn.lab.topology import VPN_CLIENT, VPN_SERVER

LAN, LAN_ADDRESS, LAN_PORT = "tvkube-lan", "10.131.0.90", "openvpn"
LAPTOP, HOME = "203.0.113.2", "203.0.113.1"
OFFICE = "10.1.2.3"
API = "10.131.0.11"
SERVICES, PODS = "10.130.0.0/16", "10.132.0.0/23"
DNS = "10.130.0.10"
NAMESPACE = "seed"
LOST = 30.0
"""Seconds in which a dead link is noticed: 15 without an answer, asked every 5."""
MASQUERADE = 'table inet vpn { chain out { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }; }'


class Corporate:
    """A laptop that reaches the cluster's API server through its company's VPN only."""

    def __init__(self, cluster: Kubernetes, directory: Path, laptop: str, server: str) -> None:
        self.laptop = KubernetesLaptop(cluster, laptop, "--manager-namespace", NAMESPACE)
        self.cluster = cluster
        self._directory, self._server = directory, server
        self._processes = Processes(directory / "pids")
        self._openvpn = OpenVpn(directory, ipv6=False, full=False)
        self._openvpn.prepare()
        self._client = 0

    def start(self) -> None:
        """The VPN's far end, and an office behind it."""
        self._run("office", self._server, [sys.executable, "-m", "tpvpn.lab.servers", "office", OFFICE])
        self._run("server", self._server, self._openvpn.server(), self._openvpn.up)

    def end(self) -> None:
        self._processes.end()

    def vpn_up(self) -> None:
        self._client = self._run("client", self.laptop.namespace, self._openvpn.client(), self._openvpn.up)

    def vpn_down(self) -> None:
        self._processes.end(self._client)

    def _run(self, name: str, where: str, argv: list[str], up: str = "") -> int:
        """Start a program in a network namespace, and wait until it says that it is up."""
        log = self._directory / f"{name}.log"
        with log.open("wb") as output:
            enter = ["nsenter", f"--net=/run/netns/{where}"]
            process = self._processes.start([*enter, *argv], stdout=output, stderr=subprocess.STDOUT)
        eventually(lambda: up in log.read_text(), 15, f"{up!r} of {name}")
        return process.pid

    def reaches_all(self) -> None:
        """Pods, services, the office, and the API server by the VPN."""
        coredns = self.cluster.coredns
        assert self.get(f"http://{coredns}:8080/health") == "OK"
        assert self.get("https://10.130.0.1/readyz") == "ok"
        assert self.laptop.run("ping", "-c", "1", "-W", "3", coredns).returncode == 0
        self.reaches_office()
        for address, device in ((coredns, "tpvpn0"), (DNS, "tpvpn0"), (API, "tun0"), (OFFICE, "tun0")):
            assert f" dev {device} " in self.laptop.sh(f"ip route get {address}")

    def reaches_office(self) -> None:
        self.laptop.reaches("office", [OFFICE])

    def get(self, url: str) -> str:
        return self.laptop.run("curl", "--silent", "--insecure", "--max-time", "5", url).stdout


@pytest.fixture(scope="module")
def corporate(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corporate]:
    with (
        namespace("laptop") as laptop,
        namespace("internet") as internet,
        namespace("vpn") as server,
        cluster.namespace(NAMESPACE),
    ):
        run("ip", "link", "add", "eth0", "netns", laptop, "type", "veth", "peer", "name", "eth0", "netns", internet)
        run("ip", "link", "add", "eth1", "netns", internet, "type", "veth", "peer", "name", "eth1", "netns", server)
        run("ip", "link", "add", "eth0", "netns", server, "type", "veth", "peer", "name", LAN_PORT, "netns", LAN)
        run("ip", "-n", LAN, "link", "set", LAN_PORT, "master", "br0", "up")
        for where, device, address in (
            (laptop, "eth0", f"{LAPTOP}/30"),
            (internet, "eth0", f"{HOME}/30"),
            (internet, "eth1", f"{VPN_CLIENT}/30"),
            (server, "eth1", f"{VPN_SERVER}/30"),
            (server, "eth0", f"{LAN_ADDRESS}/24"),
            (server, "lo", f"{OFFICE}/32"),
        ):
            sysctl(where, "ipv6/conf/all/disable_ipv6", "1")
            run("ip", "-n", where, "address", "add", address, "dev", device)
            run("ip", "-n", where, "link", "set", device, "up")
        run("ip", "-n", laptop, "route", "add", "default", "via", HOME)
        run("ip", "-n", internet, "route", "add", "blackhole", "10.0.0.0/8")
        run("ip", "-n", server, "route", "add", f"{LAPTOP}/32", "via", VPN_CLIENT)
        run("ip", "-n", server, "route", "add", "unreachable", "default")
        run("ip", "netns", "exec", server, "nft", MASQUERADE)
        for where, forwards in ((laptop, "0"), (internet, "1"), (server, "1")):
            sysctl(where, "ipv4/ip_forward", forwards)
        corporate = Corporate(cluster, tmp_path_factory.mktemp("openvpn"), laptop, server)
        try:
            corporate.start()
            blind = cluster.tpvpn("plan", "--request-timeout", "2", where=laptop)
            assert (blind.returncode, "is the VPN up" in blind.stderr) == (4, True), blind.stderr
            corporate.vpn_up()
            yield corporate
        finally:
            corporate.end()


@pytest.fixture
def before(corporate: Corporate) -> Iterator[str]:
    """The laptop's state without a session, which it must have again when the test ends."""
    before = corporate.laptop.state()
    yield before
    corporate.laptop.is_as(before)
    corporate.reaches_office()


@pytest.fixture
def again(corporate: Corporate) -> Iterator[None]:
    """The same for tests with a VPN that comes again, which has another device then: compared without it."""
    corporate.vpn_down()
    before = corporate.laptop.state()
    corporate.vpn_up()
    yield
    corporate.vpn_down()
    corporate.laptop.is_as(before)
    corporate.vpn_up()
    corporate.reaches_office()


def printed_command(text: str) -> list[str]:
    """The first command that a report tells to run."""
    found = re.search(r"^\s+(tpvpn connect (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert found, text
    return shlex.split(found[1].replace("\\\n", " "))


def test_refused_with_every_conflict_named_and_nothing_changed(corporate: Corporate, before: str) -> None:
    laptop = corporate.laptop
    plan, refused = laptop.tpvpn("plan", *laptop.manager), laptop.connect()
    assert laptop.state() == before
    for done, report in ((plan, plan.stdout), (refused, refused.stderr)):
        assert done.returncode == 3, done.stderr
        for named in (SERVICES, PODS, "10.0.0.0/8", "tun0", "openvpn"):
            assert named in report, report
        assert "--allow-conflicting-subnets" in printed_command(report)
    assert corporate.cluster.objects("jobs", NAMESPACE) == []


def test_the_printed_command_works_as_it_is(corporate: Corporate, before: str) -> None:
    """That of `connect` is complete; who pastes it has the cluster and keeps the office."""
    laptop = corporate.laptop
    command = printed_command(laptop.connect().stderr)
    assert command[:2] == ["tpvpn", "connect"]
    script = f"curl --silent --insecure https://10.130.0.1/readyz && curl --silent http://{OFFICE}/"
    done = laptop.run(*TPVPN, *command[1:], "--", "sh", "-ec", script)
    assert (done.returncode, done.stdout) == (0, f"okoffice {OFFICE}\n"), done.stderr


def allowed(corporate: Corporate) -> list[str]:
    """The flags that the report says."""
    words = printed_command(corporate.laptop.connect().stderr)
    return [word for pair in itertools.pairwise(words) if pair[0] == "--allow-conflicting-subnets" for word in pair]


def test_everything_is_reached_and_a_vpn_that_is_away_for_a_while_is_waited_for(
    corporate: Corporate, again: None
) -> None:
    with corporate.laptop.connected(*allowed(corporate)) as session:
        corporate.reaches_all()
        addresses = corporate.laptop.status()["addresses"]
        corporate.vpn_down()
        assert corporate.laptop.run("ip", "link", "show", "tun0").returncode != 0
        session.says("connecting again", LOST)
        assert corporate.laptop.status()["state"] == "reconnecting"
        corporate.vpn_up()
        eventually(lambda: "connected again" in session.said or session.process.poll() is not None, 30)
        assert session.process.poll() is None, session.said
        eventually(lambda: corporate.laptop.status()["state"] == "ready", 5)
        corporate.reaches_all()
        assert corporate.laptop.status()["addresses"] == addresses


def test_a_vpn_that_stays_away_ends_the_session_with_one_sentence(corporate: Corporate, again: None) -> None:
    """When it was told to give up."""
    with corporate.laptop.connected(*allowed(corporate), "--request-timeout", "3", "--give-up-after", "3") as session:
        corporate.vpn_down()
        try:
            assert session.wait(LOST + 30) == 7, session.said
            *_, last = session.said.splitlines()
            assert last.startswith("tpvpn: ") and "and no other is to be had: " in last and API in last
        finally:
            corporate.vpn_up()
