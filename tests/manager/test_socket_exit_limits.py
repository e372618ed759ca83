"""What the socket exit does at its limits: memory, descriptors, time; and what hostile or hasty clients bring it to."""

import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, TCP
from scapy.packet import Raw
from socket_exits import ExitWithin, Stream, exit_within, place

from peers import eventually
from pod import CLUSTER4, inside

__all__ = ["place"]


@pytest.fixture
def server(place) -> Iterator[socket.socket]:
    """The cluster's port 8080, whose connections have little room for what is not read."""
    with inside(place[1]):
        listening = socket.create_server((CLUSTER4, 8080))
    with listening:
        listening.settimeout(3)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        yield listening


@pytest.fixture
def exit(place) -> Iterator[ExitWithin]:
    with exit_within(place[0]) as exit:
        yield exit


def opened(exit: ExitWithin, port: int, server: socket.socket) -> tuple[Stream, socket.socket]:
    """A connection to the cluster's port 8080: the client's end and the server's."""
    stream = Stream(exit.session, CLUSTER4, 8080, port)
    stream.connect()
    connected, _ = server.accept()
    connected.settimeout(3)
    return stream, connected


def stuff(exit: ExitWithin, stream: Stream) -> None:
    """Send what the server does not read until the exit has to keep some of it."""
    before = exit.carrier.pool.used
    while exit.carrier.pool.used < before + 4000:
        for _ in range(8):
            stream.send("A", bytes(1400))
        stream.latest_window()


def fill(exit: ExitWithin, stream: Stream, connected: socket.socket) -> None:
    """Fill the exit's memory, with what the server does not read and what the client does not acknowledge."""
    stuff(exit, stream)
    connected.sendall(bytes(300_000))
    eventually(lambda: exit.carrier.pool.is_full, 3)


def settle(exit: ExitWithin) -> None:
    """What was sent has been judged."""
    exit.session.packet(exit.session.to(CLUSTER4) / ICMP())
    while ICMP not in (exit.session.next_packet() or b""):
        pass


# -- memory ------------------------------------------------------------------------------------------------------------


def test_acknowledgments_count_while_memory_is_full(place, server: socket.socket) -> None:
    """Those that come with data too, or nothing would ever leave the buffers."""
    with exit_within(place[0], memory=100_000) as exit:
        stream, connected = opened(exit, 5001, server)
        with connected:
            fill(exit, stream, connected)
            got = 0
            while got < 300_000:
                packet = exit.session.next_packet()
                assert packet is not None, f"only {got} bytes came"
                if packet[TCP].seq == stream.ack and isinstance(packet[TCP].payload, Raw):
                    got += len(packet[TCP].payload)
                    stream.ack += len(packet[TCP].payload)
                    stream.seq = packet[TCP].ack  # what of its data was not taken comes again
                    stream.send("PA", b"more")
            eventually(lambda: not exit.carrier.pool.is_full, 3)


def test_a_reset_counts_while_memory_is_full(place, server: socket.socket) -> None:
    with exit_within(place[0], memory=100_000) as exit:
        stream, connected = opened(exit, 5002, server)
        with connected:
            fill(exit, stream, connected)
            stream.send("R", b"with a reason")  # RFC 9293 section 3.5.3 allows it
            eventually(lambda: not exit.carrier.table.flows, 3)
        eventually(lambda: not exit.carrier.table.flows, 3)


def test_what_comes_out_of_order_is_counted_and_refused_when_memory_is_full(place, server: socket.socket) -> None:
    with exit_within(place[0], memory=50_000) as exit:
        stream, connected = opened(exit, 5003, server)
        with connected:
            first, stream.seq = stream.seq, stream.seq + 1
            for _ in range(40):
                stream.send("A", bytes(1400))
            eventually(lambda: exit.carrier.pool.is_full, 3)
            settle(exit)
            used = exit.carrier.pool.used
            stream.send("A", bytes(1400))
            settle(exit)
            assert exit.carrier.pool.used == used
            stream.seq = first
            stream.send("A", b"x")
            got = 0
            while got < 30_000:
                got += len(connected.recv(1 << 16))


def test_connections_that_hold_nothing_count_for_nothing(exit: ExitWithin, server: socket.socket) -> None:
    """One that is being made, and one whose server has finished."""
    exit.session.packet(exit.session.to("10.132.77.77") / TCP(sport=5004, dport=80, flags="S"))
    stream, connected = opened(exit, 5005, server)
    with connected:
        connected.shutdown(socket.SHUT_WR)
        stream.expect(lambda got, _: "F" in got.flags)
        stream.send("PA", b"still here")
        assert connected.recv(100) == b"still here"
        eventually(lambda: not exit.carrier.pool.used, 1)
