"""What both ends agreed on in their SYNs, and what timestamps are good for afterwards.

It knows the options of RFC 9293 (MSS), RFC 7323 (window scale, timestamps) and RFC 2018 (SACK); not states. What one
end does not offer, neither uses.
"""

from tpvpn.proto.tcp.state import Limits
from tpvpn.wire.tcp import ACK, RST, SYN, TIMESTAMP_LENGTH, Segment

DEFAULT_MSS = 536  # RFC 9293 section 3.7.1
_LEAST_MSS = 48
_PAWS_IDLE = 24 * 86_400.0  # RFC 7323 section 5.5: by then a timestamp in milliseconds may have wrapped
_MOST_RTT = 60.0
_MASK, _HALF = 0xFFFFFFFF, 0x80000000


class Options:
    """Ours as offered until `take_syn`, the common ones after it."""

    __slots__ = (
        "_own_mss",
        "_recent",
        "_recent_at",
        "_scaling",
        "peer_scale",
        "sack",
        "scale",
        "send_mss",
        "timestamps",
    )

    def __init__(self, limits: Limits) -> None:
        self._own_mss = limits.mss
        self.send_mss = DEFAULT_MSS
        """Payload that one packet to the peer may carry."""
        self.timestamps = self.sack = True
        self.scale = self.peer_scale = 0
        """Of the windows that we offer, and of those that the peer does."""
        while 0xFFFF << self.scale < limits.receive_buffer:
            self.scale += 1
        self._scaling = True
        self._recent, self._recent_at = 0, 0.0  # TS.Recent

    def take_syn(self, segment: Segment, now: float) -> None:
        """Keep what the peer's SYN offers too."""
        self.timestamps &= segment.timestamp is not None
        self.sack &= segment.sack_permitted
        self.note(segment.timestamp or 0, now)
        self._scaling = segment.window_scale is not None
        if segment.window_scale is None:
            self.scale = 0
        else:
            self.peer_scale = segment.window_scale
        mss = max(min(segment.mss or DEFAULT_MSS, self._own_mss), _LEAST_MSS)
        self.send_mss = mss - TIMESTAMP_LENGTH if self.timestamps else mss

    def syn(self, seq: int, ack: int | None, window: int, now: float) -> Segment:
        """Our SYN; with `ack` it answers the peer's."""
        flags = SYN if ack is None else SYN | ACK
        segment = Segment(seq, ack or 0, flags, window, b"", *self.stamp(now))
        segment.mss, segment.sack_permitted = self._own_mss, self.sack
        segment.window_scale = self.scale if self._scaling else None
        return segment

    def stamp(self, now: float) -> tuple[int | None, int]:
        """Timestamp and echo of a segment to send."""
        return (int(now * 1000) & _MASK, self._recent) if self.timestamps else (None, 0)

    def note(self, timestamp: int, now: float) -> None:
        """A segment that begins where the last acknowledgment ended, or before: its timestamp is to be echoed."""
        self._recent, self._recent_at = timestamp, now

    def is_newer(self, timestamp: int) -> bool:
        """Whether a timestamp is later than all that came."""
        return 0 < (timestamp - self._recent) & _MASK < _HALF

    def is_old(self, segment: Segment, now: float) -> bool:
        """PAWS (RFC 7323 section 5): older than what came before, a duplicate from long ago."""
        if segment.timestamp is None or segment.flags & RST:
            return False
        return (segment.timestamp - self._recent) & _MASK >= _HALF and now - self._recent_at <= _PAWS_IDLE

    def rtt(self, segment: Segment, now: float) -> float | None:
        """The time since what the segment echoes was sent; None when it echoes nothing."""
        if not self.timestamps or not segment.timestamp_echo:
            return None
        return min(((int(now * 1000) - segment.timestamp_echo) & _MASK) / 1000, _MOST_RTT)


def is_unstamped(segment: Segment) -> bool:
    """RFC 7323 section 3.2: where timestamps were agreed on, only a reset may come without."""
    return segment.timestamp is None and not segment.flags & RST
