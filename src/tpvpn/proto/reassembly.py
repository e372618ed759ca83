"""Fragments of IP packets put together again, both families (RFC 791 section 3.2, RFC 8200 section 4.5).

Pure: `now` is an argument. It holds a bounded number of packets and bytes; when there are more, the oldest packet goes.
A piece that overlaps another ends its packet, as in Linux (RFC 5722): nothing honest sends that, and which of two
contents counts is how filters are deceived. An exact repetition is harmless.
"""

from dataclasses import dataclass, field

from tpvpn.wire import ip

MAX_PACKETS = 64
MAX_BYTES = 1 << 20
MAX_PIECES = 128
"""Of one packet: 64 KiB over an MTU of 576 are 119, and each piece is compared with all others."""
TIMEOUT = 30.0
"""Seconds, as net.ipv4.ipfrag_time."""

_Key = tuple[bytes, bytes, int, int]


@dataclass(slots=True)
class _Parts:
    began: float
    pieces: dict[int, bytes] = field(default_factory=dict[int, bytes])
    size: int = 0
    end: int | None = None
    """Where the last piece ends, once that has come."""


class Reassembler:
    """The packets of one session that are not whole yet."""

    def __init__(self) -> None:
        self.dropped = 0
        """Packets given up: overlapping, too late, or too many at once."""
        self.size = 0
        self._waiting: dict[_Key, _Parts] = {}

    def add(self, packet: ip.Packet, now: float) -> bytes | None:
        """Take a fragment; the whole packet when it was the last one missing."""
        self.expire(now)
        family_protocol = packet.protocol if packet.version == 4 else 0  # IPv6 tells packets apart without it
        key = packet.source, packet.destination, packet.identification, family_protocol
        parts = self._waiting.setdefault(key, _Parts(now))
        if not self._fits(parts, packet):
            self._give_up(key)
            return None
        if packet.fragment_offset not in parts.pieces:
            parts.pieces[packet.fragment_offset] = bytes(packet.payload)
            parts.size += len(packet.payload)
            self.size += len(packet.payload)
        if not packet.more_fragments:
            parts.end = packet.fragment_offset + len(packet.payload)
        if parts.size == parts.end:
            del self._waiting[key]
            self.size -= parts.size
            return self._whole(parts, packet)
        while len(self._waiting) > MAX_PACKETS or self.size > MAX_BYTES:
            self._give_up(next(iter(self._waiting)))
        return None

    def expire(self, now: float) -> None:
        """Give up what is not whole in time."""
        while self._waiting:
            key, parts = next(iter(self._waiting.items()))  # in the order in which they began
            if parts.began + TIMEOUT > now:
                return
            self._give_up(key)

    def _fits(self, parts: _Parts, packet: ip.Packet) -> bool:
        start, end = packet.fragment_offset, packet.fragment_offset + len(packet.payload)
        if parts.end is not None and (end > parts.end or (not packet.more_fragments and end < parts.end)):
            return False
        if not packet.more_fragments and any(at + len(piece) > end for at, piece in parts.pieces.items()):
            return False
        known = parts.pieces.get(start)
        if known is not None:
            return len(known) == len(packet.payload)
        if len(parts.pieces) >= MAX_PIECES:
            return False
        return all(end <= at or at + len(piece) <= start for at, piece in parts.pieces.items())

    def _give_up(self, key: _Key) -> None:
        self.size -= self._waiting.pop(key).size
        self.dropped += 1

    def _whole(self, parts: _Parts, last: ip.Packet) -> bytes | None:
        payload = b"".join(parts.pieces[at] for at in sorted(parts.pieces))
        if last.version == 4 and len(payload) > 0xFFFF - ip.HEADER_LENGTH4:
            self.dropped += 1
            return None
        return ip.build(
            last.source,
            last.destination,
            last.protocol,
            payload,
            hop_limit=last.hop_limit,
            traffic_class=last.traffic_class,
            identification=last.identification,
            dont_fragment=False,
        )
