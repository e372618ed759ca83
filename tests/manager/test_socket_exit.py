"""The socket exit of a manager without any privilege: what packets of its clients become in a real cluster."""

import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6TimeExceeded,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.packet import Raw
from socket_exits import Manager, Session, Stream, manager_in, place

from peers import eventually
from pod import CLUSTER4, CLUSTER6, POD4, POD6, SERVICE4, filtering, inside, readable, run, udp_server
from tpvpn.wire import frame

__all__ = ["place"]


@pytest.fixture(scope="module")
def manager(place) -> Iterator[Manager]:
    with manager_in(place[0], "--exit", "auto") as manager:
        yield manager


@pytest.fixture
def session(manager: Manager) -> Iterator[Session]:
    with manager.session() as session:
        yield session


def listening(cluster: str, address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(cluster):
        server = socket.create_server((address, port), family=family)
    server.settimeout(3)
    return server


def accept(server: socket.socket) -> socket.socket:
    connected, _ = server.accept()
    connected.settimeout(3)
    return connected


# -- what it is --------------------------------------------------------------------------------------------------------


def test_auto_takes_sockets_without_a_privilege_and_says_why(manager: Manager, session: Session) -> None:
    assert manager.status("Uid").split()[0] == "65534"
    assert {manager.status(f"Cap{kind}").strip("0") for kind in ("Prm", "Eff", "Bnd")} == {""}
    assert "the kernel exit cannot be used" in manager.said
    assert "exit socket (IPv4 and IPv6)" in manager.said
    assert session.terms.exit == {"ipv4": "socket", "ipv6": "socket"}
    assert session.terms.mtu == 1500
    assert session.terms.facts["ping"] == {"ipv4": True, "ipv6": True}


def test_offloads_are_those_of_tcp(manager: Manager) -> None:
    with manager.session(offloads=["checksum", "tso4", "tso6", "ecn", "uso4", "uso6", "later"]) as session:
        assert session.terms.offloads == ["checksum", "tso4", "tso6", "ecn"]


# -- TCP ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [CLUSTER4, SERVICE4, CLUSTER6])
def test_tcp_connects_talks_and_closes_both_ways(place, session: Session, address: str) -> None:
    with listening(place[1], address, 8080) as server:
        stream = Stream(session, address, 8080, 4001)
        stream.connect()
        with accept(server) as connected:
            assert connected.getpeername()[0] == (POD6 if ":" in address else POD4)
            stream.send("PA", b"question")
            assert connected.recv(100) == b"question"
            stream.send("FA")
            assert connected.recv(100) == b""
            connected.sendall(b"answer after the client's end")
            assert stream.expect(lambda _, data: len(data) == 29) == b"answer after the client's end"
        stream.expect(lambda got, _: "F" in got.flags)


def test_the_clusters_end_leaves_the_other_direction_open(place, session: Session) -> None:
    with listening(place[1], CLUSTER4, 8080) as server:
        stream = Stream(session, CLUSTER4, 8080, 4002)
        stream.connect()
        with accept(server) as connected:
            connected.sendall(b"last words")
            connected.shutdown(socket.SHUT_WR)
            assert stream.expect(lambda got, _: "F" in got.flags) == b"last words"
            stream.send("PA", b"still here")
            assert connected.recv(100) == b"still here"
            stream.send("FA")
            assert connected.recv(100) == b""


@pytest.mark.parametrize("address", [CLUSTER4, CLUSTER6])
def test_a_closed_port_is_refused(session: Session, address: str) -> None:
    answer = session.ask(session.to(address) / TCP(sport=4003, dport=8081, flags="S", seq=7))
    assert (answer[TCP].flags, answer[TCP].ack) == ("RA", 8)


def test_a_filtered_port_is_silence_and_a_rejected_one_an_icmp_error(place, session: Session) -> None:
    with filtering(place[1], "tcp dport 8082 drop", "tcp dport 8083 reject with icmpx type admin-prohibited"):
        assert session.silent(session.to(CLUSTER4) / TCP(sport=4004, dport=8082, flags="S"))
        for _ in range(2):  # as the client says it again
            assert session.silent(session.to(CLUSTER4) / TCP(sport=4004, dport=8082, flags="S"))
        answer = session.ask(session.to(CLUSTER4) / TCP(sport=4005, dport=8083, flags="S"))
        quoted = IP(bytes(answer[ICMP].payload))
        assert (answer[ICMP].type, quoted.src, quoted.dst, quoted[TCP].sport) == (
            3,
            session.terms.ipv4,
            CLUSTER4,
            4005,
        )


def test_a_host_that_is_not_there_and_a_network_without_a_route(place, session: Session) -> None:
    run("ip", "-n", place[0], "route", "add", "unreachable", "10.141.0.0/16")
    run("ip", "-n", place[0], "route", "add", "prohibit", "10.142.0.0/16")
    try:
        answer = session.ask(session.to("10.141.0.1") / TCP(sport=4006, dport=80, flags="S"))
        assert (answer[ICMP].type, answer[ICMP].code) == (3, 1)
        answer = session.ask(session.to("10.142.0.1") / TCP(sport=4006, dport=80, flags="S"))
        assert (answer[ICMP].type, answer[ICMP].code) == (3, 13)
        session.packet(session.to("10.132.77.77") / TCP(sport=4007, dport=80, flags="S"))  # no ARP answer
        answer = session.next_packet(5)
        assert answer is not None
        assert (answer.src, answer[ICMP].type, answer[ICMP].code) == (POD4, 3, 1)
    finally:
        run("ip", "-n", place[0], "route", "del", "unreachable", "10.141.0.0/16")
        run("ip", "-n", place[0], "route", "del", "prohibit", "10.142.0.0/16")


def test_a_reset_of_either_side_reaches_the_other(place, session: Session) -> None:
    with listening(place[1], CLUSTER4, 8080) as server:
        stream = Stream(session, CLUSTER4, 8080, 4008)
        stream.connect()
        with accept(server) as connected:
            stream.send("RA")
            with pytest.raises(ConnectionResetError):
                connected.recv(1)
        stream = Stream(session, CLUSTER4, 8080, 4009)
        stream.connect()
        connected = accept(server)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connected.close()
        stream.expect(lambda got, _: "R" in got.flags)


def test_a_segment_of_no_connection_is_reset(session: Session) -> None:
    answer = session.ask(session.to(CLUSTER4) / TCP(sport=4010, dport=80, flags="A", seq=5, ack=77))
    assert (answer[TCP].flags, answer[TCP].seq) == ("R", 77)
    assert session.silent(session.to(CLUSTER4) / TCP(sport=4010, dport=80, flags="R", seq=5))


def test_a_client_that_reads_slowly_never_grows_the_manager(place, manager: Manager, session: Session) -> None:
    with listening(place[1], CLUSTER4, 8080) as server:
        stream = Stream(session, CLUSTER4, 8080, 4011)
        stream.connect()
        with accept(server) as connected:
            before = manager.rss()
            connected.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connected.sendall(bytes(64 << 20))
            assert manager.rss() - before < 4096


def test_a_server_that_reads_slowly_closes_the_clients_window(place, manager: Manager, session: Session) -> None:
    with listening(place[1], CLUSTER4, 8080) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream = Stream(session, CLUSTER4, 8080, 4012)
        stream.connect()
        with accept(server) as connected:
            sent = 0
            while (window := stream.latest_window()) >= 1000 and sent < 64 << 20:
                stream.send("A", b"x" * 1000)
                sent += 1000
            assert sent < 8 << 20
            got = 0
            while got < sent:
                got += len(connected.recv(1 << 16))
            assert stream.latest_window() > window


# -- UDP ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("address", "own"), [(CLUSTER4, POD4), (SERVICE4, POD4), (CLUSTER6, POD6)])
def test_udp_is_answered(place, session: Session, address: str, own: str) -> None:
    with udp_server(place[1], address, 5300) as server:
        session.packet(session.to(address) / UDP(sport=4000, dport=5300) / Raw(b"ping"))
        asked, sender = server.recvfrom(100)
        assert (asked, sender[0]) == (b"ping", own)
        for text in (b"pong", b"", b"x" * 9000):
            server.sendto(text, sender)
            answer = session.next_packet()
            assert answer is not None
            assert (answer.src, answer[UDP].sport, answer[UDP].dport) == (address, 5300, 4000)
            assert bytes(answer[UDP].payload) == text


@pytest.mark.parametrize("address", [CLUSTER4, CLUSTER6])
def test_large_datagrams_come_in_fragments(place, session: Session, address: str) -> None:
    with udp_server(place[1], address, 5301) as server:
        whole = session.to(address) / UDP(sport=4000, dport=5301) / Raw(bytes(range(256)) * 16)
        if ":" in address:
            whole = session.to(address) / IPv6ExtHdrFragment(id=7) / UDP(sport=4000, dport=5301) / whole[Raw]
            pieces = fragment6(whole, 1400)
        else:
            pieces = fragment(whole, 1400)
        assert len(pieces) > 2
        for piece in reversed(pieces):
            session.packet(piece)
        assert server.recv(8192) == bytes(range(256)) * 16


@pytest.mark.parametrize("address", [CLUSTER4, CLUSTER6])
def test_a_closed_udp_port_is_an_icmp_error_each_time(session: Session, address: str) -> None:
    for _ in range(3):
        answer = session.ask(session.to(address) / UDP(sport=4003, dport=9) / Raw(b"x"))
        assert answer.src == address
        if ":" in address:
            assert answer[ICMPv6DestUnreach].code == 4
        else:
            assert (answer[ICMP].type, answer[ICMP].code) == (3, 3)
            quoted = IP(bytes(answer[ICMP].payload))
            assert (quoted.src, quoted.dst, quoted[UDP].sport, quoted[UDP].dport) == (
                session.terms.ipv4, CLUSTER4, 4003, 9,
            )  # fmt: skip


# -- ping and errors ---------------------------------------------------------------------------------------------------


def test_ping_is_answered_by_the_destination_alone(session: Session) -> None:
    reply = session.ask(session.to(CLUSTER4) / ICMP(id=9, seq=1) / Raw(b"hello"))
    assert (reply.src, reply[ICMP].type, reply[ICMP].id, reply[ICMP].seq) == (CLUSTER4, 0, 9, 1)
    assert bytes(reply[ICMP].payload) == b"hello"
    reply = session.ask(session.to(CLUSTER6) / ICMPv6EchoRequest(id=9, seq=2, data=b"hello"))
    assert (reply.src, reply[ICMPv6EchoReply].id, reply[ICMPv6EchoReply].seq) == (CLUSTER6, 9, 2)
    assert reply[ICMPv6EchoReply].data == b"hello"
    assert session.silent(session.to("10.132.77.78") / ICMP(id=9, seq=1))


def test_traceroute_shows_the_manager_as_a_hop(session: Session) -> None:
    expired = session.ask(session.to(CLUSTER4, ttl=1) / UDP(sport=4004, dport=33434))
    assert (expired.src, expired[ICMP].type) == (POD4, 11)
    expired = session.ask(session.to(CLUSTER6, hlim=1) / UDP(sport=4004, dport=33434))
    assert (expired.src, ICMPv6TimeExceeded in expired) == (POD6, True)


def test_another_protocol_is_said_to_be_unknown(session: Session) -> None:
    answer = session.ask(session.to(CLUSTER4, proto=132) / Raw(b"sctp"))
    assert (answer.src, answer[ICMP].type, answer[ICMP].code) == (POD4, 3, 2)


def test_where_the_pod_may_not_ping_that_is_said_and_nothing_faked(place) -> None:
    run("ip", "netns", "exec", place[0], "sysctl", "-qw", "net.ipv4.ping_group_range=1 0")
    try:
        with manager_in(place[0]) as manager, manager.session() as session:
            assert session.terms.facts["ping"] == {"ipv4": False, "ipv6": False}
            answer = session.ask(session.to(CLUSTER4) / ICMP(id=9))
            assert (answer.src, answer[ICMP].type, answer[ICMP].code) == (POD4, 3, 13)
    finally:
        run("ip", "netns", "exec", place[0], "sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")


# -- policy ------------------------------------------------------------------------------------------------------------

SYN = TCP(sport=5000, dport=80, flags="S")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "246.15.0.1", "246.130.0.1",
     "::1", "::", "::ffff:127.0.0.1", "::ffff:10.132.0.9", "fe80::1", "ff02::1", "fd00:ec2::254"],
)  # fmt: skip
def test_what_no_session_may_reach(manager: Manager, session: Session, address: str) -> None:
    assert session.silent(session.to(address) / SYN)
    assert session.silent(session.to(address) / UDP(sport=5000, dport=53))
    ping = ICMPv6EchoRequest(id=3) if ":" in address else ICMP(id=3)
    assert session.silent(session.to(address) / ping)


@pytest.mark.parametrize("options", [(), ("--destination", "0.0.0.0/0", "--destination", "::/0")])
def test_no_policy_lets_a_session_at_the_manager_itself(place, options: tuple[str, ...]) -> None:
    with manager_in(place[0], *options) as manager, manager.session() as session:
        with udp_server(place[0], POD4, 5300) as server, listening(place[0], "127.0.0.1", 8090) as loopback:
            for address in (POD4, "127.0.0.1", "0.0.0.0"):
                assert session.silent(session.to(address) / UDP(sport=1, dport=5300))
                assert session.silent(session.to(address) / TCP(sport=1, dport=8090, flags="S"))
            assert session.silent(session.to("::ffff:127.0.0.1") / TCP(sport=1, dport=8090, flags="S")) or options
            assert session.silent(session.to(POD6) / UDP(sport=1, dport=5300))
            assert readable([server.fileno(), loopback.fileno()], 0) == []
        assert manager.dropped()["manager"] >= 7


def test_with_destinations_only_these_are_reached(place) -> None:
    options = ("--destination", "10.130.0.0/16", "--destination", "fd00:130::/64")
    with manager_in(place[0], *options) as manager, manager.session() as session:
        assert session.ask(session.to(SERVICE4) / ICMP())[ICMP].type == 0
        assert session.silent(session.to(CLUSTER4) / ICMP())
        assert session.silent(session.to(CLUSTER6) / ICMPv6EchoRequest())
        assert manager.dropped()["destination"] == 2


def test_sessions_do_not_reach_each_other(manager: Manager) -> None:
    with manager.session() as one, manager.session() as other:
        before = manager.dropped()["between_sessions"]
        one.packet(one.to(other.terms.ipv4 or "") / UDP(sport=1, dport=2))
        one.packet(one.to(other.terms.ipv6 or "") / UDP(sport=1, dport=2))
        assert other.next_packet(0.2) is None
        assert manager.dropped()["between_sessions"] == before + 2


def test_virtual_subnets_are_mapped(place, session: Session) -> None:
    session.say("config", id=1, virtual=[["246.130.0.0/16", "10.130.0.0/16"]])
    assert session.hear("config") == {"type": "config", "id": 1}
    reply = session.ask(session.to("246.130.0.1") / ICMP(id=4))
    assert (reply.src, reply[ICMP].type) == ("246.130.0.1", 0)
    answer = session.ask(session.to("246.130.0.1") / UDP(sport=4003, dport=9) / Raw(b"x"))
    assert (answer.src, answer[ICMP].type, IP(bytes(answer[ICMP].payload)).dst) == ("246.130.0.1", 3, "246.130.0.1")
    assert session.ask(session.to("246.130.0.1") / TCP(sport=4013, dport=8081, flags="S"))[TCP].flags == "RA"
    assert session.silent(session.to("246.131.0.1") / ICMP(id=4))


# -- hostile -----------------------------------------------------------------------------------------------------------


def test_malformed_packets_are_counted_and_harm_nobody(manager: Manager, session: Session) -> None:
    good = bytes(session.to(CLUSTER4) / TCP(sport=4014, dport=8081, flags="S"))
    before = manager.dropped()["malformed"]
    bad = [b"", b"\x45", b"\x00" * 60, b"\xff" * 60, good[:19], good[:30], good[:-1],
           b"\x4f" + good[1:], good[:-1] + b"\xff", good[:32] + b"\xf0" + good[33:]]  # fmt: skip
    for packet in bad:
        session.send(frame.PACKET, packet)
    assert session.ask(session.to(CLUSTER4) / TCP(sport=4015, dport=8081, flags="S"))[TCP].flags == "RA"
    assert manager.dropped()["malformed"] == before + len(bad)


def test_a_packet_from_another_address_is_dropped(manager: Manager, session: Session) -> None:
    before = manager.dropped()["foreign"]
    assert session.silent(IP(src="10.1.1.1", dst=CLUSTER4) / ICMP())
    assert session.silent(IP(src=CLUSTER4, dst=CLUSTER4) / TCP(sport=80, dport=80, flags="S"))  # a land attack
    assert session.silent(session.to(session.terms.ipv4 or "") / TCP(sport=80, dport=80, flags="S"))
    assert manager.dropped()["foreign"] == before + 2


def test_a_flood_of_one_session_is_limited_and_leaves_the_others(place, manager: Manager, session: Session) -> None:
    with filtering(place[1], "tcp dport 8082 drop"):
        with manager.session() as hostile:
            packets = [bytes(hostile.to(CLUSTER4) / TCP(sport=port, dport=8082, flags="S")) for port in range(1, 3000)]
            before = manager.descriptors()
            for packet in packets:
                hostile.send(frame.PACKET, packet)
            assert session.ask(session.to(CLUSTER4) / ICMP(id=5))[ICMP].type == 0
            eventually(lambda: manager.dropped()["half_open"] >= 1900, 5)
            assert manager.descriptors() - before <= 1030
        eventually(lambda: manager.descriptors() <= before, 5, "the sockets of a session that has ended are closed")


def test_a_session_that_ends_resets_its_connections(place, manager: Manager) -> None:
    with listening(place[1], CLUSTER4, 8080) as server:
        with manager.session() as session:
            stream = Stream(session, CLUSTER4, 8080, 4016)
            stream.connect()
            connected = accept(server)
        with connected, pytest.raises(ConnectionResetError):
            connected.recv(1)
