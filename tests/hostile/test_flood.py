"""A session that floods a manager with new connections: limited and counted, and the others go on."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from socket_exits import Manager, Session, manager_in, place

from peers import eventually
from pod import CLUSTER4, inside, run
from tpvpn.wire import frame

__all__ = ["place"]

SECONDS = 3.0
FILTERED, OPEN, CLOSED = 8082, 8080, 8081
MOST = 0.1
"""Seconds that 99 of 100 pings of the other session may take."""


@pytest.fixture(scope="module")
def manager(place) -> Iterator[Manager]:
    run(
        "ip",
        "netns",
        "exec",
        place[1],
        "nft",
        "add table inet f; add chain inet f i { type filter hook input priority 0; }",
    )
    run("ip", "netns", "exec", place[1], "nft", f"add rule inet f i tcp dport {FILTERED} drop")
    with manager_in(place[0]) as manager:
        yield manager


@pytest.fixture
def server(place) -> Iterator[None]:
    """Accepts on the open port, and closes at once."""
    with inside(place[1]):
        listening = socket.create_server((CLUSTER4, OPEN), backlog=4096)

    def serve() -> None:
        while True:
            try:
                listening.accept()[0].close()
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


@contextlib.contextmanager
def flooding(session: Session, packets: list[bytes], until: float) -> Iterator[list[int]]:
    """Meanwhile send them over and over, as fast as the manager takes them, with nobody reading the answers.

    A process of its own does it: a thread would take turns with whoever measures. In the end, how many were sent.
    """
    stream = b"".join(frame.encode(frame.PACKET, packet) for packet in packets)
    sent: list[int] = []
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        session.socket.settimeout(0.5)
        try:
            while time.monotonic() < until:
                session.socket.sendall(stream)
                count += len(packets)
        finally:
            os.write(writing, str(count).encode())
            os._exit(0)
    os.close(writing)
    try:
        yield sent
    finally:
        with open(reading) as told:
            sent.append(int(told.read()))
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["filtered", "open", "closed", "foreign"])
def test_others_are_answered_meanwhile(manager: Manager, server: None, kind: str) -> None:
    port = {"filtered": FILTERED, "open": OPEN, "closed": CLOSED}.get(kind, OPEN)
    before, descriptors = manager.metrics(), manager.descriptors()
    with manager.session() as hostile, manager.session() as honest:
        source = "10.9.9.9" if kind == "foreign" else hostile.terms.ipv4
        syn = TCP(dport=port, flags="S", seq=1)
        packets: list[bytes] = []
        for number in range(1, 4001):
            syn.sport = number
            packets.append(bytes(IP(src=source, dst=CLUSTER4) / syn))
        until = time.monotonic() + SECONDS
        with flooding(hostile, packets, until) as sent:
            times = list(answered(honest, until))
        after = manager.metrics()
        assert len(times) > 20
        middle, most = sorted(times)[len(times) // 2], sorted(times)[len(times) * 99 // 100]
        print(
            f"{sum(sent) / SECONDS:,.0f} SYNs a second; others wait {1000 * middle:.1f} ms, 99 % {1000 * most:.1f} ms"
        )
        assert most < MOST, (sent, sorted(times)[-5:])
        counter = {"filtered": "tpvpn_exit_dropped_half_open_total", "foreign": "tpvpn_foreign_packets_total"}.get(kind)
        assert counter is None or after[counter] - before[counter] > 10_000, sent
        assert manager.descriptors() - descriptors < 4100
    eventually(lambda: manager.descriptors() <= descriptors, 5, "every socket is closed")


def answered(session: Session, until: float) -> Iterator[float]:
    """How long each of pings and refused connections took, one after the other."""
    number = 0
    while time.monotonic() < until:
        number += 1
        began = time.monotonic()
        reply = session.ask(session.to(CLUSTER4) / ICMP(id=7, seq=number))
        assert reply[ICMP].seq == number
        yield time.monotonic() - began
        began = time.monotonic()
        refused = session.ask(session.to(CLUSTER4) / TCP(sport=1000 + number, dport=CLOSED, flags="S"))
        assert refused[TCP].flags == "RA"
        yield time.monotonic() - began
