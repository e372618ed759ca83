"""The resolvers of the manager's own pod, as its /etc/resolv.conf names them.

`search` and `ndots` are not read: the client decides which name is asked.
"""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path("/etc/resolv.conf")
MOST = 3
"""More are not asked (MAXNS in resolv.conf(5))."""
FRESH = 1.0
"""Seconds until the file is looked at again."""
_PORT = 53


class Nameserver(NamedTuple):
    """Where one is to be asked."""

    family: int
    address: Any
    """As connect() takes it, with the zone of a link-local one."""


class Nameservers:
    """Those of the file as it is now; when it cannot be read, those of before."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._servers: tuple[Nameserver, ...] = ()
        self._looked, self._seen = float("-inf"), (0, 0, 0)

    def at(self, now: float) -> tuple[Nameserver, ...]:
        """In the order in which they are to be asked."""
        if now >= self._looked + FRESH:
            self._looked = now
            with contextlib.suppress(OSError):
                status = self._file.stat()
                seen = status.st_mtime_ns, status.st_ino, status.st_size
                if seen != self._seen:
                    self._servers = tuple(dict.fromkeys(_named(self._file.read_text(errors="replace"))))[:MOST]
                    self._seen = seen
        return self._servers


def _named(text: str) -> Iterator[Nameserver]:
    for words in map(str.split, text.splitlines()):
        if len(words) > 1 and words[0] == "nameserver":
            with contextlib.suppress(OSError, ValueError):  # ValueError: it has bytes that no address has
                found = socket.getaddrinfo(words[1], _PORT, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
                family, _, _, _, address = found[0]
                yield Nameserver(family, address)
