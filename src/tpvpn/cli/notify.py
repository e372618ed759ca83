"""What a service manager hears of a session: that it is ready, that it lives, that it ends (sd_notify(3)).

That it lives is told from the session's own event loop. One that hangs tells nothing, and is ended.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator


@contextlib.asynccontextmanager
async def serving() -> AsyncGenerator[None]:
    """Say that the session is ready, then as often as asked for that it lives, and in the end that it is ending."""
    _tell("READY=1")
    living = asyncio.create_task(_live(seconds)) if (seconds := _watchdog()) else None
    try:
        yield
    finally:
        if living:
            living.cancel()
        _tell("STOPPING=1")


async def _live(seconds: float) -> None:
    while True:
        _tell("WATCHDOG=1")
        await asyncio.sleep(seconds / 2)


def _watchdog() -> float | None:
    """The seconds within which it is to be heard that this process lives, if at all (sd_watchdog_enabled(3))."""
    given, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(given) / 1e6 if given.isdecimal() and int(given) and pid == str(os.getpid()) else None


def _tell(state: str) -> None:
    if service := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), "\0" + service[1:] if service.startswith("@") else service)
