"""A manager with NET_ADMIN where IPv6 cannot be forwarded: the kernel carries IPv4, and sockets carry IPv6."""

from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw
from socket_exits import Manager, Session, manager_in, place, talk

from peers import ended
from pod import CLUSTER4, CLUSTER6, SERVICE4, pod_and_cluster, sysctl, udp_server
from tpvpn.wire import frame, vnet

__all__ = ["place"]

READ_ONLY = 'mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec "$@"'
PRIVILEGED = ("unshare", "--mount", "sh", "-ec", READ_ONLY, "sh")
"""As a pod with NET_ADMIN has it."""


@pytest.fixture(scope="module")
def manager(place) -> Iterator[Manager]:
    with manager_in(place[0], "--exit", "auto", rights=PRIVILEGED) as manager:
        yield manager


@pytest.fixture
def session(manager: Manager) -> Iterator[Session]:
    with manager.session() as session:
        yield session


def ping(session: Session, address: str) -> Packet:
    return session.to(address) / (ICMPv6EchoRequest(id=7) if ":" in address else ICMP(id=7))


def is_reply(packet: Packet | None, address: str) -> bool:
    assert packet is not None
    return packet.src == address and (ICMPv6EchoReply in packet or (ICMP in packet and packet[ICMP].type == 0))


def test_each_family_leaves_as_it_may_and_the_log_says_why(place, manager: Manager, session: Session) -> None:
    assert sysctl(place[0], "ipv6/conf/all/forwarding") == "0"
    assert session.terms.exit == {"ipv4": "kernel", "ipv6": "socket"}
    assert session.terms.facts["ping"] == {"ipv6": True}
    assert "exit kernel (IPv4), socket (IPv6)" in manager.said
    assert "the kernel exit cannot carry IPv6: forwarding is off and /proc/sys read-only" in manager.said


@pytest.mark.parametrize("address", [CLUSTER4, SERVICE4, CLUSTER6])
def test_ping_and_tcp_of_both(place, session: Session, address: str) -> None:
    assert is_reply(session.ask(ping(session, address)), address)
    stream = talk(session, place[1], address)
    stream.expect(lambda got, _: "F" in got.flags)


def test_versions_that_alternate_in_one_run_are_all_answered(session: Session) -> None:
    targets = [CLUSTER4, CLUSTER6, CLUSTER6, CLUSTER4] * 5
    frames = [frame.encode(frame.PACKET, bytes(ping(session, target))) for target in targets]
    session.socket.sendall(b"".join(frames))
    answers = [session.next_packet() for _ in targets]
    assert all(answer is not None for answer in answers)
    sources = [answer.src for answer in answers if answer is not None]
    assert sorted(sources) == sorted(targets)


def test_udp_of_both(place, session: Session) -> None:
    for address in (CLUSTER4, CLUSTER6):
        with udp_server(place[1], address, 9000) as server:
            session.packet(session.to(address) / UDP(sport=4005, dport=9000) / Raw(b"ask"))
            data, peer = server.recvfrom(100)
            server.sendto(data + b"ed", peer)
            answer = session.next_packet()
            assert answer is not None
            assert bytes(answer[UDP].payload) == b"asked"


def test_offloads_are_those_of_both(manager: Manager) -> None:
    with manager.session(offloads=["checksum", "tso4", "tso6", "ecn", "uso4", "uso6"]) as session:
        assert session.terms.offloads == ["checksum", "tso4", "tso6", "ecn"]
        for address in (CLUSTER4, CLUSTER6):
            session.send(frame.PACKET, vnet.EMPTY + bytes(ping(session, address)))
            kind, payload = session.receive()
            body = payload[vnet.HEADER_LENGTH :]
            assert kind == frame.PACKET
            assert is_reply(IPv6(body) if body[0] >> 4 == 6 else IP(body), address)


def test_virtual_subnets_of_both_are_mapped(session: Session) -> None:
    pairs = [["246.130.0.0/16", "10.132.0.0/16"], ["fd74:7077:1::/64", "fd00:132::/64"]]
    session.say("config", id=1, virtual=pairs)
    assert session.hear("config") == {"type": "config", "id": 1}
    for address in ("246.130.0.9", "fd74:7077:1::9"):
        assert is_reply(session.ask(ping(session, address)), address)


def test_what_is_dropped_of_both_is_counted(manager: Manager, session: Session) -> None:
    before = manager.dropped()
    foreign = [IP(src="10.1.1.1", dst=CLUSTER4) / ICMP(), IPv6(src="fd00:1::1", dst=CLUSTER6) / ICMPv6EchoRequest()]
    for packet in foreign:
        assert session.silent(packet)
    with manager.session() as other:
        for address in (other.terms.ipv4, other.terms.ipv6):
            assert session.silent(session.to(address or "") / UDP(sport=1, dport=2))
    after = manager.dropped()
    for name in ("foreign", "between_sessions"):
        assert after[name] == before[name] + 2


def test_a_frame_that_is_too_long_ends_the_link(session: Session) -> None:
    session.socket.sendall(frame.encode(frame.PACKET, bytes(ping(session, CLUSTER6))) + frame.HEADER.pack(0xFFFFFFFF))
    ended(session.socket, 3)


def test_an_exit_that_was_asked_for_stays_alone() -> None:
    with (
        pod_and_cluster() as (pod, _),
        manager_in(pod, "--exit", "kernel", rights=PRIVILEGED) as manager,
        manager.session() as session,
    ):
        assert session.terms.exit == {"ipv4": "kernel", "ipv6": None}
        assert session.terms.ipv6 is None


def test_a_segment_to_a_closed_port_is_refused_by_both(session: Session) -> None:
    for address in (CLUSTER4, CLUSTER6):
        answer = session.ask(session.to(address) / TCP(sport=4009, dport=8081, flags="S"))
        assert answer[TCP].flags == "RA"
