"""All links of a session as one: packets of a flow go by one of them, and by another when that is lost.

It knows of a packet what a flow is told by. To whoever carries packets it is what a single link is: `receive`,
`on_drained`, `congested`, `send_batch`, `send`. While there is no link it is congested: the TUN is not read, and the
kernel keeps or drops what programs send meanwhile.

How it works. Links have numbers; a new one takes the place of an old one of its number, which is still read for DRAIN
seconds, so that nothing on its way is lost. A link whose other end is silent (`heartbeat`) carries nothing until it is
heard again: what is sent again waits where it is for the next link. With one link a batch is passed on as it is. With
several it is cut to runs by a hash of the 5-tuple that is the same for both directions.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Protocol

from tpvpn.errors import LinkLostError
from tpvpn.link import Link, Memory, Receive, nobody
from tpvpn.wire import frame, vnet

DRAIN = 2.0
"""Seconds for which a link that another one took the place of is read."""
_ADDRESSES4, _ADDRESSES6, _PORTS = struct.Struct(">II"), struct.Struct(">4Q"), struct.Struct(">HH")
_WITH_PORTS = (6, 17)


class Links(Protocol):
    """What whoever carries packets sees of it."""

    receive: Receive
    on_drained: Callable[[], None]

    @property
    def congested(self) -> bool:
        """It takes no more now."""
        ...

    def send_batch(self, batch: memoryview) -> None:
        """Send whole packet frames. The memory stays the caller's again when `congested` is false."""
        ...

    def leave(self) -> None:
        """For `receive`: it leaves whole frames for the next turn of the loop."""
        ...


class Bundle:
    """The links of one session; its user sets `receive` and `on_drained`. `offload`: a virtio-net header is there."""

    def __init__(self, *, offload: bool) -> None:
        self.receive: Receive = nobody
        self.on_drained: Callable[[], None] = _nothing
        self.on_change: Callable[[], None] = _nothing
        """There is a link that carries, or there is none any more."""
        self.speaking: Link
        """Whose frames `receive` is given."""
        self._links: dict[int, Link] = {}
        self._silent: set[Link] = set()
        self._carrying: list[Link] = []
        self._loop = asyncio.get_running_loop()
        self._at_ip = frame.HEADER_LENGTH + (vnet.HEADER_LENGTH if offload else 0)

    # -- which links there are -----------------------------------------------------------------------------------------

    def join(self, number: int, link: Link) -> None:
        """Have this link under its number, in the place of the one that has it."""
        before, self._links[number] = self._links.get(number), link
        link.receive = lambda buffer, start, end: self._take(link, buffer, start, end)
        link.on_drained = self._drained
        if before:
            self._loop.call_later(DRAIN, before.fail, LinkLostError("another connection took its place"))
        self._choose()

    def drop(self, link: Link) -> None:
        """It is lost."""
        self._silent.discard(link)
        for number in [number for number, one in self._links.items() if one is link]:
            del self._links[number]
        self._choose()

    def set_silent(self, link: Link, silent: bool) -> None:
        """Its other end says nothing, or does again."""
        (self._silent.add if silent else self._silent.discard)(link)
        self._choose()

    @property
    def links(self) -> list[Link]:
        """All of them, those that are silent too."""
        return list(self._links.values())

    @property
    def is_linked(self) -> bool:
        """There is a link that carries."""
        return bool(self._carrying)

    def _choose(self) -> None:
        before, links = self._carrying, [self._links[number] for number in sorted(self._links)]
        self._carrying = [link for link in links if link not in self._silent]
        for link in set(before) - set(self._carrying):
            link.keep()
        if bool(before) != bool(self._carrying):
            self.on_change()
        self._drained()

    # -- as a link -----------------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """Some link takes no more, or there is none."""
        for link in self._carrying:
            if link.congested:
                return True
        return not self._carrying

    @property
    def queued(self) -> int:
        """Bytes that wait behind what the link is taking by which the next frame goes."""
        return self._carrying[0].queued if self._carrying else 0

    def send(self, kind: int, payload: bytes) -> None:
        """Send a frame that is not a packet; it is dropped when there is no link."""
        if self._carrying:
            self._carrying[0].send(kind, payload)

    def send_batch(self, batch: memoryview) -> None:
        """Send whole packet frames. The memory stays the caller's again when `congested` is false."""
        if len(self._carrying) == 1:
            self._carrying[0].send_batch(batch)
        elif self._carrying:
            self._spread(batch)

    def leave(self) -> None:
        """For `receive`: it leaves whole frames for the next turn of the loop."""
        self.speaking.leave()

    def _take(self, link: Link, buffer: Memory, start: int, end: int) -> int:
        self.speaking = link
        return self.receive(buffer, start, end)

    def _drained(self) -> None:
        if not self.congested:
            self.on_drained()

    # -- several links -------------------------------------------------------------------------------------------------

    def _spread(self, batch: memoryview) -> None:
        """Send each packet by its flow's link: one send a link, in the order of the packets."""
        carrying, unpack, at_ip = self._carrying, frame.HEADER.unpack_from, self._at_ip
        runs: list[list[memoryview]] = [[] for _ in carrying]
        at = run = 0
        chosen = -1
        while at < len(batch):
            following = at + frame.HEADER_LENGTH + (unpack(batch, at)[0] & 0xFFFFFF)
            one = flow_hash(batch[at + at_ip : following]) % len(carrying)
            if one != chosen:
                if at > run:
                    runs[chosen].append(batch[run:at])
                chosen, run = one, at
            at = following
        if at > run:
            runs[chosen].append(batch[run:at])
        for link, pieces in zip(carrying, runs, strict=True):
            if pieces:
                link.send_batch(pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)))


def flow_hash(packet: memoryview) -> int:
    """A number that all packets of a flow have, in both directions; fragments, which lack ports, go by addresses."""
    if len(packet) < 20:
        return 0
    if packet[0] >> 4 == 4:
        source, destination = _ADDRESSES4.unpack_from(packet, 12)
        protocol, at = packet[9], (packet[0] & 0xF) * 4
        fragment = packet[6] & 0x3F or packet[7]  # RFC 791 section 3.1: MF and the offset
        both = source ^ destination
    elif len(packet) >= 40:
        a, b, c, d = _ADDRESSES6.unpack_from(packet, 8)
        protocol, at, fragment, both = packet[6], 40, 0, a ^ b ^ c ^ d
    else:
        return 0
    if protocol in _WITH_PORTS and not fragment and len(packet) >= at + 4:
        port, other = _PORTS.unpack_from(packet, at)
        both ^= (port ^ other) * 0x9E3779B1  # ports that follow each other are to be far apart
    both ^= both >> 32
    return (both * 0x9E3779B1 & 0xFFFFFFFF) >> 16


def _nothing() -> None:
    pass
