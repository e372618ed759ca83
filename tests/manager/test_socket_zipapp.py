"""The zipapp with the socket exit, as a restricted pod runs it: nobody, the standard library alone, no uvloop."""

from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest
from scapy.packet import Raw
from socket_exits import Manager, manager_in, place, talk

from peers import zipapp_command
from pod import CLUSTER4, CLUSTER6, udp_server

__all__ = ["place"]


@pytest.fixture(scope="module")
def manager(place) -> Iterator[Manager]:
    with manager_in(place[0], program=zipapp_command()) as manager:
        yield manager


def test_ping_and_udp_of_both_families(place, manager: Manager) -> None:
    assert manager.status("Uid").split()[0] == "65534"
    assert manager.status("CapBnd").strip("0") == ""
    with manager.session() as session:
        assert session.terms.exit == {"ipv4": "socket", "ipv6": "socket"}
        assert session.ask(session.to(CLUSTER4) / ICMP(id=3))[ICMP].type == 0
        assert ICMPv6EchoReply in session.ask(session.to(CLUSTER6) / ICMPv6EchoRequest(id=3))
        for address in (CLUSTER4, CLUSTER6):
            with udp_server(place[1], address, 9001) as server:
                session.packet(session.to(address) / UDP(sport=4005, dport=9001) / Raw(b"ask"))
                server.sendto(b"answer", server.recvfrom(100)[1])
                answer = session.next_packet()
                assert answer is not None
                assert bytes(answer[UDP].payload) == b"answer"


@pytest.mark.parametrize("address", [CLUSTER4, CLUSTER6])
def test_tcp(place, manager: Manager, address: str) -> None:
    with manager.session() as session:
        talk(session, place[1], address)
