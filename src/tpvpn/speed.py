"""How much the way to the manager carries: padded pings, some in flight at a time, beside all else that it carries.

Up, the pings have the padding; down, their answers. More are in flight as long as answers come soon, so that a slow way
is not filled for longer than a moment; on a fast one the ends' own work is the limit, so the figure is a lower bound.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tpvpn.errors import ManagerError, TpvpnError
from tpvpn.proto import ping
from tpvpn.proto.ping import MAX_IN_FLIGHT, MAX_PADDING

PERIOD = 0.5
"""Seconds for each direction."""
_FEW = 8
_SOON = 0.2
"""Seconds; an answer that took longer waited behind others."""


class _Answer(NamedTuple):
    at: float
    length: int
    """Bytes that it says were carried."""


class Speed:
    """One measurement: `answered` is told of each pong, `fail` of what ends it; no other ping has its identities."""

    def __init__(self, send: Callable[[bytes], None], identities: Iterator[int]) -> None:
        self._send, self._identities = send, identities
        self._sent = dict[int, float]()
        self._came = list[_Answer]()
        self._window, self._goes_on, self._up = 1, False, True
        self._error: TpvpnError | None = None
        self._done: asyncio.Future[None] | None = None

    async def up(self) -> float:
        """Bytes a second to the manager, at least. It waits for ever when nothing answers; what `fail` says."""
        return await self._measure(up=True)

    async def down(self) -> float:
        """Bytes a second from the manager, at least; as `up`. ManagerError when answers have no padding."""
        rate = await self._measure(up=False)
        if not rate:
            raise ManagerError("the manager is of an older version, whose answers have no padding: upgrade it")
        return rate

    def answered(self, identity: int, padding: int) -> None:
        """A pong came, with so many bytes of padding."""
        sent, now = self._sent.pop(identity, None), time.monotonic()
        if sent is None:
            return
        self._came.append(_Answer(now, MAX_PADDING if self._up else padding))
        if now - sent < _SOON and self._window < MAX_IN_FLIGHT:
            self._window += 1
        self._fill()
        if not self._sent and self._done and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: TpvpnError) -> None:
        """Some that are in flight will not be answered."""
        self._error, self._goes_on = error, False
        if self._done and not self._done.done():
            self._done.set_exception(error)

    async def _measure(self, *, up: bool) -> float:
        if self._error:
            raise self._error
        loop = asyncio.get_running_loop()
        self._up, self._window, self._goes_on = up, 1, True
        self._came.clear()
        self._done = loop.create_future()
        began = time.monotonic()
        timer = loop.call_later(PERIOD, self._stop)
        try:
            self._fill()
            await self._done
        finally:
            timer.cancel()
            self._stop()
        return _rate(began, self._came)

    def _stop(self) -> None:
        self._goes_on = False

    def _fill(self) -> None:
        while self._goes_on and len(self._sent) < self._window:
            identity = next(self._identities)
            self._sent[identity] = time.monotonic()
            members = {"padding": MAX_PADDING} if self._up else {"wanted": MAX_PADDING}
            self._send(ping.encode(identity, **members))


def _rate(began: float, came: list[_Answer]) -> float:
    """Bytes a second: of many answers those of the later half, when as many were in flight as the way bears."""
    last = came[-1].at
    if len(came) >= _FEW:
        middle = (began + last) / 2
        began = max((one.at for one in came if one.at <= middle), default=began)
    return sum(one.length for one in came if one.at > began) / (last - began)
