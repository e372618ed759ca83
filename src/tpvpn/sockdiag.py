"""Ending the connections that a change of routes stranded, so that nobody waits for what cannot come any more.

It knows nothing of plans. A connection keeps the source address with which it began: one that began through the tunnel
has the tunnel's, which nobody outside answers; one that began elsewhere has another, which the tunnel's far end drops.
Both would hang until a timeout; destroyed (sock_diag(7), SOCK_DESTROY: what `ss --kill` does), whoever reads or writes
has ECONNABORTED at once and connects anew.

All connections of the network namespace are listed and looked through here: 10,000 take a tenth of a second. Each is
named by its cookie, so that another one that has taken its ports meanwhile is safe.
"""

import errno
import socket
import struct
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from tpvpn.netlink import NetlinkError, NetlinkSocket
from tpvpn.route.prefix import FAMILIES, Prefix, Space

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, include/net/tcp_states.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_SOCKET = struct.Struct("=4x16s16sI8x")
"""struct inet_diag_sockid, which names a socket: its own address, the other end's, the device it is bound to."""
_IDENTITY = slice(4, 4 + _SOCKET.size)
"""Where that is in a struct inet_diag_msg."""
_ESTABLISHED, _TIME_WAIT, _CLOSE, _LISTEN = 1, 6, 7, 10
_CONNECTED = {
    socket.IPPROTO_TCP: 0x1FFE & ~(1 << _TIME_WAIT | 1 << _CLOSE | 1 << _LISTEN),
    socket.IPPROTO_UDP: 1 << _ESTABLISHED,
}
"""The states of sockets that have another end, by protocol."""
_MAPPED = bytes(10) + b"\xff\xff"
"""What precedes an IPv4 address on an IPv6 socket (RFC 4291, section 2.5.5.2)."""

_UNABLE = {errno.EPROTONOSUPPORT, errno.ENOENT, errno.EOPNOTSUPP}
"""The kernel lists no sockets at all, or none of this protocol or family."""
_SPARED = {errno.ENOENT, errno.ESTALE, errno.EOPNOTSUPP}
"""It has ended by itself, or this kernel destroys none (CONFIG_INET_DIAG_DESTROY)."""


def reset(withdrawn: Sequence[Prefix], routed: Sequence[Prefix], own: Sequence[str]) -> int:
    """Destroy TCP and connected UDP sockets that lost their way; gives how many there were.

    `own` are the tunnel's addresses, which what went into it has; `withdrawn` has just left the tunnel, `routed` has
    just come to it. OSError EPERM without the right, when there is something to destroy.
    """
    stranded = _Stranded(Space(withdrawn), Space(routed), frozenset(Prefix.host(address) for address in own))
    try:
        kernel = NetlinkSocket(_NETLINK_SOCK_DIAG)
    except OSError as error:
        if error.errno in _UNABLE:
            return 0
        raise
    with closing(kernel):
        return sum(
            _destroy(kernel, family, protocol, identity)
            for family in FAMILIES.values()
            for protocol in _CONNECTED
            for identity in _connections(kernel, family, protocol)
            if stranded.holds(family, identity)
        )


class _Stranded(NamedTuple):
    """Which connections the change stranded."""

    withdrawn: Space
    routed: Space
    own: frozenset[Prefix]

    def holds(self, family: int, identity: bytes) -> bool:
        """Whether it is one, by its struct inet_diag_sockid."""
        here, there, device = _SOCKET.unpack(identity)
        local, remote = _host(family, here), _host(family, there)
        if local in self.own:
            return self.withdrawn.overlaps(remote)
        # One that is bound to a device keeps it, whatever our rules say, and the host's own addresses are not routed.
        return not device and local != remote and self.routed.overlaps(remote)


def _host(family: int, address: bytes) -> Prefix:
    """An address as inet_diag gives it."""
    if family == socket.AF_INET:
        return Prefix(4, int.from_bytes(address[:4]), 32)
    if address.startswith(_MAPPED):
        return Prefix(4, int.from_bytes(address[12:]), 32)
    return Prefix(6, int.from_bytes(address), 128)


def _connections(kernel: NetlinkSocket, family: int, protocol: int) -> list[bytes]:
    """The struct inet_diag_sockid of each."""
    try:
        answers = kernel.dump(_SOCK_DIAG_BY_FAMILY, _request(family, protocol, bytes(_SOCKET.size)))
    except NetlinkError as error:
        if error.errno in _UNABLE:
            return []
        raise
    return [answer.payload[_IDENTITY] for answer in answers]


def _destroy(kernel: NetlinkSocket, family: int, protocol: int, identity: bytes) -> bool:
    """Whether it was there to be destroyed."""
    try:
        kernel.request(_SOCK_DESTROY, 0, _request(family, protocol, identity))
    except NetlinkError as error:
        if error.errno in _SPARED:
            return False
        raise
    return True


def _request(family: int, protocol: int, identity: bytes) -> bytes:
    """struct inet_diag_req_v2."""
    return struct.pack("=BBxxI", family, protocol, _CONNECTED[protocol]) + identity
