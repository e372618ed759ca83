"""What UDP and ping have in common at the socket exit: a connected datagram socket, its errors, and its end when idle.

It knows sockets, not what is in a datagram: that is its two kinds' (`socket_udp`, `socket_icmp`). A datagram that gets
none through is dropped, as a full queue would. What ICMP says of one, the kernel keeps with the datagram (IP_RECVERR,
ip(7)), and the client is told the same, by whoever said it.
"""

import socket
from abc import abstractmethod

from tpvpn.manager.outbox import Outbox
from tpvpn.manager.socket_errors import read_errors, tell_errors
from tpvpn.manager.socket_flow import Flow, Owner, error_of, leave_as, only_family, text_of
from tpvpn.wire import ip

# linux/in.h, linux/in6.h
_MTU_DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
_DONT, _WANT, _DO = 0, 1, 2

_AT_ONCE = 32
_LARGEST = 65_535
_PIECE = 32_768


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
        self._fields = -1
        self._reading, self._ready = True, False
        self._client, self._destination, self._real = packet.source, packet.destination, real
        try:
            only_family(opened)
            tell_errors(opened)
            opened.connect((text_of(real), port))
        except BaseException:
            opened.close()
            raise
        self._fd = opened.fileno()
        owner.loop.add_reader(self._fd, self._on_readable)
        owner.schedule(self, owner.clock() + idle)

    @abstractmethod
    def _answer(self, data: bytes) -> None:
        """A datagram of the destination."""

    @abstractmethod
    def _quoted(self, data: bytes) -> bytes | None:
        """The client's packet, as it was sent, whose datagram was this; None when it cannot be told."""

    def send(self, data: ip.Bytes, packet: ip.Packet, now: float) -> None:
        """Send a datagram, that of this packet of the client."""
        self.due = now + self.idle
        whole = packet.dont_fragment and len(packet.data) <= self._owner.mtu  # or it came in fragments
        fields = packet.hop_limit << 9 | packet.traffic_class << 1 | whole
        if fields != self._fields:
            self._fields = fields
            leave_as(self._socket, packet)
            level, option = _MTU_DISCOVER[self._socket.family]
            self._socket.setsockopt(level, option, _DO if whole else _DONT if packet.version == 4 else _WANT)
        for _ in range(2):  # an error of an earlier datagram is told in the place of sending this one
            try:
                self._socket.send(data)
                return
            except BlockingIOError:
                break
            except OSError as error:
                reason = error_of(error.errno)
                if not self._report() and reason:
                    self._owner.report(reason, packet, None, self._owner.mtu)
                    return
        self._owner.dropped["socket"] += 1

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

    def handle_timeout(self, now: float) -> None:
        self.end()

    def end(self) -> None:
        self._owner.loop.remove_reader(self._fd)
        self._socket.close()
        self._owner.forget(self)

    def _on_readable(self) -> None:
        self._ready = True
        if self._owner.congested:  # the socket's queue is the one that drops, until it is this flow's turn
            self._owner.loop.remove_reader(self._fd)
            self._reading = False
        else:  # now: the loop would find it readable once more before its turn
            self.write(self._owner.outbox, self._owner.clock())
        self._owner.wants_turn(self)

    def write(self, outbox: Outbox, now: float) -> bool:
        """Read what has come, and put it there."""
        if not self._ready:
            return False
        for count in range(_AT_ONCE):
            if not outbox.room:
                break
            try:
                data = self._socket.recv(_LARGEST)
            except OSError as error:
                self._ready = False
                self._read_on(failed=not isinstance(error, BlockingIOError) or not count)
                break
            self._answer(data)
            self.due = now + self.idle
        return self._ready

    def _read_on(self, *, failed: bool) -> None:
        if failed:
            self._report()
            # libuv stops to watch a descriptor that had an error (uv__poll_io in src/unix/poll.c).
            self._owner.loop.remove_reader(self._fd)
        if failed or not self._reading:
            self._owner.loop.add_reader(self._fd, self._on_readable)
            self._reading = True

    def _report(self) -> bool:
        """Tell the client the errors that were kept; whether there were any."""
        errors = read_errors(self._socket)
        for told in errors:
            quoted = self._quoted(told.payload)
            if quoted is not None:
                speaker = self._destination if told.speaker == self._real else told.speaker
                self._owner.report(told.error, ip.parse(quoted), speaker, told.mtu)
        return bool(errors)
