"""The packet path in memory: two pumps over a real stream; a datagram socket pair stands for each TUN device."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from tpvpn.bundle import Bundle
from tpvpn.errors import LinkLostError, ProtocolError, TpvpnError
from tpvpn.link import Link
from tpvpn.pump import OwnAddress, Pump
from tpvpn.transport.stream import Stream
from tpvpn.tun import Tun
from tpvpn.wire import frame, vnet
from tpvpn.wire.vnet import Offload

CLIENT4, CLIENT6 = "246.0.0.9", "fd00::9"
OWN = OwnAddress("source", CLIENT4, CLIENT6)


def packet(data, offload: bool = True) -> bytes:
    return (vnet.EMPTY if offload else b"") + bytes(data)


TCP4 = packet(IP(src=CLIENT4, dst="10.0.0.1") / TCP() / b"tcp")
UDP6 = packet(IPv6(src=CLIENT6, dst="fd10::1") / UDP() / b"udp")
PING = packet(IP(src=CLIENT4, dst="10.0.0.1") / ICMP())
FOREIGN = packet(IP(src="10.9.9.9", dst="10.0.0.1") / UDP() / b"spoofed")
FOREIGN6 = packet(IPv6(src="fd00::8", dst="fd10::1") / TCP() / b"spoofed")


@dataclass
class End:
    """A pump, the kernel's side of its two TUN queues, and what else it was given."""

    pump: Pump
    link: Link
    queue: socket.socket
    prompt: socket.socket
    frames: list[tuple[int, bytes]]
    errors: list[TpvpnError]

    def written(self) -> tuple[list[bytes], list[bytes]]:
        return _drain(self.queue), _drain(self.prompt)


def _drain(side: socket.socket) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(side.recv(1 << 17))
    return found


@contextlib.asynccontextmanager
async def an_end(connected: socket.socket, own: OwnAddress = OWN, offload: bool = True) -> AsyncIterator[End]:
    (queue, fd), (prompt, prompt_fd) = _queue(), _queue()
    frames: list[tuple[int, bytes]] = []
    errors: list[TpvpnError] = []
    link = Link(Stream(connected), errors.append)
    tun = Tun(fd.fileno(), prompt_fd.fileno(), "test", Offload.ALL)
    bundle = Bundle(offload=offload)
    pump = Pump(tun, bundle, own, lambda kind, payload: frames.append((kind, payload)), offload=offload)
    pump.start()
    bundle.join(0, link)
    try:
        yield End(pump, link, queue, prompt, frames, errors)
    finally:
        pump.stop()
        link.close()
        for one in (queue, fd, prompt, prompt_fd):
            one.close()


def _queue() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for one in pair:
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    return pair


def a_stream() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    return one, other


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@contextlib.contextmanager
def both(offload: bool = True) -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = a_stream()
    yield one, other
    one.close()
    other.close()


def test_packets_cross_in_order_each_by_its_queue() -> None:
    async def main() -> None:
        with both() as (one, other):
            async with an_end(one) as laptop, an_end(other) as manager:
                for number in range(300):
                    (laptop.prompt if number % 3 == 0 else laptop.queue).send(
                        packet(IP(src=CLIENT4, dst="10.0.0.1") / (UDP() if number % 3 == 0 else TCP()) / str(number))
                    )
                await until(lambda: manager.pump.counters.received_packets == 300)
                queue, prompt = manager.written()
                assert [int(bytes(IP(each[10:])[TCP].payload)) for each in queue] == [n for n in range(300) if n % 3]
                assert [int(bytes(IP(each[10:])[UDP].payload)) for each in prompt] == [
                    n for n in range(300) if not n % 3
                ]
                assert laptop.pump.counters.sent_packets == 300

    asyncio.run(main())


def test_only_the_clients_own_address_passes() -> None:
    async def main() -> None:
        with both() as (one, other):
            async with an_end(other) as manager:
                for each in (TCP4, FOREIGN, UDP6, FOREIGN6, PING):
                    one.sendall(frame.encode(frame.PACKET, each))
                await until(lambda: manager.pump.counters.received_packets == 3)
                assert manager.written() == ([TCP4], [UDP6, PING])
                assert manager.pump.counters.foreign_packets == 2

    asyncio.run(main())


def test_a_laptop_takes_packets_to_its_own_address_alone_and_bare_packets_have_no_header() -> None:
    async def main() -> None:
        with both() as (one, other):
            own = OwnAddress("destination", CLIENT4, None)
            async with an_end(other, own, offload=False) as laptop:
                mine = bytes(IP(src="10.0.0.1", dst=CLIENT4) / TCP())
                for each in (bytes(IP(src="10.0.0.1", dst="192.0.2.1") / TCP()), UDP6[10:], mine):
                    one.sendall(frame.encode(frame.PACKET, each))
                await until(lambda: laptop.pump.counters.received_packets == 1)
                assert laptop.written() == ([mine], [])
                assert laptop.pump.counters.foreign_packets == 2

    asyncio.run(main())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_stream_cut_anywhere_gives_the_same(data: st.DataObject) -> None:
    run = [frame.encode(0, TCP4), frame.encode(1, b'{"type":"x"}'), frame.encode(0, UDP6), frame.encode(77, b"later")]
    stream = b"".join(run * 3)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))

    async def main() -> None:
        with both() as (_, other):
            async with an_end(other) as manager:
                buffer = bytearray(4096)
                have = 0
                for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                    buffer[have : have + end - start] = stream[start:end]
                    have += end - start
                    used = manager.pump.receive(buffer, 0, have)
                    have -= used
                    buffer[:have] = buffer[used : used + have]
                assert have == 0
                assert manager.written() == ([TCP4] * 3, [UDP6] * 3)
                assert manager.frames == [(1, b'{"type":"x"}'), (77, b"later")] * 3

    asyncio.run(main())


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"\x00\x01\x00\x0a", "kind 0 with 65546 bytes"),
        (b"\x01\x10\x00\x01", "kind 1 with 1048577 bytes"),
        (b"\xff\xff\xff\xff", "kind 255"),
    ],
)
def test_a_frame_too_long_ends_the_link_and_says_what_came(header: bytes, says: str) -> None:
    async def main() -> None:
        with both() as (one, other):
            async with an_end(other) as manager:
                one.sendall(header)
                await until(lambda: manager.errors)
                assert isinstance(manager.errors[0], ProtocolError)
                assert says in str(manager.errors[0])

    asyncio.run(main())


def test_runts_and_garbage_cost_a_counter() -> None:
    """What is too short to have an address is not the client's; nothing crashes."""

    async def main() -> None:
        with both() as (one, other):
            async with an_end(other) as manager:
                for length in range(40):
                    one.sendall(frame.encode(frame.PACKET, os.urandom(length)))
                one.sendall(frame.encode(frame.PACKET, TCP4))
                await until(lambda: manager.pump.counters.received_packets >= 1)
                counters = manager.pump.counters
                assert counters.foreign_packets + counters.invalid_packets + counters.received_packets == 41
                assert not manager.errors

    asyncio.run(main())


def test_back_pressure_stops_reading_the_tun_and_loses_nothing() -> None:
    async def main() -> None:
        with both() as (one, other):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            async with an_end(one) as laptop:
                big = packet(IP(src=CLIENT4, dst="10.0.0.1") / TCP() / bytes(60_000))
                total = 200
                received = 0

                async def feed() -> None:
                    for _ in range(total):
                        while True:
                            try:
                                laptop.queue.send(big)
                                break
                            except BlockingIOError:
                                await asyncio.sleep(0.001)

                feeding = asyncio.create_task(feed())
                await until(lambda: laptop.link.congested)
                laptop.link.send(frame.CONTROL, b'{"type":"ping"}')
                other.setblocking(False)
                stream = bytearray()
                expected = total * (4 + len(big)) + 4 + 15
                while received < expected:
                    with contextlib.suppress(BlockingIOError):
                        piece = other.recv(1 << 20)
                        stream += piece
                        received += len(piece)
                    await asyncio.sleep(0)
                await feeding
                decoder = frame.Decoder()
                decoder.receive(bytes(stream))
                kinds = list(decoder.frames())
                assert [payload for kind, payload in kinds if kind == 0] == [big] * total
                assert [payload for kind, payload in kinds if kind == 1] == [b'{"type":"ping"}']

    asyncio.run(main())


def test_the_end_of_the_stream_is_told_once() -> None:
    async def main() -> None:
        with both() as (one, other):
            async with an_end(other) as manager:
                one.close()
                await until(lambda: manager.errors)
                manager.link.send(frame.CONTROL, b"{}")
                assert len(manager.errors) == 1
                assert isinstance(manager.errors[0], LinkLostError)

    asyncio.run(main())
