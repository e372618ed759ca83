"""A session that floods a manager with new connections: limited and counted, and the others go on."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.packet import Packet
from socket_exits import Manager, Session, manager_in, place

from peers import eventually
from pod import CLUSTER4, filtering, inside
from tpvpn.wire import frame

__all__ = ["place"]

pytestmark = pytest.mark.alone

SECONDS = 3.0
FILTERED, OPEN, CLOSED, OWN = 8082, 8080, 8081, 8084
"""OWN is open too, for the session that does not flood."""
USUAL, MOST = 0.08, 0.25
"""Seconds that half, and 99 of 100, of the other session's questions may take on a machine that does much else."""


@pytest.fixture(scope="module")
def manager(place) -> Iterator[Manager]:
    with filtering(place[1], f"tcp dport {FILTERED} drop"), manager_in(place[0]) as manager:
        yield manager


@pytest.fixture
def server(place) -> Iterator[None]:
    """Accepts on the open ports, and closes at once."""
    with inside(place[1]):
        listening = [socket.create_server((CLUSTER4, port), backlog=4096) for port in (OPEN, OWN)]

    def serve(one: socket.socket) -> None:
        while True:
            try:
                one.accept()[0].close()
            except OSError:
                return

    threads = [threading.Thread(target=serve, args=(one,)) for one in listening]
    for thread in threads:
        thread.start()
    yield
    for one, thread in zip(listening, threads, strict=True):
        one.shutdown(socket.SHUT_RDWR)
        one.close()
        thread.join()


def flood(session: Session, packets: list[bytes], until: float) -> int:
    """Send them over and over, as fast as the manager takes them, with nobody reading the answers; how many."""
    stream = b"".join(frame.encode(frame.PACKET, packet) for packet in packets)
    sent = 0
    session.socket.settimeout(0.5)
    while time.monotonic() < until:
        try:
            session.socket.sendall(stream)
        except TimeoutError:
            break
        sent += len(packets)
    return sent


@pytest.mark.parametrize("kind", ["filtered", "open", "closed", "foreign"])
def test_others_are_answered_meanwhile(manager: Manager, server: None, kind: str) -> None:
    port = {"filtered": FILTERED, "open": OPEN, "closed": CLOSED}.get(kind, OPEN)
    before, descriptors = manager.dropped(), manager.descriptors()
    with manager.session() as hostile, manager.session() as honest:
        source = "10.9.9.9" if kind == "foreign" else hostile.terms.ipv4
        syn = TCP(dport=port, flags="S", seq=1)
        packets: list[bytes] = []
        for number in range(1, 4001):
            syn.sport = number
            packets.append(bytes(IP(src=source, dst=CLUSTER4) / syn))
        until = time.monotonic() + SECONDS
        sent: list[int] = []
        flooding = threading.Thread(target=lambda: sent.append(flood(hostile, packets, until)))
        flooding.start()
        times = list(answered(honest, until))
        flooding.join()
        after = manager.dropped()
        assert len(times) > 20
        times.sort()
        median, slow = times[len(times) // 2], times[len(times) * 99 // 100]
        print(f"{kind}: {sum(sent)} packets; {len(times)} questions: {1000 * median:.0f} ms, p99 {1000 * slow:.0f} ms")
        assert median < USUAL, times[-5:]
        assert slow < MOST, times[-5:]
        counter = {"filtered": "half_open", "foreign": "foreign"}.get(kind)
        assert counter is None or after[counter] - before[counter] > 10_000, sent
        assert manager.descriptors() - descriptors < 4100
    eventually(lambda: manager.descriptors() <= descriptors, 5, "every socket is closed")


def answered(session: Session, until: float) -> Iterator[float]:
    """How long each of pings, connections and refused connections took, one after the other."""
    session.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as a laptop has it
    number = 0
    while time.monotonic() < until:
        number += 1
        reply, seconds = asked(session, session.to(CLUSTER4) / ICMP(id=7, seq=number))
        assert reply[ICMP].seq == number
        yield seconds
        for port, flags in ((CLOSED, "RA"), (OWN, "SA")):
            syn = TCP(sport=1000 + number, dport=port, flags="S", seq=0)
            answer, seconds = asked(session, session.to(CLUSTER4) / syn)
            assert answer[TCP].flags == flags
            yield seconds
        session.packet(session.to(CLUSTER4) / TCP(sport=1000 + number, dport=OWN, flags="R", seq=1))


def asked(session: Session, packet: Packet) -> tuple[Packet, float]:
    """The answer, and how long it took."""
    payload = bytes(packet)  # which takes scapy longer than it may take the manager
    began = time.monotonic()
    session.send(frame.PACKET, payload)
    answer = session.next_packet()
    assert answer is not None, "no answer"
    return answer, time.monotonic() - began
