"""A link: one byte stream to the other end, carrying frames both ways, with back-pressure.

It owns the stream's descriptor, the receive buffer and the bytes that the stream has not taken yet. It knows nothing
of packets: whoever carries them gives it a `receive` function for runs of frames and whole batches to send (`pump`).

How it works. Readable: one recv into a large buffer, then `receive(buffer, start, end)` consumes the whole frames and
says where it stopped; the rest of a frame moves to the front. One that takes long `leave`s whole frames for later, and
nothing is received meanwhile. Sending: what the stream does not take is kept as a view
and sent as soon as it can be; meanwhile `congested` is true, `on_drained` is called when it is over. Control frames
queue behind it, between frames.
"""

import asyncio
import mmap
import os
import socket
import ssl
from collections.abc import Callable

from tpvpn.errors import LinkLostError, TpvpnError
from tpvpn.transport.stream import WOULD_BLOCK, Stream
from tpvpn.wire import frame

RECEIVE_SIZE = 1 << 19
"""Bytes taken from the stream at once: eight super-packets; twice as much gained nothing (docs/decisions.md)."""
_PEEK = 64  # a frame header is read together with the packet behind it, which may not be there yet
_BUFFER_SIZE = frame.MAX_PAYLOAD + frame.HEADER_LENGTH + RECEIVE_SIZE + _PEEK
_MAX_QUEUED = 4 * frame.MAX_PAYLOAD

Memory = bytearray | mmap.mmap | memoryview
Receive = Callable[[Memory, int, int], int]


class Link:
    """Frames over a stream, whose owner sets `receive` before the loop turns; `early` is what came before."""

    def __init__(self, stream: Stream, on_lost: Callable[[TpvpnError], None], early: bytes = b"") -> None:
        self.stream = stream
        self.receive: Receive = nobody
        self.on_lost = on_lost
        self.on_drained: Callable[[], None] = _nothing
        self.congested = False
        self.received = self.batches = 0
        """Bytes that came, and batches that were sent: who wants to know whether the other end lives compares them."""
        self._loop = asyncio.get_running_loop()
        self._buffer = mmap.mmap(-1, _BUFFER_SIZE)  # memory that is not used yet costs none
        self._view = memoryview(self._buffer)
        self._view[: len(early)] = early
        self._have = len(early)
        self._unsent: memoryview | None = None
        self._queued = bytearray()
        self._closed = self._behind = False
        self._loop.add_reader(stream.fd, self._on_readable)
        if early or stream.pending():
            self._loop.call_soon(self._on_early)

    def send(self, kind: int, payload: bytes) -> None:
        """Queue one frame that is not a packet; it leaves as soon as the stream takes it. A link that is lost has none.

        (What has come may still be handled then, and want an answer.)
        """
        if self._closed:
            return
        self._queued += frame.encode(kind, payload)
        if len(self._queued) > _MAX_QUEUED:
            self._lose(LinkLostError("the other end takes no more data"))
        elif not self.congested:
            self._flush()

    def send_batch(self, batch: memoryview) -> None:
        """Send whole frames at once. The memory stays the caller's again when `congested` is false."""
        self.batches += 1
        if self.congested:  # by a control frame, of which the pump was not told: it waits behind that
            self._queued += batch
            return
        try:
            rest = self._push(batch)
        except OSError as error:
            self._lose(_lost(error))
            return
        if rest or self._queued:
            self._wait(rest)

    @property
    def queued(self) -> int:
        """Bytes that wait behind what the stream is taking; the link is lost when they are too many."""
        return len(self._queued)

    def leave(self) -> None:
        """For `receive`: it leaves whole frames for the next turn of the loop, in which others have theirs."""
        self._behind = True
        self._loop.call_soon(self._on_early)

    def keep(self) -> None:
        """Have what waits in memory of its own: the caller's is wanted elsewhere."""
        if self._unsent:
            self._unsent = memoryview(bytes(self._unsent))

    def check(self) -> None:
        """Take note of an error that came together with the last bytes: of that a loop tells once (uvloop's UVPoll)."""
        number = 0 if self._closed else self.stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._lose(_lost(OSError(number, os.strerror(number))))

    def fail(self, error: TpvpnError) -> None:
        """The link is lost, for a reason that the stream does not know."""
        self._lose(error)

    def close(self) -> None:
        """Close the stream at once, without a word to anyone."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self.stream.fd)
        self._loop.remove_writer(self.stream.fd)
        self.stream.close()

    def _push(self, data: memoryview) -> memoryview | None:
        """Send as much as the stream takes; the rest, or None."""
        send = self.stream.send
        while data:
            try:
                sent = send(data)
            except WOULD_BLOCK:
                return data
            if sent == len(data):
                return None
            data = data[sent:]
        return None

    def _wait(self, rest: memoryview | None) -> None:
        self._unsent = rest
        if not self.congested:
            self.congested = True
            self._loop.add_writer(self.stream.fd, self._flush)

    def _flush(self) -> None:
        """Send what waits: first the rest of what was begun, then the queue; then tell the pump that it may go on."""
        try:
            rest = self._push(self._unsent) if self._unsent else None
            if rest is None and self._queued:
                queued, self._queued = self._queued, bytearray()
                rest = self._push(memoryview(queued))
        except OSError as error:
            self._lose(_lost(error))
            return
        if rest is not None:
            self._wait(rest)
            return
        self._unsent = None
        if self.congested:
            self.congested = False
            self._loop.remove_writer(self.stream.fd)
            self.on_drained()

    def _on_early(self) -> None:
        """Frames that came with the last bytes of the upgrade or of the handshake, or were left."""
        self._behind = False
        if not self._closed and self._consume(self._have) and self.stream.pending():
            self._on_readable()

    def _on_readable(self) -> None:
        if self._behind:
            return
        try:
            count = self.stream.recv_into(self._view[self._have : self._have + RECEIVE_SIZE])
        except WOULD_BLOCK:
            return
        except OSError as error:
            self._lose(_lost(error))
            return
        if count == 0:
            self._lose(LinkLostError("the connection was closed by the other end"))
            return
        self.received += count
        # TLS decrypts a record at a time: what it holds already is not announced by the descriptor.
        if self._consume(self._have + count) and self.stream.pending():
            self._loop.call_soon(self._on_pending)

    def _on_pending(self) -> None:
        if not self._closed:
            self._on_readable()

    def _consume(self, end: int) -> bool:
        """Hand buffer[:end] to `receive`, keep what is left of a frame; False when the link has ended."""
        try:
            start = self.receive(self._buffer, 0, end)
        except TpvpnError as error:
            self._lose(error)
            return False
        if self._closed:
            return False
        self._have = end - start
        if start and self._have:
            self._view[: self._have] = self._view[start:end]
        return True

    def _lose(self, error: TpvpnError) -> None:
        if not self._closed:
            self.close()
            self.on_lost(error)


def _nothing() -> None:
    pass


def nobody(buffer: Memory, start: int, end: int) -> int:
    """The `receive` of whoever has no owner yet."""
    raise TypeError("a link began to receive before its owner")


def _lost(error: OSError) -> LinkLostError:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return LinkLostError(f"the connection to the other end broke: {reason or error}")
