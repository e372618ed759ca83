"""How much the way to the manager carries: padded pings, some in flight at a time, beside all else that it carries.

Up, the pings have the padding; down, their answers. More are in flight as long as answers come soon, so that a slow way
is not filled for longer than a moment; on a fast one the ends' own work is the limit, so the figure is a lower bound.
"""

import asyncio
import itertools
import time
from collections.abc import Callable

from tpvpn.proto import ping
from tpvpn.proto.ping import MAX_PADDING

PERIOD = 0.5
"""Seconds for each direction."""
_MOST = 32
"""Pings in flight, of MAX_PADDING bytes each: less than a link lets wait."""
_FEW = 8
_SOON = 0.2
"""Seconds; an answer that took longer waited behind others."""


class Speed:
    """One measurement; its ids are negative, so that no other ping has them. `answered` is told of each pong."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._identities = itertools.count(-1, -1)
        self._sent = dict[int, float]()
        self._came = list[float]()
        self._window = 1
        self._goes_on = False
        self._members: dict[str, int] = {}
        self._done = asyncio.Event()

    async def up(self) -> float:
        """Bytes a second to the manager, at least. TimeoutError of whoever waits: nothing answers."""
        return await self._measure(padding=MAX_PADDING)

    async def down(self) -> float:
        """Bytes a second from the manager, at least."""
        return await self._measure(wanted=MAX_PADDING)

    def answered(self, identity: int) -> None:
        """A pong came."""
        sent, now = self._sent.pop(identity, None), time.monotonic()
        if sent is None:
            return
        self._came.append(now)
        if now - sent < _SOON and self._window < _MOST:
            self._window += 1
        self._fill()
        if not self._sent:
            self._done.set()

    async def _measure(self, **members: int) -> float:
        self._members, self._window, self._goes_on = members, 1, True
        self._came.clear()
        self._done.clear()
        began = time.monotonic()
        timer = asyncio.get_running_loop().call_later(PERIOD, self._stop)
        try:
            self._fill()
            await self._done.wait()
        finally:
            timer.cancel()
            self._stop()
        return MAX_PADDING * _rate(began, self._came)

    def _stop(self) -> None:
        self._goes_on = False

    def _fill(self) -> None:
        while self._goes_on and len(self._sent) < self._window:
            identity = next(self._identities)
            self._sent[identity] = time.monotonic()
            self._send(ping.encode(identity, **self._members))


def _rate(began: float, came: list[float]) -> float:
    """How many came a second: of many those of the later half, when as many were in flight as the way bears."""
    last = came[-1]
    if len(came) < _FEW:
        return len(came) / (last - began)
    middle = (began + last) / 2
    return sum(one > middle for one in came) / (last - middle)
