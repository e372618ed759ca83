"""What a session may cost others at the socket exit beyond its buffers: memory that nobody counts, and turns."""

import asyncio
import resource
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator

import pytest
from packet_fuzz import Side, echoing, resident
from packets import SYN, TCP, checksum

from pod import CLUSTER4, inside, pod_and_cluster
from tpvpn.manager.socket_exit import SocketExit
from tpvpn.wire import frame, ip

NOBODY = "10.132.77.77"
"""In the cluster's network: who asks for it there hears nothing for seconds."""
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with pod_and_cluster() as (pod, cluster), inside(pod):
        yield cluster


def run(test: Callable[[Side], Coroutine[None, None, None]]) -> None:
    """A session of bare packets at an exit of its own."""

    async def with_side() -> None:
        way_out = SocketExit(identity="test")
        way_out.open()
        side = Side(way_out, offload=False)
        try:
            await test(side)
        finally:
            side.close()

    asyncio.run(with_side())


def syn(side: Side, port: int, address: str, target_port: int, payload: bytes = b"") -> bytes:
    """As a frame."""
    own, target = socket.inet_aton(side.place.ipv4 or ""), socket.inet_aton(address)
    body = struct.pack(">HHIIBBHHH", port, target_port, 7, 0, 5 << 4, SYN, 65535, 0, 0) + payload
    total = checksum(own + target + struct.pack(">II", len(body), TCP), body)
    return frame.encode(frame.PACKET, ip.build(own, target, ip.TCP, body[:16] + struct.pack(">H", total) + body[18:]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.001)


def test_what_a_syn_carries_is_not_kept(cluster: str) -> None:
    """It may be 64 KiB, and only an ICMP error's quotation is ever needed."""

    async def thousand(side: Side) -> None:
        await side.send(syn(side, 9, NOBODY, 80))
        before = resident()
        for port in range(1000, 2000):
            await side.send(syn(side, port, NOBODY, 80, bytes(60_000)))
        await until(lambda: side.carrier.table.half_open == 1001)
        assert side.carrier.pool.used == 0
        assert resident() - before < 20 << 10

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    run(thousand)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_turn_comes_when_datagrams_had_filled_the_outbox_and_the_link_took_them_all(cluster: str) -> None:
    async def answered(side: Side) -> None:
        for end in (side.link.stream.socket, side.client):
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 8 << 20)
        async with echoing(cluster):
            await side.send(syn(side, 1000, CLUSTER4, 8080))
            await until(lambda: bool(side.heard()))  # SYN-ACK: nothing else happens until it is sent again
            (flow,) = side.carrier.table.flows.values()
            while side.carrier.outbox.room:
                side.carrier.outbox.put(bytes(60_000))
            side.carrier.wants_turn(flow)
            for _ in range(5):
                await asyncio.sleep(0)
            assert not side.link.congested
            assert not side.carrier._turns

    run(answered)
