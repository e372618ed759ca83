"""Connections watched for the error that ends them, also while nobody reads or writes them.

An event loop tells of a reset by waking whoever reads or writes. After an end of file, or while the laptop takes
nothing, nobody does; and libuv wakes a reader once and no more (uv__poll_io in src/unix/poll.c), though data may lie
before the error. epoll tells of errors where no event was asked for too (epoll_ctl(2)).
"""

import asyncio
import select
from collections.abc import Callable


class Watch:
    """For one session's connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._failed: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._on_events)

    def add(self, descriptor: int, failed: Callable[[], None]) -> None:
        """Call `failed()` once when this socket has an error, or both directions have ended."""
        self._epoll.register(descriptor, 0)
        self._failed[descriptor] = failed

    def remove(self, descriptor: int) -> None:
        """Before it is closed; harmless for one that is not watched."""
        if self._failed.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Watch nothing more; harmless for one that is closed."""
        if self._epoll.closed:
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _on_events(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            failed = self._failed.get(descriptor)
            if failed:  # none was closed by another's failing
                self.remove(descriptor)
                failed()
