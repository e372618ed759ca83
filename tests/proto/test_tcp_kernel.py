"""The terminator against Linux's own TCP over a real TUN, on a link that loses, delays, repeats and reorders.

kernel's sockets ── tun ══ Link (faults both ways) ══ Connection ── bytes
"""

import contextlib
import heapq
import itertools
import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from peers import eventually
from pod import inside, namespace, run
from tpvpn.errors import ProtocolError
from tpvpn.proto.tcp import CLOSED, ESTABLISHED, PEER_CLOSED, RESET, Connection, Limits, State, reset_for
from tpvpn.tun import open_tun
from tpvpn.wire import ip, tcp, vnet

MSS4 = 1460
LARGEST = 65_483
OWN = {4: "198.18.7.1", 6: "fd00:7::1"}
FAR = {4: "198.18.7.2", 6: "fd00:7::2"}
PORT = 7777
LENGTH = 6_000_000


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


class End:
    """One thread that is the far host: a Connection behind a link with faults; it echoes, or says and hears."""

    def __init__(self, name: str, family: int, *, offload: bool, loss: float, late: float, seed: int = 1) -> None:
        self.offload, self.loss, self.late = offload, loss, late
        self.before = vnet.HEADER_LENGTH if offload else 0
        self.random = random.Random(seed)
        self.family = family
        with inside(name):
            self.tun = open_tun("tun0", offload=offload)
        run("ip", "-n", name, "addr", "add", OWN[4] + "/24", "dev", "tun0")
        run("ip", "-n", name, "addr", "add", OWN[6] + "/64", "dev", "tun0", "nodad")
        run("ip", "-n", name, "link", "set", "tun0", "up", "mtu", "1500")
        mss = MSS4 if family == 4 else MSS4 - 20
        self.connection = Connection(Limits(mss, LARGEST if offload else 0))
        self.port = 0
        self.to_say, self.said, self.heard = b"", 0, bytearray()
        self.events = 0
        self.closes_after_saying = True
        self.closed = False
        self.accepts = True
        self.error: BaseException | None = None
        self._order = itertools.count()
        self._flying: list[tuple[float, int, bool, bytes]] = []
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        os.write(self._wake, b"x")
        self._thread.join()
        for descriptor in (self._stop, self._wake):
            os.close(descriptor)
        self.tun.close()
        if self.error:
            raise self.error

    def say(self, data: bytes) -> None:
        """Say this and close."""
        self.to_say, self.closes_after_saying = data, True
        os.write(self._wake, b"w")

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.error = error

    def _turn(self) -> bool:
        now = time.monotonic()
        waits = [self._flying[0][0]] if self._flying else []
        if (at := self.connection.next_timeout()) is not None:
            waits.append(at)
        wait = max(min(waits) - now, 0) if waits else 5
        descriptors = [self.tun.fd, self.tun.prompt_fd]
        ready = select.select([*descriptors, self._stop], [], [], wait)[0]
        if self._stop in ready and os.read(self._stop, 1) == b"x":
            return False
        for descriptor in set(ready) & set(descriptors):
            for _ in range(64):
                try:
                    self._fly(True, os.read(descriptor, 70_000))
                except BlockingIOError:
                    break
        now = time.monotonic()
        while self._flying and self._flying[0][0] <= now:
            _, _, arriving, data = heapq.heappop(self._flying)
            if arriving:
                self._receive(data, now)
            else:
                with contextlib.suppress(BlockingIOError):  # a full queue is one more fault
                    os.write(self.tun.fd, data)
        self.connection.handle_timeout(now)
        self._serve(now)
        return True

    def _fly(self, arriving: bool, data: bytes) -> None:
        for _ in range(1 + (self.random.random() < self.loss / 2)):
            if self.random.random() >= self.loss:
                late = 0.003 if self.random.random() < self.late else 0
                heapq.heappush(self._flying, (time.monotonic() + 0.0005 + late, next(self._order), arriving, data))

    def _receive(self, data: bytes, now: float) -> None:
        checked = bool(self.before and vnet.Header.unpack(data).flags & vnet.NEEDS_CHECKSUM)
        packet = ip.parse(memoryview(data)[self.before :])
        if packet.protocol != ip.TCP or bytes(packet.destination) != packed(FAR[self.family]):
            return  # the kernel's own: router solicitations
        try:
            segment = tcp.parse(packet, checked=checked)
        except ProtocolError as error:
            raise AssertionError("the kernel's segments are well formed") from error
        source_port, port = tcp.ports(packet.payload)
        if port != PORT or (self.port and source_port != self.port) or self.connection.is_closed:
            self._send(source_port, port, [answer] if (answer := reset_for(segment)) else [])
            return
        self.port = source_port
        self.connection.receive_segment(segment, now)

    def _serve(self, now: float) -> None:
        connection = self.connection
        if connection.is_requested and self.accepts:
            connection.accept(now, self.random.getrandbits(32))
        elif connection.is_requested:
            connection.refuse()
        for _ in range(100):
            self.events |= connection.take_events()
            views = connection.peek()
            self.heard += b"".join(views)
            connection.consume(connection.readable)
            if room := connection.writable:
                piece = self.to_say[self.said : self.said + min(room, LARGEST)]
                connection.write(piece)
                self.said += len(piece)
            if (
                self.closes_after_saying
                and self.said == len(self.to_say)
                and not self.closed
                and self.events & ESTABLISHED
            ):
                self.closed = True
                connection.shutdown_write()
            segments = connection.segments_to_send(now, 1 << 18)
            self._send(self.port, PORT, segments)
            if not any(segment.payload for segment in segments):
                break

    def _send(self, to_port: int, port: int, segments: list[tcp.Segment]) -> None:
        writer = tcp.Writer(packed(FAR[self.family]), port, packed(OWN[self.family]), to_port, offload=self.offload)
        for segment in segments:
            buffer = bytearray(len(segment.payload) + 200)
            self._fly(False, bytes(buffer[: writer.write(buffer, 0, segment, self.connection.send_mss)]))

    def dial(self, port: int, now: float) -> None:
        """Open the connection from this side, before `start`."""
        self.port = port
        self.connection.connect(now, self.random.getrandbits(32))


@pytest.fixture
def host() -> Iterator[str]:
    with namespace("host") as name:
        yield name


@contextlib.contextmanager
def far_end(name: str, family: int = 4, *, offload: bool = True, loss: float = 0.0, late: float = 0.0) -> Iterator[End]:
    end = End(name, family, offload=offload, loss=loss, late=late)
    try:
        yield end
    finally:
        end.close()


def connected(name: str, family: int = 4) -> socket.socket:
    """A socket of the host, connected to the far end."""
    with inside(name):
        made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
    made.settimeout(20)
    try:
        made.connect((FAR[family], PORT))
    except OSError:
        made.close()
        raise
    made.settimeout(120)
    return made


def converse(connection: socket.socket, data: bytes) -> bytes:
    """Say `data` and hear all there is, at once."""
    saying = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
    saying.start()
    heard = bytearray()
    while part := connection.recv(1 << 18):
        heard += part
    saying.join()
    return bytes(heard)


FAULTS = pytest.mark.parametrize(
    ("loss", "late"), [(0, 0), (0.01, 0), (0, 0.2), (0.05, 0.2)], ids=["good", "loses", "reorders", "both"]
)


@FAULTS
@pytest.mark.parametrize("offload", [True, False], ids=["offload", "bare"])
@pytest.mark.parametrize("family", [4, 6])
def test_the_kernel_connects(host: str, family: int, offload: bool, loss: float, late: float) -> None:
    length = LENGTH if offload else LENGTH // 6
    there, back = random.Random(1).randbytes(length), random.Random(2).randbytes(length)
    with far_end(host, family, offload=offload, loss=loss, late=late) as end:
        end.to_say = back
        end.start()
        with connected(host, family) as client:
            assert converse(client, there) == back
        eventually(lambda: end.connection.state in (State.TIME_WAIT, State.CLOSED), 30)
        assert bytes(end.heard) == there
        assert end.events & PEER_CLOSED


@FAULTS
@pytest.mark.parametrize("offload", [True, False], ids=["offload", "bare"])
def test_the_kernel_is_connected_to(host: str, offload: bool, loss: float, late: float) -> None:
    length = LENGTH if offload else LENGTH // 6
    there, back = random.Random(1).randbytes(length), random.Random(2).randbytes(length)
    with inside(host):
        listening = socket.create_server(("0.0.0.0", 8888))
    with listening, far_end(host, 4, offload=offload, loss=loss, late=late) as end:
        end.to_say = back
        end.dial(8888, time.monotonic())
        end.start()
        listening.settimeout(20)
        server, _ = listening.accept()
        with server:
            server.settimeout(120)
            assert converse(server, there) == back
        eventually(lambda: len(end.heard) >= length, 30)
        assert bytes(end.heard) == there


def test_the_kernel_is_refused(host: str) -> None:
    with far_end(host) as end:
        end.accepts = False
        end.start()
        with pytest.raises(ConnectionRefusedError):
            connected(host)


def test_half_close_and_a_late_answer(host: str) -> None:
    with far_end(host) as end:
        end.closes_after_saying = False
        end.start()
        with connected(host) as client:
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            eventually(lambda: bool(end.events & PEER_CLOSED), 30)
            assert end.heard == b"question"
            end.say(b"answer")
            assert client.recv(100) == b"answer"
            assert client.recv(100) == b""


def test_an_abort_of_the_kernel_is_a_reset(host: str) -> None:
    with far_end(host) as end:
        end.closes_after_saying = False
        end.start()
        client = connected(host)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        eventually(lambda: bool(end.events & RESET), 30)
        assert end.connection.state is State.CLOSED
        assert not end.events & CLOSED
