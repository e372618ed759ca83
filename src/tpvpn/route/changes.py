"""Word of every change of the kernel's routing, once a burst.

Changes are only announced, never decoded: whoever listens reads the view again, so what a queue that overflowed has
lost is told by what is in it. No privilege is needed, and nothing is changed.
"""

import asyncio
import contextlib
import socket

QUIET = 0.2
"""Seconds without an event after which a burst of changes is over."""
LONGEST_BURST = 0.5
"""Seconds after which changes are told although they go on."""

_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NETLINK_NO_ENOBUFS = 270, 1, 5
_GROUPS = (1, 5, 7, 8, 9, 11, 19, 32)
"""RTNLGRP_ LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, NEXTHOP."""
_DRAINED_AT_ONCE = 256


class Changes:
    """An iterator that wakes whenever rules, routes, links or addresses of this network namespace have changed.

    Once a burst: after 200 ms of quiet, or 500 ms after it began. Subscribed from its making on, so make it before the
    view is read; what changes while the consumer works is told next. Needs a running event loop; `close()` it, or use
    `with`. `events`: a socket of another network namespace, of which this then tells.
    """

    def __init__(self, events: socket.socket | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._others: list[socket.socket] = []
        self._events = events or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._events.setblocking(False)
        self._events.bind((0, 0))
        for group in _GROUPS:
            self._events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        self._listen(self._events)

    def close(self) -> None:
        """End the subscription."""
        for events in (self._events, *self._others):
            self._loop.remove_reader(events)
            events.close()

    def add(self, events: socket.socket) -> None:
        """Hear of what another netlink socket tells too, which is then ours to close."""
        events.setblocking(False)
        self._others.append(events)
        self._listen(events)

    def _listen(self, events: socket.socket) -> None:
        # An error of a socket ends its watching for good (uv__poll_io in libuv's src/unix/poll.c).
        events.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        self._loop.add_reader(events, self._drain, events)

    def tell(self) -> None:
        """Wake up for a change that is not the kernel's."""
        self._changed.set()

    def __enter__(self) -> "Changes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> "Changes":
        return self

    async def __anext__(self) -> None:
        await self._changed.wait()
        end = self._loop.time() + LONGEST_BURST
        while self._changed.is_set():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(QUIET, max(0, end - self._loop.time()))):
                    await self._changed.wait()
            if self._loop.time() >= end:
                self._changed.clear()

    def _drain(self, events: socket.socket) -> None:
        """Throw away what is queued: that something came is all that counts."""
        self._changed.set()
        for _ in range(_DRAINED_AT_ONCE):
            try:
                events.recv(1)
            except OSError:  # it is empty
                return
