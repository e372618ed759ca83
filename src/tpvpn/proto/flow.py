"""Flows of a session at the socket exit: how many there may be, how fast new ones come, and when each has its turn.

Pure: `now` (seconds, never going back) is an argument. It knows nothing of packets or sockets; a flow is whatever the
owner keeps under a key. Four values:
- `Pool`, one for all sessions: flows and bytes. A session may have four times as many flows as are free (Choudhury and
  Hahne's dynamic threshold): one alone has four fifths of all, two have four ninths each, and a newcomer finds room.
- `Shares`, one a session: how large the buffers of its flows are.
- `FlowTable`, one a session: its flows by key, with a bucket for the rate of new ones and a limit on those half open.
- `Timers`: the times at which flows want to be called. A time that moves on, as an idle timeout does with each packet,
  is one attribute set: the heap is looked at only when the earlier time has come.
"""

import enum
import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

_SHARE = 4
_FEW = 64
PERIOD = 0.1
"""Seconds between two looks at what a flow has moved."""
_QUIET = 5 * PERIOD

Key = TypeVar("Key")
Flow = TypeVar("Flow")


class Refusal(enum.Enum):
    """Why a flow was not admitted; the values are the names of counters."""

    TOO_MANY = "flows"
    TOO_FAST = "flow_rate"
    HALF_OPEN = "half_open"


class Bucket:
    """A token bucket: `burst` at once, then `rate` a second."""

    __slots__ = ("_burst", "_rate", "_tokens", "_when")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst, self._tokens, self._when = rate, burst, burst, now

    def take(self, now: float) -> bool:
        """Whether there is a token; it is taken."""
        self._tokens = min(self._burst, self._tokens + (now - self._when) * self._rate)
        self._when = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Pool:
    """What all sessions share: at most `flows` of them, and `memory` bytes in their buffers."""

    __slots__ = ("_free", "most_flows", "most_memory", "used")

    def __init__(self, flows: int, memory: int) -> None:
        self.most_flows, self.most_memory = flows, memory
        self._free = flows
        self.used = 0
        """Bytes in buffers; their owners count them."""

    @property
    def is_full(self) -> bool:
        """No buffer may grow."""
        return self.used >= self.most_memory

    def take(self, have: int) -> bool:
        """One more flow for a session that has `have`."""
        if have >= _SHARE * self._free:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """A flow has ended."""
        self._free += 1


class Shares(Generic[Flow]):
    """The buffers of flows that move much: one alone has `most` bytes, several share that, none has less than `least`.

    A buffer is the data of one round trip, and the queue in front of everybody else's packets.
    """

    __slots__ = ("_least", "_most", "_moved")

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._moved: dict[Flow, float] = {}

    def of(self, flow: Flow, moved: int, now: float) -> int:
        """A flow's buffer, when it has moved so many bytes in the last PERIOD."""
        if moved < self._least // 8:
            self._moved.pop(flow, None)
            return self._least
        self._moved[flow] = now
        for other in [one for one, when in self._moved.items() if now - when > _QUIET]:
            del self._moved[other]
        return max(self._most // len(self._moved), self._least)

    def forget(self, flow: Flow) -> None:
        """It has ended."""
        self._moved.pop(flow, None)


class FlowTable(Generic[Key, Flow]):
    """The flows of one session."""

    def __init__(self, pool: Pool, now: float, *, rate: float, burst: float, half_open: int) -> None:
        self.flows: dict[Key, Flow] = {}
        self.get = self.flows.get
        self.half_open = 0
        """Flows whose other end has not answered yet; their owners count them."""
        self._pool, self._most_half_open = pool, half_open
        self._bucket = Bucket(rate, burst, now)

    def refusal(self, now: float, *, half_open: bool) -> Refusal | None:
        """None when a flow may begin, and then `add` it; `half_open`: its other end must answer first."""
        if half_open and self.half_open >= self._most_half_open:
            return Refusal.HALF_OPEN
        if not self._bucket.take(now):
            return Refusal.TOO_FAST
        return None if self._pool.take(len(self.flows)) else Refusal.TOO_MANY

    def add(self, key: Key, flow: Flow) -> None:
        """A flow that `refusal` had nothing against."""
        self.flows[key] = flow

    def remove(self, key: Key, flow: Flow) -> None:
        """It has ended; another one may have its key by now."""
        if self.flows.get(key) is flow:
            del self.flows[key]
        self._pool.give_back()


class Timed:
    """What can be scheduled; `queued` belongs to `Timers`."""

    due: float | None = None
    queued: tuple[float, int] | None = None


Item = TypeVar("Item", bound=Timed)


class Timers(Generic[Item]):
    """Items by the time at which they are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._items: dict[int, Item] = {}
        """By the number of their entry; one that is not here has been replaced or forgotten."""
        self._count = 0

    def schedule(self, item: Item, due: float | None) -> None:
        """It is due then and at no other time. One that is only moved on may have its `due` set instead."""
        item.due = due
        if due is not None and (item.queued is None or due < item.queued[0]):
            self._take_out(item)
            self._count += 1
            item.queued = due, self._count
            self._items[self._count] = item
            heapq.heappush(self._heap, item.queued)

    def forget(self, item: Item) -> None:
        """It has ended: it is due no more, and not kept until it would have been."""
        item.due = None
        self._take_out(item)

    def _take_out(self, item: Item) -> None:
        if item.queued is None:
            return
        del self._items[item.queued[1]]
        item.queued = None
        if len(self._heap) > 2 * len(self._items) + _FEW:
            self._heap = [entry for entry in self._heap if entry[1] in self._items]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """When to look again; perhaps nothing is due then."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[Item]:
        """Those whose time has come, each once; they are scheduled no more."""
        while self._heap and self._heap[0][0] <= now:
            _, number = heapq.heappop(self._heap)
            item = self._items.pop(number, None)
            if item is None:
                continue
            item.queued = None
            if item.due is not None and item.due > now:
                self.schedule(item, item.due)
            elif item.due is not None:
                item.due = None
                yield item
