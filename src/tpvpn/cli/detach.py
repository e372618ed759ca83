"""`connect --detach`: the session is a process of its own, which leaves the terminal when it is ready.

The process that was called forks before anything else. The one that is to stay has the terminal until it is ready, so
sudo can ask for a password there and every line is printed as ever; the other one waits for it, and ends with its exit
code, or with 0 when it is ready. A socketpair joins them: when whoever waits is gone, a session that is not ready ends.
The helper, which nobody can take the terminal from, has a pipe instead, and whoever waits prints what comes of it.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Waiting:
    """Whoever waits at the terminal, as the session sees it."""

    def __init__(self, connection: socket.socket, stderr: int) -> None:
        self._connection, self.stderr = connection, stderr

    def watch(self, left: Callable[[], None]) -> None:
        """Call `left` when nobody waits any more, and the session is not ready."""
        loop = asyncio.get_running_loop()

        def on_readable() -> None:
            loop.remove_reader(self._connection)
            left()

        loop.add_reader(self._connection, on_readable)

    def leave(self) -> None:
        """The session is ready: leave the terminal, whose end is not ours from now on, and tell whoever waits."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._connection)
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        os.close(nowhere)
        os.close(self.stderr)
        with self._connection:
            self._connection.send(b"ready")


def fork(ready_fd: int | None) -> Waiting | int:
    """Become two processes: the session's has what this gives; in the other one it lasts, and gives the exit code."""
    ours, theirs = socket.socketpair()
    said, stderr = os.pipe()
    session = os.fork()
    if session == 0:
        ours.close()
        os.close(said)
        theirs.setblocking(False)
        return Waiting(theirs, stderr)
    theirs.close()
    os.close(stderr)
    if ready_fd is not None:
        with contextlib.suppress(OSError):
            os.close(ready_fd)
    with ours:
        return _wait(ours, said, session)


def _wait(connection: socket.socket, said: int, session: int) -> int:
    """0 when the session is ready, else its exit code; a signal ends it, and is waited for."""

    def stop(_: int, __: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # it has just become ready
            connection.shutdown(socket.SHUT_WR)

    for number in _SIGNALS:
        signal.signal(number, stop)
    from_helper = [said]
    while connection not in select.select([connection, *from_helper], [], [])[0]:
        if not _print(said):
            from_helper.clear()
    if connection.recv(16):
        return 0
    _, status = os.waitpid(session, 0)
    while from_helper and select.select(from_helper, [], [], 0)[0] and _print(said):
        pass
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _print(said: int) -> bool:
    """Print what has come; False at the end."""
    text = os.read(said, 4096)
    with contextlib.suppress(OSError):
        os.write(2, text)
    return bool(text)
