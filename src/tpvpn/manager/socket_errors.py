"""What ICMP said of a socket's packets: the kernel keeps it with the socket (IP_RECVERR, ip(7)), here it is read.

It knows sockets and the ICMP errors of both families; whom to tell is for those who ask.
"""

import socket
import struct
from dataclasses import dataclass

from tpvpn.manager.socket_flow import error_of
from tpvpn.wire.icmp import Error

# linux/in.h, linux/in6.h, linux/errqueue.h
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_EXTENDED_ERROR = struct.Struct("=IBBBBII")
_ORIGIN_LOCAL = 1
_ERRORS_AT_ONCE = 16

_BY_TYPE = {(i, *kind_code): error for error in Error for i, kind_code in enumerate(error.value)}
"""By family (0: ICMPv4, 1: ICMPv6), type and code."""


@dataclass(frozen=True, slots=True)
class SocketError:
    """An error that a socket was told of: what, by whom (None: this host), of which payload."""

    error: Error
    speaker: bytes | None
    mtu: int
    payload: bytes


def tell_errors(opened: socket.socket, wanted: bool = True) -> None:
    """Keep what ICMP says of this socket's packets, with the packets, for `read_errors`."""
    if opened.family == socket.AF_INET:
        opened.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, wanted)
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, wanted)


def read_errors(opened: socket.socket) -> list[SocketError]:
    """What was kept since the last time."""
    found: list[SocketError] = []
    for _ in range(_ERRORS_AT_ONCE):
        try:
            payload, ancillary, _, _ = opened.recvmsg(2048, 512, socket.MSG_ERRQUEUE)
        except OSError:
            break
        for _, _, data in ancillary:
            told = _parse_error(opened.family, data, payload)
            if told:
                found.append(told)
    return found


def _parse_error(family: int, data: bytes, payload: bytes) -> SocketError | None:
    """struct sock_extended_err with the offender's sockaddr behind it (linux/errqueue.h)."""
    if len(data) < _EXTENDED_ERROR.size:
        return None
    number, origin, kind, code, _, info, _ = _EXTENDED_ERROR.unpack_from(data)
    four = family == socket.AF_INET
    error = error_of(number) if origin == _ORIGIN_LOCAL else _BY_TYPE.get((0 if four else 1, kind, code))
    error = error or error_of(number)
    if error is None:
        return None
    at = _EXTENDED_ERROR.size + (4 if four else 8)
    speaker = data[at : at + (4 if four else 16)]
    known = origin != _ORIGIN_LOCAL and any(speaker)
    return SocketError(error, speaker if known else None, info, payload)
