"""DNS over TCP (RFC 7766): each message behind its length, several questions on one connection, answers as they come.

It knows nothing of what messages say. What a client may make us keep is bounded: connections, questions on the way,
answers that it does not take, idle time.
"""

import asyncio
import socket
from collections.abc import Callable

IDLE = 10.0
"""Seconds without a whole question or an answer."""
CONNECTIONS = 100
"""At a time; the one that is idle for longest goes."""
QUESTIONS = 32
"""On the way at a time, of one connection; it is not read meanwhile."""
UNREAD, UNSENT = 1 << 16, 1 << 19
"""Bytes of answers that a client has not taken: when no more questions are read, and when the connection ends."""
PAUSE = 1.0
"""Seconds until we accept again when there was no descriptor for a connection."""

Respond = Callable[[bytes], None]
Take = Callable[[bytes, Respond], None]


class TcpServer:
    """Hands the questions of all connections to listeners to `take`, with a function that sends the answer."""

    def __init__(self, listeners: list[socket.socket], take: Take) -> None:
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._connections: dict[_Connection, None] = {}  # in their order: uvloop's clock counts milliseconds
        self._listeners = listeners
        for one in listeners:
            self._listen(one)

    def close(self) -> None:
        """End all connections, and stop listening."""
        for one in self._listeners:
            self._loop.remove_reader(one)
            one.close()
        self._listeners = []
        for connection in list(self._connections):
            connection.close()

    def _listen(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._loop.remove_reader(listener)
            self._loop.call_later(PAUSE, self._listen, listener)
            return
        accepted.setblocking(False)
        if len(self._connections) >= CONNECTIONS:
            idle = [one for one in self._connections if not one.waiting]
            if not idle:
                accepted.close()
                return
            min(idle, key=lambda one: one.last).close()
        self._connections[_Connection(accepted, self._take, self._over)] = None

    def _over(self, connection: "_Connection") -> None:
        self._connections.pop(connection, None)


class _Connection:
    """One connection; `waiting` counts its questions that have no answer yet."""

    def __init__(self, connected: socket.socket, take: Take, over: "Callable[[_Connection], None]") -> None:
        self.waiting = 0
        self._socket = connected
        self._take, self._over = take, over
        self._loop = asyncio.get_running_loop()
        self.last = self._loop.time()
        self._received, self._unsent = bytearray(), bytearray()
        self._reading = self._ended = self._closed = False
        self._timer = self._loop.call_later(IDLE, self._idle)
        self._read()

    def close(self) -> None:
        """End it, whatever waits."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._over(self)

    def _idle(self) -> None:
        now = self._loop.time()
        due = self.last + IDLE if not self.waiting else now + IDLE  # an answer, or none, comes sooner
        if now >= due:
            self.close()
        else:
            self._timer = self._loop.call_at(due, self._idle)

    def _read(self) -> None:
        """Begin or cease to read, as there is room for questions."""
        wanted = not self._closed and not self._ended and len(self._unsent) <= UNREAD and self.waiting < QUESTIONS
        if wanted == self._reading or self._closed:
            return
        self._reading = wanted
        if wanted:
            self._loop.add_reader(self._socket, self._on_readable)
        else:
            self._loop.remove_reader(self._socket)

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._received += data
        self._ended = not data
        self._questions()

    def _questions(self) -> None:
        """Take as many whole questions as there is room for."""
        received = self._received
        while self.waiting < QUESTIONS and not self._closed and len(received) >= 2:
            end = 2 + int.from_bytes(received[:2])
            if len(received) < end:
                break
            message = bytes(received[2:end])
            del received[:end]
            self.last = self._loop.time()
            self.waiting += 1
            self._take(message, self._respond)
        self._read()
        self._finish()

    def _finish(self) -> None:
        """A client that sends no more goes when it has its answers."""
        if self._ended and not self.waiting and not self._unsent:
            self.close()

    def _respond(self, answer: bytes) -> None:
        """Send an answer; an empty one is none."""
        self.waiting -= 1
        if self._closed:
            return
        self.last = self._loop.time()
        if answer:
            idle = not self._unsent
            self._unsent += len(answer).to_bytes(2) + answer
            if idle:
                self._loop.add_writer(self._socket, self._flush)
        if len(self._unsent) > UNSENT:
            self.close()
        elif self.waiting == QUESTIONS - 1 or not answer:
            self._loop.call_soon(self._questions)

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)
        self._read()
        self._finish()
