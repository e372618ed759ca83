"""What a flow of the socket exit and the session that has it know of each other, and errors of sockets as ICMP.

A flow turns packets of one 5-tuple into one socket and back. Its session gives it packets, turns to write some itself
and the calls it asked for.
"""

import asyncio
import errno
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from tpvpn.manager.outbox import Outbox
from tpvpn.proto.flow import Pool, Shares, Timed
from tpvpn.wire import ip
from tpvpn.wire.icmp import Error

_BY_NUMBER = {
    errno.ECONNREFUSED: Error.PORT_UNREACHABLE,
    errno.EHOSTUNREACH: Error.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Error.HOST_UNREACHABLE,
    errno.ENETUNREACH: Error.NO_ROUTE,
    errno.ENETDOWN: Error.NO_ROUTE,
    errno.EADDRNOTAVAIL: Error.NO_ROUTE,
    errno.EACCES: Error.PROHIBITED,  # a `prohibit` route, or ICMPv6's code 1
    errno.ENOPROTOOPT: Error.PROTOCOL_UNREACHABLE,
    errno.EMSGSIZE: Error.TOO_BIG,
}
_FIELDS = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL, socket.IP_TOS),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, socket.IPV6_TCLASS),
}


class Flow(Timed, ABC):
    """One flow; `key` is its own in the session's table."""

    key: bytes

    def write(self, outbox: Outbox, now: float) -> bool:
        """It is its turn: put packets there, as long as there is room; whether more are left."""
        return False

    def advance(self, now: float) -> None:
        """The packets that came together are all there."""

    def link_again(self, now: float) -> None:
        """There was no link for a while: what it sent may be lost."""

    @abstractmethod
    def handle_timeout(self, now: float) -> None:
        """The time that it asked for has come."""

    @abstractmethod
    def end(self) -> None:
        """Close the socket at once and be forgotten; the client is told nothing."""


class Owner(Protocol):
    """The session, as its flows see it."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    outbox: Outbox
    pool: Pool
    shares: "Shares[Flow]"
    mtu: int
    offload: bool
    dropped: Counter[str]
    """Packets, by reason."""

    @property
    def congested(self) -> bool:
        """The link takes no packets now."""
        ...

    def watch(self, descriptor: int, failed: Callable[[], None]) -> None:
        """`failed()` shall be called once when this connection has an error, or both sides have finished."""
        ...

    def unwatch(self, descriptor: int) -> None:
        """No longer; harmless for one that is not watched."""
        ...

    def answered(self) -> None:
        """A flow is half open no more."""
        ...

    def wants_turn(self, flow: Flow) -> None:
        """It has packets to write."""
        ...

    def schedule(self, flow: Flow, due: float | None) -> None:
        """`flow.handle_timeout()` shall be called then."""
        ...

    def forget(self, flow: Flow) -> None:
        """It has ended, and its socket is closed."""
        ...

    def report(self, error: Error, offending: ip.Packet, speaker: bytes | None, mtu: int = 0) -> None:
        """Say an ICMP error of a packet to the client; None: the manager itself is the speaker."""
        ...


def family_of(address: bytes) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def text_of(address: bytes) -> str:
    """The address in words, as `connect` wants it."""
    return socket.inet_ntop(family_of(address), address)


def only_family(opened: socket.socket) -> None:
    """Let no mapped IPv6 address lead to IPv4, where the policy has other rules."""
    if opened.family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def leave_as(opened: socket.socket, packet: ip.Packet) -> None:
    """Let a socket's packets leave with the traffic class of the client's, and a hop less, as behind a router."""
    level, hop_limit, traffic_class = _FIELDS[opened.family]
    opened.setsockopt(level, hop_limit, packet.hop_limit - 1)
    opened.setsockopt(level, traffic_class, packet.traffic_class)


def error_of(number: int | None) -> Error | None:
    """The ICMP error that a router would have sent for this errno, if any."""
    return _BY_NUMBER.get(number or 0)
