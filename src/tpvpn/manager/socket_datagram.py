"""What UDP and ping have in common at the socket exit: a connected datagram socket, its errors, and its end when idle.

It knows sockets, not what is in a datagram: that is its two kinds' (`socket_udp`, `socket_icmp`). A datagram that gets
none through is dropped, as a full queue would. What ICMP says of one, the kernel keeps with the datagram (IP_RECVERR,
ip(7)), and the client is told the same, by whoever said it.
"""

import socket
import struct
import time
from abc import abstractmethod
from dataclasses import dataclass

from tpvpn.manager.socket_flow import Flow, Owner, error_of, text_of
from tpvpn.wire import ip
from tpvpn.wire.icmp import Error

# linux/in.h, linux/in6.h, linux/errqueue.h
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_EXTENDED_ERROR = struct.Struct("=IBBBBII")
_ORIGIN_LOCAL = 1
_ERRORS_AT_ONCE = 16

_AT_ONCE = 32
_LARGEST = 65_535
_PIECE = 32_768

_BY_TYPE = {(i, *kind_code): error for error in Error for i, kind_code in enumerate(error.value)}
"""By family (0: ICMPv4, 1: ICMPv6), type and code."""


class DatagramFlow(Flow):
    """Between a client's port, or identifier, and one destination; OSError when nothing leads there.

    It has `opened` from the start, and closes it when it cannot be used.
    """

    def __init__(
        self, owner: Owner, key: bytes, packet: ip.Packet, real: bytes, opened: socket.socket, port: int, idle: float
    ) -> None:
        self.key = key
        self.idle = idle
        """Seconds after which it ends."""
        self._owner, self._socket = owner, opened
        self._identification = 0
        self._client, self._destination, self._real = packet.source, packet.destination, real
        try:
            _tell_errors(opened)
            opened.connect((text_of(real), port))
        except BaseException:
            opened.close()
            raise
        self._fd = opened.fileno()
        owner.loop.add_reader(self._fd, self._on_readable)
        owner.schedule(self, time.monotonic() + idle)

    @abstractmethod
    def _answer(self, data: bytes) -> None:
        """A datagram of the destination."""

    @abstractmethod
    def _quoted(self, data: bytes) -> bytes | None:
        """The client's packet, as it was sent, whose datagram was this; None when it cannot be told."""

    def send(self, data: ip.Bytes, packet: ip.Packet, now: float) -> None:
        """Send a datagram, that of this packet of the client."""
        self.due = now + self.idle
        for _ in range(2):  # an error of an earlier datagram is told in the place of sending this one
            try:
                self._socket.send(data)
            except BlockingIOError:
                return
            except OSError as error:
                reason = error_of(error.errno)
                if not self._report() and reason:
                    self._owner.report(reason, packet, None, self._owner.mtu)
                    return
            else:
                return

    def _put(self, protocol: int, body: bytes) -> None:
        """Send the client the payload of a packet from the destination: whole, whatever the MTU is.

        The laptop's kernel takes from its TUN what an IP packet can be; only what a frame cannot hold is cut.
        """
        source, destination, owner = self._destination, self._client, self._owner
        size = len(body)
        if len(source) == 4:
            fits = ip.HEADER_LENGTH4 + size <= owner.mtu
            number = 0 if fits else self._next_identification()
            owner.outbox.put(ip.build(source, destination, protocol, body, identification=number, dont_fragment=fits))
        elif ip.HEADER_LENGTH6 + size <= _LARGEST:
            owner.outbox.put(ip.build(source, destination, protocol, body))
        else:
            number = self._next_identification()
            for start in range(0, size, _PIECE):
                piece, more = body[start : start + _PIECE], start + _PIECE < size
                owner.outbox.put(
                    ip.build(
                        source,
                        destination,
                        protocol,
                        piece,
                        identification=number,
                        fragment_offset=start,
                        more_fragments=more,
                    )
                )

    def _next_identification(self) -> int:
        self._identification = self._identification % 0xFFFF + 1
        return self._identification

    def resume(self) -> None:
        self._owner.loop.add_reader(self._fd, self._on_readable)

    def handle_timeout(self, now: float) -> None:
        self.end()

    def end(self) -> None:
        self._owner.loop.remove_reader(self._fd)
        self._socket.close()
        self._owner.forget(self)

    def _on_readable(self) -> None:
        owner = self._owner
        if owner.congested:  # the socket's queue is the one that drops
            owner.loop.remove_reader(self._fd)
            owner.pause(self)
            return
        for count in range(_AT_ONCE):
            try:
                data = self._socket.recv(_LARGEST)
            except OSError as error:
                if not isinstance(error, BlockingIOError) or not count:
                    self._on_error()
                break
            self._answer(data)
        self.due = time.monotonic() + self.idle
        owner.wants_turn(self)

    def _on_error(self) -> None:
        self._report()
        # libuv stops to watch a descriptor that had an error (uv__poll_io in src/unix/poll.c).
        self._owner.loop.remove_reader(self._fd)
        self._owner.loop.add_reader(self._fd, self._on_readable)

    def _report(self) -> bool:
        """Tell the client the errors that were kept; whether there were any."""
        errors = _read_errors(self._socket)
        for told in errors:
            quoted = self._quoted(told.payload)
            if quoted is not None:
                speaker = self._destination if told.speaker == self._real else told.speaker
                self._owner.report(told.error, ip.parse(quoted), speaker, told.mtu)
        return bool(errors)


@dataclass(frozen=True, slots=True)
class _SocketError:
    """An error that a socket was told of: what, by whom (None: this host), of which payload."""

    error: Error
    speaker: bytes | None
    mtu: int
    payload: bytes


def _tell_errors(opened: socket.socket) -> None:
    """Keep what ICMP says of this socket's packets, with the packets, for `read_errors`."""
    if opened.family == socket.AF_INET:
        opened.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)


def _read_errors(opened: socket.socket) -> list[_SocketError]:
    """What was kept since the last time."""
    found: list[_SocketError] = []
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


def _parse_error(family: int, data: bytes, payload: bytes) -> _SocketError | None:
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
    return _SocketError(error, speaker if known else None, info, payload)
