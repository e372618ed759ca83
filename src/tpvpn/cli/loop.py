"""The event loop of a command: one whose lookups of host names keep nobody from leaving.

getaddrinfo(3) cannot be cancelled, and goes on for half a minute when the servers are silent, as when a VPN is not up.
The threads of an executor are waited for at the end, whoever has pressed Ctrl-C; a daemon thread is left behind.
"""

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Lookups:
    """The part of an event loop that looks host names up."""

    async def getaddrinfo(self, *words: Any, **options: Any) -> list[Any]:
        """As socket.getaddrinfo."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Any]] = loop.create_future()

        def settle(give: Callable[[Any], None], what: Any) -> None:
            if not found.done():
                give(what)

        def look() -> None:
            try:
                give, what = found.set_result, socket.getaddrinfo(*words, **options)
            except (OSError, UnicodeError) as error:
                give, what = found.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, give, what)

        try:
            threading.Thread(target=look, daemon=True).start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        return await found


class _Loop(Lookups, asyncio.SelectorEventLoop):
    """The standard library's."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns; KeyboardInterrupt when it was ended by Ctrl-C."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """The same on uvloop, which takes a moment to load and carries packets sooner."""
    import uvloop

    class Fast(Lookups, uvloop.Loop):
        """uvloop's."""

    with asyncio.Runner(loop_factory=Fast) as runner:
        return runner.run(main)
