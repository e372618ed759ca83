"""TCP at the socket exit: a connection of the laptop ends here, and goes on in a socket.

It knows which event of one side is what on the other (the protocol itself is `proto/tcp`):

    laptop                       here                            cluster
    SYN                      ->  connect, without waiting    ->
    SYN-ACK                  <-  it succeeded
    RST                      <-  refused
    ICMP                     <-  no route, prohibited, …
    nothing                  <-  nothing (a client repeats SYN and gives up as it would without us)
    data                     ->  sent at once; what the socket does not take waits, and the window closes by it
    data                     <-  read while the send buffer has room, and the link or nothing on its way
    FIN                      ->  all data was taken: shutdown
    FIN                      <-  end of file
    RST                      ->  reset: closed with SO_LINGER 0
    RST                      <-  any error of the socket
    keepalive                ->  a keepalive, and as often from then on
"""

import contextlib
import errno
import os
import socket
import struct

from tpvpn.manager import local_ports
from tpvpn.manager.outbox import Outbox
from tpvpn.manager.socket_errors import read_errors, tell_errors
from tpvpn.manager.socket_flow import Flow, Owner, error_of, family_of, leave_as, only_family, text_of
from tpvpn.proto.flow import PERIOD
from tpvpn.proto.tcp import ESTABLISHED, KEEPALIVE, PEER_CLOSED, RESET, Connection, Limits, reset_for
from tpvpn.wire import frame, icmp, ip, tcp

BUFFER, MOST_BUFFER = 1 << 20, 4 << 20
"""Bytes that a flow may hold in each direction, and one that moves much alone."""
_AT_ONCE = 4
"""Reads in a row from a socket that has more, and segments in a turn: then others have theirs."""
_MOST_PIECES = 512  # IOV_MAX is 1024
_LONGEST_KEEPALIVE = 7200
"""Seconds; the default of net.ipv4.tcp_keepalive_time, so that none is asked more rarely than before."""
_RESET = struct.pack("ii", 1, 0)
_REFUSALS = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE)
"""The last two: a server that accepted and reset before we looked, the one before, the other after its FIN."""


class TcpFlow(Flow):
    """One connection; OSError when no socket can be had or nothing leads there."""

    def __init__(self, owner: Owner, key: bytes, packet: ip.Packet, real: bytes) -> None:
        self.key = key
        self.half_open = True
        self._owner = owner
        self._syn = packet.quotation(icmp.MOST_QUOTED)
        self._real = real
        source_port, port = key[-4] << 8 | key[-3], key[-2] << 8 | key[-1]
        self._writer = tcp.Writer(packet.destination, port, packet.source, source_port, offload=owner.offload)
        headers = ip.HEADER_LENGTH6 if packet.version == 6 else ip.HEADER_LENGTH4
        mss = owner.mtu - headers - tcp.HEADER_LENGTH
        largest = (tcp.LARGEST_PACKET - headers - tcp.HEADER_LENGTH - tcp.TIMESTAMP_LENGTH) if owner.offload else 0
        self._connection = Connection(Limits(mss, largest, MOST_BUFFER, MOST_BUFFER))
        self._connection.resize(BUFFER)
        self._moved, self._looked_at = 0, 0.0
        self._read_size = largest or 16 * mss
        self._held = 0
        self._heard_at, self._keepalive = 0.0, 0
        self._ended = False
        self._reading = self._writing = self._paused = self._reads_in_turn = False
        self._client_finished = self._told_finished = self._cluster_finished = False
        self._socket = socket.socket(family_of(real), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._connect(real, port)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, real: bytes, port: int) -> None:
        only_family(self._socket)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the laptop has decided when to send
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tell_errors(self._socket)
        leave_as(self._socket, self._syn)
        self._fd = self._socket.fileno()
        number = local_ports.connect(self._socket, text_of(real), port)
        if number not in (0, errno.EINPROGRESS, errno.ECONNREFUSED):
            raise OSError(number, os.strerror(number))
        # A refusal that came at once is still there to be told by the same way as a later one.
        self._refused_at_once = number == errno.ECONNREFUSED
        self._owner.loop.add_writer(self._fd, self._on_connected)

    # -- the laptop's side ---------------------------------------------------------------------------------------------

    def gives_way_to(self, segment: tcp.Segment) -> bool:
        """Whether a new connection from the same port begins, and this one has ended."""
        begins = segment.flags & (tcp.SYN | tcp.ACK | tcp.RST) == tcp.SYN
        if not begins or self._is_delivering:
            return False
        return self._connection.is_closed or self._connection.gives_way_to(segment)

    @property
    def _is_delivering(self) -> bool:
        """The socket has still to take what was acknowledged, also when the laptop's side is over."""
        return self._connection.readable > 0 and self._socket.fileno() >= 0

    def receive(self, segment: tcp.Segment, now: float) -> None:
        """Take a segment; `advance` comes when all that came together are there."""
        self._connection.receive_segment(segment, now, full=self._owner.pool.is_full)

    def advance(self, now: float) -> None:
        """Do what the segments brought, before their memory is used again."""
        connection = self._connection
        events = connection.take_events()
        if events & RESET:
            self.end()
            return
        if events & ESTABLISHED:
            self._read()
        if events & KEEPALIVE:
            self._keep_alive(now)
        self._heard_at = now
        if connection.readable and not self._writing and not self.half_open:
            self._push()
        if events & PEER_CLOSED:
            self._client_finished = True
        if self._client_finished and not connection.readable and not self._told_finished and not self.half_open:
            self._shut_output()
        if self._told_finished and self._cluster_finished:
            self._close_socket()  # what is left is between the laptop and us
        connection.keep()
        if now > self._looked_at + PERIOD:
            connection.resize(self._owner.shares.of(self, self._moved, now))
            self._moved, self._looked_at = 0, now
        if self._paused and connection.writable >= min(self._read_size, BUFFER // 4):
            self._read()
        self._count()
        self._owner.wants_turn(self)

    def _keep_alive(self, now: float) -> None:
        """The laptop asks whether its peer is there: the socket asks too, and gives up by the same measure."""
        seconds = min(round(now - self._heard_at), _LONGEST_KEEPALIVE)
        if seconds and seconds != self._keepalive and self._socket.fileno() >= 0:
            self._keepalive = seconds
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
            # What is shorter than the silence so far is due at once (tcp_sock_set_keepidle_locked in net/ipv4/tcp.c).
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)

    def write(self, outbox: Outbox, now: float) -> bool:
        """Put segments into the outbox: as many as there is room for."""
        connection, write, mss = self._connection, self._writer.write, self._connection.send_mss
        if self._reads_in_turn:
            self._reads_in_turn = False
            self._read()
        more = True
        for _ in range(_AT_ONCE):
            if not more or not outbox.room:
                break
            more = False
            for segment in connection.segments_to_send(now, 1):
                outbox.close_frame(write(outbox.view, outbox.at + frame.HEADER_LENGTH, segment, mss))
                more = bool(segment.payload)
        if connection.is_closed and not self._is_delivering:
            self.end()
            return False
        self._owner.schedule(self, connection.next_timeout())
        return more

    def link_again(self, now: float) -> None:
        """What was on its way to the laptop may be lost."""
        self._connection.resume(now)
        self._owner.wants_turn(self)

    def handle_timeout(self, now: float) -> None:
        """One of the connection's timers has expired."""
        self._connection.handle_timeout(now)
        self.advance(now)

    # -- the cluster's side --------------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        self._owner.loop.remove_writer(self._fd)
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        told = read_errors(self._socket) if number else []
        if told:
            self.end()
            speaker = self._syn.destination if told[0].speaker == self._real else told[0].speaker
            self._owner.report(told[0].error, self._syn, speaker)
            return
        if self._refused_at_once or number in _REFUSALS:
            self._connection.refuse()
        elif number:
            self._give_up(number)
            return
        else:
            tell_errors(self._socket, False)  # they would end an open connection
            self._owner.watch(self._fd, self._on_failed)
            self._connection.accept(self._owner.clock(), int.from_bytes(os.urandom(4), "big"))
        self._set_open()
        self._owner.wants_turn(self)

    def _give_up(self, number: int) -> None:
        """The connection cannot be made: say what a router would, or nothing."""
        error = error_of(number)
        self.end()
        if error:
            self._owner.report(error, self._syn, None)

    def _read(self) -> None:
        if not self._reading and not self._cluster_finished:
            self._reading = True
            self._owner.loop.add_reader(self._fd, self._on_readable)
        self._paused = False

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._owner.loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        connection, owner = self._connection, self._owner
        if owner.congested and connection.unacknowledged:  # one that has nothing on its way may say something
            self._stop_reading()
            self._reads_in_turn = True
            owner.wants_turn(self)
            return
        for _ in range(_AT_ONCE):
            room = min(connection.writable, self._read_size)
            if not room or (owner.pool.is_full and connection.unacknowledged):  # acknowledgments will make room
                self._stop_reading()
                self._paused = True
                break
            try:
                data = self._socket.recv(room)
            except BlockingIOError:
                break
            except OSError:
                self._broken()
                return
            if not data:
                self._stop_reading()
                self._cluster_finished = True
                connection.shutdown_write()
                break
            connection.write(data)
            self._moved += len(data)
            if len(data) < room:
                break
        self._count()
        owner.wants_turn(self)

    def _push(self) -> None:
        """Give the socket what it takes of the laptop's data; the rest keeps the window closed by as much."""
        connection = self._connection
        try:
            while connection.readable:
                sent = self._socket.sendmsg(connection.peek()[:_MOST_PIECES])
                connection.consume(sent)
                self._moved += sent
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._owner.loop.add_writer(self._fd, self._on_writable)
            return
        except OSError:
            self._broken()
            return
        if self._writing:
            self._writing = False
            self._owner.loop.remove_writer(self._fd)

    def _on_writable(self) -> None:
        self._push()
        if self._socket.fileno() >= 0:
            self.advance(self._owner.clock())

    def _shut_output(self) -> None:
        self._told_finished = True
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._broken()

    def _on_failed(self) -> None:
        """The socket has an error: what came before it goes first, as far as there is room."""
        if not self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return  # both sides have finished
        self._stop_reading()
        self._cluster_finished = True
        connection = self._connection
        with contextlib.suppress(OSError):
            while (room := min(connection.writable, self._read_size)) and (data := self._socket.recv(room)):
                connection.write(data)
        self._owner.wants_turn(self)
        self._owner.loop.call_soon(self._broken)

    def _broken(self) -> None:
        """The real connection is lost: so is the laptop's."""
        if self._ended:
            return
        self._connection.abort()
        self._close_socket()
        self._owner.wants_turn(self)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _set_open(self) -> None:
        if self.half_open:
            self.half_open = False
            self._owner.answered()

    def _count(self) -> None:
        held = 0 if self._ended else self._connection.held
        self._owner.pool.used += held - self._held
        self._held = held

    def _close_socket(self) -> None:
        """Close it, if it still is open: by a reset, unless both sides have finished."""
        if self._socket.fileno() < 0:
            return
        self._owner.loop.remove_reader(self._fd)
        self._owner.loop.remove_writer(self._fd)
        self._owner.unwatch(self._fd)
        self._reading = self._writing = False
        if not (self._told_finished and self._cluster_finished):
            self._cluster_finished = True
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._socket.close()

    def end(self) -> None:
        """Close the socket and be forgotten; the laptop is told nothing more."""
        if self._ended:
            return
        self._ended = True
        self._set_open()
        self._close_socket()
        self._count()
        self._owner.forget(self)


def write_reset(outbox: Outbox, packet: ip.Packet, segment: tcp.Segment, *, offload: bool) -> bool:
    """Answer a segment for which there is no connection (RFC 9293 section 3.10.7.1); whether it is answered."""
    answer = reset_for(segment)
    if answer is None or not outbox.room:
        return False
    source_port, port = tcp.ports(packet.payload)
    writer = tcp.Writer(packet.destination, port, packet.source, source_port, offload=offload)
    outbox.close_frame(writer.write(outbox.view, outbox.at + frame.HEADER_LENGTH, answer, len(packet.payload)))
    return True
