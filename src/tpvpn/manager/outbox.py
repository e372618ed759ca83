"""Packets of a session on their way to its links, gathered into one send.

It knows frames, not what is in them. Two buffers take turns: while the stream has not taken all of one, which is its
until then (`Bundle.send_batch`), packets gather in the other. Whoever writes asks first whether there is `room`, which
is how the links' congestion reaches the sockets.
"""

import mmap

from tpvpn.bundle import Links
from tpvpn.wire import frame, vnet

_ACKNOWLEDGMENTS = 2048
"""Bytes of the frames that a connection sends before its large segment: each tells of three ranges, all of 24."""
SLOT = frame.HEADER_LENGTH + vnet.HEADER_LENGTH + 65_535 + _ACKNOWLEDGMENTS
_LARGEST = 65_535  # no receiver takes a longer packet (docs/reference/wire.md)
_SIZE = (1 << 19) + SLOT


class Outbox:
    """Write a packet at `at` behind room for its frame header, then `close_frame`; or `put` a whole one."""

    def __init__(self, bundle: Links, *, offload: bool) -> None:
        self.packets = self.bytes = self.dropped = 0
        self.at = 0
        self._bundle = bundle
        self._before = vnet.EMPTY if offload else b""
        self.view = memoryview(mmap.mmap(-1, _SIZE))  # memory that is not used yet costs none
        self._other = memoryview(mmap.mmap(-1, _SIZE))

    @property
    def room(self) -> bool:
        """All that a connection says at once fits."""
        return self.at + SLOT <= _SIZE

    def close_frame(self, end: int) -> None:
        """A packet was written from `at` + frame.HEADER_LENGTH to `end`."""
        frame.HEADER.pack_into(self.view, self.at, end - self.at - frame.HEADER_LENGTH)  # kind PACKET is 0
        self.at = end
        self.packets += 1

    def put(self, packet: bytes) -> None:
        """Add a whole packet without a virtio-net header; dropped when there is no room, as a full queue does."""
        start = self.at + frame.HEADER_LENGTH
        body = start + len(self._before)
        end = body + len(packet)
        if end > _SIZE or len(packet) > _LARGEST:
            self.dropped += 1
            return
        self.view[start:body] = self._before
        self.view[body:end] = packet
        self.close_frame(end)

    def flush(self) -> None:
        """Send what is there, unless the stream still has the other buffer."""
        if not self.at or self._bundle.congested:
            return
        end, self.at = self.at, 0
        self.bytes += end
        self._bundle.send_batch(self.view[:end])
        if self._bundle.congested:
            self.view, self._other = self._other, self.view
