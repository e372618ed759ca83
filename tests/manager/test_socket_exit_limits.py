"""What the socket exit does at its limits: memory, descriptors, time; and what hostile or hasty clients bring it to."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.packet import Raw
from socket_exits import UNPRIVILEGED, ExitWithin, Manager, Stream, exit_within, manager_in, place

from peers import eventually
from pod import CLUSTER4, CLUSTER6, POD4, SERVICE4, inside, run

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


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_a_manager_of_few_descriptors_keeps_half_of_them_for_links(place, server: socket.socket) -> None:
    few = ("prlimit", "--nofile=80", *UNPRIVILEGED)
    with manager_in(place[0], rights=few) as manager, manager.session() as greedy:
        for port in range(1, 101):
            greedy.packet(greedy.to(CLUSTER4) / UDP(sport=port, dport=9999))
        eventually(lambda: manager.metrics()["tpvpn_exit_dropped_flows_total"] == 68, 3)
        with manager.session() as other:
            Stream(other, CLUSTER4, 8080, 5101).connect()
            assert manager.metrics()["tpvpn_exit_dropped_socket_total"] == 0


def limit(manager: Manager, more: int) -> None:
    """The process may have so many descriptors more than it has."""
    as_its_user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    run(*as_its_user, "prlimit", f"--pid={manager.process.pid}", f"--nofile={manager.descriptors() + more}:")


def test_without_descriptors_clients_hear_nothing_and_all_goes_on_when_there_are_some(
    place, server: socket.socket
) -> None:
    with manager_in(place[0]) as manager, manager.session() as session:
        stream = Stream(session, CLUSTER4, 8080, 5102)
        stream.connect()
        limit(manager, 0)
        # Also to where nothing was sent yet, of which a socket would have to say whether it is the manager's own.
        for address in (CLUSTER4, CLUSTER6, SERVICE4):
            assert session.silent(session.to(address) / TCP(sport=5103, dport=8080, flags="S"))
            assert session.silent(session.to(address) / UDP(sport=5103, dport=9999))
            ping = ICMPv6EchoRequest(id=3) if ":" in address else ICMP(id=3)
            assert session.silent(session.to(address) / ping)
        assert session.silent(session.to("10.1.2.3", ttl=1) / UDP(sport=5103, dport=33434))
        with dialled(manager) as waiting:
            cpu = manager.cpu()
            waiting.settimeout(1)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            assert manager.cpu() - cpu < 0.2
            stream.send("PA", b"what is open goes on")
            with server.accept()[0] as connected:
                connected.settimeout(3)
                assert connected.recv(100) == b"what is open goes on"
            stream.expect(lambda got, _: "F" in got.flags)
            stream.send("FA")  # and gives its descriptor back
            assert b"200 OK" in waiting.recv(100)
        assert manager.said.count("cannot accept connections, they wait: Too many open files") == 1
        stream.expect(lambda got, _: got.ack == stream.seq)
        again = Stream(session, CLUSTER4, 8080, 5103)
        again.connect()
        limit(manager, 100)
        assert session.ask(session.to(CLUSTER4) / ICMP(id=3))[ICMP].type == 0
        expired = session.ask(session.to("10.1.2.3", ttl=1) / UDP(sport=5103, dport=33434))
        assert (expired.src, expired[ICMP].type) == (POD4, 11)
        assert manager.metrics()["tpvpn_exit_dropped_socket_total"] == 9


def test_a_session_that_finds_no_descriptors_leaves_nothing(place) -> None:
    """Its link had one, and what watches its connections has none."""
    with manager_in(place[0]) as manager:
        manager.metrics()
        before = manager.descriptors()
        limit(manager, 1)
        with pytest.raises((EOFError, ConnectionError)), manager.session() as session:
            while True:
                session.receive()
        eventually(lambda: manager.descriptors() == before, 3)
        limit(manager, 100)
        with manager.session() as session:
            assert session.ask(session.to(CLUSTER4) / ICMP(id=3))[ICMP].type == 0


@contextlib.contextmanager
def dialled(manager: Manager) -> Iterator[socket.socket]:
    """A connection that asks whether the manager is well."""
    with inside(manager.pod), socket.create_connection(("127.0.0.1", manager.port), timeout=5) as connected:
        connected.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        yield connected
