"""The kernel's table of sockets: which connections go through the tunnel, and ending those that lost their way.

What a change of routes stranded is ended, so that nobody waits for what cannot come any more.

It knows nothing of plans. A connection keeps the source address with which it began: one that began through the tunnel
has the tunnel's, which nobody outside answers; one that began elsewhere has another, which the tunnel's far end drops.
Both would hang until a timeout; destroyed (sock_diag(7), SOCK_DESTROY: what `ss --kill` does), whoever reads or writes
has ECONNABORTED at once and connects anew.

For that all connections of the network namespace are listed and looked through here: 10,000 take a tenth of a second.
Each is named by its cookie, so that another one that has taken its ports meanwhile is safe. Who only wants to know has
the kernel leave out all but the tunnel's.
"""

import contextlib
import errno
import socket
import struct
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from tpvpn.netlink import NetlinkError, NetlinkSocket, attribute, parse_attributes
from tpvpn.route.prefix import FAMILIES, Prefix, Space

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, include/net/tcp_states.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_SOCKET = struct.Struct("=4x16s16sI8x")
"""struct inet_diag_sockid, which names a socket: its own address, the other end's, the device it is bound to."""
_IDENTITY = slice(4, 4 + _SOCKET.size)
"""Where that is in a struct inet_diag_msg."""
_MESSAGE_LENGTH = 72
"""Bytes of a struct inet_diag_msg."""
_ESTABLISHED, _TIME_WAIT, _CLOSE, _LISTEN = 1, 6, 7, 10
_CONNECTED = {
    socket.IPPROTO_TCP: 0x1FFE & ~(1 << _TIME_WAIT | 1 << _CLOSE | 1 << _LISTEN),
    socket.IPPROTO_UDP: 1 << _ESTABLISHED,
}
"""The states of sockets that have another end, by protocol."""
_MAPPED = bytes(10) + b"\xff\xff"
"""What precedes an IPv4 address on an IPv6 socket (RFC 4291, section 2.5.5.2)."""

_INFO = 2
"""INET_DIAG_INFO: a struct tcp_info comes too."""
_COUNTERS = struct.Struct("=120xQQ")
"""Of that tcpi_bytes_acked, tcpi_bytes_received (linux/tcp.h, of RFC 4898)."""
_BYTECODE, _SOURCE_CONDITION = 1, 7
"""INET_DIAG_REQ_BYTECODE, INET_DIAG_BC_S_COND: keep a socket only if its own address is one."""
_CONDITION = struct.Struct("=BBHBBxxi")
"""struct inet_diag_bc_op, struct inet_diag_hostcond, whose address follows."""

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


class Flow(NamedTuple):
    """A TCP connection through the tunnel, with the bytes that its other end has acknowledged and that came from it."""

    cookie: bytes
    address: str
    port: int
    sent: int
    received: int


def flows(own: Sequence[str]) -> list[Flow]:
    """The TCP connections of this network namespace's programs from these addresses; [] where the kernel lists none."""
    found = list[Flow]()
    with contextlib.suppress(OSError), closing(NetlinkSocket(_NETLINK_SOCK_DIAG)) as kernel:
        for host in map(Prefix.host, own):
            condition = attribute(_BYTECODE, _only_from(host))
            for family in FAMILIES.values():  # an IPv6 socket may have an IPv4 address
                request = _request(family, socket.IPPROTO_TCP, bytes(_SOCKET.size), _INFO) + condition
                answers = kernel.dump(_SOCK_DIAG_BY_FAMILY, request)
                found += (flow for answer in answers if (flow := _flow(family, answer.payload)))
    return found


def _only_from(host: Prefix) -> bytes:
    """The program of one condition; what does not fulfil it jumps behind the end, and is left out."""
    address = host.network.to_bytes(host.length // 8)
    length = _CONDITION.size + len(address)
    return _CONDITION.pack(_SOURCE_CONDITION, length, length + 4, FAMILIES[host.version], host.length, -1) + address


def _flow(family: int, payload: bytes) -> Flow | None:
    """What one struct inet_diag_msg and its attributes tell."""
    identity, info = payload[_IDENTITY], parse_attributes(payload[_MESSAGE_LENGTH:]).get(_INFO, b"")
    if len(info) < _COUNTERS.size:
        return None
    _, there, _ = _SOCKET.unpack(identity)
    return Flow(
        identity[-8:], _host(family, there).address(), int.from_bytes(identity[2:4]), *_COUNTERS.unpack_from(info)
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


def _request(family: int, protocol: int, identity: bytes, wanted: int = 0) -> bytes:
    """struct inet_diag_req_v2; `wanted`: the attribute that is to come with each socket."""
    bits = 1 << wanted - 1 if wanted else 0
    return struct.pack("=BBBxI", family, protocol, bits, _CONNECTED[protocol]) + identity
