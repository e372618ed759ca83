"""A non-blocking byte stream over a socket, with one way to say "not now", which streams inside it have too.

It knows nothing of what the bytes mean. `recv_into` and `send` raise one of WOULD_BLOCK when the stream has nothing or
takes nothing; `readable()` and `writable()` wait for that to change. Once a stream is given to a `Link`, the link alone
reads and writes it.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
NO_CERTIFICATE = bytes(32)
"""Stands for the certificate's hash on a stream without TLS (docs/reference/wire.md)."""


class Dialler(Protocol):
    """Comes by a stream to a manager."""

    async def resolve(self) -> list[str]:
        """The addresses to dial. Errors: ManagerError, ClusterError."""
        ...

    async def dial(self, addresses: list[str]) -> "tuple[Stream, bytes]":
        """A stream on which frames may begin, and the bytes that came early. Errors: ManagerError, ClusterError."""
        ...

    @property
    def token(self) -> bytes:
        """What proves to the manager who we are; known once it has dialled."""
        ...


class Stream:
    """A connected TCP socket."""

    certificate_hash: bytes = NO_CERTIFICATE

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.fd = connected.fileno()
        self.recv_into = connected.recv_into
        self.send = connected.send

    def pending(self) -> int:
        """Bytes that are here already but not announced by the descriptor."""
        return 0

    async def readable(self) -> None:
        """Return when there may be something to receive."""
        loop = asyncio.get_running_loop()
        await self._announced(loop.add_reader, loop.remove_reader)

    async def writable(self) -> None:
        """Return when the stream may take something."""
        loop = asyncio.get_running_loop()
        await self._announced(loop.add_writer, loop.remove_writer)

    async def _announced(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        ready = asyncio.get_running_loop().create_future()
        add(self.fd, _settle, ready)
        try:
            await ready
        finally:
            remove(self.fd)

    async def receive(self, limit: int) -> bytes:
        """At least one byte and at most `limit`; b"" at the end of the stream."""
        buffer = bytearray(limit)
        while True:
            try:
                return bytes(buffer[: self.recv_into(buffer)])
            except ssl.SSLWantWriteError:
                await self.writable()
            except WOULD_BLOCK:
                await self.readable()

    async def send_all(self, data: bytes) -> None:
        """Send all of `data`; for small messages before a link has the stream."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.send(view) :]
            except ssl.SSLWantReadError:
                await self.readable()
            except WOULD_BLOCK:
                await self.writable()

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _settle(ready: asyncio.Future[None]) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):
        ready.set_result(None)
