"""How the helper comes to be one: in the background, with its end of the socketpair, knowing whom it serves."""

import os
import signal
import socket
import struct
from dataclasses import dataclass

_PEER = struct.Struct("=iII")


@dataclass(frozen=True, slots=True)
class User:
    """Whom the session belongs to."""

    pid: int
    uid: int
    gid: int


def detach() -> None:
    """Go on in the background: whoever started us gets its child back at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGABRT):  # the last: a watchdog of systemd
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o022)


def take_connection() -> socket.socket:
    """The socketpair's end that is our standard input; descriptor 0 becomes /dev/null."""
    connection = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return connection


def user(connection: socket.socket) -> User:
    """Who made the socketpair; when that was root by sudo, whom sudo names."""
    pid, uid, gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid == 0 and "SUDO_UID" in os.environ:
        uid, gid = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
    return User(pid, uid, gid)
