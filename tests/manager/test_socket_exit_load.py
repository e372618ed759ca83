"""What many flows at once cost the socket exit: memory, processor time and descriptors, and that all come back."""

import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP
from socket_exits import Manager, Session, manager_in, place

from peers import eventually
from pod import CLUSTER4, inside
from tpvpn.wire import frame, ip, tcp

__all__ = ["place"]

FLOWS = 10_000
AT_ONCE = 500


@pytest.fixture
def manager(place) -> Iterator[Manager]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with manager_in(place[0]) as manager:
        yield manager
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def accepted(place) -> Iterator[list[socket.socket]]:
    """What a server on the cluster's port 8080 has accepted."""
    with inside(place[1]):
        server = socket.create_server((CLUSTER4, 8080), backlog=4096)
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connections.append(server.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    yield connections
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for connection in connections:
        connection.close()


class Many:
    """Connections of one session, from the source ports 10000 and up."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._own = socket.inet_aton(session.terms.ipv4 or "")
        self._buffer = bytearray(200)

    def send(self, port: int, flags: int, seq: int, ack: int) -> None:
        writer = tcp.Writer(self._own, port, socket.inet_aton(CLUSTER4), 8080, offload=False)
        end = writer.write(self._buffer, 0, tcp.Segment(seq, ack, flags, 65535), 1460)
        self._session.send(frame.PACKET, bytes(self._buffer[:end]))

    def connect(self, ports: range) -> None:
        for port in ports:
            self.send(port, tcp.SYN, 1000, 0)
        missing = set(ports)
        while missing:
            packet = ip.parse(self._session.receive()[1])
            segment, port = tcp.parse(packet), tcp.ports(packet.payload)[1]
            if segment.flags == tcp.SYN | tcp.ACK:
                self.send(port, tcp.ACK, 1001, segment.seq + 1)
                missing.discard(port)


def test_ten_thousand_idle_flows_cost_little_and_leave_nothing(manager: Manager, accepted: list[socket.socket]) -> None:
    descriptors = manager.descriptors()
    with manager.session() as session:
        many = Many(session)
        began, before = time.monotonic(), manager.cpu()
        for first in range(10_000, 10_000 + FLOWS, AT_ONCE):
            many.connect(range(first, first + AT_ONCE))
        eventually(lambda: len(accepted) == FLOWS, 5)
        cpu = manager.cpu() - before
        print(f"{FLOWS / (time.monotonic() - began):.0f} connections a second, {1e6 * cpu / FLOWS:.0f} µs each")
        print(f"{manager.rss() // 1024} MiB")
        assert manager.rss() < 150 << 10
        before = manager.cpu()
        time.sleep(2)
        assert manager.cpu() - before <= 0.02
        assert session.ask(session.to(CLUSTER4) / ICMP())[ICMP].type == 0
    eventually(lambda: manager.descriptors() <= descriptors, 10, "every socket is closed")


def test_short_connections_in_a_row_leave_nothing(manager: Manager, accepted: list[socket.socket]) -> None:
    with manager.session() as session:
        many = Many(session)
        descriptors = manager.descriptors()
        rss = []
        for _ in range(10):
            for first in range(10_000, 12_000, AT_ONCE):
                ports = range(first, first + AT_ONCE)
                many.connect(ports)
                for port in ports:
                    many.send(port, tcp.RST | tcp.ACK, 1001, 0)
            eventually(lambda: manager.descriptors() <= descriptors, 5, "every socket is closed")
            while accepted:
                accepted.pop().close()
            rss.append(manager.rss())
        print(rss)
        assert rss[-1] - rss[4] < 2048
