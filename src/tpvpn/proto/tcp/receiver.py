"""The receiving half of a connection: bytes in order for the application, the window, and when to acknowledge.

It knows sequence space; not states, nor segments. Positions are integers that grow without bound (see `sender`).

How it works. What comes in order is queued as a view of the segment's own memory, which the owner of that memory must
not reuse before `keep()`; what comes out of order is copied, and never exceeds the window that was offered.
- Window: the capacity less what the application has not taken; its edge moves only in worthwhile steps (silly-window
  avoidance, RFC 9293 section 3.8.6.2.2).
- Acknowledgments are due at once, except in a conversation of question and answer: while answers keep coming within the
  delay, the acknowledgment waits for the answer to carry it. One that comes too late ends that.
"""

DELAY = 0.02
"""Seconds that an acknowledgment waits for an answer."""
_SMALL = 2048
"""Bytes; a piece this small is copied again to be one with what follows."""
_MAX_RANGES = 24
"""Told at once; more are told when these are filled."""
_MAX_PARTS = 1024
"""Pieces out of order; more come only from a peer that sends a byte at a time."""
_PART = 128
"""Bytes of memory that such a piece takes besides what is in it."""


class Receiver:
    """RCV.* of RFC 9293; `irs` is the position of the peer's SYN."""

    __slots__ = (
        "_consumed",
        "_interactive",
        "_latest",
        "_owned",
        "_parts",
        "_parts_held",
        "_queue",
        "_received_at",
        "_scale",
        "ack_at",
        "ack_due",
        "capacity",
        "edge",
        "fin_at",
        "fin_received",
        "last_ack",
        "mss",
        "nxt",
        "queued",
    )

    def __init__(self, irs: int, mss: int, capacity: int, scale: int) -> None:
        self.nxt = self.last_ack = irs + 1
        self.mss = mss
        self.capacity = min(capacity, 0xFFFF << scale)
        self._scale = scale
        self.edge = self.nxt + min(self.capacity, 0xFFFF)  # SYN's window is not scaled
        self.queued = 0
        self.fin_at: int | None = None
        self.fin_received = False
        self.ack_due = False
        self.ack_at: float | None = None
        self._queue: list[memoryview] = []
        self._parts: list[tuple[int, bytes]] = []
        self._parts_held = 0
        self._consumed = False
        self._owned = 0
        self._latest = 0
        self._interactive = False
        self._received_at = -1.0

    def resize(self, capacity: int) -> None:
        """Another capacity; the edge that was offered is not taken back (RFC 9293 section 3.8.6)."""
        self.capacity = min(capacity, 0xFFFF << self._scale)

    # -- what comes ----------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Bytes of memory in use."""
        return self.queued + self._parts_held

    def receive(self, position: int, payload: memoryview, *, fin: bool, now: float, full: bool) -> int:
        """Take a segment's payload; how many bytes became readable.

        When memory is full, only what the application may take at once: the rest is not acknowledged and comes again.
        """
        if full and payload and (self.queued or position > self.nxt):
            return 0
        end = position + len(payload)
        if fin and self.nxt <= end < max(self.edge, self.nxt + 1) and self.fin_at in (None, end):
            self.fin_at = end
        before = self.nxt
        limit = self.edge if self.fin_at is None else min(self.edge, self.fin_at)
        if position < before or end > limit:
            payload = payload[max(before - position, 0) : max(limit - position, 0)]
            position = max(position, before)
            self.ack_due = True  # it was, or goes on, where the peer should not be
        if position > before:
            self._keep_part(position, payload)
            self.ack_due = True
        elif payload:
            self._append(payload)
            if self._parts:
                self._take_parts()
                self.ack_due = True
            elif not self.ack_due:
                self._schedule_ack(now)
            self._received_at = now
        if self.fin_at == self.nxt and not self.fin_received:
            self.fin_received = self.ack_due = True
            self.nxt += 1
            self._parts.clear()
            self._parts_held = 0
        return self.nxt - before - self.fin_received if self.nxt > before else 0

    def _append(self, payload: memoryview) -> None:
        self._queue.append(payload)
        self.queued += len(payload)
        self.nxt += len(payload)

    def _schedule_ack(self, now: float) -> None:
        if not self._interactive or self.nxt - self.last_ack >= 2 * self.mss:
            self.ack_due = True
        elif self.ack_at is None:
            self.ack_at = now + DELAY

    def _keep_part(self, position: int, payload: memoryview) -> None:
        """Keep what is out of order, without what is there already."""
        parts = self._parts
        index = len(parts)
        while index and parts[index - 1][0] > position:
            index -= 1
        start, end = position, position + len(payload)
        if index:
            start = max(start, parts[index - 1][0] + len(parts[index - 1][1]))
        if index < len(parts):
            end = min(end, parts[index][0])
        if start < end and len(parts) < _MAX_PARTS:
            parts.insert(index, (start, bytes(payload[start - position : end - position])))
            self._parts_held += end - start + _PART
            self._latest = start

    def _take_parts(self) -> None:
        """What was out of order and follows now."""
        taken = 0
        for position, data in self._parts:
            if position > self.nxt:
                break
            if position + len(data) > self.nxt:
                self._append(memoryview(data)[self.nxt - position :])
            self._parts_held -= len(data) + _PART
            taken += 1
        del self._parts[:taken]

    # -- the application -----------------------------------------------------------------------------------------------

    def peek(self) -> list[memoryview]:
        """What is in order and not consumed."""
        return self._queue

    def consume(self, count: int) -> None:
        """The application has taken so many bytes."""
        self._consumed = True
        self.queued -= count
        queue = self._queue
        while count and count >= len(queue[0]):
            count -= len(queue.pop(0))
            self._owned = max(self._owned - 1, 0)
        if count:
            queue[0] = queue[0][count:]

    def keep(self) -> None:
        """Copy what is queued in the memory of segments into our own."""
        own, queue = self._owned, self._queue
        if own < len(queue):
            if own and len(queue[own - 1]) < _SMALL:
                own -= 1
            queue[own:] = [memoryview(b"".join(queue[own:]))]
            self._owned = len(queue)

    # -- what goes -----------------------------------------------------------------------------------------------------

    @property
    def window_update_due(self) -> bool:
        """Whether the application has opened the window so far that the peer should know without asking."""
        if not self._consumed:
            return False
        free = self.nxt + self.capacity - self.queued - self.edge
        return free >= self.capacity // 2 or (self.edge - self.nxt < self.mss <= free)

    def window(self) -> int:
        """The window as the header of a segment has it; its edge is offered from now on."""
        edge = self.nxt + self.capacity - self.queued
        if edge - self.edge >= min(self.capacity // 2, self.mss):
            self.edge = edge
        self.last_ack = self.nxt
        return min(max(self.edge - self.nxt, 0) >> self._scale, 0xFFFF)

    def acknowledged(self, now: float, *, with_data: bool) -> None:
        """A segment with the acknowledgment leaves."""
        if with_data and now - self._received_at < DELAY:
            self._interactive = True
        self.ack_due = self._consumed = False
        self.ack_at = None

    def handle_timeout(self) -> None:
        """No answer came to carry the acknowledgment."""
        self._interactive = False
        self.ack_due = True
        self.ack_at = None

    def sack_blocks(self) -> list[tuple[int, int]]:
        """The ranges out of order, that of the latest segment first (RFC 2018 section 4)."""
        ranges: list[tuple[int, int]] = []
        for position, data in self._parts:
            if ranges and ranges[-1][1] == position:
                ranges[-1] = ranges[-1][0], position + len(data)
            else:
                ranges.append((position, position + len(data)))
        ranges.sort(key=lambda block: not block[0] <= self._latest < block[1])
        return ranges[:_MAX_RANGES]

    @property
    def has_parts(self) -> bool:
        """Whether anything is out of order."""
        return bool(self._parts)
