"""The socket exit under a fuzzer: one session sends what `packets` makes, beside it an honest one is asked all along.

All of it is one process and one loop, on real sockets, in the namespace of a pod; whatever is raised, logged as an
error, kept too long or not answered ends it with a `Failure`.
"""

import asyncio
import contextlib
import gc
import logging
import os
import random
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from packets import Packets
from socket_exits import WoundLoop

from pod import CLUSTER4, CLUSTER6, SERVICE4, inside
from tpvpn.bundle import Bundle
from tpvpn.link import Link
from tpvpn.manager.socket_carrier import SocketCarrier
from tpvpn.manager.socket_exit import MAX_FLOWS, MAX_MEMORY, SocketExit, SocketPlace
from tpvpn.proto.flow import Pool
from tpvpn.transport.stream import Stream
from tpvpn.wire import frame, icmp, ip
from tpvpn.wire.vnet import Offload

BATCH = 256
"""Packets between two questions of the honest session."""
PATIENCE = 2.0
TIGHT = 500, 200_000
"""Flows and bytes of every other pair of seeds, so that the limits are met too."""
LEAPS = (0.3, 3.0, 11.0, 31.0, 70.0, 200.0, 1000.0)
"""Seconds that pass at once now and then: each kind of timer has its turn."""
GROWTH = 48 << 10
"""KiB of resident memory that a run may add: buffers are bounded."""


class Failure(AssertionError):
    """What went wrong."""


@dataclass
class Report:
    """What a run did."""

    seed: int
    packets: int = 0
    answers: int = 0
    flows: int = 0
    """The most that were open at once."""
    congested: int = 0
    """How often the link was found to take nothing."""
    seconds: float = 0.0
    growth: int = 0
    """KiB of resident memory."""
    slowest: float = 0.0
    """Seconds that the honest session waited for an answer."""
    counters: dict[str, int] = field(default_factory=dict[str, int])


class Trace:
    """Whether each packet of a session came to something: a flow, reassembly or an answer; else a counter has it."""

    def __init__(self, carrier: SocketCarrier) -> None:
        self.packets = self._handed = 0
        self.lost: list[str] = []
        self._carrier, self._receive = carrier, carrier._receive_packet
        carrier._receive_packet = self._receive_packet
        reassembler = carrier._reassembler
        reassembler.add = self._counting(reassembler.add)
        carrier.table.get = self._counting(carrier.table.get)

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A packet that finds its flow, or is kept as a fragment, is carried; the call says so by giving something."""

        def counted(*arguments: object) -> object:
            found = call(*arguments)
            self._handed += found is not None or len(arguments) > 1
            return found

        return counted

    def _seen(self) -> tuple[int, ...]:
        carrier = self._carrier
        counters = carrier.counters
        dropped = counters.foreign_packets + counters.invalid_packets + carrier.dropped.total()
        return dropped, carrier.outbox.packets, carrier.outbox.dropped, len(carrier.table.flows), self._handed

    def _receive_packet(self, data: memoryview, now: float) -> None:
        before = self._seen()
        self._receive(data, now)
        self.packets += 1
        if self._seen() == before:
            self.lost.append(bytes(data).hex())


class Side:
    """A session at the exit, and its client's end of the link."""

    def __init__(self, way_out: SocketExit, *, offload: bool) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        self.client = theirs
        theirs.setblocking(False)
        self.place: SocketPlace = way_out.add_session(None, None, offload=offload)
        if offload:
            self.place.agree(Offload.ALL)
        self.lost: Exception | None = None
        self.link = Link(Stream(ours), self._on_lost)
        bundle = Bundle(offload=offload)
        self.carrier = self.place.attach(bundle, lambda kind, payload: None)
        self.carrier.start()
        bundle.join(0, self.link)
        self._decoder = frame.Decoder()

    def _on_lost(self, error: Exception) -> None:
        self.lost = error

    def close(self) -> None:
        self.carrier.stop()
        self.link.close()
        self.place.close()
        self.client.close()

    def heard(self) -> list[bytes]:
        """The packets that came meanwhile."""
        with contextlib.suppress(BlockingIOError):
            while data := self.client.recv(1 << 18):
                self._decoder.receive(data)
        return [payload for _, payload in self._decoder.frames()]

    async def send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self.client, data)
        except OSError as error:
            raise Failure(f"the exit has ended the link: {self.lost}") from error


async def fuzz(cluster: str, seed: int, *, offload: bool, packets: int) -> Report:
    """In the pod's namespace: run until so many packets were sent; the report, or Failure."""
    report, began = Report(seed), time.monotonic()
    chance = random.Random(seed)
    async with _watched() as errors, echoing(cluster):
        descriptors = len(os.listdir("/proc/self/fd"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, WoundLoop)
        way_out = SocketExit(identity="fuzz", clock=loop.time)
        way_out.open()
        flows, memory = TIGHT if seed & 2 else (MAX_FLOWS, MAX_MEMORY)
        way_out.pool = Pool(flows, memory)
        hostile, honest = Side(way_out, offload=offload), Side(way_out, offload=False)
        trace = Trace(hostile.carrier)
        targets = (CLUSTER4, SERVICE4, CLUSTER6)
        own = hostile.place.ipv4 or "", hostile.place.ipv6 or ""
        source, before = Packets(seed, own, targets, offload=offload), 0
        deaf = False
        while report.packets < packets:
            stream = b"".join(frame.encode(frame.PACKET, source.next()) for _ in range(BATCH))
            if chance.random() < 0.1:
                deaf = not deaf  # nobody takes the answers: the link is congested
            if chance.random() < 0.05:
                loop.ahead += chance.choice(LEAPS)
            while stream:
                cut = chance.choice((1, 5, 1000, 60_000, len(stream)))
                await hostile.send(stream[:cut])
                stream = stream[cut:]
                await asyncio.sleep(0)
                for payload in () if deaf else hostile.heard():
                    source.hear(payload)
                    report.answers += 1
            report.packets += BATCH
            report.flows = max(report.flows, len(hostile.carrier.table.flows))
            report.congested += hostile.link.congested
            report.slowest = max(report.slowest, await _ask(honest, report.packets))
            if report.packets == 8 * BATCH:
                before = resident()
            if trace.lost:
                errors.append(f"neither carried nor counted: {trace.lost[0]}")
            if errors or hostile.lost:
                raise Failure(f"seed {seed}, near packet {report.packets}: {hostile.lost or errors[0]}")
        await _ask(honest, 1)
        if trace.packets != report.packets:
            raise Failure(f"seed {seed}: {report.packets} packets were sent, {trace.packets} came")
        report.growth = resident() - before
        report.seconds = time.monotonic() - began
        counters = hostile.carrier.counters
        report.counters = way_out.dropped() | {
            "invalid": counters.invalid_packets,
            "foreign": counters.foreign_packets,
        }
        hostile.close()
        honest.close()
        gc.collect()
        await _settle(way_out, flows, descriptors, report)
        if errors:
            raise Failure(f"seed {seed}, at the end: {errors[0]}")
    return report


async def _settle(way_out: SocketExit, flows: int, descriptors: int, report: Report) -> None:
    """All that the sessions had is given back; the cluster's servers hear of it a moment later."""
    deadline = time.monotonic() + PATIENCE
    while True:
        left = {
            "bytes in buffers": way_out.pool.used,
            "flows": flows - way_out.pool._free,
            "descriptors": max(0, len(os.listdir("/proc/self/fd")) - descriptors),
            "KiB of memory": report.growth if report.growth > GROWTH else 0,
        }
        if not any(left.values()):
            return
        if time.monotonic() > deadline:
            raise Failure(f"seed {report.seed}: left behind {left}")
        await asyncio.sleep(0.01)


async def _ask(honest: Side, number: int) -> float:
    """Ping as the honest session; how long the answer took."""
    began = time.monotonic()
    own, target = socket.inet_aton(honest.place.ipv4 or ""), socket.inet_aton(CLUSTER4)
    message = icmp.Message(icmp.ECHO_REQUEST4, 0, number & 0xFFFF, b"honest")
    packet = ip.build(own, target, ip.ICMP4, icmp.build(own, target, message))
    await honest.send(frame.encode(frame.PACKET, packet))
    while time.monotonic() < began + PATIENCE:
        for payload in honest.heard():
            answer = ip.parse(payload)
            if answer.protocol == ip.ICMP4 and icmp.parse(answer, checked=False).word == number & 0xFFFF:
                return time.monotonic() - began
        await asyncio.sleep(0.001)
    raise Failure(f"the honest session had no answer within {PATIENCE:g} s after {number} packets")


@contextlib.asynccontextmanager
async def _watched() -> AsyncIterator[list[str]]:
    """What the loop's handler gets and what is logged as an error."""
    errors: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(f"{context.get('exception') or context['message']!r}"))
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield errors
    finally:
        logging.getLogger().removeHandler(handler)
        loop.set_exception_handler(None)


@contextlib.asynccontextmanager
async def echoing(cluster: str) -> AsyncIterator[None]:
    """Echoes of TCP on 8080 and of UDP on 9000, in the cluster."""
    async with contextlib.AsyncExitStack() as stack:
        for address in (CLUSTER4, CLUSTER6, SERVICE4):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with inside(cluster):
                listening = socket.create_server((address, 8080), family=family, backlog=1024)
                datagrams = socket.socket(family, socket.SOCK_DGRAM)
            datagrams.bind((address, 9000))
            server = await stack.enter_async_context(await asyncio.start_server(_echo, sock=listening))
            stack.callback(server.close)
            datagrams.setblocking(False)
            loop = asyncio.get_running_loop()
            loop.add_reader(datagrams, _echo_datagram, datagrams)
            stack.callback(datagrams.close)
            stack.callback(loop.remove_reader, datagrams)
        yield


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError), contextlib.closing(writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def _echo_datagram(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        server.sendto(*server.recvfrom(65_536))


def run(cluster: str, seed: int, *, offload: bool, packets: int) -> Report:
    """`fuzz` on a loop whose clock can be put forward."""
    with asyncio.Runner(loop_factory=WoundLoop) as runner:
        return runner.run(fuzz(cluster, seed, offload=offload, packets=packets))


def allow_descriptors() -> None:
    """As many as the manager would take."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def resident() -> int:
    """KiB of memory that this process has."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024
