"""One connection: the states of RFC 9293, what a segment may do in each, and the two halves put together.

It knows segments and time as values; not addresses, ports or sockets. The halves (`sender`, `receiver`) count positions
without bound; here they meet the wire's numbers modulo 2**32.

How it works. A segment is judged in the order of RFC 9293 section 3.10.7.4: sequence (with PAWS, RFC 7323), RST, SYN,
ACK, data, FIN. What could be forged is answered by a challenge (RFC 5961), at most ten a second, and counted in
`dropped`; nothing that comes raises an error or makes the connection grow beyond its two buffers. Urgent data is data.
"""

from tpvpn.proto.tcp.challenges import Challenges
from tpvpn.proto.tcp.options import DEFAULT_MSS, Options, is_unstamped
from tpvpn.proto.tcp.receiver import Receiver
from tpvpn.proto.tcp.sender import Sender
from tpvpn.proto.tcp.state import (
    AFTER_OUR_FIN,
    AFTER_SHUTDOWN,
    AFTER_THEIR_FIN,
    CLOSED,
    ESTABLISHED,
    KEEPALIVE,
    MAY_WRITE,
    OPENING,
    PEER_CLOSED,
    READABLE,
    RESET,
    TIME_WAIT,
    UNSYNCHRONIZED,
    WRITABLE,
    Limits,
    State,
)
from tpvpn.wire import ip
from tpvpn.wire.tcp import ACK, FIN, PSH, RST, SYN, Segment

_MASK, _HALF = 0xFFFFFFFF, 0x80000000


class Connection:
    """One end of a connection (see the package for how it is used)."""

    __slots__ = (
        *("_challenges", "_events", "_full", "_immediate", "_limits", "_opened_at", "_options", "_receiver"),
        *("_requested", "_room", "_sender", "_syn_due", "_time_wait_at", "dropped", "state"),
    )

    def __init__(self, limits: Limits) -> None:
        self.state = State.LISTEN
        self.dropped = 0
        """Segments that did not belong, or came too often."""
        self._limits, self._room = limits, limits.send_buffer
        self._events, self._opened_at = 0, 0.0
        self._immediate: list[Segment] = []
        self._requested = self._syn_due = self._full = False
        self._time_wait_at: float | None = None
        self._challenges = Challenges()
        options = self._options = Options(limits)
        self._sender = Sender(0, DEFAULT_MSS, DEFAULT_MSS)
        self._receiver = Receiver(0, limits.mss, limits.receive_buffer, options.scale)

    @property
    def send_mss(self) -> int:
        """Payload that one packet to the peer may carry: the virtio-net header's gso_size."""
        return self._options.send_mss

    # -- opening -------------------------------------------------------------------------------------------------------

    @property
    def is_requested(self) -> bool:
        """A SYN waits for `accept` or `refuse`."""
        return self._requested

    @property
    def is_closed(self) -> bool:
        """There is nothing more to come or, once `segments_to_send` is empty, to send."""
        return self.state is State.CLOSED

    def accept(self, now: float, iss: int) -> None:
        """Answer the SYN."""
        if self._requested:
            self._requested = False
            self._open(State.SYN_RECEIVED, now, iss)

    def refuse(self) -> None:
        """Answer the SYN with a reset."""
        if self._requested:
            self._requested = False
            self._immediate.append(Segment(0, self._receiver.nxt & _MASK, RST | ACK, 0))
            self._close(CLOSED)

    def connect(self, now: float, iss: int) -> None:
        """Send a SYN."""
        self._open(State.SYN_SENT, now, iss)

    def _open(self, state: State, now: float, iss: int) -> None:
        self.state, self._opened_at, self._syn_due = state, now, True
        self._sender = Sender(iss, self.send_mss, self._limits.largest or self.send_mss)

    def _take_syn(self, segment: Segment, now: float) -> None:
        options, limits = self._options, self._limits
        options.take_syn(segment, now)
        self._sender.mss, self._sender.largest = options.send_mss, limits.largest or options.send_mss
        self._receiver = Receiver(segment.seq, limits.mss, self._receiver.capacity, options.scale)

    def _receive_in_listen(self, segment: Segment, now: float) -> None:
        if not self._requested and segment.flags & (SYN | ACK | RST | FIN) == SYN:
            self._requested = True
            self._take_syn(segment, now)
        elif self._requested and segment.flags & RST and segment.seq == self._receiver.nxt & _MASK:
            self._requested = False
            self._close(RESET)
        elif not (self._requested and segment.flags & SYN):  # which the peer sends again while we connect
            self.dropped += 1

    def _receive_in_syn_sent(self, segment: Segment, now: float) -> None:
        sender = self._sender
        if not segment.flags & ACK or segment.ack != sender.nxt & _MASK or not segment.flags & (SYN | RST):
            self.dropped += 1
        elif segment.flags & RST:
            self._close(RESET)
        else:
            self._take_syn(segment, now)
            self._receiver.ack_due = True
            self._establish(segment.window, self._receiver.nxt, sender.nxt, now)

    def _establish(self, window: int, seq: int, ack: int, now: float) -> None:
        self.state = State.ESTABLISHED
        self._events |= ESTABLISHED
        self._syn_due = False
        self._sender.receive_ack(ack, seq, window, has_data=False, rtt=None, now=now)
        if self._sender.is_finishing:
            self.state = State.FIN_WAIT_1

    # -- what comes ----------------------------------------------------------------------------------------------------

    def receive_segment(self, segment: Segment, now: float, *, full: bool = False) -> None:
        """Take a segment of this connection; `full`: there is no memory for payload that cannot go on at once."""
        if self.state in UNSYNCHRONIZED:
            if self.state is State.LISTEN:
                self._receive_in_listen(segment, now)
            elif self.state is State.SYN_SENT:
                self._receive_in_syn_sent(segment, now)
            else:
                self.dropped += 1
            return
        receiver, payload, flags = self._receiver, segment.payload, segment.flags
        nxt = receiver.nxt
        seq = nxt + ((segment.seq - nxt + _HALF) & _MASK) - _HALF
        if self._options.timestamps and self._is_stale(segment, now):
            return
        occupied = len(payload) + (flags & FIN) + (flags >> 1 & 1)
        if (seq < nxt and seq + occupied <= nxt) or (seq >= receiver.edge and seq != nxt):
            self._refuse_outside(segment, occupied, now)
            return
        if flags & (RST | SYN) or not flags & ACK:
            self._receive_unusual(flags, seq, now)
            return
        if segment.timestamp is not None and seq <= receiver.last_ack:
            self._options.note(segment.timestamp, now)
        if self._receive_ack(segment, seq, now) and occupied and self.state in AFTER_THEIR_FIN:
            if receiver.receive(seq, memoryview(payload), fin=flags & FIN != 0, now=now, full=full):
                self._events |= READABLE
            if receiver.fin_received:
                self._events |= PEER_CLOSED
                self._move(AFTER_THEIR_FIN, now)

    def _is_stale(self, segment: Segment, now: float) -> bool:
        """Where timestamps were agreed on: there is none, or an old one."""
        if self._options.is_old(segment, now):
            self._challenge(now)
            return True
        if is_unstamped(segment):
            self.dropped += 1
            return True
        return False

    def _refuse_outside(self, segment: Segment, occupied: int, now: float) -> None:
        """Nothing of the segment is in the window. The peer is told where we are, so that a lost answer comes again."""
        if segment.flags & RST:
            self.dropped += 1
        elif self.state is State.SYN_RECEIVED and segment.flags & (SYN | ACK) == SYN:
            self._syn_due = True
        elif occupied and not segment.flags & SYN:
            self.dropped += 1
            self._receiver.ack_due = True
            if self._time_wait_at is not None:
                self._time_wait_at = now + TIME_WAIT
        else:  # a keepalive or a window probe, or no one's: two ends must not answer each other for ever
            if self._receiver.edge > self._receiver.nxt and segment.seq == self._receiver.nxt - 1 & _MASK:
                self._events |= KEEPALIVE
            self._challenge(now)

    def _receive_unusual(self, flags: int, seq: int, now: float) -> None:
        """RST and SYN within the window (RFC 5961 sections 3 and 4), or no ACK."""
        if flags & RST and seq == self._receiver.nxt:
            self._close(RESET)
        elif flags & (RST | SYN):
            self._challenge(now)
        else:
            self.dropped += 1

    def _challenge(self, now: float) -> None:
        self.dropped += 1
        self._receiver.ack_due |= self._challenges.may_answer(now)

    def _receive_ack(self, segment: Segment, seq: int, now: float) -> bool:
        """The segment's ACK field; whether the rest of the segment may be used."""
        sender = self._sender
        una = sender.una
        ack = una + ((segment.ack - una + _HALF) & _MASK) - _HALF
        if self.state is State.SYN_RECEIVED:
            if ack != sender.nxt:
                self.dropped += 1
                self._immediate = [Segment(segment.ack, 0, RST, 0)]  # one is enough, however many come
                return False
            self._establish(segment.window << self._options.peer_scale, seq, ack, now)
            return True
        if ack > sender.nxt or ack < una - sender.max_wnd:  # RFC 5961 section 5
            self._challenge(now)
            return False
        window = segment.window << self._options.peer_scale
        rtt = self._options.rtt(segment, now) if ack > una else None
        has_data = bool(segment.payload) or segment.flags & FIN != 0
        advanced = sender.receive_ack(ack, seq, window, has_data=has_data, rtt=rtt, now=now)
        if segment.sack_blocks and self._options.sack:
            sender.receive_sack(segment.sack_blocks)
        if advanced:
            if self._full and len(sender.buffer) <= self._room // 2:
                self._full = False
                self._events |= WRITABLE
            if sender.fin_acknowledged:
                self._move(AFTER_OUR_FIN, now)
        return True

    def _move(self, transitions: dict[State, State], now: float) -> None:
        self.state = transitions.get(self.state, self.state)
        if self.state is State.TIME_WAIT and self._time_wait_at is None:
            self._time_wait_at = now + TIME_WAIT
            self._sender.timer_at = None
        elif self.state is State.CLOSED:
            self._close(CLOSED)

    def _close(self, event: int) -> None:
        self.state = State.CLOSED
        self._events |= event
        self._time_wait_at = self._sender.timer_at = self._receiver.ack_at = None

    def gives_way_to(self, segment: Segment) -> bool:
        """Whether a SYN begins a new connection while this one is in TIME-WAIT (RFC 6191)."""
        if self.state is not State.TIME_WAIT or segment.flags & (SYN | ACK | RST) != SYN:
            return False
        if segment.timestamp is not None and self._options.timestamps:
            return self._options.is_newer(segment.timestamp)
        return (segment.seq - self._receiver.nxt) & _MASK < _HALF

    # -- the application -----------------------------------------------------------------------------------------------

    def take_events(self) -> int:
        """What happened since the last call, as bits: ESTABLISHED, READABLE, WRITABLE, PEER_CLOSED, RESET, CLOSED."""
        events, self._events = self._events, 0
        return events

    @property
    def readable(self) -> int:
        """Bytes in order that were not consumed."""
        return self._receiver.queued

    def peek(self) -> list[memoryview]:
        """These bytes; the views are the segments' own memory until `keep`."""
        return self._receiver.peek()

    def consume(self, count: int) -> None:
        """The first `count` bytes are taken: the window opens."""
        self._receiver.consume(count)

    def keep(self) -> None:
        """Copy what is not consumed: the memory of the segments is about to be reused."""
        self._receiver.keep()

    @property
    def held(self) -> int:
        """Bytes of memory in its buffers."""
        return self._receiver.held + len(self._sender.buffer)

    @property
    def writable(self) -> int:
        """Bytes that `write` takes; 0 until there is room for a worthwhile piece, then WRITABLE is an event."""
        if self._full or self._sender.is_finishing or self.state not in MAY_WRITE:
            return 0
        return max(self._room - len(self._sender.buffer), 0)

    @property
    def unacknowledged(self) -> int:
        """Bytes that were written and are not the peer's yet."""
        return len(self._sender.buffer)

    def resize(self, size: int) -> None:
        """Have buffers of this size from now on, at most that of the limits; a window that was offered stays so."""
        self._room = min(size, self._limits.send_buffer)
        self._receiver.resize(min(size, self._limits.receive_buffer))

    def write(self, data: ip.Bytes) -> None:
        """Send these bytes; `bytes` are kept without a copy. ValueError when they are more than `writable`."""
        if len(data) > self.writable:
            raise ValueError(f"{len(data)} bytes, but only {self.writable} can be written")
        if data:
            buffer = self._sender.buffer
            buffer.append(data if isinstance(data, bytes) else bytes(data))
            least = min(self._sender.largest, self._room // 4)
            self._full = self._room - len(buffer) < least

    def shutdown_write(self) -> None:
        """Send FIN behind what was written; the other direction goes on."""
        if self.state in MAY_WRITE:
            self._sender.finish()
            self.state = AFTER_SHUTDOWN.get(self.state, self.state)

    def abort(self) -> None:
        """End the connection by a reset."""
        if self.state is State.LISTEN:
            self.refuse()
        elif self.state not in (State.CLOSED, State.TIME_WAIT, State.SYN_SENT):
            self._immediate.append(Segment(self._sender.nxt & _MASK, self._receiver.nxt & _MASK, RST | ACK, 0))
        self._close(CLOSED)

    # -- time and what goes --------------------------------------------------------------------------------------------

    def next_timeout(self) -> float | None:
        """When `handle_timeout` is due; None: not before something else happens."""
        first, ack_at = self._sender.timer_at, self._receiver.ack_at
        if ack_at is not None and (first is None or ack_at < first):
            first = ack_at
        return first if self._time_wait_at is None else self._time_wait_at

    def handle_timeout(self, now: float) -> None:
        """Time has come; earlier than that, nothing happens."""
        sender, receiver = self._sender, self._receiver
        if self._time_wait_at is not None:
            if now >= self._time_wait_at:
                self._close(CLOSED)
            return
        if receiver.ack_at is not None and now >= receiver.ack_at:
            receiver.handle_timeout()
        if sender.timer_at is None or now < sender.timer_at:
            return
        opening = self.state in (State.SYN_SENT, State.SYN_RECEIVED)
        if sender.is_given_up(now) or (opening and now - self._opened_at > OPENING):
            self.abort()
            self._events |= RESET
        elif opening:
            sender.back_off(now)
            self._syn_due = True
        else:
            sender.handle_timeout(now)

    def resume(self, now: float) -> None:
        """The link is back after a pause: do not wait for timers that grew long meanwhile."""
        if self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            self._syn_due = True
        elif self.state not in UNSYNCHRONIZED:
            self._sender.resume(now)

    def segments_to_send(self, now: float, limit: int = 1 << 20) -> list[Segment]:
        """What to send now, about `limit` bytes of payload at most; there may be more when the last one has payload."""
        out, self._immediate = self._immediate, []
        if self.state in UNSYNCHRONIZED or self.state is State.SYN_RECEIVED:
            if self._syn_due:
                out.append(self._syn(now))
            return out
        sender, receiver = self._sender, self._receiver
        nxt = sender.nxt & _MASK
        pieces = sender.pieces(now, limit) if self.state is not State.TIME_WAIT else []
        pure = receiver.ack_due or receiver.window_update_due
        if not pieces and not pure:
            return out
        ack, window = receiver.nxt & _MASK, receiver.window()
        timestamp, echo = self._options.stamp(now)
        if pure and self._options.sack and receiver.has_parts:
            # Many segments came since the last acknowledgment: one has no room for all that is missing between them.
            blocks = [(start & _MASK, end & _MASK) for start, end in receiver.sack_blocks()]
            for at in range(0, len(blocks), 3):
                out.append(Segment(nxt, ack, ACK, window, b"", timestamp, echo))
                out[-1].sack_blocks = tuple(blocks[at : at + 3])
        elif not pieces:
            out.append(Segment(nxt, ack, ACK, window, b"", timestamp, echo))
        end = sender.buffer.end
        for position, data, fin in pieces:
            flags = ACK | fin | (PSH if data and position + len(data) == end else 0)
            out.append(Segment(position & _MASK, ack, flags, window, data, timestamp, echo))
        receiver.acknowledged(now, with_data=bool(pieces))
        return out

    def _syn(self, now: float) -> Segment:
        """SYN, or SYN and ACK; it comes again until it is answered."""
        sender, receiver, self._syn_due = self._sender, self._receiver, False
        sender.timer_at = now + sender.rto.value
        ack = receiver.nxt & _MASK if self.state is State.SYN_RECEIVED else None
        return self._options.syn(sender.una & _MASK, ack, min(receiver.capacity, 0xFFFF), now)
