"""All links of a session as one: real sockets, and scapy's packets as the oracle of what a flow is."""

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption, fragment
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from tpvpn import bundle as module
from tpvpn.bundle import Bundle, flow_hash
from tpvpn.errors import TpvpnError
from tpvpn.link import Link, Memory
from tpvpn.transport.stream import Stream
from tpvpn.wire import frame, vnet

# -- which flow a packet is of -----------------------------------------------------------------------------------------


def hashed(packet: Packet) -> int:
    return flow_hash(memoryview(bytes(packet)))


PORTS = st.integers(0, 65535)


@given(st.ip_addresses(v=4).map(str), st.ip_addresses(v=4).map(str), PORTS, PORTS, st.sampled_from([TCP, UDP]))
def test_both_directions_of_a_flow_have_one_hash(one: str, other: str, port: int, peer: int, kind: type) -> None:
    there = IP(src=one, dst=other) / kind(sport=port, dport=peer) / Raw(b"x" * 50)
    back = IP(src=other, dst=one, ttl=9, tos=4) / kind(sport=peer, dport=port)
    assert hashed(there) == hashed(back)


@given(st.ip_addresses(v=6).map(str), st.ip_addresses(v=6).map(str), PORTS, PORTS)
def test_of_ipv6_too(one: str, other: str, port: int, peer: int) -> None:
    there = IPv6(src=one, dst=other) / TCP(sport=port, dport=peer)
    assert hashed(there) == hashed(IPv6(src=other, dst=one) / TCP(sport=peer, dport=port))


def test_options_do_not_move_a_flow() -> None:
    plain = IP(src="246.0.0.1", dst="10.130.0.1") / TCP(sport=4000, dport=80)
    with_options = IP(src="246.0.0.1", dst="10.130.0.1", options=IPOption(b"\x07\x07\x04" + bytes(5))) / TCP(
        sport=4000, dport=80
    )
    assert bytes(with_options)[0] & 0xF > 5
    assert hashed(plain) == hashed(with_options)


def test_all_fragments_of_a_datagram_go_one_way() -> None:
    pieces = fragment(IP(src="246.0.0.1", dst="10.130.0.1", id=7) / UDP(sport=4000, dport=53) / Raw(bytes(5000)), 1400)
    assert len(pieces) == 4
    assert len({hashed(piece) for piece in pieces}) == 1


def test_flows_are_spread() -> None:
    """As evenly as thrown dice, for the ports that a kernel gives one after the other."""
    for links in (2, 3, 4, 8):
        for step in (1, 2):
            packets = (
                IP(src="246.0.0.1", dst="10.130.0.1") / TCP(sport=40000 + step * k, dport=443) for k in range(800)
            )
            shares = Counter(hashed(packet) % links for packet in packets)
            assert len(shares) == links
            assert min(shares.values()) > 0.6 * 800 / links, shares


@given(st.binary(max_size=80))
def test_whatever_a_packet_is_it_has_a_hash(data: bytes) -> None:
    assert 0 <= flow_hash(memoryview(data)) < 1 << 16


# -- links that come and go --------------------------------------------------------------------------------------------


@dataclass
class Far:
    """One link's other end."""

    link: Link
    socket: socket.socket
    lost: list[TpvpnError]
    decoder: frame.Decoder = field(default_factory=frame.Decoder)
    heard: list[tuple[int, bytes]] = field(default_factory=list)

    def take(self) -> list[tuple[int, bytes]]:
        """All frames that have come."""
        with contextlib.suppress(BlockingIOError):
            while data := self.socket.recv(1 << 20):
                self.decoder.receive(data)
        self.heard += self.decoder.frames()
        return self.heard


class Ends:
    """A bundle, and what it tells."""

    def __init__(self) -> None:
        self.bundle = Bundle(offload=True)
        self.bundle.receive = self._receive
        self.bundle.on_change = lambda: self.changes.append(self.bundle.is_linked)
        self.bundle.on_drained = lambda: self.drained.append(self.bundle.congested)
        self.got: list[tuple[Link, bytes]] = []
        self.changes: list[bool] = []
        self.drained: list[bool] = []
        self._all: list[Far] = []

    def join(self, number: int, send_buffer: int = 1 << 20) -> Far:
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        for one in (near, far):
            one.setblocking(False)
        lost: list[TpvpnError] = []

        def on_lost(error: TpvpnError) -> None:
            lost.append(error)
            self.bundle.drop(link)

        link = Link(Stream(near), on_lost)
        self.bundle.join(number, link)
        self._all.append(Far(link, far, lost))
        return self._all[-1]

    def close(self) -> None:
        for one in self._all:
            one.link.close()
            one.socket.close()

    def _receive(self, buffer: Memory, start: int, end: int) -> int:
        self.got.append((self.bundle.speaking, bytes(buffer[start:end])))
        return end


@contextlib.asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    made = Ends()
    try:
        yield made
    finally:
        made.close()


def play(scenario: Callable[[Ends], Awaitable[None]]) -> None:
    async def playing() -> None:
        async with asyncio.timeout(10), ends() as made:
            await scenario(made)

    asyncio.run(playing())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def batch(*packets: bytes) -> memoryview:
    return memoryview(b"".join(frame.encode(frame.PACKET, vnet.EMPTY + packet) for packet in packets))


def segments(flows: int, each: int, size: int = 100) -> list[bytes]:
    """Packets of several flows in a random order, numbered within each."""
    order = [flow for flow in range(flows) for _ in range(each)]
    random.Random(5).shuffle(order)
    numbers: Counter[int] = Counter()
    made = []
    for flow in order:
        data = numbers[flow].to_bytes(4, "big") + bytes(size)
        made.append(bytes(IP(src="246.0.0.1", dst="10.130.0.1") / TCP(sport=4000 + flow, dport=80) / Raw(data)))
        numbers[flow] += 1
    return made


def test_without_a_link_it_is_congested_and_drops() -> None:
    async def scenario(made: Ends) -> None:
        assert made.bundle.congested
        made.bundle.send(frame.CONTROL, b"{}")
        made.bundle.send_batch(batch(b"lost"))
        far = made.join(0)
        assert not made.bundle.congested
        assert made.changes == [True]
        assert made.drained == [False]
        made.bundle.send_batch(batch(b"carried"))
        assert far.take() == [(frame.PACKET, vnet.EMPTY + b"carried")]
        far.link.fail(TpvpnError("lost"))
        assert made.changes == [True, False]
        assert made.bundle.congested

    play(scenario)


@pytest.mark.parametrize("links", [2, 3, 8])
def test_each_flow_goes_by_one_link_and_in_order(links: int) -> None:
    async def scenario(made: Ends) -> None:
        fars = [made.join(number) for number in range(links)]
        packets = segments(40, 25)
        for at in range(0, len(packets), 64):
            made.bundle.send_batch(batch(*packets[at : at + 64]))
        places: dict[int, set[int]] = {}
        last: dict[int, int] = {}
        for number, far in enumerate(fars):
            carried = far.take()
            assert carried, "each has a share"
            for _, payload in carried:
                packet = IP(payload[vnet.HEADER_LENGTH :])
                flow, count = packet[TCP].sport, int.from_bytes(bytes(packet[Raw])[:4], "big")
                places.setdefault(flow, set()).add(number)
                assert count == last.get(flow, -1) + 1
                last[flow] = count
        assert all(len(where) == 1 for where in places.values())
        assert last == {4000 + flow: 24 for flow in range(40)}

    play(scenario)


def test_a_lost_links_flows_go_by_the_others() -> None:
    async def scenario(made: Ends) -> None:
        one, other = made.join(0), made.join(1)
        one.socket.close()
        await until(lambda: bool(one.lost))
        assert made.changes == [True]
        made.bundle.send_batch(batch(*segments(20, 1)))
        assert len(other.take()) == 20

    play(scenario)


def test_a_silent_link_carries_nothing_until_it_is_heard_again() -> None:
    async def scenario(made: Ends) -> None:
        one, other = made.join(0), made.join(1)
        made.bundle.set_silent(one.link, True)
        made.bundle.send_batch(batch(*segments(20, 1)))
        made.bundle.send(frame.CONTROL, b"{}")
        assert (len(one.take()), len(other.take())) == (0, 21)
        made.bundle.set_silent(other.link, True)
        assert made.bundle.congested
        assert made.changes == [True, False]
        made.bundle.set_silent(one.link, False)
        made.bundle.send_batch(batch(*segments(20, 1)))
        assert len(one.take()) == 20
        one.socket.sendall(frame.encode(frame.CONTROL, b"{}"))
        await until(lambda: bool(made.got))

    play(scenario)


def test_what_comes_by_each_is_received_and_told_apart() -> None:
    async def scenario(made: Ends) -> None:
        one, other = made.join(0), made.join(1)
        for far in (one, other):
            far.socket.sendall(frame.encode(frame.PACKET, b"x"))
        await until(lambda: len(made.got) == 2)
        assert {link for link, _ in made.got} == {one.link, other.link}

    play(scenario)


def test_a_link_that_is_replaced_delivers_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, though the memory of the batch is used for another one at once."""
    monkeypatch.setattr(module, "DRAIN", 0.3)

    async def scenario(made: Ends) -> None:
        before = made.join(0, send_buffer=4096)
        packets = [bytes([number]) * 1000 for number in range(200)]
        memory = bytearray(batch(*packets))
        made.bundle.send_batch(memoryview(memory))
        assert made.bundle.congested
        after = made.join(0)
        assert not made.bundle.congested
        memory[:] = bytes(len(memory))
        made.bundle.send_batch(batch(b"by the new one"))
        before.socket.sendall(frame.encode(frame.PACKET, b"late"))
        await until(lambda: len(before.take()) == 200 and bool(made.got))
        assert [payload[vnet.HEADER_LENGTH :] for _, payload in before.heard] == packets
        assert after.take() == [(frame.PACKET, vnet.EMPTY + b"by the new one")]
        await until(lambda: bool(before.lost))
        assert not after.lost
        assert made.changes == [True]

    play(scenario)


def test_one_that_takes_no_more_holds_all_up_until_it_does() -> None:
    async def scenario(made: Ends) -> None:
        fars = [made.join(number, send_buffer=4096) for number in range(2)]
        packets = segments(20, 50, size=1000)
        made.bundle.send_batch(batch(*packets))
        assert made.bundle.congested
        made.drained.clear()
        await until(lambda: sum(len(far.take()) for far in fars) == len(packets))
        await until(lambda: not made.bundle.congested)
        assert made.drained == [False]

    play(scenario)
