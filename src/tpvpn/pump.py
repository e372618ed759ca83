"""The packet path: moves packets between a TUN device and a session's links, in batches, without looking into them.

It knows nothing of sessions, routes or NAT. What it reads of a packet is the protocol, to choose the TUN's queue, and
the address that must be the client's own: the source of what a manager receives, the destination of what a laptop
receives; a packet with another one is dropped and counted.

Theory of operation. Nothing here makes an object of lasting life, logs or awaits per packet.
- TUN to link: a batch of packets is read into one buffer, each behind its frame header, and sent by one call. When the
  stream does not take it all, the TUN is not read until it has: the kernel's queue is fair, and drops when it must.
  The prompt queue is read first, so that a ping or a datagram never waits behind the windows of bulk flows; each
  queue has its own share of a batch, so that neither starves the other.
- Link to TUN: one receive brings a run of frames; each packet is written straight from the receive buffer, through the
  queue in which the kernel shall put the answers (see `tun`).
With offload on both sides a packet is up to 64 KiB, preceded by its virtio-net header: foreign bytes, which the kernel
validates (EINVAL is counted).
"""

import asyncio
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from tpvpn.bundle import Links
from tpvpn.link import Memory
from tpvpn.tun import Device
from tpvpn.wire import frame, vnet

_HEADER = frame.HEADER_LENGTH
_SLOT = _HEADER + vnet.HEADER_LENGTH + 65_535
MAX_PACKET = vnet.HEADER_LENGTH + 65_535
"""Bytes of a packet frame's payload; its header is then below this too, since kind PACKET is 0."""
BATCH_BYTES = 1 << 19
"""A queue is read until this much is there: more adds delay for whatever comes next, but no throughput."""
BATCH_PACKETS = 64
_TCP = 6


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """The client's addresses, and on which side of a received packet they must stand."""

    side: Literal["source", "destination"]
    ipv4: str | None
    ipv6: str | None


@dataclass(slots=True)
class Counters:
    """Packets and bytes since the pump started; sent and received as the link's owner sees it."""

    sent_packets: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    received_bytes: int = 0
    foreign_packets: int = 0
    """Dropped: the address that must be the client's own was another."""
    invalid_packets: int = 0
    """Refused by the kernel: malformed packet or virtio-net header."""


class Pump:
    """Runs from `start()` to `stop()`; `on_frame(kind, payload)` gets every frame that is not a packet."""

    def __init__(
        self, tun: Device, bundle: Links, own: OwnAddress, on_frame: Callable[[int, bytes], None], *, offload: bool
    ) -> None:
        self.counters = Counters()
        self._tun, self._bundle, self._on_frame = tun, bundle, on_frame
        self._loop = asyncio.get_running_loop()
        self._view = memoryview(mmap.mmap(-1, 2 * (BATCH_BYTES + _SLOT)))  # memory that is not used yet costs none
        self._read_queue, self._read_prompt = tun.reader(tun.fd), tun.reader(tun.prompt_fd)
        self._running = False
        self._set_own(own, vnet.HEADER_LENGTH if offload else 0)

    def start(self) -> None:
        """Take the links over and begin to read the TUN."""
        self._running = True
        self._bundle.receive = self.receive
        self._bundle.on_drained = self.resume
        self.resume()

    def stop(self) -> None:
        """Leave the TUN alone; the links are their owner's to close."""
        self._running = False
        self._pause()

    def link_again(self) -> None:
        """Nothing: the kernel kept what its programs sent meanwhile."""

    def _set_own(self, own: OwnAddress, before: int) -> None:
        """Prepare one struct that reads frame header, IP version, protocol and address (RFC 791 section 3.1)."""
        skip, at6 = (2, 8) if own.side == "source" else (6, 24)
        self._peek = struct.Struct(f">I{before}xB8xB{skip}xI")
        self._own4 = int(IPv4Address(own.ipv4)) if own.ipv4 else -1
        self._own6 = memoryview(IPv6Address(own.ipv6).packed if own.ipv6 else b"")
        self._at_ip = _HEADER + before
        self._at6 = self._at_ip + at6

    def resume(self) -> None:
        """Read the TUN again, unless the links still take nothing."""
        if not self._running or self._bundle.congested:
            return
        self._loop.add_reader(self._tun.prompt_fd, self._on_prompt)
        self._loop.add_reader(self._tun.fd, self._on_tun)

    def _pause(self) -> None:
        self._loop.remove_reader(self._tun.prompt_fd)
        self._loop.remove_reader(self._tun.fd)

    def _on_prompt(self) -> None:
        if self._bundle.congested:  # by a control frame, or since the other end is silent: nothing is read to be lost
            self._pause()
        else:
            self._send(self._read(self._read_prompt, 0))

    def _on_tun(self) -> None:
        if self._bundle.congested:
            self._pause()
        else:
            self._send(self._read(self._read_queue, self._read(self._read_prompt, 0)))

    def _read(self, readinto: Callable[[memoryview], int | None], at: int) -> int:
        """Read one queue's share of a batch into the buffer from `at`; where it ends."""
        view, pack = self._view, frame.HEADER.pack_into
        limit = at + BATCH_BYTES
        packets = 0
        try:
            while packets < BATCH_PACKETS and at < limit:
                length = readinto(view[at + _HEADER : at + _SLOT])
                if not length:
                    break
                pack(view, at, length)  # kind PACKET is 0: the header is the length
                at += _HEADER + length
                packets += 1
        except OSError:  # the device was set down: there is nothing to read until it is up again or gone
            self._pause()
            self._loop.call_later(1, self.resume)
        self.counters.sent_packets += packets
        return at

    def _send(self, end: int) -> None:
        if end:
            self.counters.sent_bytes += end
            self._bundle.send_batch(self._view[:end])
            if self._bundle.congested:
                self._pause()

    def receive(self, buffer: Memory, start: int, end: int) -> int:
        """Link to TUN: consume the whole frames of buffer[start:end]; where the rest begins."""
        fd, prompt_fd, view, write = self._tun.fd, self._tun.prompt_fd, memoryview(buffer), self._tun.write
        peek, own4, own6, at6 = self._peek.unpack_from, self._own4, self._own6, self._at6
        at = start
        packets = foreign = 0
        while end - at >= _HEADER:
            word, version, protocol, address = peek(buffer, at)
            following = at + _HEADER + (word & 0xFFFFFF)
            if word > MAX_PACKET:
                hand_on(word, buffer, at, end, self._on_frame)
            if following > end:
                break
            if word <= MAX_PACKET:
                if version >= 0x60:
                    protocol = buffer[self._at_ip + at + 6]  # RFC 8200 section 3: next header
                    address = own4 if view[at + at6 : at + at6 + 16] == own6 else None
                if address != own4:
                    foreign += 1
                else:
                    try:
                        write(fd if protocol == _TCP else prompt_fd, view[at + _HEADER : following])
                        packets += 1
                    except OSError:
                        self.counters.invalid_packets += 1
            at = following
        self.counters.foreign_packets += foreign
        self.counters.received_packets += packets
        self.counters.received_bytes += at - start
        return at


def hand_on(word: int, buffer: Memory, at: int, end: int, on_frame: Callable[[int, bytes], None]) -> None:
    """A frame that is not a packet: refuse it when it is too long, hand it on when it is whole."""
    kind, length = word >> 24, word & 0xFFFFFF
    frame.check_length(kind, length, MAX_PACKET if kind == frame.PACKET else frame.MAX_PAYLOAD)
    if end - at >= _HEADER + length:
        on_frame(kind, bytes(buffer[at + _HEADER : at + _HEADER + length]))
