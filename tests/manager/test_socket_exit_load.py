"""What many flows cost the socket exit, at once or in a row: memory, processor time, descriptors, ports; all come back.

TPVPN_TEST_CONNECTIONS=100000 makes the long row as long as that.
"""

import contextlib
import os
import re
import resource
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP
from socket_exits import Manager, Session, manager_in, place

from peers import eventually
from pod import CLUSTER4, SERVICE4, inside, run, sysctl
from tpvpn.wire import frame, ip, tcp

__all__ = ["place"]

pytestmark = pytest.mark.alone

FLOWS = 10_000
AT_ONCE = 500
TICK = 0.01
"""Seconds in which the kernel counts processor time."""
IN_A_ROW = int(os.environ.get("TPVPN_TEST_CONNECTIONS", "6000"))
FIN, PSH_ACK = tcp.FIN | tcp.ACK, tcp.PSH | tcp.ACK
Target = tuple[str, int]


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


def cpu_in(manager: Manager, seconds: float) -> float:
    """The processor time it uses within so many seconds."""
    before = manager.cpu()
    time.sleep(seconds)
    return manager.cpu() - before


class Many:
    """Connections of one session, from the source ports 10000 and up."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._own = socket.inet_aton(session.terms.ipv4 or "")
        self._buffer = bytearray(200)

    def send(
        self, port: int, flags: int, seq: int, ack: int, data: bytes = b"", target: Target = (CLUSTER4, 8080)
    ) -> None:
        writer = tcp.Writer(self._own, port, socket.inet_aton(target[0]), target[1], offload=False)
        end = writer.write(self._buffer, 0, tcp.Segment(seq, ack, flags, 65535, data), 1460)
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

    def exchange(self, target: Target, ports: range) -> int:
        """Connect, send a byte, have it back and close, this end first unless the other did; how many were refused."""
        refused, open_ports = 0, set(ports)
        for port in ports:
            self.send(port, tcp.SYN, 1000, 0, target=target)
        while open_ports:
            packet = ip.parse(self._session.receive()[1])
            if packet.protocol == ip.ICMP4:
                refused += 1
                quoted = packet.payload[8 + ip.HEADER_LENGTH4 :]
                open_ports.discard(tcp.ports(quoted)[0])
                continue
            segment, port = tcp.parse(packet), tcp.ports(packet.payload)[1]
            if port not in open_ports:
                continue
            after = segment.seq + len(segment.payload) + bool(segment.flags & (tcp.SYN | tcp.FIN)) & 0xFFFFFFFF
            if segment.flags & tcp.SYN:
                self.send(port, PSH_ACK, 1001, after, b"x", target)
            elif segment.payload or segment.flags & tcp.FIN:
                assert segment.payload in (b"", b"x")
                if segment.payload:
                    self.send(port, FIN, 1002, after, target=target)
                elif segment.ack == 1003:
                    self.send(port, tcp.ACK, 1003, after, target=target)
                if segment.flags & tcp.FIN:
                    open_ports.discard(port)
        return refused


@contextlib.contextmanager
def echoing(cluster: str, targets: list[Target], *, closes: bool = False) -> Iterator[None]:
    """Servers that give back what comes and close when the client did, or, with `closes`, at once."""
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for target in targets:
            with inside(cluster):
                server = stack.enter_context(socket.create_server(target, backlog=4096))
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ, "server")
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        selector.register(theirs, selectors.EVENT_READ, "end")

        def serve() -> None:
            while True:
                for key, _ in selector.select():
                    ready = key.fileobj
                    assert isinstance(ready, socket.socket)
                    if key.data == "end":
                        return
                    if key.data == "server":
                        with contextlib.suppress(BlockingIOError):
                            while True:
                                selector.register(ready.accept()[0], selectors.EVENT_READ)
                        continue
                    data = ready.recv(100)
                    if data:
                        ready.send(data)
                    if closes or not data:
                        selector.unregister(ready)
                        ready.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ours.send(b"x")
            thread.join()


def time_waits(pod: str) -> int:
    found = re.search(r"^TCP: .* tw (\d+) ", run("ip", "netns", "exec", pod, "cat", "/proc/net/sockstat"), re.MULTILINE)
    assert found
    return int(found[1])


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
        idle = [cpu_in(manager, 3.0) for _ in range(2)]  # in the first the handshakes' last timers may expire
        assert min(idle) < 0.01 * 3.0 + TICK / 2, idle
        assert session.ask(session.to(CLUSTER4) / ICMP())[ICMP].type == 0
    eventually(lambda: manager.descriptors() <= descriptors, 10, "every socket is closed")


def test_short_connections_in_a_row_leave_nothing(manager: Manager, accepted: list[socket.socket]) -> None:
    with manager.session() as session:
        many = Many(session)
        assert session.answers()  # all that a session opens is open
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


def test_short_connections_that_close_properly_leave_nothing(place, manager: Manager) -> None:
    """To several targets: each may have as many in TIME-WAIT as there are local ports."""
    targets = [(address, port) for address in (CLUSTER4, SERVICE4) for port in range(8081, 8085)]
    with echoing(place[1], targets), manager.session() as session:
        many = Many(session)
        before, descriptors, rss = time_waits(place[0]), manager.descriptors(), []
        began, cpu = time.monotonic(), manager.cpu()
        for number in range(IN_A_ROW // AT_ONCE):
            first = 10_000 + number // len(targets) * AT_ONCE % 50_000
            assert many.exchange(targets[number % len(targets)], range(first, first + AT_ONCE)) == 0
            rss.append(manager.rss())
        eventually(lambda: manager.descriptors() <= descriptors, 5, "every socket is closed")
        seconds = time.monotonic() - began
        print(f"{IN_A_ROW / seconds:.0f} connections a second, {1e6 * (manager.cpu() - cpu) / IN_A_ROW:.0f} µs each")
        print(f"{time_waits(place[0])} in TIME-WAIT; {rss[0]}, {rss[len(rss) // 2]}, {rss[-1]} KiB")
        assert time_waits(place[0]) > before
        assert rss[-1] - rss[len(rss) // 2] < 2048
    assert manager.dropped()["ports"] == 0


@pytest.fixture(params=[100])
def few_ports(request: pytest.FixtureRequest, place) -> Iterator[int]:
    """So many local ports has the pod."""
    before = {key: sysctl(place[0], key) for key in ("ipv4/ip_local_port_range", "ipv4/tcp_tw_reuse")}
    sysctl(place[0], "ipv4/ip_local_port_range", f"40000 {39_999 + request.param}")
    sysctl(place[0], "ipv4/tcp_tw_reuse", "0")
    yield request.param
    for key, value in before.items():
        sysctl(place[0], key, value)


def test_a_target_has_as_many_connections_as_there_are_ports(place, manager: Manager, few_ports: int) -> None:
    """What is beyond fails at once, is counted and said once, concerns no other target, and passes."""
    targets = [(CLUSTER4, port) for port in (8085, 8086)]
    with echoing(place[1], targets), manager.session() as session:
        many = Many(session)
        lacking = many.exchange(targets[0], range(10_000, 10_000 + few_ports))
        assert lacking <= few_ports // 20, "but for those that other sockets of the pod have for themselves"
        began = time.monotonic()
        assert many.exchange(targets[0], range(10_200, 10_210)) == 10
        assert time.monotonic() - began < 1
        assert manager.dropped()["ports"] == 10 + lacking
        assert manager.said.count("no local port is left for 10.132.0.9 port 8085") == 1
        assert many.exchange(targets[1], range(10_300, 10_350)) == 0
        sysctl(place[0], "ipv4/tcp_tw_reuse", "1")  # which ends the wait after a second, for the test's patience
        again = iter(range(10_400, 12_000))
        eventually(lambda: many.exchange(targets[0], range(port := next(again), port + 1)) == 0, 5, "ports are back")


def test_a_server_that_closes_first_has_the_wait(place, manager: Manager, few_ports: int) -> None:
    target = (CLUSTER4, 8087)
    with echoing(place[1], [target], closes=True), manager.session() as session:
        many = Many(session)
        for first in range(10_000, 10_000 + 5 * few_ports, 50):
            assert many.exchange(target, range(first, first + 50)) == 0


@pytest.mark.parametrize("few_ports", [1000], indirect=True)
def test_a_port_is_found_where_most_are_taken(place, manager: Manager, few_ports: int) -> None:
    """Though the kernel looks at a piece of the range at a time."""
    target = (CLUSTER4, 8088)
    with echoing(place[1], [target]), manager.session() as session:
        many = Many(session)
        for first in range(10_000, 10_000 + few_ports * 4 // 5, 100):
            assert many.exchange(target, range(first, first + 100)) == 0
