"""The sending half of a connection: what to send, what to send again, and when.

It knows sequence space, the peer's window and one timer; not states, nor what the segments carry besides. Positions
are integers that grow without bound; only the wire wraps them at 2**32.

How it works. New data goes from SND.NXT as far as SND.UNA + SND.WND, in pieces of up to `largest` bytes; there is no
congestion window: the link to the laptop is a reliable stream that pushes back by itself (docs/decisions.md).
- Loss: after three duplicate acknowledgments, or when the peer has more than two segments beyond a hole (RFC 6675), the
  holes below the highest range that it has are sent again, each once. A partial acknowledgment without SACK brings the
  next piece (RFC 6582).
- Timer: RFC 6298. At expiry the first piece is sent again; when its acknowledgment comes, all the rest that is missing.
- A window that is closed, or too small to be worth a segment, is asked about when the persist timer expires
  (RFC 9293 section 3.8.6.1): by a segment before SND.UNA without data, which every receiver answers.
"""

from typing import NamedTuple

from tpvpn.proto.tcp.buffer import SendBuffer
from tpvpn.proto.tcp.rto import RetransmissionTimeout
from tpvpn.proto.tcp.scoreboard import Scoreboard

_DUPLICATES = 3
_SHARE = 4
"""With data on the way, wait until a quarter of the window is free: small pieces cost as much as large ones."""
GIVE_UP = 900.0
"""Seconds without any answer after which the peer is gone; Linux's tcp_retries2 amounts to the same."""


class Piece(NamedTuple):
    """What one segment takes of the sequence space."""

    position: int
    data: memoryview | bytes
    fin: bool


class Sender:
    """SND.* of RFC 9293; `iss` is the position of SYN."""

    __slots__ = (
        "_duplicates",
        "_heard_at",
        "_override",
        "_probe",
        "_recovery_point",
        "_resend_at",
        "_resend_to",
        "_sacked",
        "_timed_at",
        "_timed_position",
        "_timeout_recovery",
        "_wl1",
        "_wl2",
        "buffer",
        "fin_sent",
        "is_finishing",
        "largest",
        "max_wnd",
        "mss",
        "nxt",
        "rto",
        "timer_at",
        "una",
        "wnd",
    )

    def __init__(self, iss: int, mss: int, largest: int) -> None:
        self.una, self.nxt, self.wnd, self.max_wnd = iss, iss + 1, 0, 0
        self.mss, self.largest = mss, largest
        self._wl1 = self._wl2 = -1
        self.buffer = SendBuffer(iss + 1)
        self.rto = RetransmissionTimeout()
        self.timer_at: float | None = None
        self.fin_sent = False
        self.is_finishing = False
        self._sacked = Scoreboard()
        self._duplicates = 0
        self._resend_at = self._resend_to = self._recovery_point = iss + 1
        self._timeout_recovery = False
        self._probe = self._override = False
        self._timed_position: int | None = None
        self._timed_at = 0.0
        self._heard_at: float | None = None

    @property
    def unsent(self) -> int:
        """Bytes that wait for their first segment."""
        return 0 if self.fin_sent else self.buffer.end - self.nxt

    @property
    def fin_acknowledged(self) -> bool:
        """Whether the peer has all there will ever be."""
        return self.fin_sent and self.una > self.buffer.end

    def finish(self) -> None:
        """Send FIN behind what was written."""
        self.is_finishing = True

    # -- what comes ----------------------------------------------------------------------------------------------------

    def receive_ack(self, ack: int, seq: int, window: int, *, has_data: bool, rtt: float | None, now: float) -> bool:
        """Take the acknowledgment and window of a segment at `seq`, not beyond SND.NXT; whether it was a new one."""
        old_wnd = self.wnd
        if self._wl1 < seq or (self._wl1 == seq and self._wl2 <= ack):
            self._wl1, self._wl2 = seq, ack
            self.wnd = window
            self.max_wnd = max(self.max_wnd, window)
        self._heard_at = now
        if ack > self.una:
            self._advance(ack, rtt, now)
            return True
        if old_wnd != self.wnd:
            if self.una == self.nxt:
                self.timer_at = None  # a persist timer begins anew if it is still needed
                self._override = self._probe = False
            elif old_wnd == 0:  # what was sent before the window closed was not taken
                self._resend_all(now)
        elif ack == self.una and not has_data and self.una < self.nxt:
            self._duplicates += 1
            if self._duplicates == _DUPLICATES and not self._sacked and self.una >= self._recovery_point:
                self._recover(min(self.una + self.largest, self.nxt))
        return False

    def receive_sack(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Take the ranges beyond the acknowledgment that the peer has, as the wire's numbers."""
        una, news = self.una, False
        for block in blocks:
            start, end = (una + ((number - una + 0x80000000) & 0xFFFFFFFF) - 0x80000000 for number in block)
            if una < start < end <= self.nxt:
                news |= self._sacked.add(start, end)
        if not news:
            return
        if self.una < self._recovery_point:
            if not self._timeout_recovery:
                self._resend_to = max(self._resend_to, self._sacked.highest)
        elif self._sacked.size > 2 * self.mss or self._duplicates >= _DUPLICATES:
            self._recover(self._sacked.highest)

    def _advance(self, ack: int, rtt: float | None, now: float) -> None:
        if self._timed_position is not None and ack >= self._timed_position:
            rtt = now - self._timed_at if rtt is None else rtt
            self._timed_position = None
        if rtt is not None:
            self.rto.sample(rtt)
        self.una = ack
        self._duplicates = 0
        self.buffer.drop(min(ack, self.buffer.end))
        if self._sacked:
            self._sacked.drop(ack)
        self._resend_at = max(self._resend_at, ack)
        if ack < self._recovery_point:
            if self._timeout_recovery:
                self._resend_to = self._recovery_point
            elif not self._sacked:
                self._resend_at, self._resend_to = ack, min(ack + self.largest, self._recovery_point)
        else:
            self._timeout_recovery = False
            self._resend_to = self._resend_at
        self.timer_at = None if ack == self.nxt else now + self.rto.value

    def _recover(self, until: int) -> None:
        self._recovery_point = self.nxt
        self._resend_at, self._resend_to = self.una, until
        self._timed_position = None  # Karn: what is sent twice gives no sample

    # -- time ----------------------------------------------------------------------------------------------------------

    def is_given_up(self, now: float) -> bool:
        """Whether the peer has been silent for too long."""
        return self._heard_at is not None and now - self._heard_at > GIVE_UP

    def back_off(self, now: float) -> None:
        """Wait again, for longer."""
        self.rto.back_off()
        self.timer_at = now + self.rto.value

    def handle_timeout(self, now: float) -> None:
        """The timer has expired."""
        self.back_off(now)
        self._timed_position = None
        if self.wnd == 0 or self.una == self.nxt:
            self._override, self._probe = self.wnd > 0, self.wnd == 0
        else:
            self._sacked.clear()
            self._recover(min(self.una + self.largest, self.nxt))
            self._timeout_recovery = True

    def resume(self, now: float) -> None:
        """The path is back after a pause: what was on the way is sent again at once."""
        self.rto.reset_backoff()
        if self.una < self.nxt:
            self._resend_all(now)
        elif self.timer_at is not None:
            self.timer_at = now

    def _resend_all(self, now: float) -> None:
        self._recover(self.nxt)
        self._timeout_recovery = True
        self.timer_at = now + self.rto.value

    # -- what goes -----------------------------------------------------------------------------------------------------

    def pieces(self, now: float, limit: int) -> list[Piece]:
        """What to send now: first what was lost, then new data, up to about `limit` bytes."""
        out: list[Piece] = []
        if self._probe:
            self._probe = False
            out.append(Piece(self.una - 1, b"", False))
        if self._resend_at < self._resend_to:
            limit = self._add_lost(out, limit)
        if self.buffer.end > self.nxt or (self.is_finishing and not self.fin_sent):
            self._add_new(out, limit, now)
        if self._heard_at is None:
            self._heard_at = now
        if self.timer_at is None and (self.una < self.nxt or self.unsent or self.is_finishing != self.fin_sent):
            self.timer_at = now + self.rto.value
        return out

    def _add_lost(self, out: list[Piece], limit: int) -> int:
        edge = self.una + self.wnd
        while limit > 0:
            start, end = self._sacked.hole(self._resend_at, self._resend_to)
            data_end = min(end, self.buffer.end, edge)
            length = max(min(self.largest, data_end - start), 0)
            after = start + length
            fin = self.fin_sent and after == self.buffer.end and end > after and edge > after
            if not length and not fin:
                if start >= self._resend_to:
                    self._resend_at = self._resend_to
                break
            out.append(Piece(start, self.buffer.read(start, length) if length else b"", fin))
            limit -= length
            self._resend_at = after + fin
        return limit

    def _add_new(self, out: list[Piece], limit: int, now: float) -> None:
        edge, end = self.una + self.wnd, self.buffer.end
        while limit > 0 and not self.fin_sent:
            have, room = end - self.nxt, edge - self.nxt
            length = min(have, room, self.largest)
            if length < have and length < self._worth_sending() and not self._override:
                break
            last = length == have
            fin = self.is_finishing and last and room > length
            if length <= 0 and not fin:
                break
            out.append(Piece(self.nxt, self.buffer.read(self.nxt, length) if length else b"", fin))
            if self.una == self.nxt:
                self.timer_at = None  # was the persist timer
                self._heard_at = now
            limit -= length
            self.nxt += length + fin
            self.fin_sent = fin
            self._override = False
            if self._timed_position is None:
                self._timed_position, self._timed_at = self.nxt, now

    def _worth_sending(self) -> int:
        """The least that is sent when the window does not take all (silly-window avoidance, RFC 9293 3.8.6.2.1)."""
        if self.una == self.nxt:
            return min(self.mss, max(self.max_wnd // 2, 1))
        return min(self.largest, max(self.max_wnd // _SHARE, 1))
