"""What a service tells systemd of itself (sd_notify(3)): that it is ready, and that its event loop turns."""

import asyncio
import contextlib
import os
import socket

READY, ALIVE = b"READY=1", b"WATCHDOG=1"


def tell(what: bytes) -> None:
    """Tell systemd, if it started this process and listens."""
    if service := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(what, "\0" + service[1:] if service.startswith("@") else service)


def keep_telling() -> None:
    """Say that the loop turns twice as often as the unit's WatchdogSec wants it, as long as it does."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    loop, seconds = asyncio.get_running_loop(), int(microseconds) / 2e6

    def again() -> None:
        tell(ALIVE)
        loop.call_later(seconds, again)

    if seconds > 0:
        again()
