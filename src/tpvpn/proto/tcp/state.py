"""The states of a connection (RFC 9293 section 3.3.2), what leads from one to the next, and what its owner is told."""

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """RFC 9293's names."""

    LISTEN = enum.auto()
    SYN_SENT = enum.auto()
    SYN_RECEIVED = enum.auto()
    ESTABLISHED = enum.auto()
    FIN_WAIT_1 = enum.auto()
    FIN_WAIT_2 = enum.auto()
    CLOSE_WAIT = enum.auto()
    CLOSING = enum.auto()
    LAST_ACK = enum.auto()
    TIME_WAIT = enum.auto()
    CLOSED = enum.auto()


AFTER_SHUTDOWN = {State.ESTABLISHED: State.FIN_WAIT_1, State.CLOSE_WAIT: State.LAST_ACK}
AFTER_OUR_FIN = {State.FIN_WAIT_1: State.FIN_WAIT_2, State.CLOSING: State.TIME_WAIT, State.LAST_ACK: State.CLOSED}
"""When it is acknowledged."""
AFTER_THEIR_FIN = {
    State.ESTABLISHED: State.CLOSE_WAIT,
    State.FIN_WAIT_1: State.CLOSING,
    State.FIN_WAIT_2: State.TIME_WAIT,
}
MAY_WRITE = (State.SYN_SENT, State.SYN_RECEIVED, State.ESTABLISHED, State.CLOSE_WAIT)
UNSYNCHRONIZED = (State.LISTEN, State.SYN_SENT, State.CLOSED)

OPENING = 60.0
"""Seconds that a handshake may take."""
TIME_WAIT = 2.0
"""Seconds; the link keeps no packet for longer, and the laptop's next connection from this port must not wait."""

ESTABLISHED, READABLE, WRITABLE, PEER_CLOSED, RESET, CLOSED, KEEPALIVE = 1, 2, 4, 8, 16, 32, 64
"""What `Connection.take_events` tells, as bits. RESET: by the peer, or because it no longer answers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection may use; sizes in bytes."""

    mss: int
    """Payload of a packet on this path without options: MTU less 40 (IPv4) or 60 (IPv6)."""
    largest: int = 0
    """Payload of the largest segment to send: more than the MSS where the other end cuts it; 0: the MSS."""
    receive_buffer: int = 1 << 20
    send_buffer: int = 1 << 20
