"""Virtual subnets at the kernel exit: what arrives where, what comes back, and what no mapping opens.

A session asks 246.130.0.0/16 and fd74:7077:132::/64; the cluster of tests/pod has the addresses that they stand for.
"""

import contextlib
import itertools
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from exits import ask, exit_in, place, receive, send, silent
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6TimeExceeded, IPv6
from scapy.packet import Packet, Raw

from pod import CLUSTER4, CLUSTER6, POD4, POD6, SERVICE4, inside, readable, run, sysctl, udp_server
from tpvpn.errors import ManagerError, UsageError
from tpvpn.manager.kernel_exit import ExitSession
from tpvpn.nfnetlink import Table

__all__ = ["place"]

FOUR, SIX = ("246.130.0.0/16", "10.130.0.0/16"), ("fd74:7077:132::/64", "fd00:132::/64")
PODS = ("246.132.0.0/16", "10.132.0.0/16")
VIRTUAL4, VIRTUAL6, VIRTUAL_POD = "246.130.0.1", "fd74:7077:132::9", "246.132.0.9"  # SERVICE4, CLUSTER6, CLUSTER4


_numbers = itertools.count(1)


def own() -> tuple[str, str]:
    """Addresses that no other test's session has had: what its connections still say does not come here."""
    number = next(_numbers)
    return f"246.9.0.{number}", f"fd74:7076:706e:9::{number:x}"


def map_to(session: ExitSession, pod: str, *pairs: tuple[str, str]) -> None:
    with inside(pod):
        session.set_virtual([(ip_network(virtual), ip_network(real)) for virtual, real in pairs])


def to(session: ExitSession, address: str, **fields) -> Packet:
    """An IP header from the session to an address."""
    return IPv6(src=session.ipv6, dst=address, **fields) if ":" in address else IP(src=session.ipv4, dst=address)


def tables(pod: str) -> str:
    return run("ip", "netns", "exec", pod, "nft", "list", "tables")


@contextlib.contextmanager
def mapped(pod: str, *pairs: tuple[str, str], **options) -> Iterator[tuple[ExitSession, dict[str, int]]]:
    """A session with a mapping, and what the exit dropped, which must come true by the end."""
    dropped: dict[str, int] = {}
    with exit_in(pod, own(), **options) as (way_out, [session]):
        map_to(session, pod, *pairs)
        yield session, dropped
        assert {name: count for name, count in way_out.dropped().items() if count} == dropped


# -- what arrives, and what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("virtual", "real", "pod_address"), [(VIRTUAL4, SERVICE4, POD4), (VIRTUAL6, CLUSTER6, POD6)], ids=["ipv4", "ipv6"]
)
def test_udp_arrives_at_the_real_address_and_its_answer_comes_from_the_virtual_one(
    place, virtual: str, real: str, pod_address: str
) -> None:
    pod, cluster = place
    with mapped(pod, FOUR, SIX) as (session, _), udp_server(cluster, real, 5300) as server:
        send(session, to(session, virtual) / UDP(sport=4000, dport=5300) / Raw(b"ping"))
        asked, sender = server.recvfrom(100)
        assert (asked, sender[:2]) == (b"ping", (pod_address, 4000))
        server.sendto(b"pong", sender)
        answer = receive(session)
        assert answer is not None
        assert (answer.src, answer[UDP].sport, answer[UDP].dport) == (virtual, 5300, 4000)
        assert bytes(answer[UDP].payload) == b"pong"
        assert intact(answer)


def intact(packet: Packet) -> bool:
    """Its checksums fit the translated addresses (a packet from a TUN with offload may leave the last one undone)."""
    data = bytes(packet)
    again = packet.copy()
    for layer in (IP, ICMP):
        if layer in again:
            del again[layer].chksum
    return bytes(again) == data


@pytest.mark.parametrize(("virtual", "real"), [(VIRTUAL4, SERVICE4), (VIRTUAL6, CLUSTER6)], ids=["ipv4", "ipv6"])
def test_tcp_connects_and_is_refused_truthfully(place, virtual: str, real: str) -> None:
    pod, cluster = place
    with inside(cluster):
        server = socket.create_server((real, 8080), family=socket.AF_INET6 if ":" in real else socket.AF_INET)
    with server, mapped(pod, FOUR, SIX) as (session, _):
        ip = to(session, virtual)
        taken = ask(session, ip / TCP(sport=4001, dport=8080, flags="S"))
        assert (taken.src, str(taken[TCP].flags)) == (virtual, "SA")
        refused = ask(session, ip / TCP(sport=4002, dport=8081, flags="S"))
        assert (refused.src, str(refused[TCP].flags)) == (virtual, "RA")


def test_ping_is_answered_by_the_host_itself(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR, SIX) as (session, _):
        reply = ask(session, to(session, VIRTUAL4) / ICMP(id=9, seq=1) / Raw(b"hello"))
        assert (reply.src, reply[ICMP].type, reply[ICMP].id, bytes(reply[ICMP].payload)) == (VIRTUAL4, 0, 9, b"hello")
        assert intact(reply)
        reply = ask(session, to(session, VIRTUAL6) / ICMPv6EchoRequest(id=9, data=b"hello"))
        assert (reply.src, reply[ICMPv6EchoReply].data) == (VIRTUAL6, b"hello")


def test_unreachable_ports_are_said_by_the_virtual_address(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR, SIX) as (session, _):
        said = ask(session, to(session, VIRTUAL4) / UDP(sport=4003, dport=9) / Raw(b"x"))
        assert (said.src, said[ICMP].type, said[ICMP].code) == (VIRTUAL4, 3, 3)
        # The quotation is what the session sent, else no socket would believe it.
        assert (said[ICMP].payload.src, said[ICMP].payload.dst) == (session.ipv4, VIRTUAL4)
        assert intact(said)
        said = ask(session, to(session, VIRTUAL6) / UDP(sport=4003, dport=9))
        assert (said.src, said[ICMPv6DestUnreach].code) == (VIRTUAL6, 4)
        quoted = said[ICMPv6DestUnreach].payload
        assert (quoted.src, quoted.dst) == (session.ipv6, VIRTUAL6)


def test_what_a_router_says_comes_from_the_virtual_address_too(place) -> None:
    """So the session never sees an address of the cluster: whoever said it, it is as if the destination had."""
    pod, cluster = place
    sysctl(cluster, "ipv4/ip_forward", "1")
    run("ip", "-n", cluster, "route", "add", "unreachable", "10.130.7.0/24")
    try:
        with mapped(pod, FOUR, SIX) as (session, _):
            said = ask(session, to(session, "246.130.7.7") / UDP(sport=4004, dport=9))
            assert (said.src, said[ICMP].type, said[ICMP].code) == ("246.130.7.7", 3, 1)
            assert said[ICMP].payload.dst == "246.130.7.7"
    finally:
        run("ip", "-n", cluster, "route", "del", "10.130.7.0/24")
        sysctl(cluster, "ipv4/ip_forward", "0")


def test_traceroute_quotes_the_virtual_address(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR, SIX) as (session, _):
        expired = ask(session, IP(src=session.ipv4, dst=VIRTUAL4, ttl=1) / UDP(sport=4005, dport=33434))
        assert (expired[ICMP].type, expired[ICMP].payload.dst) == (11, VIRTUAL4)
        expired = ask(session, IPv6(src=session.ipv6, dst=VIRTUAL6, hlim=1) / UDP(sport=4005, dport=33434))
        assert expired[ICMPv6TimeExceeded].payload.dst == VIRTUAL6


def test_the_real_addresses_are_reached_as_before(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR, SIX) as (session, _):
        assert ask(session, to(session, SERVICE4) / ICMP(id=1)).src == SERVICE4
        assert ask(session, to(session, CLUSTER6) / ICMPv6EchoRequest(id=1)).src == CLUSTER6
        # The same ports at both addresses of one host are two flows.
        for address in (SERVICE4, VIRTUAL4):
            assert ask(session, to(session, address) / UDP(sport=4006, dport=9)).src == address


def test_a_single_address_is_mapped(place) -> None:
    pod, _ = place
    with mapped(pod, ("246.255.1.2/32", f"{SERVICE4}/32")) as (session, dropped):
        assert ask(session, to(session, "246.255.1.2") / ICMP(id=2)).src == "246.255.1.2"
        assert silent(session, to(session, "246.255.1.3") / ICMP(id=2))
        dropped |= {"destination": 1}


# -- several sessions, and changes -------------------------------------------------------------------------------------


def test_two_sessions_map_the_same_virtual_subnet_differently(place) -> None:
    pod, cluster = place
    run("ip", "-n", cluster, "addr", "add", "10.130.0.9/32", "dev", "lo")
    with (
        exit_in(pod, own(), own()) as (way_out, [other, third]),
        udp_server(cluster, "10.130.0.9", 5300) as service,
        udp_server(cluster, CLUSTER4, 5300) as host,
    ):
        with inside(pod):
            one = way_out.add_session(*own(), offload=True)
        map_to(one, pod, ("246.130.0.0/16", "10.130.0.0/16"))
        map_to(other, pod, ("246.130.0.0/16", "10.132.0.0/16"))
        for session in (one, other, third):
            send(session, to(session, "246.130.0.9") / UDP(sport=4000, dport=5300) / Raw(session.tun.name.encode()))
        for server, session in ((service, one), (host, other)):
            asked, sender = server.recvfrom(100)
            assert asked == session.tun.name.encode()
            server.sendto(b"pong", sender)
            answer = receive(session)
            assert answer is not None
            assert (answer.src, answer[UDP].dport) == ("246.130.0.9", 4000)
        assert receive(third, 0.1) is None
        assert readable([service.fileno(), host.fileno()], 0) == []
        assert way_out.dropped()["destination"] == 1  # the third has no mapping
        # One's end is nothing to the other.
        one.close()
        assert tables(pod) == f"table inet tpvpn\ntable inet {other.tun.name}\n"
        assert ask(other, to(other, "246.130.0.9") / ICMP(id=3)).src == "246.130.0.9"


class Connection:
    """A session's TCP connection, in order and without loss."""

    def __init__(self, session: ExitSession, address: str, port: int, own: int) -> None:
        self._session, self._ip = session, to(session, address)
        self._ports = {"sport": own, "dport": port}
        taken = ask(session, self._ip / TCP(**self._ports, flags="S", seq=1000))[TCP]
        self._seq, self._ack = 1001, taken.seq + 1
        send(session, self._segment("A"))

    def _segment(self, flags: str) -> Packet:
        return self._ip / TCP(**self._ports, flags=flags, seq=self._seq, ack=self._ack)

    def say(self, data: bytes) -> None:
        send(self._session, self._segment("PA") / Raw(data))
        self._seq += len(data)

    def reset(self) -> None:
        """End it at once, so that nothing is said again in another test."""
        send(self._session, self._segment("RA"))

    def hear(self) -> bytes:
        """The next data; it comes from where the connection leads."""
        while packet := receive(self._session):
            assert packet.src == self._ip.dst
            if data := bytes(packet[TCP].payload):
                assert packet[TCP].seq == self._ack
                self._ack += len(data)
                send(self._session, self._segment("A"))
                return data
        raise AssertionError("no data")


@pytest.mark.parametrize(("virtual", "real"), [(VIRTUAL4, SERVICE4), (VIRTUAL6, CLUSTER6)], ids=["ipv4", "ipv6"])
def test_an_open_connection_lives_on_while_the_mapping_is_replaced(place, virtual: str, real: str) -> None:
    pod, cluster = place
    with inside(cluster):
        listening = socket.create_server((real, 8080), family=socket.AF_INET6 if ":" in real else socket.AF_INET)
    with listening, exit_in(pod, own()) as (_, [session]):
        map_to(session, pod, FOUR, SIX)
        connection = Connection(session, virtual, 8080, 4010)
        server = listening.accept()[0]
        server.settimeout(2)

        def works() -> bool:
            connection.say(b"question")
            asked = server.recv(100)
            server.sendall(b"answer")
            return (asked, connection.hear()) == (b"question", b"answer")

        with server:
            assert works()
            for pairs in ((FOUR, SIX, PODS), (SIX, FOUR), (PODS, FOUR, SIX)):
                map_to(session, pod, *pairs)
                assert works()
            assert ask(session, to(session, VIRTUAL_POD) / ICMP(id=4)).src == VIRTUAL_POD
            # It keeps what it began with even when the mapping goes.
            map_to(session, pod)
            assert works()
            connection.reset()
            with pytest.raises(ConnectionResetError):
                server.recv(100)


def test_new_flows_follow_the_new_mapping(place) -> None:
    pod, cluster = place
    with exit_in(pod, own()) as (way_out, [session]), udp_server(cluster, CLUSTER4, 5300) as host:
        map_to(session, pod, ("246.140.0.0/16", "10.130.0.0/16"))
        assert ask(session, to(session, "246.140.0.1") / ICMP(id=5)).src == "246.140.0.1"
        map_to(session, pod, ("246.140.0.0/16", "10.132.0.0/16"))
        send(session, to(session, "246.140.0.9") / UDP(sport=4000, dport=5300) / Raw(b"new"))
        assert host.recv(100) == b"new"
        map_to(session, pod)
        assert silent(session, to(session, "246.140.0.9") / UDP(sport=4001, dport=5300))
        assert way_out.dropped()["destination"] == 1


def test_nothing_is_left_of_a_mapping(place) -> None:
    pod, _ = place
    with exit_in(pod, own()) as (_, [session]):
        for _ in range(3):
            map_to(session, pod, FOUR, SIX)
            assert tables(pod) == f"table inet tpvpn\ntable inet {session.tun.name}\n"
            map_to(session, pod)
            assert tables(pod) == "table inet tpvpn\n"
        map_to(session, pod, FOUR)
    assert run("ip", "netns", "exec", pod, "nft", "list", "ruleset") == ""


# -- what no mapping opens ---------------------------------------------------------------------------------------------


def test_the_policy_judges_the_real_address(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR, PODS, SIX, destinations=["10.130.0.0/16"]) as (session, dropped):
        assert ask(session, to(session, VIRTUAL4) / ICMP(id=6)).src == VIRTUAL4
        # Identifiers of their own: a flow that is open already stays open.
        assert silent(session, to(session, VIRTUAL_POD) / ICMP(id=66))
        assert silent(session, to(session, VIRTUAL6) / ICMPv6EchoRequest(id=66))
        dropped |= {"destination": 2}


def test_a_virtual_subnet_as_a_destination_opens_nothing(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR, destinations=["246.130.0.0/16"]) as (session, dropped):
        assert silent(session, to(session, VIRTUAL4) / ICMP(id=67))
        dropped |= {"destination": 1}


@pytest.mark.parametrize(
    ("pair", "asked", "reason"),
    [
        (("246.169.0.0/16", "169.254.0.0/16"), "246.169.169.254", "destination"),
        (("fd74:7077:e:2::/64", "fd00:ec2::/64"), "fd74:7077:e:2::254", "destination"),
        (("246.140.0.0/16", "246.140.0.0/16"), "246.140.0.1", "destination"),
        (("246.132.0.0/16", "10.132.0.0/16"), "246.132.0.5", "manager"),  # POD4
        (("fd74:7077:132::/64", "fd00:132::/64"), "fd74:7077:132::5", "manager"),  # POD6
        (("fd74:7077:9::1/128", "::1/128"), "fd74:7077:9::1", None),
        (("246.132.0.0/16", "10.132.0.0/16"), "246.132.255.255", "manager"),  # broadcast
        (("246.127.0.0/16", "127.0.0.0/16"), "246.127.0.1", None),
        (("246.224.0.0/16", "224.0.0.0/16"), "246.224.0.1", "manager"),
        (("246.200.0.0/16", "255.255.0.0/16"), "246.200.255.255", "manager"),
        (("246.201.0.0/16", "0.0.0.0/16"), "246.201.0.1", "destination"),
        (("fd74:7077:ff02::/48", "ff02::/48"), "fd74:7077:ff02::1", "manager"),
        (("fd74:7077:fe80::/64", "fe80::/64"), "fd74:7077:fe80::1", None),
    ],
    ids=str,
)
def test_what_no_session_may_reach_is_not_reached_by_a_mapping(place, pair, asked: str, reason: str | None) -> None:
    """Some the kernel itself drops, or says that it has no route: they are in no counter of ours."""
    pod, _ = place
    ping = ICMPv6EchoRequest(id=68) if ":" in asked else ICMP(id=68)
    with mapped(pod, pair) as (session, dropped):
        send(session, to(session, asked) / ping)
        said = receive(session, 0.2)
        assert said is None or ICMPv6DestUnreach in said
        dropped |= {reason: 1} if reason else {}


def test_a_service_on_the_managers_loopback_is_not_reached_even_where_the_kernel_would_route_to_it(place) -> None:
    pod, _ = place
    sysctl(pod, "ipv4/conf/all/route_localnet", "1")
    try:
        loopback = ("246.200.0.0/16", "127.0.0.0/16")
        with udp_server(pod, "127.0.0.1", 5300) as server, mapped(pod, loopback) as (session, dropped):
            assert silent(session, to(session, "246.200.0.1") / UDP(dport=5300))
            assert readable([server.fileno()], 0) == []
            dropped |= {"manager": 1}
    finally:
        sysctl(pod, "ipv4/conf/all/route_localnet", "0")


def test_other_sessions_are_not_reached_through_a_mapping(place) -> None:
    pod, _ = place
    wanted = ("246.1.0.1", "fd74:7076:706e:1::1"), ("246.1.0.2", "fd74:7076:706e:1::2")
    with exit_in(pod, *wanted) as (way_out, [one, other]):
        map_to(one, pod, ("246.201.0.0/24", "246.1.0.0/24"), ("fd74:7077:1:1::/64", "fd74:7076:706e:1::/64"))
        for address in ("246.201.0.1", "246.201.0.2"):
            send(one, to(one, address) / UDP(sport=1, dport=2))
        for address in ("fd74:7077:1:1::1", "fd74:7077:1:1::2"):
            send(one, to(one, address) / UDP(sport=1, dport=2))
        assert receive(one, 0.2) is None
        assert receive(other, 0.1) is None
        assert way_out.dropped()["between_sessions"] == 4


# -- what cannot be mapped ---------------------------------------------------------------------------------------------


def test_a_family_that_is_not_carried_is_not_mapped(place) -> None:
    pod, _ = place
    sysctl(pod, "ipv6/conf/default/disable_ipv6", "1")
    try:
        with exit_in(pod, own()) as (_, [session]):
            assert session.ipv6 is None
            map_to(session, pod, FOUR)
            with pytest.raises(ManagerError, match="fd74:7077:132::/64 cannot be mapped: this manager carries no IPv6"):
                map_to(session, pod, PODS, SIX)
            assert ask(session, to(session, VIRTUAL4) / ICMP(id=7)).src == VIRTUAL4
            assert silent(session, to(session, VIRTUAL_POD) / ICMP(id=7))
    finally:
        sysctl(pod, "ipv6/conf/default/disable_ipv6", "0")


def test_what_the_kernel_refuses_is_said_and_the_session_goes_on(place) -> None:
    pod, _ = place
    with exit_in(pod, own()) as (_, [session]):
        with inside(pod):
            foreign = Table(session.tun.name, ())
        with pytest.raises(UsageError, match=f"{session.tun.name} belongs to a running program"):
            map_to(session, pod, FOUR)
        assert ask(session, to(session, SERVICE4) / ICMP(id=8)).src == SERVICE4
        foreign.close()
        map_to(session, pod, FOUR)
        assert ask(session, to(session, VIRTUAL4) / ICMP(id=8)).src == VIRTUAL4


def test_nobody_else_changes_a_mapping(place) -> None:
    pod, _ = place
    with mapped(pod, FOUR) as (session, _):
        rule = ["nft", "add", "rule", "inet", session.tun.name, "prerouting", "drop"]
        assert subprocess.run(["ip", "netns", "exec", pod, *rule], capture_output=True).returncode != 0
