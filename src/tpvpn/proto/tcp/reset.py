"""The answer to a segment of which no connection knows."""

from tpvpn.wire.tcp import ACK, FIN, RST, SYN, Segment


def reset_for(segment: Segment) -> Segment | None:
    """The reset that answers it (RFC 9293 section 3.10.7.1); None for a reset."""
    if segment.flags & RST:
        return None
    if segment.flags & ACK:
        return Segment(segment.ack, 0, RST, 0)
    occupied = len(segment.payload) + bool(segment.flags & FIN) + bool(segment.flags & SYN)
    return Segment(0, (segment.seq + occupied) & 0xFFFFFFFF, RST | ACK, 0)
